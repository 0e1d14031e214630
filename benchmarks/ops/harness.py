"""The one way an op is measured: checked against float64, then all arms in turn, then medians."""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastmoe import native

Outputs = Sequence[torch.Tensor]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
_libc = ctypes.CDLL(None)


@dataclass
class Case:
    """arms: name -> one call of the work, returning what it computed; "fastmoe" is ours. exact: the same in float64.

    work: bytes or FLOPs that one call needs at least, whoever makes it. roof: "mm" (work is FLOPs), "triad" or "update"
    (bytes) of machine.roofs. tolerance: largest error of an output, relative to that output's largest exact value.
    """

    name: str
    arms: dict[str, Callable[[], Outputs]]
    exact: Callable[[], Outputs]
    work: float
    roof: str
    tolerance: float = TOLERANCE[torch.float32]


def measure(case: Case, roofs: dict[str, float], seconds: float) -> dict[str, object]:
    """Runs every arm of a case for about `seconds` together. Returns the JSON record of the case.

    An arm is called once, compared with float64 and refused when wrong: it then has no time, and no arm a ratio. The
    others are called in turn, A B A B ..., several calls to a sample where one takes under 2 ms; a time is the median
    of the samples. Peak memory is the growth of the resident set in one call, a kept workspace included.
    """
    exact = [tensor.detach().double() for tensor in case.exact()]
    errors, peaks, calls = {}, {}, {}
    for arm, call in case.arms.items():
        got = call()
        errors[arm] = max((_error(tensor, want) for tensor, want in zip(got, exact, strict=True)), default=0.0)
        del got
    del exact
    right = [arm for arm, error in errors.items() if error <= case.tolerance]
    for arm in right:
        peaks[arm] = _peak_mib(case.arms[arm])
        start = time.perf_counter()
        case.arms[arm]()
        once = time.perf_counter() - start
        calls[arm] = (math.ceil(2e-3 / once), once) if once < 2e-3 else (1, once)
    round_seconds = sum(count * once for count, once in calls.values())
    samples = {arm: [] for arm in right}
    gc.disable()
    for _ in range(min(max(int(seconds / round_seconds), 3), 50) if seconds and right else len(right[:1])):
        for arm in right:
            count, call = calls[arm][0], case.arms[arm]
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[arm].append((time.perf_counter() - start) / count)
    gc.enable()
    record = {"case": case.name, "unit": "GFLOP/s" if case.roof == "mm" else "GB/s", "roof": case.roof, "arms": {}}
    for arm in case.arms:
        record["arms"][arm] = {"error": errors[arm]}
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
    ours = record["arms"]["fastmoe"]
    if len(right) == len(case.arms):
        for arm in record["arms"].values():
            arm["fastmoe_is"] = arm["ms"] / ours["ms"]  # times as fast
    return record


def _error(got: torch.Tensor, exact: torch.Tensor) -> float:
    if got.shape != exact.shape or not got.isfinite().all():
        return math.inf
    if not exact.numel():
        return 0.0
    return float((got.detach().double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300))


def _peak_mib(call: Callable[[], Outputs]) -> float | None:
    """MiB by which one call grows the resident set at its peak; None where the system does not tell."""
    native._kept.__dict__.clear()  # so that a workspace kept from the last call counts
    gc.collect()
    _libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak restarts at the present size
    except OSError:
        return None
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) / 1024


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


def topk_ids(T: int, K: int, E: int, zipf: float = 0.0) -> torch.Tensor:
    """[T, K] int64, K different experts a token; expert popularity falls as rank^-zipf."""
    popularity_E = -zipf * torch.arange(1, E + 1).log()
    gumbel_TE = -torch.empty(T, E).exponential_().log()
    return (popularity_E + gumbel_TE).topk(K, dim=1).indices
