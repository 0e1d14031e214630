"""What the numbers were measured on: the machine, its limits of the moment, and whether anybody else was using it."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastmoe import __version__, native

ROOT = Path(__file__).resolve().parents[1]
BUSY = 0.2  # CPUs in use by others, from which on no number is worth keeping


def describe() -> dict[str, object]:
    """The machine, the versions and the commit, as JSON values."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    flags = set(re.search(r"flags\s*: (.*)|$", cpuinfo)[0].split())
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    cpu, cores = model[1].strip() if model else platform.machine(), len(os.sched_getaffinity(0))
    slug = re.sub(r"[^a-z0-9]+", "-", f"{cpu} {sets[-1] if sets else ''} {cores} cores".lower()).strip("-")
    return {
        "name": slug,
        "cpu": cpu,
        "cores": cores,
        "instruction_sets": sets,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": "cpu",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "fastmoe": __version__,
        "extension": native.missing() or "built",
        "peers": {name: found for name in ("transformers",) if (found := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!RESULTS.md")
        ),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()


def others_load(seconds: float = 1.0) -> float:
    """CPUs that other processes used on average over the next `seconds`."""
    before = _busy_seconds()
    time.sleep(seconds)
    return max(0.0, (_busy_seconds() - before) / seconds)


def _busy_seconds() -> float:
    """CPU time of everybody but this process, from boot."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    mine = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - mine.user - mine.system


def roofs(quick: bool = False) -> dict[str, float]:
    """The machine's measured limits: "mm" in GFLOP/s (torch.mm, float32, 2048^3), "triad" and "update" in GB/s.

    triad: a = b + 3c, three arrays of 128 MiB. update: a = a * s in place, one read and one write.
    """
    n, size = (256, 1 << 20) if quick else (2048, 1 << 25)
    x, y = torch.randn(n, n), torch.randn(n, n)
    product = torch.empty(n, n)
    a, b, c = torch.zeros(size), torch.randn(size), torch.randn(size)
    return {
        "mm": 2 * n**3 / _median_seconds(lambda: torch.mm(x, y, out=product)) / 1e9,
        "triad": 12 * size / _median_seconds(lambda: torch.add(b, c, alpha=3, out=a)) / 1e9,
        "update": 8 * size / _median_seconds(lambda: a.mul_(0.999)) / 1e9,
    }


def _median_seconds(call: Callable[[], object], repeats: int = 9) -> float:
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
