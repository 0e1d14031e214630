from __future__ import annotations

import errno
import os
import resource

import pytest
import torch

from fastmoe.config import ModelConfig
from fastmoe.nn import Transformer
from fastmoe.optim import Adafactor, AdamW
from fastmoe.testing import assert_bit_equal
from fastmoe.trainer import checkpoint

SMALL = dict(d_model=16, num_layers=1, num_heads=2, num_experts=2, d_ff=16, max_seq_len=16)


def trained(steps: int = 1, optimizer=AdamW, dtype=torch.float32, **changes):
    """changes: of the model or, by the names below, of the optimizer."""
    torch.manual_seed(0)
    options = {name: changes.pop(name) for name in ("state_dtype", "master") if name in changes}
    model = Transformer(ModelConfig(**{**SMALL, **changes})).to(dtype)
    optimizer = optimizer(model.parameters(), lr=1e-2, **options)
    ids = torch.arange(16).view(2, 8)
    for _ in range(steps):
        model(ids, ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def three(tmp_path):
    """A folder with checkpoints 1, 2 and 10."""
    for step in (1, 2, 10):
        checkpoint.save(tmp_path, step, *trained(step % 9), {"note": step}, keep=3)
    return tmp_path


@pytest.mark.parametrize("tied", [False, True])
def test_everything_comes_back(tmp_path, tied, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 4000)
    model, optimizer = trained(3, tie_embeddings=tied)
    path = checkpoint.save(tmp_path, 3, model, optimizer, {"position": 12}, keep=1)
    drawn = torch.rand(3)
    assert path.name == "step-00000003" and checkpoint.verify(path) == []
    assert len(list(path.glob("model-*.safetensors"))) > 2
    assert checkpoint.read_state(path) | {"optimizer": 0} == {"position": 12, "step": 3, "optimizer": 0}
    other, fresh = trained(0, tie_embeddings=tied)
    torch.rand(5)
    with torch.no_grad():
        other.embedding.fill_(0)
    checkpoint.load_training(path, other, fresh)
    assert torch.equal(torch.rand(3), drawn)
    assert (other.head is other.embedding) == tied
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        one, two = optimizer.state[a], fresh.state[b]
        assert one.keys() == two.keys() and one["step"] == two["step"] == 3
        assert torch.equal(one["exp_avg"], two["exp_avg"]) and torch.equal(one["exp_avg_sq"], two["exp_avg_sq"])


def test_order_is_by_number_and_old_ones_go(three):
    os.utime(three / "step-00000002")
    assert [path.name for path in checkpoint.steps(three)] == ["step-00000001", "step-00000002", "step-00000010"]
    checkpoint.save(three, 11, *trained(), {}, keep=2)
    assert sorted(path.name for path in three.iterdir()) == ["step-00000010", "step-00000011"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: flip(d / "model-00001.safetensors"),
        lambda d: flip(d / "optimizer-00001.safetensors"),
        lambda d: flip(d / "state.json"),
        lambda d: os.truncate(d / "model-00001.safetensors", 100),
        lambda d: os.truncate(d / "manifest.json", 90),
        lambda d: (d / "model-00001.safetensors").unlink(),
        lambda d: (d / "rng-00001.safetensors").unlink(),
        lambda d: (d / "manifest.json").unlink(),
        lambda d: (d / "manifest.json").write_text("{}"),
        lambda d: (d / "manifest.json").write_text('{"format": 1, "files": {}}'),
    ],
)
def test_damage_is_seen_and_the_one_before_is_used(three, damage, capsys):
    damage(three / "step-00000010")
    assert checkpoint.newest_intact(three).name == "step-00000002"
    assert "step-00000010 is damaged" in capsys.readouterr().err
    flip(three / "step-00000002" / "state.json")
    flip(three / "step-00000001" / "state.json")
    with pytest.raises(checkpoint.CheckpointError, match="all 3 checkpoints"):
        checkpoint.newest_intact(three)


def test_a_damaged_one_is_set_aside_not_overwritten(three):
    flip(three / "step-00000010" / "state.json")
    checkpoint.set_aside(three, 2)
    checkpoint.save(three, 10, *trained(), {}, keep=2)
    flip(three / "step-00000010" / "state.json")
    checkpoint.save(three, 10, *trained(), {}, keep=2)
    assert sorted(path.name for path in three.iterdir()) == [
        "damaged-step-00000010",
        "damaged-step-00000010.1",
        "step-00000002",
        "step-00000010",
    ]


def test_an_interrupted_save_is_invisible_and_cleaned(three):
    whole = three / "step-00000010"
    whole.rename(three / ".tmp-step-00000010")
    assert checkpoint.newest_intact(three).name == "step-00000002"
    checkpoint.clean(three)
    assert sorted(path.name for path in three.iterdir()) == ["step-00000001", "step-00000002"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO, "limit"])
def test_a_failed_write_leaves_the_others_intact(three, code, monkeypatch):
    model, optimizer = trained()
    if code == "limit":
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    else:

        def fail(file):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fail)
    try:
        with pytest.raises(
            checkpoint.CheckpointError, match="cannot write .*step-00000020.*already there are intact"
        ) as error:
            checkpoint.save(three, 20, model, optimizer, {}, keep=1)
    finally:
        if code == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG if code == "limit" else code) in str(error.value)
    assert sorted(path.name for path in three.iterdir()) == ["step-00000001", "step-00000002", "step-00000010"]
    assert all(checkpoint.verify(path) == [] for path in three.iterdir())


def test_another_model_is_refused_by_name(three):
    with pytest.raises(
        checkpoint.CheckpointError, match=r"embedding in .* must have the model's shape \(256, 32\), got \(256, 16\)"
    ):
        checkpoint.load_model(three / "step-00000010", trained(0, d_model=32)[0])
    with pytest.raises(checkpoint.CheckpointError, match="the checkpoint has no layers.1"):
        checkpoint.load_model(three / "step-00000010", trained(0, num_layers=2)[0])
    with pytest.raises(checkpoint.CheckpointError, match="the model has no head"):
        checkpoint.load_model(three / "step-00000010", trained(0, tie_embeddings=True)[0])


@pytest.mark.parametrize(
    ("was", "now", "message"),
    [
        ({}, {"state_dtype": "int8"}, r"exp_avg int8 .*, exp_avg_scale bfloat16 .*, got exp_avg float32"),
        ({"state_dtype": "int8"}, {"state_dtype": "bf16"}, r"exp_avg bfloat16 .*, got exp_avg int8"),
        ({"dtype": torch.bfloat16, "master": "residual8"}, {"dtype": torch.bfloat16}, r"got .* master int8"),
        ({"dtype": torch.bfloat16}, {}, r"embedding in .* must be torch.float32 as in the model, got torch.bfloat16"),
        ({}, {"optimizer": Adafactor}, r"must be row float32 \[256\], column float32 \[16\], got exp_avg"),
    ],
)
def test_states_kept_otherwise_are_refused(tmp_path, was, now, message):
    path = checkpoint.save(tmp_path, 1, *trained(1, **was), {}, keep=1)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.load_training(path, *trained(0, **now))


@pytest.mark.parametrize(
    "kept", [{"state_dtype": "int8"}, {"state_dtype": "fp16"}, {"dtype": torch.bfloat16, "master": "residual8"}]
)
def test_states_of_any_dtype_come_back(tmp_path, kept):
    model, optimizer = trained(2, **kept)
    path = checkpoint.save(tmp_path, 2, model, optimizer, {}, keep=1)
    other, fresh = trained(0, **kept)
    checkpoint.load_training(path, other, fresh)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        one, two = optimizer.state[a], fresh.state[b]
        assert one.keys() == two.keys()
        for name, value in one.items():
            if isinstance(value, torch.Tensor):
                assert_bit_equal(two[name], value, name)
            else:
                assert two[name] == value, name
