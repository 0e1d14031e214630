"""Kills durable training with weights and states on disk by SIGKILL, goes on, and compares with a run left alone.

python benchmarks/kill_offload.py --tries 10     (status 0 when every try passes)

A try kills up to four times, at random moments. It passes when every byte of the final weights and states, and every
loss, are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from fastmoe.config import ModelConfig
from fastmoe.nn import Transformer
from fastmoe.offload import Engine
from fastmoe.optim import AdamW

STEPS = 6
CONFIG = ModelConfig(
    vocab_size=64, d_model=64, num_layers=4, num_heads=2, num_experts=4, d_ff=64, router="deepseek-v3", top_k=2
)


def work(folder: Path) -> None:
    """The child: trains to the end and prints a line a step, and the digest of what came out."""
    torch.set_num_threads(1)
    torch.manual_seed(0)

    def make_model() -> Transformer:
        model = Transformer(CONFIG).to(torch.bfloat16)
        model.checkpointed = True
        return model

    def make_optimizer(model: Transformer) -> AdamW:
        return AdamW(model.parameters(), lr=1e-2, master="residual8", seed=1)

    budgets = {"host": 8 << 20, "disk": 1 << 30}
    options = {"clip_norm": 0.5, "durable": True, "resume": (folder / "commit").exists()}
    engine = Engine(make_model, make_optimizer, budgets, folder, units=lambda model: model.layers[1:], **options)
    print("ready", flush=True)
    losses = engine.state or []
    for step in range(engine.steps, STEPS):
        ids_BS = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(step))
        out = engine.model(ids_BS[:, :-1], ids_BS[:, 1:])
        engine.backward(out.loss + out.aux_loss)
        for layer, load_E in zip(engine.model.layers, out.load_LE):
            layer.feed_forward.router.update(load_E)  # before the step: it changes buffers
        losses = [*losses, out.loss.item()]
        engine.step(losses)
        print(f"step {step + 1}", flush=True)
    digest = hashlib.sha256()
    for part in engine.walk():
        for weight, state in part.values():
            for tensor in (weight, *(value for value in state.values() if isinstance(value, torch.Tensor))):
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    biases = [buffer.tolist() for buffer in engine.model.buffers()]
    print(json.dumps([digest.hexdigest(), losses, biases]), flush=True)


def start(folder: Path) -> subprocess.Popen:
    words = [sys.executable, __file__, "--work", str(folder)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(folder: Path) -> str:
    process = start(folder)
    output, error = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run ended with status {process.returncode}: {error}")
    return output.splitlines()[-1]


def kill(folder: Path, draw: random.Random) -> str:
    """Kills a run a little after it is ready or printed some step; returns its last line."""
    process, last, lines = start(folder), "nothing", draw.randint(0, STEPS // 2)
    for line in process.stdout:
        last = line.strip()
        lines -= last.startswith(("ready", "step"))
        if lines < 0:
            break
    time.sleep(draw.uniform(0, 0.1))
    process.kill()
    process.communicate()
    return last


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args.work)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        wanted, passed, draw = finish(Path(temporary) / "whole"), 0, random.Random(args.seed)
        for n in range(args.tries):
            folder = Path(temporary) / f"try-{n}"
            killed = [kill(folder, draw)[:7] for _ in range(draw.randint(1, 4))]
            same = finish(folder) == wanted
            passed += same
            print(f"try {n + 1}: killed after {killed}: {'PASS' if same else 'FAIL'}", flush=True)
    print(f"{'PASS' if passed == args.tries else 'FAIL'}: {passed} of {args.tries}")
    return 0 if passed == args.tries else 1


if __name__ == "__main__":
    sys.exit(main())
