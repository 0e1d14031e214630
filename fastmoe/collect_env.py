"""What fastmoe finds on this machine, what is missing and how to get it: `python -m fastmoe.collect_env`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

from fastmoe import jit, native
from fastmoe.ops.registry import explain
from fastmoe.version import __version__

_COMPILER = "apt-get install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora, RHEL)"


def collect() -> str:
    """Versions, devices, compilers, what is missing with the command that gets it, and fastmoe.explain()."""
    compiler, nvcc = _tool("c++", "g++", "clang++"), _tool("nvcc")
    rows = [
        ("fastmoe", __version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", torch.__version__),
        ("triton", _version("triton", "pytorch-triton-rocm")),
        ("numpy", _version("numpy")),
        ("cupy", _cupy() or "not installed"),
        ("compiler", compiler or "not found"),
        ("nvcc", nvcc or "not found"),
        ("CPU", _cpu()),
        ("instruction set", native._C.isa() if native.missing() is None else "that of torch"),
        ("threads", f"{torch.get_num_threads()} OpenMP threads on {os.cpu_count()} cores"),
        ("CUDA devices", _devices()),
        ("C++ extension", "built" if native.missing() is None else "not built"),
        ("FASTMOE_BACKEND", os.environ.get("FASTMOE_BACKEND") or "not set"),
    ]
    wanted = [
        ("a C++17 compiler builds the extension", compiler, _COMPILER),
        (
            "the C++ extension makes the CPU fast",
            native.missing() is None,
            "pip install -e . (in a checkout, once a compiler is there)",
        ),
        ("Triton serves NVIDIA GPUs", jit.triton_missing() is None, "pip install 'triton>=3.6'"),
    ]
    if torch.cuda.is_available():
        wanted.append(
            (
                "CuPy compiles the CUDA C++ kernels",
                jit.cuda_missing() is None,
                "pip install cupy-cuda13x (or cupy-cuda12x)",
            )
        )
    lines = [f"{name:<16} {value}" for name, value in rows]
    missing = [f"{what}: {command}" for what, found, command in wanted if not found]
    if native.missing():
        missing.append(f"why there is no extension: {native.missing()}")
    try:
        table = explain()
    except (RuntimeError, ValueError) as error:
        table = str(error)
    return "\n".join([*lines, "", "missing", *(missing or ["nothing"]), "", table])


def _version(*distributions: str) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _cupy() -> str | None:
    for dist in importlib.metadata.distributions():
        name = dist.metadata["Name"] or ""
        if name == "cupy" or name.startswith("cupy-cuda"):
            return f"{dist.version} ({name})"
    return None


def _tool(*names: str) -> str | None:
    """The line with the version number of the first of these programs that is there, and its path."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        return None
    try:
        words = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20).stdout.splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        return f"{path} does not run ({error})"
    line = next((line for line in words if re.search(r"\d+\.\d+\.\d+", line)), "unknown version")
    return f"{line.strip()} ({path})"


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def _devices() -> str:
    if not torch.cuda.is_available():
        return (
            f"none (torch is built for CUDA {torch.version.cuda})"
            if torch.version.cuda
            else "none (a CPU build of torch)"
        )
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)" for p in properties)


if __name__ == "__main__":
    print(collect())
