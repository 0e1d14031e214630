"""What is on the disk after a run ended anywhere, and what a disk that fails does to a run."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmoe.offload import clear, disk
from tests.offload.models import (
    CONFIG,
    LARGE,
    assert_equal,
    contents,
    host_bytes,
    make_engine,
    make_model,
    make_optimizer,
    train,
)

ROOT = Path(__file__).parents[2]
STEPS = 2
THREE = replace(CONFIG, num_layers=3)
SECTOR = 512


class Crash(BaseException):
    """The power goes."""


class Machine:
    """In place of the calls in fastmoe.offload.disk: loses power at call `crash_at`, and with it any part of what was
    written and not synced: sectors of one write may be there or not, whatever the order of the writes.
    """

    def __init__(self, directory: Path, crash_at: int, seed: int, monkeypatch):
        self.crash_at, self.calls, self.draw = crash_at, 0, random.Random(seed)
        self.synced = {str(path): path.read_bytes() for path in directory.iterdir()}
        self.pending: dict[str, list[tuple[int, bytes]]] = {}
        self.lock = threading.Lock()
        self.real = {name: getattr(disk, name) for name in ("pwrite", "rename")}
        for name in (*self.real, "sync"):
            monkeypatch.setattr(disk, name, getattr(self, name))

    def tick(self) -> None:
        self.calls += 1
        if self.calls >= self.crash_at:
            raise Crash

    def path(self, handle: int) -> str:
        return os.readlink(f"/proc/self/fd/{handle}")

    def pwrite(self, handle: int, views: list, offset: int) -> int:
        with self.lock:
            if self.calls < self.crash_at:
                self.pending.setdefault(self.path(handle), []).append((offset, bytes(views[0])))
            self.tick()
            return self.real["pwrite"](handle, views, offset)

    def sync(self, handle: int) -> None:
        with self.lock:
            self.tick()
            self.synced[self.path(handle)] = Path(self.path(handle)).read_bytes()
            self.pending.pop(self.path(handle), None)

    def rename(self, old: Path, new: Path) -> None:
        with self.lock:
            self.tick()
            self.real["rename"](old, new)
            self.synced[str(new)] = self.synced.pop(str(old))

    def lose(self) -> None:
        """What the disk then holds."""
        for path in {*self.synced, *self.pending}:
            content = bytearray(self.synced.get(path, b""))
            writes = self.pending.get(path, [])
            sectors = [(at, data, i) for at, data in writes for i in range(0, len(data), SECTOR)]
            self.draw.shuffle(sectors)
            for at, data, i in sectors[: self.draw.randint(0, len(sectors))]:
                piece = data[i : i + SECTOR]
                content.extend(bytes(max(0, at + i + len(piece) - len(content))))
                content[at + i : at + i + len(piece)] = piece
            if path in self.synced or writes:
                Path(path).write_bytes(content)


def small(directory: Path, **options):
    """A durable engine, one of its layers in memory, states in two kinds."""
    settings = {"clip_norm": 0.3, "durable": True, "model": lambda: make_model(torch.bfloat16, config=THREE)}
    optimizer = lambda model: make_optimizer(model, state_dtype="bf16", master="residual8", seed=1)
    budgets = {"host": host_bytes(1, True, True, settings["model"], optimizer), "disk": LARGE}
    return make_engine(directory, budgets, optimizer=optimizer, **{**settings, **options})


def uninterrupted(directory: Path) -> dict[str, torch.Tensor]:
    engine = small(directory / "whole")
    train(engine, range(STEPS))
    return contents(engine)


def test_power_lost_at_any_call_leaves_a_whole_step(tmp_path, monkeypatch):
    wanted = uninterrupted(tmp_path)
    folder, crash_at, steps_seen, finished = tmp_path / "run", 1, set(), False
    while not finished:
        small(folder)
        with monkeypatch.context() as patch:
            machine = Machine(folder, crash_at, crash_at, patch)
            try:
                train(small(folder, resume=True), range(STEPS))
                finished = True
            except Crash:
                pass
        machine.lose()
        engine = small(folder, resume=True)
        steps_seen.add(engine.steps)
        train(engine, range(engine.steps, STEPS))
        assert_equal(contents(engine), wanted)
        clear(folder)
        crash_at += 13
    assert steps_seen == set(range(STEPS + 1))


def test_power_lost_again_while_a_step_is_finished(tmp_path, monkeypatch):
    wanted = uninterrupted(tmp_path)
    for crash_at in range(1, 60, 13):
        folder = tmp_path / str(crash_at)
        small(folder)
        for again in (40, crash_at):  # in the updates of the first step, then while these are finished
            with monkeypatch.context() as patch:
                machine = Machine(folder, again, again, patch)
                try:
                    engine = small(folder, resume=True)
                    train(engine, range(engine.steps, STEPS))
                except Crash:
                    pass
            machine.lose()
        engine = small(folder, resume=True)
        train(engine, range(engine.steps, STEPS))
        assert_equal(contents(engine), wanted)
        clear(folder)


def fail(monkeypatch, name: str, file: str, code: int, after: int = 0) -> None:
    """From its call `after` on, disk.<name> fails on files of this name."""
    real, calls = getattr(disk, name), []

    def failing(handle, *rest):
        path = str(handle) if isinstance(handle, Path) else os.readlink(f"/proc/self/fd/{handle}")
        if file in path:
            calls.append(path)
            if len(calls) > after:
                raise OSError(code, os.strerror(code))
        return real(handle, *rest)

    monkeypatch.setattr(disk, name, failing)


@pytest.mark.parametrize("name, code", [("pwrite", errno.EIO), ("pwrite", errno.ENOSPC), ("sync", errno.EIO)])
@pytest.mark.parametrize("file", ["unit-00002", "grads-00002", "journal", "commit.new"])
def test_a_failing_disk_stops_a_durable_run_which_goes_on_later(tmp_path, monkeypatch, file, name, code):
    engine = small(tmp_path / "run")
    train(engine, range(1))
    with monkeypatch.context() as patch:
        fail(patch, name, file, code)
        with pytest.raises(OSError, match="fastmoe.offload: .*, got: .*" + file.split(".")[0]) as caught:
            train(engine, range(1, 2))
            engine.flush()
        assert caught.value.errno == code
        with pytest.raises(RuntimeError, match="a step did not finish.*resume from the directory"):
            engine.flush()
    engine = small(tmp_path / "run", resume=True)
    assert engine.steps == (1 if file in ("grads-00002", "commit.new") else 2)
    train(engine, range(engine.steps, STEPS))
    assert_equal(contents(engine), uninterrupted(tmp_path))


@pytest.mark.parametrize("name", ["pread", "pwrite"])
def test_a_failing_disk_stops_a_run(tmp_path, monkeypatch, name):
    engine = make_engine(tmp_path)
    train(engine, range(1))
    fail(monkeypatch, name, "unit-00003", errno.EIO)
    with pytest.raises(OSError, match="bytes .* got: Input/output error.*unit-00003"):
        train(engine, range(1, 3))
    with pytest.raises(RuntimeError, match="a step did not finish.*start from a checkpoint"):
        engine.step()
    with pytest.raises(FileNotFoundError, match="must hold states of a run that was closed or durable"):
        make_engine(tmp_path, resume=True)


def test_a_file_truncated_between_steps_is_named(tmp_path):
    engine = make_engine(tmp_path)
    train(engine, range(1))
    os.truncate(tmp_path / "unit-00004", 4096)
    with pytest.raises(ValueError, match=r"unit-00004 must hold \d+ bytes, got 4096"):
        train(engine, range(1, 2))


def test_a_disk_that_is_full_or_read_only_leaves_no_files(tmp_path, monkeypatch):
    reserve = os.posix_fallocate

    def fill_up(file, offset, size):
        if len(list((tmp_path / "full").iterdir())) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(file, offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fill_up)
        with pytest.raises(OSError, match="directory must have .* free, got: No space left") as caught:
            make_engine(tmp_path / "full")
    assert caught.value.errno == errno.ENOSPC and not list((tmp_path / "full").iterdir())

    def refuse(path, *args, real=os.open, **kwargs):
        if "unit-" in str(path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return real(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(OSError, match="directory must be writable and have room, got: Read-only") as caught:
            make_engine(tmp_path / "sealed")
    assert caught.value.errno == errno.EROFS and not list((tmp_path / "sealed").iterdir())
    with pytest.raises(OSError, match="directory must have 1024.00 TiB free"):
        disk.File(tmp_path / "huge", 1 << 50, True, disk.Traffic())
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="directory must be one that can be made"):
        make_engine(tmp_path / "taken" / "below")


def test_states_of_another_model_are_refused(tmp_path):
    engine = make_engine(tmp_path)
    train(engine, range(1))
    engine.close()
    for options in (
        {"model": lambda: make_model(torch.float64)},
        {"model": lambda: make_model(config=THREE)},
        {"optimizer": lambda model: make_optimizer(model, state_dtype="bf16")},
        {"units": lambda model: list(model.layers)[:2]},
    ):
        with pytest.raises(ValueError, match="must hold states of this model, units and optimizer"):
            make_engine(tmp_path, {"host": LARGE}, resume=True, **options)
    with pytest.raises(FileExistsError, match="directory must hold no states"):
        make_engine(tmp_path)
    content = bytearray((tmp_path / "unit-00002").read_bytes())
    content[20] ^= 1
    (tmp_path / "unit-00002").write_bytes(content)
    with pytest.raises(RuntimeError, match="unit-00002 must be of step 1, got a damaged file"):
        make_engine(tmp_path, resume=True)


@pytest.mark.parametrize("durable", [False, True])
def test_other_budgets_go_on_bit_for_bit(tmp_path, durable):
    budgets = [
        {"host": host_bytes(0, True), "disk": LARGE},
        {"host": LARGE, "disk": LARGE},
        {"host": host_bytes(2, True), "disk": LARGE},
    ]
    engine = make_engine(tmp_path / "run", budgets[0], clip_norm=0.3, durable=durable)
    for step, given in enumerate(budgets):
        if step:
            engine = make_engine(tmp_path / "run", given, clip_norm=0.3, durable=durable, resume=True)
        assert engine.steps == step and (engine.state == {"tokens": step} or not step)
        train(engine, range(step, step + 1), {"tokens": step + 1})
        engine.close()
    whole = make_engine(tmp_path / "whole", clip_norm=0.3)
    train(whole, range(3))
    engine = make_engine(tmp_path / "run", budgets[0], clip_norm=0.3, resume=True)
    assert_equal(contents(engine), contents(whole))


def test_a_killed_process_goes_on_bit_for_bit():
    words = [sys.executable, str(ROOT / "benchmarks" / "kill_offload.py"), "--tries", "1", "--seed", "6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=200)
    assert ran.returncode == 0 and ran.stdout.endswith("PASS: 1 of 1\n"), ran.stdout + ran.stderr


def test_loaded_states_are_durable(tmp_path):
    source = small(tmp_path / "source")
    train(source, range(1))
    given = {name: pair for part in source.walk() for name, pair in deepcopy(part).items()}
    engine = small(tmp_path / "run")
    train(engine, range(1, 3))
    engine.load(given.get, 1, source.norm)
    for again in (engine, small(tmp_path / "run", resume=True)):
        assert again.steps == 1 and again.norm == source.norm
        assert_equal(contents(again), contents(source))
    train(again, range(1, STEPS))
    assert_equal(contents(again), uninterrupted(tmp_path))


def test_a_walk_that_is_left_early_keeps_nothing(tmp_path):
    engine = make_engine(tmp_path)
    for _ in range(4):
        for part in engine.walk():
            if "layers.2.attention.qkv_proj" in part:
                break
    train(engine, range(1))
    engine.close()
