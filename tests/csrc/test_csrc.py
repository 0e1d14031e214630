"""The C ABI's own test programs, built with AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "sanitized"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def run(*words):
    ran = subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": PATH, "ASAN_OPTIONS": "detect_leaks=1", "OMP_WAIT_POLICY": "passive"},
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-3000:]
    return ran.stdout


@pytest.mark.apart
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    not shutil.which("c++", path=PATH) or not shutil.which("cmake", path=PATH), reason="no C++ compiler or no CMake"
)
def test_c_abi_under_sanitizers():
    run(
        "cmake",
        "-S",
        ".",
        "-B",
        BUILD,
        "-G",
        "Ninja",
        "-DFM_PYTHON=OFF",
        "-DFM_TESTS=ON",
        "-DFM_SANITIZE=address,undefined",
    )
    run("cmake", "--build", BUILD)
    out = run("ctest", "--test-dir", BUILD, "--output-on-failure", "--no-tests=error", "--timeout", "300")
    programs = list((ROOT / "csrc" / "tests").glob("test_*.cpp"))
    assert (
        f"tests passed, 0 tests failed out of {len(programs)}" in out
        or f"100% tests passed out of {len(programs)}" in out
    ), out
