"""Triton's kernels on a real device: `pytest tests/gpu`. Where there is none nothing here is collected."""

import pytest
import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch, tmp_path_factory):
    """Triton for every op that has it; tuned blocks are looked for anew, in a cache of this run."""
    monkeypatch.setenv("FASTMOE_BACKEND", "triton")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
