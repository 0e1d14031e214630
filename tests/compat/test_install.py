import runpy
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXAMPLES.parent)


def test_import_fmoe_after_install():
    done = run("""
import fastmoe.compat
fmoe = fastmoe.compat.install()
assert fastmoe.compat.install() is fmoe
import fmoe as again
from fmoe import FMoETransformerMLP
from fmoe.gates import GShardGate
from fmoe.layers import FMoE
import fmoe.linear, fmoe.transformer
import fastmoe.compat.fmoe as ours
assert again is fmoe is ours and FMoE is ours.FMoE and fmoe.linear.FMoELinear is ours.FMoELinear
""")
    assert done.returncode == 0, done.stderr


def test_another_fmoe_is_not_replaced():
    done = run("""
import sys, types
sys.modules["fmoe"] = types.ModuleType("fmoe")
import fastmoe.compat
fastmoe.compat.install()
""")
    assert "RuntimeError: fastmoe.compat.install: call it before `import fmoe`; fmoe is already imported" in done.stderr


def test_the_example_learns(capsys):
    before = set(sys.modules)
    try:
        runpy.run_path(str(EXAMPLES / "fmoe_script.py"))
    finally:
        for name in set(sys.modules) - before:
            if name.split(".")[0] == "fmoe":
                del sys.modules[name]
    losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert len(losses) >= 3 and losses[-1] < 0.7 * losses[0]
