"""The one way an op is measured: checked against float64, then all arms in turn, then medians."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from fastmoe import native

Outputs = Sequence[torch.Tensor]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SLOW = 3.0  # seconds a call, from which an arm is timed once
_libc = ctypes.CDLL(None)


@dataclass
class Case:
    """arms: name -> one call of the work, returning what it computed; "fastmoe" is ours. exact: the same in float64.

    work: bytes or FLOPs that one call needs at least, whoever makes it. roof: "mm" (work is FLOPs), "triad" or "update"
    (bytes) of machine.roofs. tolerance: largest error of an output, relative to that output's largest exact value.
    compared: what of an arm's outputs is compared with exact. labels: what the case is, as JSON values. left_out: the
    arms that are not run, and why. slow: filled by measure, the arms that were timed once, and why.
    """

    name: str
    arms: dict[str, Callable[[], Outputs]]
    exact: Callable[[], Outputs]
    work: float
    roof: str
    tolerance: float = TOLERANCE[torch.float32]
    compared: Callable[[Outputs], Outputs] = lambda outputs: outputs
    labels: dict[str, object] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    slow: dict[str, str] = field(default_factory=dict)


def measure(case: Case, roofs: dict[str, float], seconds: float, device: str = "cpu") -> dict[str, object]:
    """Runs every arm of a case for about `seconds` together. Returns the JSON record of the case.

    An arm is called once, compared with float64 and refused when wrong: it then has no time, and no arm a ratio. A peer
    that raises has no time either. The others are called in turn, A B A B ..., several calls to a sample where one
    takes under 2 ms on the CPU; a time is the median of the samples. An arm that takes more than SLOW seconds is timed
    once, before the others. Peak memory is the growth of the resident set in one call (on a GPU of what is allocated),
    a kept workspace included. A GPU's times are between events, its L2 cache flushed before each call.
    """
    timed = _cuda_seconds if device == "cuda" else _cpu_seconds
    exact = [tensor.detach().double() for tensor in case.exact()] if case.arms else []
    errors, failed, peaks, samples, calls = {}, {}, {}, {}, {}
    for arm, call in case.arms.items():
        start = time.perf_counter()
        try:
            got = case.compared(call())
            pairs = zip(got, exact, strict=True)
            errors[arm] = max((_error(tensor, want) for tensor, want in pairs), default=0.0)
            del got, pairs
        except Exception as error:
            if arm == "fastmoe":
                raise
            failed[arm] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if time.perf_counter() - start > SLOW and seconds:
            case.slow[arm] = f"took {time.perf_counter() - start:.0f} s a call"
    del exact
    right = [arm for arm, error in errors.items() if error <= case.tolerance]
    for arm in right:
        peaks[arm], once = _peak_mib(case.arms[arm], device)
        if arm in case.slow and once > SLOW:
            samples[arm] = [once]
            continue
        case.slow.pop(arm, None)
        once = timed(case.arms[arm], 1)
        calls[arm] = (math.ceil(2e-3 / once) if once < 2e-3 and device == "cpu" else 1), once
        samples[arm] = []
    round_seconds = sum(count * once for count, once in calls.values())
    gc.disable()
    for _ in range(min(max(int(seconds / round_seconds), 3), 50) if seconds and calls else len(right[:1])):
        for arm, (count, _) in calls.items():
            samples[arm].append(timed(case.arms[arm], count))
    gc.enable()
    _free(device)
    record = {"case": case.name, "unit": "GFLOP/s" if case.roof == "mm" else "GB/s", "roof": case.roof, "arms": {}}
    record |= {"labels": case.labels, "left_out": case.left_out}
    for arm in case.arms:
        record["arms"][arm] = {"failed": failed[arm]} if arm in failed else {"error": errors[arm]}
        if arm in right:
            median = statistics.median(samples[arm])
            rate = case.work / median / 1e9
            record["arms"][arm] |= {
                "ms": median * 1e3,
                "ms_min": min(samples[arm]) * 1e3,
                "ms_max": max(samples[arm]) * 1e3,
                "samples": len(samples[arm]),
                "rate": rate,
                "of_roof": rate / roofs[case.roof],
                "peak_mib": peaks[arm],
            }
    if len(right) == len(errors) and "fastmoe" in right:
        for arm in right:  # times as fast
            record["arms"][arm]["fastmoe_is"] = record["arms"][arm]["ms"] / record["arms"]["fastmoe"]["ms"]
    return record


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """max |got - exact| / max |exact|, in pieces: some are gigabytes."""
    if got.shape != exact.shape:
        return math.inf
    if not exact.numel():
        return 0.0
    largest, smallest = float(exact.max()), float(exact.min())
    worst = 0.0
    for part, want in zip(got.detach().reshape(-1).split(1 << 24), exact.reshape(-1).split(1 << 24)):
        difference = float((part.double() - want).abs().max())
        if not math.isfinite(difference):
            return math.inf
        worst = max(worst, difference)
    return worst / max(abs(largest), abs(smallest), 1e-300)


def _cpu_seconds(call: Callable[[], Outputs], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def _cuda_seconds(call: Callable[[], Outputs], count: int) -> float:
    total = 0.0
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        _flush_buffer().zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        total += start.elapsed_time(end)
    return total / count / 1e3


@cache
def _flush_buffer() -> torch.Tensor:
    """More than any L2 cache holds."""
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def _free(device: str) -> None:
    """Gives back what is kept for reuse: workspaces and idle blocks."""
    native._kept.__dict__.clear()
    gc.collect()
    native.empty_cache()
    _libc.malloc_trim(0)
    if device == "cuda":
        torch.cuda.empty_cache()


def _peak_mib(call: Callable[[], Outputs], device: str) -> tuple[float | None, float]:
    """MiB by which one call raises the memory in use at its peak, None where the system does not tell; its seconds."""
    _free(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = _cuda_seconds(call, 1)
        return (torch.cuda.max_memory_allocated() - before) / 2**20, seconds
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts at the present size
    except OSError:
        return None, _cpu_seconds(call, 1)
    before = _status_kib("VmRSS")
    seconds = _cpu_seconds(call, 1)
    return (_status_kib("VmHWM") - before) / 1024, seconds


def _status_kib(field: str) -> int:
    return int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def with_grads(function: Callable[..., Outputs], inputs: Outputs, grads: Outputs) -> Callable[[], Outputs]:
    """A call of forward and backward: the differentiable outputs, then the gradient of each input."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def call() -> Outputs:
        outputs = function(*leaves)
        return [*outputs, *torch.autograd.grad(outputs, leaves, grads)]

    return call


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def topk_ids(T: int, K: int, E: int, zipf: float = 0.0, device: str = "cpu") -> torch.Tensor:
    """[T, K] int64, K different experts a token; expert popularity falls as rank^-zipf."""
    if zipf == 0.0 and T * E > 1 << 26:  # a matrix of that size is too big: draw, and draw again where two are equal
        ids_TK = torch.randint(E, (T, K), device=device)
        while (again := ids_TK.sort(1).values.diff(dim=1).eq(0).any(1)).any():
            ids_TK[again] = torch.randint(E, (int(again.sum()), K), device=device)
        return ids_TK
    popularity_E = -zipf * torch.arange(1, E + 1, device=device).log()
    gumbel_TE = -torch.empty(T, E, device=device).exponential_().log()
    return (popularity_E + gumbel_TE).topk(K, dim=1).indices
