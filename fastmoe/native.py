"""The door to the C++ extension: whether it is there, addresses of tensors, thread count, memory."""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

import torch  # first: the extension then shares torch's OpenMP runtime

try:
    import fastmoe._C as _C

    _WHY_NOT = None
except ModuleNotFoundError:
    _C, _WHY_NOT = None, ""
except ImportError as error:
    _C, _WHY_NOT = None, f" or does not load ({error})"

_HUGE = 4 << 20
_kept = threading.local()
_libc = ctypes.CDLL(None, use_errno=True)
_forked = False


def _mark_forked():
    global _forked
    _forked = True


os.register_at_fork(after_in_child=_mark_forked)


def missing() -> str | None:
    """None when the extension is loaded, else why it is not and how to get it."""
    if _C is not None:
        return None
    return f"the C++ extension is not built{_WHY_NOT}; install a C++17 compiler and run `pip install -e .` again"


def num_threads() -> int:
    """Threads an op may use: torch's setting at each call; 1 in a forked child, where OpenMP cannot start a team."""
    return 1 if _forked else torch.get_num_threads()


def ptr(tensor: torch.Tensor | None) -> int:
    """The address of a dense CPU tensor; 0 for None. Refuses what would silently give a wrong address."""
    if tensor is None:
        return 0
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        raise TypeError(
            f"fastmoe.native: a plain torch.Tensor is wanted, got {type(tensor).__name__} (DTensor: to_local() first)"
        )
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"fastmoe.native: a contiguous CPU tensor is wanted, got strides {tensor.stride()} on {tensor.device}"
        )
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise ValueError("fastmoe.native: the tensor has no memory (fake or freed storage)")
    return address


_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def dtype_code(tensor: torch.Tensor) -> int:
    """FM_F32, FM_BF16 or FM_F16 of fastmoe/common.h."""
    try:
        return _CODES[tensor.dtype]
    except KeyError:
        raise TypeError(f"fastmoe.native: float32, bfloat16 or float16 is wanted, got {tensor.dtype}") from None


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """torch.empty on the CPU, backed by huge pages from 4 MiB up (page faults then cost a quarter)."""
    tensor = torch.empty(shape, dtype=dtype)
    if tensor.nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return tensor


def workspace(size: int) -> torch.Tensor:
    """`size` bytes of scratch memory, 64-byte aligned, kept by this thread for its next call: use it within one op
    only.
    """
    kept = getattr(_kept, "workspace", None)
    if kept is None or kept.numel() < size:
        kept = _kept.workspace = empty(size, dtype=torch.uint8)
    return kept
