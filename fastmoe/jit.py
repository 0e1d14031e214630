"""Kernels that are compiled at run time: whether Triton and CUDA C++ can serve here, and the door to each."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

_SOURCES = (
    Path(__file__).parent / "csrc" / "cuda",
    Path(__file__).parent.parent / "csrc" / "cuda",
)  # installed, checkout


@cache
def triton_missing() -> str | None:
    """None when Triton can serve, else why not and how to get it."""
    try:
        import triton
    except Exception as error:  # a broken install fails in many ways
        return f"Triton does not import ({error}); run `pip install 'triton>=3.6'`"
    version = tuple(int(part) for part in re.findall(r"\d+", triton.__version__)[:2])
    return None if version >= (3, 6) else f"Triton 3.6 or newer is wanted, got {triton.__version__}"


@cache
def cuda_missing() -> str | None:
    """None when CUDA C++ can be compiled and run (a CUDA device, CuPy with NVRTC, the sources), else why not."""
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # without a driver or NVRTC, CuPy imports and its calls raise errors of many kinds
        return f"CuPy cannot serve ({error}); run `pip install cupy-cuda13x` (or the wheel of your CUDA version)"
    return None if any(folder.is_dir() for folder in _SOURCES) else f"the CUDA sources are not in {_SOURCES[0]}"


def triton_version() -> str:
    """Triton's version, "" where it does not import."""
    return "" if triton_missing() else importlib.metadata.version("triton")


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter (TRITON_INTERPRET=1 when they were imported)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


class Device(NamedTuple):
    """What a kernel can count on: bytes of shared memory a block may use, multiprocessors."""

    shared_memory: int
    processors: int


@cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.shared_memory_per_block_optin, properties.multi_processor_count)


def device(tensor: torch.Tensor) -> Device:
    """The tensor's device; an H200 where it is on none."""
    return _device(tensor.device.index) if tensor.is_cuda else Device(227 << 10, 132)


@cache
def _compile(source: str, function: str, defines: tuple[tuple[str, int], ...], device: int):
    import cupy

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"fastmoe.jit: {source}:{function} {dict(defines)} must be compiled before a CUDA graph is captured; "
            "call the op once outside the capture"
        )
    path = next(folder / source for folder in _SOURCES if (folder / source).is_file())
    options = ("-std=c++17", *(f"-D{name}={value}" for name, value in defines))
    with cupy.cuda.Device(device):
        kernel = cupy.RawModule(code=path.read_text(), options=options).get_function(function)
        kernel.compile()
    return kernel


def _current_stream(device: torch.device):
    """torch's current stream as CuPy sees it; ExternalStream is CuPy 13's way."""
    import cupy

    stream = torch.cuda.current_stream(device)
    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(stream)
    return cupy.cuda.ExternalStream(stream.cuda_stream, device.index)


def load(source: str, function: str, defines: dict[str, int]) -> Callable:
    """The kernel `function` of csrc/cuda/<source>, compiled with these macros for the device it is launched on.

    Returns launch(grid, block, *args): grid and block are the numbers of blocks and of threads in one; args are
    tensors of one CUDA device, passed by address, and ints, passed as 64 bits. It runs on torch's current stream there
    and waits for nothing. The first launch with these macros compiles; RuntimeError if that is during the capture of a
    CUDA graph.
    """
    macros = tuple(sorted(defines.items()))

    def launch(grid: int, block: int, *args: torch.Tensor | int) -> None:
        import cupy

        device = next(arg.device for arg in args if isinstance(arg, torch.Tensor))
        with torch.cuda.device(device):
            kernel = _compile(source, function, macros, device.index)
            with cupy.cuda.Device(device.index), _current_stream(device):
                kernel(
                    (grid,), (block,), tuple(arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args)
                )

    return launch
