"""Who may import whom, which twin of an op is missing, what the environment may change, what `import fastmoe` needs."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoe.ops.registry import OPS

ROOT = Path(__file__).parents[1]
FAMILIES = sorted({op.family for op in OPS.values()})

# A column imports those below it: never one above, never a neighbour of its own. ops does without config.
COLUMNS = [
    {"__main__"},
    {"examples", "benchmarks", "cli", "collect_env"},
    {"trainer", "scale", "compat", "integrations"},
    {"nn", "optim", "offload"},
    {"comm", "testing"},
    {"ops"},
    {"jit", "native"},
    {"_C", "config", "version"},
]
COLUMN = {name: i for i, names in enumerate(COLUMNS) for name in names}
ONLY_IN = {  # third-party module -> the files that may import it
    "triton": r"fastmoe/ops/\w+/kernels\.py|fastmoe/jit\.py",
    "cupy": r"fastmoe/jit\.py",
    "mpi4py": r"fastmoe/comm/mpi\.py|benchmarks/scaling/.*",
    "pybind11": r"setup\.py",
}
ENVIRONMENT = {
    "FASTMOE_BACKEND",
    "FASTMOE_NO_EXT",  # ours
    "TRITON_INTERPRET",
    "XDG_CACHE_HOME",
    "PATH",
    "HOME",
    "TERM",
    "COLUMNS",
    "NO_COLOR",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_JOB_NODELIST",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
}


def sources(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(tree):
    """Dotted names that a module imports, anywhere in it: `from fastmoe import nn` gives fastmoe.nn."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            assert node.level == 0, "imports are absolute"


def broken_rules(relative, text):
    """The import rules that a file of this name and text breaks."""
    parts = Path(relative).with_suffix("").parts
    package = parts[1] if parts[0] == "fastmoe" else parts[0]
    for name in imported(ast.parse(text)):
        top, *rest = name.split(".")
        if top in ONLY_IN and not re.fullmatch(ONLY_IN[top], relative):
            yield f"{relative} imports {top}"
        if package == "ops" and (name + ".").startswith("torch.distributed."):
            yield f"{relative} imports torch.distributed"
        if top != "fastmoe" or package == "__init__":
            continue
        target = rest[0] if rest else None
        if target not in COLUMN:  # the package itself, or a name it re-exports
            if COLUMN[package] > COLUMN["cli"]:
                yield f"{relative} imports {name}: the package as a whole is for users"
        elif (target != package and COLUMN[target] <= COLUMN[package]) or (package == "ops" and target == "config"):
            yield f"{relative} imports fastmoe.{target}"


def test_imports_go_right_only():
    broken = [
        rule
        for path in sources("fastmoe", "examples", "benchmarks")
        for rule in broken_rules(str(path.relative_to(ROOT)), path.read_text())
    ]
    assert not broken, "\n".join(broken)
    packages = {path.relative_to(ROOT / "fastmoe").parts[0].removesuffix(".py") for path in sources("fastmoe")}
    assert packages - {"__init__"} <= COLUMN.keys(), "a new package needs its column"


@pytest.mark.parametrize(
    ("relative", "text"),
    [
        ("fastmoe/ops/norm/native.py", "from fastmoe.config import Config"),
        ("fastmoe/ops/norm/native.py", "import fastmoe.nn"),
        ("fastmoe/ops/norm/native.py", "def f():\n    from torch import distributed"),
        ("fastmoe/ops/norm/native.py", "import triton"),
        ("fastmoe/nn/moe.py", "from fastmoe import trainer"),
        ("fastmoe/nn/moe.py", "from fastmoe.optim import AdamW"),
        ("fastmoe/nn/moe.py", "import fastmoe"),
        ("fastmoe/native.py", "from fastmoe import ops"),
        ("fastmoe/trainer/data.py", "import cupy"),
        ("fastmoe/comm/torch_dist.py", "from mpi4py import MPI"),
        ("fastmoe/native.py", "import pybind11"),
        ("benchmarks/peers.py", "import mpi4py.MPI"),
    ],
)
def test_each_import_rule_can_be_broken(relative, text):
    assert list(broken_rules(relative, text))


def test_csrc_includes_no_framework():
    allowed = re.compile(r"[a-z_0-9]+(\.h|\.hpp)?|(cub|cuda|cooperative_groups|sys)/[\w/.]+|cooperative_groups\.h")
    for path in [*ROOT.glob("csrc/**/*.*"), *ROOT.glob("python/*.*")]:
        for bracket, name in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', path.read_text(), re.M):
            where = f"{path.relative_to(ROOT)} includes {name}"
            if bracket == '"':
                own = [path.parent / name, ROOT / "csrc/include" / name, ROOT / "csrc" / name, ROOT / "csrc/cpu" / name]
                assert any(file.exists() for file in own), where
            elif path.parent.name == "python":
                assert allowed.fullmatch(name) or name.startswith("pybind11/"), where
            else:
                assert allowed.fullmatch(name), where


def functions(path):
    """{name: parameter names} of a module's functions, without importing it."""
    return {
        node.name: [a.arg for a in node.args.posonlyargs + node.args.args]
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_backends_have_the_reference_signature(family):
    folder = ROOT / "fastmoe" / "ops" / family
    reference = functions(folder / "reference.py")
    ops = [op.name for op in OPS.values() if op.family == family]
    assert not set(ops) - reference.keys(), "every op has a reference"
    for module in ("native", "kernels", "cuda"):
        path = folder / f"{module}.py"
        found = functions(path) if path.exists() else {}
        for name in found.keys() & set(ops):
            assert found[name] == reference[name], f"{path.relative_to(ROOT)}: {name}"


def test_every_native_function_has_its_twins():
    bindings = "".join(path.read_text() for path in ROOT.glob("python/*.cpp"))
    missing = []
    for header in sorted(ROOT.glob("csrc/include/fastmoe/*.h")):
        family, text = header.stem, header.read_text()
        kernels = re.findall(r"^FM_API fm_status fm_(\w+)_cpu\(", text, re.M)
        helpers = re.findall(r"^FM_API int64_t (fm_\w+)\(", text, re.M)
        if family == "common":
            assert not kernels
            continue
        for file in (
            f"csrc/cpu/{family}.cpp",
            f"csrc/tests/test_{family}.cpp",
            f"python/{family}.cpp",
            f"fastmoe/ops/{family}/native.py",
            f"tests/ops/test_{family}.py",
            f"benchmarks/ops/bench_{family}.py",
        ):
            if not (ROOT / file).exists():
                missing.append(file)
        texts = {
            file: (ROOT / file).read_text() if (ROOT / file).exists() else ""
            for file in (f"csrc/tests/test_{family}.cpp", f"fastmoe/ops/{family}/native.py")
        }
        for name in kernels:
            if name not in OPS:
                missing.append(f"op {name} of {header.name}")
            if not re.search(rf"\bfm_{name}_cpu\b", bindings):
                missing.append(f"binding of fm_{name}_cpu")
            if not re.search(rf"fm_{name}_cpu", texts[f"csrc/tests/test_{family}.cpp"]):
                missing.append(f"fm_{name}_cpu in csrc/tests/test_{family}.cpp")
            if not re.search(rf"_C\.{name}\b", texts[f"fastmoe/ops/{family}/native.py"]):
                missing.append(f"use of _C.{name} in fastmoe/ops/{family}/native.py")
        missing += [f"binding of {name}" for name in helpers if name not in bindings]
    assert not missing, "missing: " + ", ".join(missing)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_reference_test_and_header(family):
    for file in (
        f"fastmoe/ops/{family}/__init__.py",
        f"fastmoe/ops/{family}/reference.py",
        f"tests/ops/test_{family}.py",
        f"csrc/include/fastmoe/{family}.h",
        f"benchmarks/ops/bench_{family}.py",
    ):
        assert (ROOT / file).exists(), file


def variables_read(tree):
    """Names that a module reads from os.environ or os.getenv as literals."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and node.args
            and re.search(r"environ\.(get|pop|setdefault)$|getenv$", ast.unparse(node.func))
        ):
            yield node.args[0]
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            yield node.slice
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith("environ"):
            yield node.left


def test_only_known_environment_variables_are_read():
    for path in [*sources("fastmoe"), ROOT / "setup.py"]:
        text = path.read_text()
        names = {node.value for node in variables_read(ast.parse(text)) if isinstance(node, ast.Constant)}
        names |= set(re.findall(r"""["'](FASTMOE_[A-Z_]+)["']""", text))
        assert names <= ENVIRONMENT, f"{path.relative_to(ROOT)} reads {names - ENVIRONMENT}"
    for path in [*ROOT.glob("csrc/cpu/*"), *ROOT.glob("csrc/include/**/*.h"), *ROOT.glob("python/*")]:
        assert "getenv" not in path.read_text(), path


def run(code):
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name in BLOCKED or name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""

STEP = """
import torch, fastmoe
torch.manual_seed(0)
torch.set_num_threads(1)
config = fastmoe.config.ModelConfig(d_model=16, num_layers=2, num_heads=2, d_ff=8, num_experts=4, top_k=2)
model = fastmoe.nn.Transformer(config)
optimizer = fastmoe.optim.AdamW(model.parameters(), lr=1e-2)
ids = torch.randint(0, 256, (2, 9))
losses = []
for _ in range(5):
    optimizer.zero_grad()
    out = model(ids[:, :-1], ids[:, 1:])
    (out.loss + out.aux_loss).backward()
    optimizer.step()
    losses.append(out.loss.item())
assert losses[-1] < losses[0] - 0.1, losses
"""


def test_import_needs_nothing_optional_and_is_quick():
    out = run(
        'BLOCKED = {"triton", "cupy", "tyro", "mpi4py", "transformers", "safetensors", "tokenizers", "pyarrow"}'
        + BLOCK
        + """
import time, torch
start = time.process_time()
import fastmoe
print(time.process_time() - start)
"""
        + STEP
    )
    assert float(out.split()[0]) < 2


def test_import_loads_nothing_heavy():
    out = run("import sys, torch; before = set(sys.modules); import fastmoe; print(*(set(sys.modules) - before))")
    heavy = {
        "triton",
        "cupy",
        "tyro",
        "mpi4py",
        "transformers",
        "safetensors",
        "tensorboard",
        "torch._dynamo",
        "torch._inductor",
    }
    assert not heavy & set(out.split())


def test_without_the_extension_everything_runs_on_the_reference():
    out = run(
        'BLOCKED = {"fastmoe._C"}'
        + BLOCK
        + STEP
        + """
import os
from fastmoe import native
assert "pip install -e ." in native.missing()
print(fastmoe.explain("cpu"))
os.environ["FASTMOE_BACKEND"] = "experts=native"
try:
    model(ids)
except RuntimeError as error:
    print(error)
"""
    )
    *rows, error = out.splitlines()
    assert len(rows) == 1 + len(OPS) and all(row.split()[1] == "reference" for row in rows[1:])
    assert all("the C++ extension is not built" in row for row in rows[1:])
    assert error.startswith(
        "fastmoe.moe_mlp: FASTMOE_BACKEND asks for native, which cannot run: the C++ extension is not built"
    )


@pytest.mark.skipif(importlib.util.find_spec("fastmoe._C") is None, reason="the extension is not built")
def test_the_extension_knows_no_torch():
    run(
        "import importlib.machinery as m, importlib.util as u, sys\n"
        "spec = m.PathFinder.find_spec('_C', ['fastmoe'])\n"
        "u.module_from_spec(spec)\nassert not any(name.split('.')[0] in ('torch', 'numpy') for name in sys.modules)"
    )
