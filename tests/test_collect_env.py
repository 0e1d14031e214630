import re
import subprocess
import sys
from pathlib import Path

import torch

from fastmoe import collect_env, jit, native, testing
from fastmoe.ops.registry import OPS

ROOT = Path(__file__).parents[1]


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_report_as_a_program():
    ran = run("-m", "fastmoe.collect_env")
    assert ran.returncode == 0, ran.stderr
    for name in (
        "fastmoe",
        "python",
        "torch",
        "triton",
        "numpy",
        "cupy",
        "compiler",
        "CPU",
        "instruction set",
        "threads",
        "C++ extension",
    ):
        assert re.search(rf"^{re.escape(name)} +\S", ran.stdout, re.M), name
    assert torch.__version__ in ran.stdout and all(f"{op.family}.{op.name}" in ran.stdout for op in OPS.values())


def test_says_how_to_get_what_is_missing(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: "not built here")
    monkeypatch.setattr(jit, "triton_missing", lambda: "no Triton")
    monkeypatch.setattr(collect_env.shutil, "which", lambda name: None)
    text = collect_env.collect()
    for command in ("apt-get install g++", "pip install -e .", "pip install 'triton>=3.6'", "not built here"):
        assert command in text
    assert re.search(r"^compiler +not found$", text, re.M) and re.search(r"^C\+\+ extension +not built$", text, re.M)


def test_nothing_missing(monkeypatch):
    monkeypatch.setattr(native, "missing", lambda: None)
    monkeypatch.setattr(jit, "triton_missing", lambda: None)
    monkeypatch.setattr(collect_env, "_tool", lambda *names: "found")
    assert "missing\nnothing\n" in collect_env.collect()


def test_a_wish_that_cannot_be_met_is_told_not_raised():
    with testing.backend("experts=cuda"):
        text = collect_env.collect()
    assert re.search(r"^FASTMOE_BACKEND +experts=cuda$", text, re.M) and "cannot run" in text


def test_import_one_op_example():
    ran = run("examples/import_one_op.py")
    assert ran.returncode == 0 and "gradient of gate_up_proj [8, 96, 32]" in ran.stdout, ran.stderr
