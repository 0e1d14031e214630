"""The door to the C++ extension: whether it is there, addresses of tensors, thread count, memory."""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch  # first: the extension then shares torch's OpenMP runtime

try:
    import fastmoe._C as _C

    _WHY_NOT = None
except ModuleNotFoundError:
    _C, _WHY_NOT = None, ""
except ImportError as error:
    _C, _WHY_NOT = None, f" or does not load ({error})"

_kept = threading.local()
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
    address = strided_ptr(tensor)
    if not tensor.is_contiguous():
        raise ValueError(f"fastmoe.native: a contiguous CPU tensor is wanted, got strides {tensor.stride()}")
    return address


def strided_ptr(tensor: torch.Tensor) -> int:
    """The address of the first element of a CPU tensor of any strides."""
    if type(tensor) not in PLAIN:
        raise TypeError(
            f"fastmoe.native: a plain torch.Tensor is wanted, got {type(tensor).__name__} (DTensor: to_local() first)"
        )
    if not tensor.is_cpu:
        raise ValueError(f"fastmoe.native: a CPU tensor is wanted, got one on {tensor.device}")
    address = tensor.data_ptr()
    if address == 0 and tensor.numel():
        raise ValueError("fastmoe.native: the tensor has no memory (fake or freed storage)")
    return address


PLAIN = {torch.Tensor, torch.nn.Parameter, torch.nn.Buffer}
_is_cpu = attrgetter("is_cpu")


class Known(list):
    """Tensors that were looked at before: dense, of one device, at these addresses still. notes: what a backend worked
    out about them.
    """

    addresses: array

    def __init__(self, tensors: Iterable[torch.Tensor]):
        super().__init__(tensors)
        self.notes: dict[str, object] = {}


def noted(tensors: Sequence[torch.Tensor], name: str, find: Callable[[], object]) -> object:
    """find(), or what it was for these Known tensors."""
    if not isinstance(tensors, Known):
        return find()
    if name not in tensors.notes:
        tensors.notes[name] = find()
    return tensors.notes[name]


def ptrs(tensors: Sequence[torch.Tensor]) -> array:
    """The addresses of dense CPU tensors, with the checks of `ptr`."""
    if isinstance(tensors, Known) and all(tensors.addresses):
        return tensors.addresses
    plain = set(map(type, tensors)) <= PLAIN
    if plain and all(map(_is_cpu, tensors)) and all(map(torch.Tensor.is_contiguous, tensors)):
        addresses = array("Q", map(torch.Tensor.data_ptr, tensors))
        if all(addresses):
            return addresses
    return array("Q", map(ptr, tensors))


_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MASTERS = {torch.float32: 1, torch.int8: 2}  # fm_master of fastmoe/common.h


def dtype_code(tensor: torch.Tensor) -> int:
    """FM_F32, FM_BF16 or FM_F16 of fastmoe/common.h."""
    try:
        return _CODES[tensor.dtype]
    except KeyError:
        raise TypeError(f"fastmoe.native: float32, bfloat16 or float16 is wanted, got {tensor.dtype}") from None


_POOLED = 4 << 20  # bytes from which memory is kept for the next tensor
_HUGE_PAGE = 2 << 20
_OLD = 4096  # requests after which a block that served none is unmapped


class MemoryStats(NamedTuple):
    """Bytes of the blocks behind `empty`: held by tensors, waiting for the next tensor, held at once at most."""

    in_use: int
    idle: int
    peak: int


class _Block:
    """A private anonymous mapping whose `size` bytes from `start` on begin at a huge page."""

    def __init__(self, size: int):
        self.size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.map = mmap.mmap(-1, self.size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.start = -torch.frombuffer(self.map, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
        self.idle_since = 0
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self.map.madvise(mmap.MADV_HUGEPAGE, self.start, self.size)


class _Pool:
    """Blocks that no tensor holds, kept because touching fresh memory costs as much as computing what goes there."""

    def __init__(self):
        self.lock = threading.Lock()
        self.returned: deque[_Block] = deque()  # from finalizers: these run anywhere, even inside the lock
        self.idle: list[_Block] = []  # in order of return
        self.in_use = self.idle_bytes = self.peak = self.requests = 0

    def take(self, size: int) -> _Block:
        """The smallest idle block of size to 1.25 size, of equal ones the last used, or a new one."""
        with self.lock:
            self.requests += 1
            self.settle()
            fitting = [block for block in reversed(self.idle) if size <= block.size <= 1.25 * size]
            if fitting:
                block = min(fitting, key=lambda block: block.size)
                self.idle.remove(block)
                self.idle_bytes -= block.size
            else:
                block = self.map(size)
            self.in_use += block.size
            self.peak = max(self.peak, self.in_use)
            return block

    def map(self, size: int) -> _Block:
        try:
            return _Block(size)
        except OSError:
            self.clear()
        try:
            return _Block(size)
        except OSError as error:
            raise torch.OutOfMemoryError(
                f"fastmoe.native.empty: {size} bytes are wanted beside {self.in_use} in use, got {error}"
            ) from None

    def give_back(self, block: _Block) -> None:
        """Never waits: whoever holds the lock, or takes it next, settles."""
        self.returned.append(block)
        if self.lock.acquire(blocking=False):
            try:
                self.settle()
            finally:
                self.lock.release()

    def settle(self) -> None:
        """Takes in what was returned; unmaps the oldest while it is too old or more is idle than ever was in use."""
        while self.returned:
            block = self.returned.popleft()
            block.idle_since = self.requests
            self.idle.append(block)
            self.in_use -= block.size
            self.idle_bytes += block.size
        while self.idle and (self.idle_bytes > self.peak or self.idle[0].idle_since < self.requests - _OLD):
            self.idle_bytes -= self.idle.pop(0).size

    def clear(self) -> None:
        self.idle.clear()
        self.idle_bytes = 0

    def forked(self) -> None:
        """A child maps its own: to write to memory it shares with its parent would copy what the parent has there."""
        self.clear()
        self.lock.release()


_pool = _Pool()
os.register_at_fork(before=_pool.lock.acquire, after_in_parent=_pool.lock.release, after_in_child=_pool.forked)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """torch.empty on the CPU. From 4 MiB up it lies in huge pages of a block that goes back to a pool when torch frees
    the tensor's storage, and is reused without page faults.

    The storage has the tensor's exact size and cannot be resized (as that of torch.from_numpy). Errors:
    torch.OutOfMemoryError where the system has no such memory even after idle blocks were given back.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _POOLED or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    block = _pool.take(size)
    memory = memoryview(block.map)[block.start : block.start + size]  # torch holds it as long as the storage lives
    weakref.finalize(memory, _pool.give_back, block).atexit = False
    tensor = torch.frombuffer(memory, dtype=dtype).resize_(shape)
    if torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory:
        tensor.fill_(torch.empty((), dtype=dtype, device="cpu"))
    return tensor


def huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Asks the system to back a fresh CPU tensor of 4 MiB or more with huge pages, and returns the tensor.

    Pages that were touched before stay as they are. Weights that are read once a step are read a fifth faster so.
    """
    size = tensor.numel() * tensor.element_size()
    if size >= _POOLED and type(tensor) in PLAIN and tensor.is_cpu and hasattr(mmap, "MADV_HUGEPAGE"):
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        madvise(first, last - first, mmap.MADV_HUGEPAGE)  # refused by a kernel without: then they stay small
    return tensor


def empty_cache() -> None:
    """Gives all idle blocks of `empty` back to the system."""
    with _pool.lock:
        _pool.settle()
        _pool.clear()


def memory_stats() -> MemoryStats:
    """What `empty` holds now. A kept workspace counts as in use."""
    with _pool.lock:
        _pool.settle()
        return MemoryStats(_pool.in_use, _pool.idle_bytes, _pool.peak)


def workspace(size: int) -> torch.Tensor:
    """`size` bytes of scratch memory, 64-byte aligned, kept by this thread for its next call: use it within one op
    only.
    """
    kept = getattr(_kept, "workspace", None)
    if kept is None or kept.numel() < size:
        kept = _kept.workspace = empty(size, dtype=torch.uint8)
    return kept
