"""What the numbers were measured on: the machine, its limits of the moment, and whether anybody else was using it."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastmoe import __version__, native

ROOT = Path(__file__).resolve().parents[1]
BUSY = 0.2  # CPUs in use by others, from which on no number is worth keeping
ISAS = {  # what keeps torch and its libraries to an instruction set; read when they load
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
}


def limit_isa(isa: str) -> None:
    """Keeps torch and the extension to `isa` of ISAS: starts this program again with torch's limits, then sets ours.

    Errors: SystemExit when the extension cannot be limited or torch did not obey.
    """
    if any(os.environ.get(name) != value for name, value in ISAS[isa].items()):
        sys.stdout.flush()
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **ISAS[isa]})
    taken = torch.backends.cpu.get_cpu_capability()
    if taken.lower() != isa:
        raise SystemExit(f"benchmarks: --isa {isa}: torch must keep to it, but takes {taken}")
    if native._C is not None:
        if not hasattr(native._C, "limit_isa"):
            raise SystemExit(f"benchmarks: --isa {isa}: the extension must have limit_isa; build it again")
        native._C.limit_isa(isa)


def describe(device: str = "cpu", isa: str | None = None) -> dict[str, object]:
    """The machine, the versions and the commit, as JSON values. isa: what limit_isa was called with."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*: (.*)", cpuinfo)
    flags = set(re.search(r"flags\s*: (.*)|$", cpuinfo)[0].split())
    sets = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    cpu, cores = model[1].strip() if model else platform.machine(), len(os.sched_getaffinity(0))
    name = f"{cpu} {sets[-1] if sets else ''} {cores} cores" if device == "cpu" else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return {
        "name": f"{slug}-as-{isa}" if isa else slug,
        "cpu": cpu,
        "cores": cores,
        "instruction_sets": sets[: sets.index(isa) + 1] if isa else sets,
        "isa": native._C.isa() if hasattr(native._C, "isa") else None,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": device if device == "cpu" else torch.cuda.get_device_name(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "fastmoe": __version__,
        "extension": native.missing() or "built",
        "backend": os.environ.get("FASTMOE_BACKEND") or None,
        "peers": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(
            _git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results", ":!RESULTS.md")
        ),
    }


PACKAGES = (
    "transformers",
    "triton",
    "scattermoe",
    "liger-kernel",
    "sonic-moe",
    "quack-kernels",
    "bitsandbytes",
    "torchao",
    "deepspeed",
)


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


def free_bytes(device: str = "cpu") -> int:
    """Memory that can still be taken on the device."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024


def roofs(quick: bool = False, device: str = "cpu") -> dict[str, float]:
    """The device's measured limits: "mm" in GFLOP/s, "triad" and "update" in GB/s.

    mm: torch.mm of random numbers, on the CPU float32 2048^3, on a GPU bfloat16 8192^3. triad: a = b + 3c, three
    float32 arrays of 128 MiB, on a GPU of 1 GiB. update: a = a * s in place, one read and one write.
    """
    gpu = device == "cuda"
    n, size = (256, 1 << 20) if quick else (8192, 1 << 28) if gpu else (2048, 1 << 25)
    x, y = (torch.randn(n, n, device=device, dtype=torch.bfloat16 if gpu else torch.float32) for _ in range(2))
    product = torch.empty_like(x)
    a, b, c = torch.zeros(size, device=device), *(torch.randn(size, device=device) for _ in range(2))
    return {
        "mm": 2 * n**3 / _median_seconds(lambda: torch.mm(x, y, out=product), gpu) / 1e9,
        "triad": 12 * size / _median_seconds(lambda: torch.add(b, c, alpha=3, out=a), gpu) / 1e9,
        "update": 8 * size / _median_seconds(lambda: a.mul_(0.999), gpu) / 1e9,
    }


def _median_seconds(call: Callable[[], object], gpu: bool, repeats: int = 9) -> float:
    wait = torch.cuda.synchronize if gpu else lambda: None
    call()
    seconds = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
