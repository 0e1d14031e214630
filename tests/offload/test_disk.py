from __future__ import annotations

import errno
import os

import pytest
import torch

from fastmoe.offload import disk


def test_bytes_come_back_in_pages_and_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_REQUEST", 2 * disk.PAGE)
    calls, real = [], disk.pwrite

    def short(handle, views, offset):  # the system may do less than it was asked to
        calls.append(offset)
        return real(handle, [views[0][: disk.PAGE]], offset)

    monkeypatch.setattr(disk, "pwrite", short)
    traffic = disk.Traffic()
    file = disk.File(tmp_path / "states", 8 * disk.PAGE, True, traffic)
    data = disk.buffer(5 * disk.PAGE)
    assert data.data_ptr() % disk.PAGE == 0
    data.copy_(torch.randint(0, 256, data.shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    file.write(data, 2 * disk.PAGE)
    assert sorted(calls) == [i * disk.PAGE for i in range(2, 7)]
    out = disk.buffer(6 * disk.PAGE)
    file.read(out, disk.PAGE)
    assert out[disk.PAGE :].equal(data) and not out[: disk.PAGE].any()
    assert traffic.bytes == {"read": out.nbytes, "write": data.nbytes} and min(traffic.seconds.values()) > 0
    file.close()
    again = disk.File(tmp_path / "states", 8 * disk.PAGE, False, traffic)
    again.read(out, disk.PAGE)
    assert out[disk.PAGE :].equal(data) and os.stat(again.path).st_blocks * 512 >= again.size
    again.remove()
    assert not list(tmp_path.iterdir())


def test_files_that_are_missing_there_already_or_cut(tmp_path):
    with pytest.raises(FileNotFoundError, match="the state file must be readable and writable"):
        disk.File(tmp_path / "states", disk.PAGE, False, disk.Traffic())
    file = disk.File(tmp_path / "states", 2 * disk.PAGE, True, disk.Traffic())
    with pytest.raises(FileExistsError):
        disk.File(tmp_path / "states", disk.PAGE, True, disk.Traffic())
    os.truncate(tmp_path / "states", 100)
    for use in (file.read, file.write):
        with pytest.raises(ValueError, match="states must hold 8192 bytes, got 100"):
            use(disk.buffer(disk.PAGE), 0)


def test_every_request_is_over_before_an_error_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_REQUEST", disk.PAGE)
    done = []

    def fail(handle, views, offset):
        done.append(offset)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    file = disk.File(tmp_path / "states", 8 * disk.PAGE, True, disk.Traffic())
    monkeypatch.setattr(disk, "pread", fail)
    with pytest.raises(OSError, match="must be there to read, got: Input/output error"):
        file.read(disk.buffer(8 * disk.PAGE), 0)
    assert len(done) == 8


def test_records_are_whole_or_known_not_to_be(tmp_path):
    record = disk.seal({"step": 3, "kept": [True, False]}, 2 * disk.PAGE)
    assert disk.unseal(record) == {"step": 3, "kept": [True, False]}
    for at in range(40):
        torn = record.clone()
        torn[at] ^= 1
        assert disk.unseal(torn) is None
    assert disk.unseal(torch.zeros_like(record)) is None
    with pytest.raises(ValueError, match="a record must fit 4096 bytes, got"):
        disk.seal({"long": "x" * 5000}, disk.PAGE)
    disk.put(tmp_path / "commit", record)
    disk.put(tmp_path / "commit", disk.seal({"step": 4}))
    assert disk.unseal(disk.get(tmp_path / "commit")) == {"step": 4} and disk.get(tmp_path / "none") is None
    assert [path.name for path in tmp_path.iterdir()] == ["commit"]
