"""The offload engine with tiers that are a GPU's memory, pinned memory and files."""

from __future__ import annotations

import pytest
import torch

from fastmoe.offload import Engine
from tests.offload.models import LARGE, assert_equal, contents, host_bytes, make_model, make_optimizer


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    ids = torch.randint(0, 64, (2, 17), generator=torch.Generator().manual_seed(step)).cuda()
    out = model(ids[:, :-1], ids[:, 1:])
    return out.loss + out.aux_loss


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.3}, {"durable": True}, {"accumulation": 2}])
def test_steps_equal_those_with_all_on_the_device(tmp_path, options):
    layer = host_bytes(1, True) - host_bytes(0, True)
    budgets = [
        {"device": LARGE, "disk": LARGE},
        {"device": host_bytes(1, True), "host": round(1.7 * layer), "disk": LARGE},
    ]
    losses, ends = [], []
    for i, given in enumerate(budgets):
        torch.manual_seed(0)
        engine = Engine(make_model, make_optimizer, given, tmp_path / str(i), device="cuda", **options)
        for step in range(3):
            for micro in range(engine.accumulation):
                loss = loss_of(engine.model, step * engine.accumulation + micro) / engine.accumulation
                losses.append(loss.item())
                engine.backward(loss)
            engine.step()
        ends.append(contents(engine))
        engine.close()
    assert set(engine.plan.tier.values()) == {"device", "host", "disk"}
    assert losses[: len(losses) // 2] == losses[len(losses) // 2 :]
    assert_equal(*ends)
