"""Runs whose weights and states are mostly on disk, against the same runs in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fastmoe import cli
from fastmoe.nn import Transformer
from fastmoe.trainer.train import train

BUDGETS = {"host": "1200KiB", "disk": "1GiB"}
STEPS = 4


@pytest.fixture
def deep(tiny):
    def make(dir: str, memory: dict | None = None, **groups):
        settings = {
            "model": {"num_layers": 6, "max_seq_len": 32},
            "train": {"steps": STEPS, "activation_checkpointing": True},
            "optim": {"clip_norm": 0.0, "min_lr_ratio": 1.0},
            "eval": {"every": 0},
        }
        merged = {name: {**settings.get(name, {}), **groups.get(name, {})} for name in {*settings, *groups}}
        return tiny(dir, memory=memory or {}, **merged)

    return make


def records(config) -> list[dict]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("perf", "grad_norm", "heldout")} for line in lines]


def tensors(config, step: int) -> dict:
    folder = Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"
    found = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return found | {"scalars": json.loads((folder / "state.json").read_text())["optimizer"]}


def assert_same(a, b) -> None:
    assert records(a) == records(b)
    one, other = tensors(a, STEPS), tensors(b, STEPS)
    assert one.pop("scalars") == other.pop("scalars") and one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_a_run_on_disk_equals_one_in_memory(deep, capsys):
    inside, outside = deep("inside"), deep("outside", BUDGETS)
    heldout = train(inside).heldout
    capsys.readouterr()
    assert train(outside).heldout == heldout
    out = capsys.readouterr().out
    assert "      disk           5" in out and out.index("tier") < out.index("step:")
    assert_same(inside, outside)
    shutil.rmtree(outside.run.dir)
    for steps, memory in ((2, BUDGETS), (3, {}), (4, {"host": "1GiB"})):  # each goes on from the one before
        train(deep("outside", memory, train={"steps": steps}, run={"resume": steps > 2}))
    assert_same(inside, outside)


def test_clipping_and_accumulation(deep):
    groups = {"optim": {"clip_norm": 0.5}, "train": {"grad_accumulation": 2}}
    inside, outside = deep("inside", **groups), deep("outside", {"host": "1300KiB", "disk": "1GiB"}, **groups)
    train(inside)
    train(outside)
    for a, b in zip(records(inside), records(outside)):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)


def test_a_gradient_that_is_not_finite_is_named(deep, monkeypatch):
    def spoil(model, *args, forward=Transformer.forward, **options):
        out = forward(model, *args, **options)
        return out._replace(loss=out.loss + (model.norm.weight.sum() - 32).sqrt())  # at 0 its slope is infinite

    monkeypatch.setattr(Transformer, "forward", spoil)
    with pytest.raises(FloatingPointError, match="first gradient that is not finite: norm.weight"):
        train(deep("run", {"host": "1GiB"}, optim={"clip_norm": 1.0}))


def test_budgets_are_checked(flags, tmp_path, capsys):
    words = ["train", "tiny", *flags, "--run.dir", str(tmp_path / "run")]
    assert cli.main([*words, "--memory.host", "1GiB"]) == 2
    assert "--train.activation-checkpointing must be on with --memory budgets" in capsys.readouterr().err
    words.append("--train.activation-checkpointing")
    assert cli.main([*words, "--memory.host", "1KiB"]) == 2
    assert "budgets must hold" in capsys.readouterr().err
    assert cli.main([*words, "--memory.host", "many"]) == 2
    assert "memory must be like 32GB or 24GiB, got 'many'" in capsys.readouterr().err
