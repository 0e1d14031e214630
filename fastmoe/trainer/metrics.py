"""What a run shows and keeps: metrics.jsonl, printed lines or a progress bar, TensorBoard; the machine and its measured
peak.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

from fastmoe.config import LogConfig

MAX_COUNTS = 64  # experts a layer up to which metrics.jsonl keeps every count; above, 17 quantiles
HOT = 4.0  # times the mean load, above which an expert counts as hot
_GIB = 1 << 30


@cache
def measured_peak(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the best square torch.mm (1024 on a CPU, 8192 on a GPU) within about 0.3 s."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + 0.3
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def memory_gib(device: torch.device) -> tuple[float, float]:
    """Peak memory of this process (reserved GPU memory, or resident set) and what the machine has, in GiB."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return torch.cuda.max_memory_reserved(device) / _GIB, total / _GIB
    unit = 1 if sys.platform == "darwin" else 1024
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB, total / _GIB


def machine(device: torch.device) -> str:
    """One line: processor or GPU, threads, Python and torch."""
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        try:
            lines = Path("/proc/cpuinfo").read_text().splitlines()
            name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        except (OSError, StopIteration):
            pass
        name = f"{name}, {torch.get_num_threads()} threads"
    return f"{name}; Python {platform.python_version()}, torch {torch.__version__}"


def describe_routing(
    load_LE: torch.Tensor, dropped_L: torch.Tensor, logit_norm_L: torch.Tensor, losses: dict[str, torch.Tensor]
) -> dict:
    """Metrics of one step's routing: `load` (counts by layer and expert, or `load_quantiles` past MAX_COUNTS experts),
    `load_max_over_mean` (the largest of the layers), `drop_rate` (dropped slots over all slots) and `layers`.

    `layers` has lists over the MoE layers: `max_over_mean`, `cv` (standard deviation over mean) and `entropy` (over
    log E: 1 is even, 0 one expert) of the load, `dead` (experts without a token), `hot` (experts with more than HOT
    times the mean), `drop_rate`, `logit_norm` and `loss_<name>` of every loss.

    load_LE: [L, E] and dropped_L: [L], integer-valued; logit_norm_L and losses: [L]. All float64 on the CPU.
    """
    L, E = load_LE.shape
    if not L:
        return {"load": [], "load_max_over_mean": 1.0, "drop_rate": 0.0, "layers": {}}
    total_L = load_LE.sum(1)
    slots_L = total_L.clamp(min=1)
    share_LE, peak_L = load_LE / slots_L[:, None], load_LE.amax(1) * E / slots_L
    layers = {
        "max_over_mean": peak_L,
        "cv": share_LE.std(1, correction=0) * E,
        "entropy": (-torch.xlogy(share_LE, share_LE).sum(1) / math.log(E)) if E > 1 else torch.ones_like(total_L),
        "dead": (load_LE == 0).sum(1),
        "hot": (share_LE * E > HOT).sum(1),
        "drop_rate": dropped_L / slots_L,
        "logit_norm": logit_norm_L,
        **{f"loss_{name}": loss_L for name, loss_L in losses.items()},
    }
    if E <= MAX_COUNTS:
        counts = {"load": load_LE.long().tolist()}
    else:
        points = torch.linspace(0, 1, 17, dtype=load_LE.dtype)
        counts = {"load_quantiles": torch.quantile(load_LE, points, dim=1).T.tolist()}
    return {
        **counts,
        "load_max_over_mean": peak_L.max().item(),
        "drop_rate": (dropped_L.sum() / total_L.sum().clamp(min=1)).item(),
        "layers": {name: [_short(value) for value in value_L.tolist()] for name, value_L in layers.items()},
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}") if value % 1 else int(value)


def worst(key: str) -> Callable[[Sequence[float]], float]:
    """min or max, whichever is the worse end of a metric of `layers`."""
    return min if key == "entropy" else max


def read(path: str | Path, last_step: int | None = None) -> list[dict]:
    """The records of a metrics.jsonl up to last_step, without a line that a killed run left half written."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if last_step is None or record["step"] <= last_step:
            records.append(record)
    return records


class Quiet:
    """In place of Metrics on the ranks that leave writing to the first."""

    def record(self, record: dict) -> None: ...
    def note(self, text: str) -> None: ...
    def amend(self, step: int, **values) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class Metrics:
    """Writes every record to `<run_dir>/metrics.jsonl` and shows them as they come.

    On a terminal: one progress bar. Elsewhere: a line at the first step, every log.every steps and the last.
    Lines past restored_step are cut off the file first.
    """

    def __init__(self, run_dir: Path, config: LogConfig, steps: int, restored_step: int, memory_total_gib: float):
        self.path, self.config, self.steps, self.memory_total = (
            run_dir / "metrics.jsonl",
            config,
            steps,
            memory_total_gib,
        )
        self.bar = sys.stdout.isatty()
        self.window: list[dict] = []
        self._rewrite(read(self.path, restored_step) if restored_step and self.path.exists() else [])
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.board = _tensorboard(run_dir, restored_step) if config.tensorboard else None

    def record(self, record: dict) -> None:
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise RuntimeError(
                f"fastmoe.metrics: cannot write {self.path}: {error.strerror}; the checkpoints are intact"
            ) from error
        self.window.append(record)
        step = record["step"]
        shown = step % self.config.every == 0 or step == self.steps or len(self.window) == step == 1
        if self.board:
            self._board(record, shown)
        if self.bar:
            print(f"\r\033[K{self._bar(record)}", end="", flush=True)
        elif shown:
            print(self._line(record), flush=True)
        if shown:
            self.window.clear()

    def note(self, text: str) -> None:
        """Prints a line of its own."""
        print(f"\r\033[K{text}" if self.bar else text, flush=True)

    def amend(self, step: int, **values) -> None:
        """Sets values in the record of a step that is already written; the file is replaced in one rename."""
        self.file.close()
        self._rewrite([{**record, **values} if record["step"] == step else record for record in read(self.path)])
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        for key, value in values.items() if self.board else ():
            self.board.add_scalar(key, value, step)

    def sync(self) -> None:
        """Makes what is written survive a power cut."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        if self.bar and self.window:
            print(flush=True)
        self.file.close()
        if self.board:
            self.board.close()

    def _rewrite(self, records: list[dict]) -> None:
        temporary = self.path.with_suffix(".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def _speed(self) -> dict:
        """Throughput over the records since the last printed line."""
        seconds = sum(record["perf"]["step_seconds"] for record in self.window)
        rate = len(self.window) / seconds
        return {
            key: self.window[-1]["perf"][key] * self.window[-1]["perf"]["step_seconds"] * rate
            for key in ("tokens_per_second", "tflops", "mfu")
        }

    def _line(self, record: dict) -> str:
        speed, memory = self._speed(), record["perf"]["memory_gib"]
        parts = [
            f"step: {record['step']:2}",
            f"loss: {record['loss']:8.5f}",
            f"grad_norm: {_norm(record):7.4f}",
            f"memory: {memory:5.2f}GiB({100 * memory / self.memory_total:.2f}%)",
            f"tps: {round(speed['tokens_per_second']):,}",
            f"tflops: {speed['tflops']:,.2f}",
            f"mfu: {100 * speed['mfu']:.2f}%",
            f"lr: {record['lr']:.2e}",
            f"load: {record['load_max_over_mean']:.2f}",
            f"drop: {100 * record['drop_rate']:.2f}%",
        ]
        return "  ".join(parts + ([f"heldout: {record['heldout']:.4f}"] if "heldout" in record else []))

    def _bar(self, record: dict) -> str:
        seconds = [r["perf"]["step_seconds"] for r in self.window]
        left = round((self.steps - record["step"]) * sum(seconds) / len(seconds))
        parts = [
            f" {record['step']}/{self.steps}",
            f"loss {record['loss']:.4f}",
            f"lr {record['lr']:.1e}",
            f"norm {_norm(record):.2f}",
            f"{round(self._speed()['tokens_per_second']):,} tok/s",
            f"mfu {100 * record['perf']['mfu']:.0f}%",
            f"{record['perf']['memory_gib']:.1f}GiB",
            f"load {record['load_max_over_mean']:.2f}",
            f"drop {100 * record['drop_rate']:.1f}%",
            f"{left // 60}:{left % 60:02}",
        ]
        columns, text = shutil.get_terminal_size().columns - 1, "  ".join(parts)
        width = max(0, min(20, columns - len(text)))
        done = round(width * record["step"] / self.steps)
        return "█" * done + "░" * (width - done) + text[:columns]

    def _board(self, record: dict, histograms: bool) -> None:
        """Of what is kept by layer the mean and the worst; the loads of all layers and experts as one histogram."""
        values = {**record, **{f"perf/{key}": value for key, value in record["perf"].items()}}
        for key, value_L in record["layers"].items():
            values[f"layers/{key}"] = sum(value_L) / len(value_L)
            values[f"layers/{key}_worst"] = worst(key)(value_L)
        for key, value in values.items():
            if isinstance(value, int | float) and key != "step":
                self.board.add_scalar(key, value, record["step"])
        load_LE = record.get("load", record.get("load_quantiles"))
        if histograms and load_LE:
            shares = torch.tensor([[load / (sum(row) / len(row) or 1) for load in row] for row in load_LE])
            self.board.add_histogram("layers/load_over_mean", shares, record["step"])


def _norm(record: dict) -> float:
    return math.nan if record["grad_norm"] is None else record["grad_norm"]


def _tensorboard(run_dir: Path, restored_step: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "fastmoe.metrics: --log.tensorboard needs the tensorboard package: pip install tensorboard"
        ) from None
    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=restored_step + 1)
