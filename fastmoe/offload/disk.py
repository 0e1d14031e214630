"""Files of tensors: whole pages past the system's cache, several requests in flight."""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastmoe import native
from fastmoe.offload.plan import human

PAGE = mmap.PAGESIZE
_REQUEST, _REQUESTS = 4 << 20, 4  # bytes of a request, requests in flight

# The only calls that touch the contents of a file; tests put failing ones in their place.
pread, pwrite, sync, rename = os.preadv, os.pwritev, os.fdatasync, os.replace

_pool = ThreadPoolExecutor(_REQUESTS, "offload-io")
_counting = threading.Lock()


class Traffic:
    """Bytes moved and the seconds it took, "read" and "write" each, over all files."""

    def __init__(self):
        self.bytes, self.seconds = dict.fromkeys(("read", "write"), 0), dict.fromkeys(("read", "write"), 0.0)

    def add(self, kind: str, size: int, start: float) -> None:
        with _counting:
            self.bytes[kind] += size
            self.seconds[kind] += time.perf_counter() - start


class File:
    """A file of `size` bytes, read and written in whole pages from and to the memory of uint8 tensors (`buffer`).

    create: make it, its blocks reserved, so that writing into it later cannot fill the disk; else it must be there and
    have that size. Tensors of another device pass through a pinned buffer of one request.

    Errors: OSError with the system's errno that names the file; ValueError where it has another size.
    """

    def __init__(self, path: Path, size: int, create: bool, traffic: Traffic):
        self.path, self.size, self._traffic = path, size, traffic
        if create:
            _allocate(path, size)
        try:
            self._handle = os.open(path, os.O_RDWR)
        except OSError as error:
            raise named(error, "the state file must be readable and writable", path) from None
        self.check_size()
        try:
            os.close(self._handle)
            self._handle = os.open(path, os.O_RDWR | os.O_DIRECT)
        except OSError:  # a file system without
            self._handle = os.open(path, os.O_RDWR)

    def check_size(self) -> None:
        size = os.fstat(self._handle).st_size
        if size != self.size:
            raise ValueError(f"fastmoe.offload: {self.path} must hold {self.size} bytes, got {size}")

    def read(self, out: torch.Tensor, offset: int) -> None:
        self._move("read", out, offset)

    def write(self, data: torch.Tensor, offset: int) -> None:
        self._move("write", data, offset)

    def _move(self, kind: str, tensor: torch.Tensor, offset: int) -> None:
        self.check_size()
        start = time.perf_counter()
        if tensor.is_cpu:
            starts = range(0, tensor.nbytes, _REQUEST)
            requests = [_pool.submit(self._request, kind, tensor[i : i + _REQUEST], offset + i) for i in starts]
            errors = [request.exception() for request in requests]  # waits for all: the memory is in use until then
            for error in filter(None, errors):
                raise error
        else:
            staging = buffer(min(tensor.nbytes, _REQUEST), pinned=True)
            for i in range(0, tensor.nbytes, _REQUEST):
                part = tensor[i : i + _REQUEST]
                if kind == "write":
                    staging[: part.nbytes].copy_(part)
                self._request(kind, staging[: part.nbytes], offset + i)
                if kind == "read":
                    part.copy_(staging[: part.nbytes])
        self._traffic.add(kind, tensor.nbytes, start)

    def _request(self, kind: str, tensor: torch.Tensor, offset: int) -> None:
        view = memoryview((ctypes.c_char * tensor.nbytes).from_address(native.ptr(tensor)))
        done = 0
        while done < tensor.nbytes:
            try:
                moved = (pread if kind == "read" else pwrite)(self._handle, [view[done:]], offset + done)
            except OSError as error:
                raise named(error, f"bytes {offset + done} and on must be there to {kind}", self.path) from None
            if not moved:
                raise ValueError(f"fastmoe.offload: {self.path} must hold {self.size} bytes, ended at {offset + done}")
            done += moved

    def sync(self) -> None:
        try:
            sync(self._handle)
        except OSError as error:
            raise named(error, "what was written must reach the disk", self.path) from None

    def close(self) -> None:
        os.close(self._handle)

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)


def buffer(size: int, device: torch.device | str = "cpu", pinned: bool = False) -> torch.Tensor:
    """uint8 [size] that starts on a page."""
    if torch.device(device).type != "cpu":
        return torch.empty(size, dtype=torch.uint8, device=device)
    bytes_ = native.huge_pages(torch.empty(size + PAGE, dtype=torch.uint8, pin_memory=pinned))
    first = -bytes_.data_ptr() % PAGE
    return bytes_[first : first + size]


def pages(size: int) -> int:
    """`size` rounded up to whole pages."""
    return -(-size // PAGE) * PAGE


def check_space(directory: Path, size: int) -> None:
    """OSError (ENOSPC) unless the file system of `directory` has `size` bytes free."""
    room = os.statvfs(directory)
    if size > room.f_bavail * room.f_frsize:
        raise OSError(
            errno.ENOSPC,
            f"fastmoe.offload: directory must have {human(size)} free, got {human(room.f_bavail * room.f_frsize)}",
            str(directory),
        )


def _allocate(path: Path, size: int) -> None:
    """Makes a file of `size` zero bytes with its blocks; no file is left behind where that fails."""
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


def seal(content: dict, size: int = 0) -> torch.Tensor:
    """A record of `size` bytes, whole pages (0: as many as it takes): JSON behind its length and CRC."""
    text = json.dumps(content).encode()
    head = len(text).to_bytes(8, "little") + zlib.crc32(text).to_bytes(8, "little")
    size = size or pages(len(head) + len(text))
    if len(head) + len(text) > size:
        raise ValueError(f"fastmoe.offload: a record must fit {size} bytes, got {len(text)}")
    out = buffer(size).zero_()
    out[: len(head) + len(text)] = torch.frombuffer(bytearray(head + text), dtype=torch.uint8)
    return out


def unseal(record: torch.Tensor) -> dict | None:
    """The content of a sealed record; None where it is torn or was never written."""
    data = record.numpy().tobytes()
    length, crc = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")
    text = data[16 : 16 + length]
    return json.loads(text) if length and len(text) == length and zlib.crc32(text) == crc else None


def crc(tensor: torch.Tensor) -> int:
    """CRC-32 of a uint8 tensor's bytes."""
    return zlib.crc32(tensor.cpu().numpy())


def put(path: Path, data: torch.Tensor) -> None:
    """Replaces the file's content at once: after a crash it is the old or the new one."""
    draft = path.with_suffix(".new")
    try:
        with open(draft, "wb", buffering=0) as file:
            if pwrite(file.fileno(), [memoryview(data.numpy())], 0) < data.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(file.fileno())
        rename(draft, path)
        sync_directory(path.parent)
    except OSError as error:
        raise named(error, "the record must be written", path) from None


def get(path: Path) -> torch.Tensor | None:
    """The file's bytes, None where there is none."""
    try:
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
    except (FileNotFoundError, NotADirectoryError):
        return None


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
