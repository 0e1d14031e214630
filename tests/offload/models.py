"""A small model, its optimizer and batches; the same for the same arguments."""

from __future__ import annotations

from pathlib import Path

import torch

from fastmoe.config import ModelConfig
from fastmoe.nn import Transformer
from fastmoe.offload import Engine
from fastmoe.offload.units import split
from fastmoe.optim import AdamW

CONFIG = ModelConfig(
    vocab_size=64, d_model=32, num_layers=6, num_heads=2, num_experts=4, top_k=2, d_ff=16, max_seq_len=32
)
LARGE = 1 << 40


def make_model(dtype: torch.dtype = torch.float32, checkpointed: bool = True, config=CONFIG) -> Transformer:
    model = Transformer(config).to(dtype)
    model.checkpointed = checkpointed
    return model


def make_optimizer(model: torch.nn.Module, **options) -> AdamW:
    matrices = [param for param in model.parameters() if param.ndim > 1]
    vectors = [param for param in model.parameters() if param.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW(groups, lr=1e-2, **options)


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(step))
    out = model(ids[:, :-1], ids[:, 1:])
    return out.loss + out.aux_loss


def make_engine(directory: Path, budgets: dict | None = None, *, model=make_model, optimizer=make_optimizer, **options):
    """All layers on disk unless budgets are given. units: of the model, as everywhere."""
    given = budgets or {"host": host_bytes(0, keeps=True), "disk": LARGE}
    torch.manual_seed(0)
    return Engine(model, optimizer, given, directory, **options)


def host_bytes(
    layers: int, keeps: bool = False, slots: bool = True, model=make_model, optimizer=make_optimizer, durable=False
) -> int:
    """The host budget for the rest of the model and `layers` layers. keeps: with their gradients. slots: for others."""
    model = model()
    rest, layer, *_ = split(model, lambda model: model.layers, optimizer(model))
    regions = ["weights", "states", "grads"] if keeps else ["weights", "states"]
    size = lambda unit: unit.header + sum(unit.size[region] for region in regions)
    passing = 6 * layer.size["weights"] + 2 * layer.size["states"] if slots else durable * 2 * layer.size["grads"]
    return size(rest) + layers * size(layer) + passing


def train(engine: Engine, steps: range, state: object = None) -> tuple[list[float], list]:
    losses, ended = [], []
    for step in steps:
        for micro in range(engine.accumulation):
            loss = loss_of(engine.model, step * engine.accumulation + micro) / engine.accumulation
            losses.append(loss.item())
            engine.backward(loss)
        ended.append(engine.step(state))
    return losses, ended


def train_plain(
    model, optimizer, steps: range, scales: list[float] | None = None, accumulation: int = 1
) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        for micro in range(accumulation):
            loss = loss_of(model, step * accumulation + micro) / accumulation
            losses.append(loss.item())
            loss.backward()
        optimizer.step(grad_scale=scales[step] if scales else 1.0)
    return losses


def contents(engine: Engine) -> dict[str, torch.Tensor]:
    """Copies of all weights and states by name."""
    found = {}
    for part in engine.walk():
        for name, (weight, state) in part.items():
            found |= {name: weight.clone()} | {f"{name}:{k}": torch.as_tensor(v).clone() for k, v in state.items()}
    return found


def contents_plain(model, optimizer) -> dict[str, torch.Tensor]:
    found = {}
    for name, param in model.named_parameters():
        state = {f"{name}:{key}": torch.as_tensor(value).clone() for key, value in optimizer.state[param].items()}
        found |= {name: param.detach().clone()} | state
    return found


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different[:5]
