"""OffloadedAdamW against fastmoe.optim.AdamW, bit for bit."""

from __future__ import annotations

import copy
import errno
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmoe import ops
from fastmoe.offload import OffloadedAdamW, TensorFile
from fastmoe.optim import AdamW

SHAPES = [[(33, 17), (5,)], [(64, 9)], [(3, 4, 5), (1,)], [(7, 7)]]
TIERS = ["disk", "host", "disk", "disk"]


def model(dtype=torch.float32) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in group] for group in SHAPES]


def groups(params, tiers=None) -> list[dict]:
    """One group a layer; the second has its own weight decay."""
    made = [{"params": layer} for layer in params]
    made[1]["weight_decay"] = 0.3
    for group, tier in zip(made, tiers or []):
        group["tier"] = tier
    return made


def give_gradients(params, step: int) -> None:
    """The same for equal `step`; the third layer has none at step 1, one of its tensors none at step 2."""
    generator = torch.Generator().manual_seed(100 + step)
    for i, layer in enumerate(params):
        for j, param in enumerate(layer):
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
            if i == 2 and (step == 1 or (step == 2 and j == 0)):
                param.grad = None


def train(optimizer, params, steps) -> None:
    for step in steps:
        give_gradients(params, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (step + 1)
        optimizer.step(grad_scale=1 / (1 + step))


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))


def moments(optimizer) -> list[list]:
    states = [optimizer.state[param] for group in optimizer.param_groups for param in group["params"]]
    return [[torch.tensor(state["step"]), state["exp_avg"], state["exp_avg_sq"]] for state in states]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_step_equals_adamw(tmp_path, dtype):
    plain, offloaded = model(dtype), model(dtype)
    a = AdamW(groups(plain), weight_decay=0.1)
    b = OffloadedAdamW(groups(offloaded, TIERS), tmp_path, weight_decay=0.1)
    for step in range(5):
        train(a, plain, [step])
        train(b, offloaded, [step])
        assert equal(plain, offloaded)
    assert equal(moments(a), moments(b))
    b.close()


def test_one_group_and_a_closure(tmp_path):
    (weight,), (twin,) = ([torch.ones(3, requires_grad=True)] for _ in range(2))
    a, b = AdamW([weight], lr=0.1), OffloadedAdamW([twin], tmp_path, lr=0.1)

    def closure(optimizer, param):
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    for _ in range(3):
        assert torch.equal(a.step(lambda: closure(a, weight)), b.step(lambda: closure(b, twin)))
    assert torch.equal(weight, twin)


def test_reopened_states_go_on_bit_for_bit_with_other_tiers(tmp_path):
    plain, offloaded = model(), model()
    train(AdamW(groups(plain)), plain, range(6))
    first = OffloadedAdamW(groups(offloaded, TIERS), tmp_path)
    train(first, offloaded, range(2))
    first.flush()
    train(first, offloaded, [2])
    first.close()
    second = OffloadedAdamW(groups(offloaded, ["host", "disk", "host", "disk"]), tmp_path, reopen=True)
    train(second, offloaded, range(3, 6))
    assert equal(plain, offloaded)


def test_a_run_that_was_not_closed_cannot_be_reopened(tmp_path):
    params = model()
    optimizer = OffloadedAdamW(groups(params), tmp_path)
    optimizer.flush()
    train(optimizer, params, [0])
    del optimizer
    with pytest.raises(FileNotFoundError, match="directory must hold states of a run that was closed"):
        OffloadedAdamW(groups(params), tmp_path, reopen=True)
    with pytest.raises(FileExistsError, match="directory must hold no states"):
        OffloadedAdamW(groups(params), tmp_path)


def test_states_of_another_model_are_refused(tmp_path):
    OffloadedAdamW(groups(model()), tmp_path).close()
    for other in (groups(model(torch.float64)), groups(model())[::-1], groups(model())[:3]):
        with pytest.raises(ValueError, match="must hold states of these parameter groups"):
            OffloadedAdamW(other, tmp_path, reopen=True)


@pytest.mark.parametrize("source", [AdamW, OffloadedAdamW])
def test_state_dicts_of_both_optimizers_are_taken(tmp_path, source):
    params = model(torch.bfloat16)
    first = AdamW(groups(params)) if source is AdamW else OffloadedAdamW(groups(params), tmp_path / "first")
    train(first, params, range(2))
    state_dict, twin = (
        copy.deepcopy(first.state_dict()),
        [[p.detach().clone().requires_grad_() for p in layer] for layer in params],
    )
    train(first, params, range(2, 4))
    second = OffloadedAdamW(groups(twin, TIERS), tmp_path / "second")
    second.load_state_dict(state_dict)
    assert [group["tier"] for group in second.param_groups] == TIERS
    assert second.state[twin[0][0]]["exp_avg"].dtype == torch.float32
    train(second, twin, range(2, 4))
    assert equal(params, twin)


def test_a_plain_optimizer_takes_over(tmp_path):
    params = model()
    first = OffloadedAdamW(groups(params, TIERS), tmp_path)
    train(first, params, range(2))
    state_dict, twin = (
        copy.deepcopy(first.state_dict()),
        [[p.detach().clone().requires_grad_() for p in layer] for layer in params],
    )
    train(first, params, range(2, 4))
    second = AdamW(groups(twin))
    second.load_state_dict(state_dict)
    train(second, twin, range(2, 4))
    assert equal(params, twin)


def resident_bytes(path: Path) -> int:
    """Of mapped files whose names begin with `path`, what this process holds in memory."""
    entries = re.findall(rf"{path}\S*\n(?:\w+:.*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    return sum(map(int, entries)) * 1024


def test_the_next_group_is_read_ahead_and_three_at_most_are_in_memory(tmp_path, monkeypatch):
    layers = [[torch.zeros(1 << 17, requires_grad=True)] for _ in range(8)]
    optimizer = OffloadedAdamW([{"params": layer} for layer in layers], tmp_path)
    file_size, seen, step_tensors = 1 << 20, [], ops.adamw_step

    def spy(*args):
        step_tensors(*args)
        following = tmp_path / f"group-{len(seen) % 8 + 1:05d}.bin"
        deadline = time.monotonic() + 5
        while following.exists() and resident_bytes(following) < file_size:
            assert time.monotonic() < deadline, "the next group is not read while this one is in use"
            time.sleep(0.01)
        seen.append(resident_bytes(tmp_path))

    monkeypatch.setattr(ops, "adamw_step", spy)
    for _ in range(2):
        for (param,) in layers:
            param.grad = torch.ones_like(param)
        optimizer.step()
    optimizer.close()
    assert len(seen) == 16 and max(seen) <= 3 * file_size
    assert resident_bytes(tmp_path) == 0
    assert sum(path.stat().st_size for path in tmp_path.glob("*.bin")) == 8 * file_size


@pytest.mark.parametrize("failing, steps", [(0, 1), (3, 2), (3, 1)], ids=["in the step", "in the next", "in flush"])
def test_an_io_error_stops_the_run_and_nothing_half_done_is_kept(tmp_path, monkeypatch, failing, steps):
    params = model()
    optimizer = OffloadedAdamW(groups(params), tmp_path)
    write_back = TensorFile.write_back

    def fail(file):
        if file.path.name == f"group-{failing:05d}.bin":
            raise OSError(errno.EIO, "fastmoe.offload: msync failed: Input/output error", str(file.path))
        write_back(file)

    monkeypatch.setattr(TensorFile, "write_back", fail)
    with pytest.raises(OSError, match="Input/output error"):
        train(optimizer, params, range(steps))
        optimizer.flush()
    monkeypatch.undo()
    for use in (optimizer.step, optimizer.flush):
        with pytest.raises(RuntimeError, match="the last step did not finish"):
            use()
    assert not (tmp_path / "states.json").exists()
    optimizer.load_state_dict(AdamW(groups(params)).state_dict())
    train(optimizer, params, [0])
    optimizer.close()


def test_a_file_truncated_between_steps_is_an_error(tmp_path):
    params = model()
    optimizer = OffloadedAdamW(groups(params), tmp_path)
    train(optimizer, params, [0])
    os.truncate(tmp_path / "group-00002.bin", 0)
    with pytest.raises(ValueError, match=r"group-00002.bin must hold \d+ bytes, got 0"):
        train(optimizer, params, [2])


def test_a_full_disk_leaves_no_files(tmp_path, monkeypatch):
    fallocate = os.posix_fallocate

    def fill_up(file, offset, size):
        if len(list(tmp_path.glob("*.bin"))) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fallocate(file, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", fill_up)
    with pytest.raises(OSError, match="fastmoe.offload: directory must have 4.00 KiB free, got: No space"):
        OffloadedAdamW(groups(model()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_bad_arguments_are_named(tmp_path):
    params, file = model(), tmp_path / "file"
    file.write_text("")
    for wrong, message in (
        (dict(tier="tape"), "tier must be 'disk' or 'host', got 'tape'"),
        (dict(lr=-1.0), r"lr must be at least 0 .* got \[-1.0\]"),
        (dict(betas=(0.9, 1.0)), r"betas must be at least 0 \(betas below 1\), got \(0.9, 1.0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            OffloadedAdamW(groups(params), tmp_path, **wrong)
    with pytest.raises(ValueError, match="params must be on the CPU, got one on meta"):
        OffloadedAdamW([torch.zeros(2, device="meta")], tmp_path)
    with pytest.raises(OSError, match="directory must be one that can be made"):
        OffloadedAdamW(groups(params), file / "states")
    with pytest.raises(NotImplementedError, match="all parameter groups must be given at construction"):
        OffloadedAdamW(groups(params), tmp_path).add_param_group({"params": [torch.zeros(2)]})


def test_the_example_runs():
    example = Path(__file__).parents[2] / "examples" / "offload_big.py"
    command = [sys.executable, str(example), "--layers", "6", "--d-model", "64"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert re.search(r"host +\d+ .*\n +disk +[1-9]", run.stdout) and run.stdout.count("loss") == 3
