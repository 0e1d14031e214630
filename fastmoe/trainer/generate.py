"""Text from a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from fastmoe import config as configs
from fastmoe.nn import MoE, RouterInputs, Transformer
from fastmoe.trainer import checkpoint
from fastmoe.trainer.data import Tokenizer, load_tokenizer


@torch.no_grad()
def generate(
    model: Transformer,
    ids: list[int],
    num_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    cached: bool = True,
    domain: int = 0,
) -> list[int]:
    """The prompt ids and num_tokens more, drawn from softmax(logits / temperature); the likeliest at temperature 0.

    cached=False computes every position anew for each token: the same result, slowly. domain: of the text, for router
    "domain". Experts take every token, whatever the capacity in training. ValueError for an empty prompt, or ids and
    tokens that do not fit the model.
    """
    config = model.config
    if not ids:
        raise ValueError("fastmoe.generate: the prompt must have at least one token, got none")
    if num_tokens < 0 or temperature < 0:
        raise ValueError(
            f"fastmoe.generate: --tokens and --temperature must be at least 0, got {num_tokens} and {temperature}"
        )
    if len(ids) + num_tokens > config.max_seq_len:
        raise ValueError(
            f"fastmoe.generate: prompt and --tokens must fit in {config.max_seq_len} positions (model.max_seq_len), "
            f"got {len(ids)} + {num_tokens}"
        )
    if max(ids) >= config.vocab_size:
        raise ValueError(
            f"fastmoe.generate: prompt ids must be below {config.vocab_size} (model.vocab_size), got {max(ids)}"
        )
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    cache = model.new_cache(1, len(ids) + num_tokens) if cached else None
    ids, fresh = [int(i) for i in ids], [int(i) for i in ids]
    with _dropless(model):
        for _ in range(num_tokens):
            tokens_BS = torch.tensor([fresh if cached else ids], device=device)
            inputs = RouterInputs(domains_T=torch.full_like(tokens_BS[0], domain))
            logits_V = model(tokens_BS, cache=cache, inputs=inputs).logits_BSV[0, -1].float().cpu()
            if temperature:
                drawn = torch.multinomial(torch.softmax(logits_V / temperature, 0), 1, generator=random)
            else:
                drawn = logits_V.argmax()
            fresh = [int(drawn)]
            ids += fresh
    return ids


def printable(text: str) -> str:
    """Text that is safe to show: control characters, which byte models write freely, become U+FFFD."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


@contextmanager
def _dropless(model: Transformer) -> Iterator[None]:
    layers = [(module, module.capacity_factors) for module in model.modules() if isinstance(module, MoE)]
    training = model.training
    model.eval()
    for module, _ in layers:
        module.capacity_factors = (None, None)
    try:
        yield
    finally:
        model.train(training)
        for module, factors in layers:
            module.capacity_factors = factors


def load_run(run_dir: str | Path) -> tuple[Transformer, Tokenizer]:
    """Model (on the GPU where there is one) and tokenizer of a run's newest intact checkpoint. ValueError where there
    is none.
    """
    run_dir = Path(run_dir)
    path = checkpoint.newest_intact(run_dir / "checkpoints")
    if path is None:
        raise ValueError(
            f"fastmoe.generate: --run.dir must be the folder of a run with a checkpoint, got {str(run_dir)!r}"
        )
    state = checkpoint.read_state(path)
    config = replace(configs.from_dict(state["config"]).model, capacity_factor=0.0, eval_capacity_factor=None)
    model = Transformer(config).to("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint.load_model(path, model)
    return model, load_tokenizer(state["tokenizer"], run_dir)
