import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "enable_fused_moe.py"


def test_both_runs_learn_alike():
    ran = subprocess.run([sys.executable, SCRIPT, "2"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert re.findall(r"model.layers.\d.mlp.experts  \w+ ", ran.stdout)
    rows = re.findall(r"^ +\d  +([\d.]+)  +([\d.]+)$", ran.stdout, re.MULTILINE)
    assert len(rows) == 2 and rows[0] != rows[1]
    for default, ours in rows:
        assert abs(float(default) - float(ours)) <= 1e-5 * float(default) + 1e-5
    assert re.search(r"tokens/s  grouped_mm [\d,]+  fastmoe [\d,]+", ran.stdout)
