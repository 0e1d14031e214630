"""Tensors that are the bytes of a file."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from fastmoe import native
from fastmoe.offload.plan import human

_libc = ctypes.CDLL(None, use_errno=True)  # its calls release the GIL
_MS_SYNC, _MADV_DONTNEED, _MADV_POPULATE_WRITE = 4, 4, 23


def check_space(directory: Path, size: int) -> None:
    """OSError (ENOSPC) unless the file system of `directory` has `size` bytes free."""
    room = os.statvfs(directory)
    if size > room.f_bavail * room.f_frsize:
        raise OSError(
            errno.ENOSPC,
            f"fastmoe.offload: directory must have {human(size)} free, got {human(room.f_bavail * room.f_frsize)}",
            str(directory),
        )


def allocate(path: Path, size: int) -> None:
    """Makes a new file of `size` zero bytes whose blocks are reserved: writing into it later cannot fill the disk.

    Errors: OSError with the system's errno (ENOSPC, EROFS, EACCES, EEXIST, ...); no file is left behind.
    """
    try:
        check_space(path.parent, size)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except OSError as error:
        raise named(error, "directory must be writable and have room", path.parent) from None
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        path.unlink()
        raise named(error, f"directory must have {human(size)} free", path.parent) from None
    finally:
        os.close(file)


def named(error: OSError, wanted: str, path: Path) -> OSError:
    """The same error, saying whose it is, what was wanted and where."""
    if (error.strerror or "").startswith("fastmoe"):
        return error
    return OSError(error.errno, f"fastmoe.offload: {wanted}, got: {error.strerror}", str(path))


class TensorFile:
    """One file mapped into memory as a list of tensors; what is written to a tensor is written to the file.

    layout: shape and dtype of each tensor, in order of place; tensors start at multiples of 64 bytes. create: make a
    new file of zeros, or open one that is there. Errors: OSError naming the file; ValueError where it has another size.
    """

    def __init__(self, path: str | Path, layout: Sequence[tuple[Sequence[int], torch.dtype]], create: bool = True):
        self.path = Path(path)
        spans = [(torch.Size(shape).numel() * dtype.itemsize, shape, dtype) for shape, dtype in layout]
        self.size = file_size(layout)
        if create:
            allocate(self.path, self.size)
        try:
            self._file = open(self.path, "r+b")  # noqa: SIM115
        except OSError as error:
            raise named(error, "the state file must be readable and writable", self.path) from None
        self._check_size()
        self._bytes = torch.frombuffer(mmap.mmap(self._file.fileno(), self.size), dtype=torch.uint8)
        self.tensors, start = [], 0
        for length, shape, dtype in spans:
            self.tensors.append(self._bytes[start : start + length].view(dtype).view(shape))
            start += _aligned(length)

    def prefetch(self) -> None:
        """Reads the file into memory, ready to be written; returns when it is there."""
        self._check_size()
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        self._advise("madvise", _MADV_POPULATE_WRITE, tolerated=errno.EINVAL)  # kernels before 5.14 fault page by page

    def write_back(self) -> None:
        """Writes what changed to the disk, returns when it is there, and gives the memory back."""
        self._check_size()
        self._advise("msync", _MS_SYNC)
        self._advise("madvise", _MADV_DONTNEED)
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _advise(self, function: str, how: int, tolerated: int = 0) -> None:
        if getattr(_libc, function)(ctypes.c_void_p(native.ptr(self._bytes)), ctypes.c_size_t(self.size), how):
            code = ctypes.get_errno()
            if code != tolerated:
                raise OSError(code, f"fastmoe.offload: {function} failed: {os.strerror(code)}", str(self.path))

    def _check_size(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if size != self.size:
            raise ValueError(f"fastmoe.offload: {self.path} must hold {self.size} bytes, got {size}")


def file_size(layout: Sequence[tuple[Sequence[int], torch.dtype]]) -> int:
    """Bytes of a TensorFile of this layout, a multiple of the page size."""
    size = sum(_aligned(torch.Size(shape).numel() * dtype.itemsize) for shape, dtype in layout)
    return max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE


def _aligned(size: int) -> int:
    return -(-size // 64) * 64
