"""Trains a small Mixture-of-Experts model on the Python library's own text, and lets it write.

python examples/train_tiny.py     (about a minute on two CPU cores; `fastmoe train tiny` is the same with all 300 steps)
"""

from __future__ import annotations

from dataclasses import replace

from fastmoe.config import RunConfig
from fastmoe.trainer.generate import generate, load_run, printable
from fastmoe.trainer.recipes import recipe
from fastmoe.trainer.train import train

config = recipe("tiny")
config = replace(
    config,
    train=replace(config.train, steps=100, batch_size=8),
    optim=replace(config.optim, lr=2e-3),
    run=RunConfig("runs/example", resume=True),
)
result = train(config)
print(f"held-out {result.heldout:.3f} bits/byte, the order-2 model {result.order2:.3f}; report in {result.report}")

model, tokenizer = load_run(config.run.dir)
ids = generate(model, tokenizer.encode("import ").tolist(), num_tokens=100, temperature=0.5)
print(printable(tokenizer.decode(ids)))
