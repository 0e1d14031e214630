from __future__ import annotations

import errno
import os

import pytest
import torch

from fastmoe.offload import TensorFile, disk

LAYOUT = [((3, 5), torch.float32), ((0,), torch.float32), ((7,), torch.float64), ((), torch.bfloat16)]


def test_tensors_are_the_bytes_of_the_file(tmp_path):
    file = TensorFile(tmp_path / "states", LAYOUT)
    assert [(tensor.shape, tensor.dtype) for tensor in file.tensors] == [(torch.Size(s), d) for s, d in LAYOUT]
    assert not any(tensor.any() for tensor in file.tensors) and all(t.data_ptr() % 64 == 0 for t in file.tensors)
    for i, tensor in enumerate(file.tensors):
        tensor.fill_(i + 1.5)
    file.write_back()
    assert all((tensor == i + 1.5).all() for i, tensor in enumerate(file.tensors))
    again = TensorFile(tmp_path / "states", LAYOUT, create=False)
    again.prefetch()
    assert all(map(torch.equal, file.tensors, again.tensors))
    assert os.stat(tmp_path / "states").st_blocks * 512 >= file.size == disk.file_size(LAYOUT)


def test_a_file_larger_than_the_disk_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(OSError, match=r"fastmoe\.offload: directory must have 1024.00 TiB free, got .*iB") as caught:
        TensorFile(tmp_path / "states", [((1 << 50,), torch.uint8)])
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def fail_with(code):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_disk_that_fills_while_blocks_are_reserved_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", fail_with(errno.ENOSPC))
    with pytest.raises(OSError, match=r"directory must have 4.00 KiB free, got: No space left") as caught:
        TensorFile(tmp_path / "states", LAYOUT)
    assert caught.value.errno == errno.ENOSPC and not list(tmp_path.iterdir())


def test_a_read_only_directory_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", fail_with(errno.EROFS))
    with pytest.raises(
        OSError, match=f"directory must be writable and have room, got: Read-only.*{tmp_path}"
    ) as caught:
        TensorFile(tmp_path / "states", LAYOUT)
    assert caught.value.errno == errno.EROFS


def test_missing_existing_and_truncated_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="the state file must be readable and writable"):
        TensorFile(tmp_path / "states", LAYOUT, create=False)
    file = TensorFile(tmp_path / "states", LAYOUT)
    with pytest.raises(FileExistsError):
        TensorFile(tmp_path / "states", LAYOUT)
    os.truncate(tmp_path / "states", 100)
    for use in (file.prefetch, file.write_back, lambda: TensorFile(tmp_path / "states", LAYOUT, create=False)):
        with pytest.raises(ValueError, match=r"states must hold 4096 bytes, got 100"):
            use()
