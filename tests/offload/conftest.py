from __future__ import annotations

import pytest
import torch

from fastmoe.offload import disk


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(disk, "sync", lambda handle: None)
    monkeypatch.setattr(disk, "sync_directory", lambda path: None)
