"""Triton's kernels in its interpreter, in a process of their own, since it is chosen when a kernel is decorated:
`pytest tests/triton`. A plain run leaves these files to tests/test_compile.py, which starts that process.
"""

import os
import sys

import pytest
import torch

if any("tests/triton" in word for word in sys.argv[1:]):
    os.environ["TRITON_INTERPRET"] = "1"
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch):
    monkeypatch.setenv("FASTMOE_BACKEND", "triton")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
