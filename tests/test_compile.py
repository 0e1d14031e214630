"""Kernels for GPUs, checked where there is none: Triton's in its interpreter, and for every architecture through the
compiler; CUDA C++ through nvcc, and run on the CPU by an emulation of threads.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastmoe import jit, testing
from fastmoe.ops.permutation import cuda, reference

ROOT = Path(__file__).parent.parent
ARCHITECTURES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of shared memory a block may use


def run(*words: str | Path, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTMOE_BACKEND")} | environment
    done = subprocess.run([str(word) for word in words], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]
    return done


@pytest.mark.apart
@pytest.mark.timeout(1200)
def test_triton_kernels_in_the_interpreter():
    """tests/triton needs a process of its own: the interpreter is chosen when a kernel is decorated."""
    run(sys.executable, "-m", "pytest", "-x", "tests/triton", TRITON_INTERPRET="1")


# Compiles what the backends launch for a real layer: their launches are caught on their way to a GPU that is not there.
COMPILE = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from fastmoe import jit
from fastmoe.ops.adamw import kernels as adamw
from fastmoe.ops.experts import kernels as experts
from fastmoe.ops.gating import kernels as gating
from fastmoe.ops.norm import kernels as norm
from fastmoe.ops.permutation import kernels as permutation
from fastmoe.ops.quantize import kernels as quantize
from fastmoe.ops.random import kernels as random


class Device:
    get_current_target = lambda self: GPUTarget("cuda", arch, 32)
    get_current_device = lambda self: arch  # Triton keeps a cache for each device
    get_current_stream = lambda self, device=0: 0

def compile_only(self, *args, grid, warmup, **kwargs):
    kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found.append({
        "kernel": self.fn.__name__,
        "for": about,
        "hash": kernel.hash,
        "wide": len(re.findall(r"global[.\\w]*[.]v4[.]b32", kernel.asm["ptx"])),
        "shared": kernel.metadata.shared,
        "registers": int(re.search(r"REG:(\\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\\d+)", usage)[1]),
    })
    return kernel

arch, shared, dtype = json.loads(sys.argv[1])
found, about = [], "routing"
cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
launch, JITFunction.run = JITFunction.run, compile_only
driver.set_active(Device())
jit.device = lambda tensor: jit.Device(shared, 132)
modules = adamw, gating, norm, permutation, experts, quantize, random
kernels = {k.fn.__name__ for m in modules for k in vars(m).values()
           if isinstance(k, JITFunction) and k.fn.__name__.endswith("_kernel")}
make = lambda *shape, dtype=getattr(torch, dtype): torch.empty(shape, dtype=dtype, device="meta")
E, K, D, F = 64, 8, 2048, 1024
for experts_of_gate, bias_E, options in (
    (E, None, ("softmax", True, 1, 1, "max", 1.0)),
    (256, make(256, dtype=torch.float32), ("sigmoid", True, 8, 4, "top2", 2.5)),
    (160, None, ("softmax", False, 8, 3, "max", 16.0)),
    (256, None, ("softmax", True, 1, 1, "max", 1.0)),
):
    about = f"gate of {experts_of_gate}, {options}"
    logits_TE = make(16384, experts_of_gate)
    weights_TK, ids_TK, probs_TE, _ = gating.topk_gate(logits_TE, bias_E, K, *options)
    gating.topk_gate_backward(weights_TK, probs_TE, ids_TK, probs_TE, *options[:2], options[-1])
about = "random"
random.random_uniform(make(3, dtype=torch.int64), 3, 16384, E)
about = "routing"
launches = len(found)
permutation.build_routing(ids_TK, E, -1)
launches = len(found) - launches
routing = permutation.build_routing(ids_TK, E, 4096)
permutation.build_routing_from_experts(make(16384, dtype=torch.int64), make(E + 1, dtype=torch.int64), 16384)
x_TD = make(16384, D)
y_RD = permutation.permute(x_TD, *routing[:2])
permutation.unpermute_backward(x_TD, y_RD, *routing[:2], weights_TK)
for T, activation, pairs, transposed, save, biases in (
    (16384, "swiglu", False, False, "z", False),
    (512, "swiglu", False, False, "z", False),
    (16384, "swiglu", False, False, "z8", False),
    (16384, "clamped_swiglu", True, True, "z", True),
    (128, "clamped_swiglu", True, True, "z8", True),
    (16384, "geglu", False, True, "z8", True),
    (16384, "gelu_tanh", False, False, "z8", True),
    (512, "relu2", False, True, "x", False),
):
    about = f"{T} tokens, {activation}, interleaved {pairs}, transposed {transposed}, save {save}, biases {biases}"
    Z = 2 * F if activation in experts.GATED else F
    shapes = ((E, D, Z), (E, F, D)) if transposed else ((E, Z, D), (E, D, F))
    R = (T * K,)
    inputs = (make(T, D), make(T, K), make(*R, dtype=torch.int32), make(T, K, dtype=torch.int32), routing[2],
              *(make(*shape) for shape in shapes), *((make(E, Z), make(E, D)) if biases else (None, None)))
    layer = (activation, pairs, transposed, 1.702, 7.0, save)
    y_TD, z_RZ, z_scale = experts.moe_mlp(*inputs, *layer, False)
    experts.moe_mlp_backward(y_TD, *inputs, z_RZ, z_scale, *layer, True, True, True, True, biases, biases, False)
for width, center, biased in ((128, False, False), (D, False, False), (D, True, True), (8192, True, True)):
    about = f"norm of {width}, centered {center}, bias {biased}"
    for residual in (None, make(4096, width)):
        rows, weight_D = make(4096, width), make(width)
        y, _, mean, rstd = norm.normalize(rows, residual, weight_D, weight_D if biased else None, 1e-6, center)
        norm.normalize_backward(y, residual, rows, weight_D, mean, rstd, center, biased)
for I in (2048, 2047):
    about = f"codes of rows of {I}"
    for signed, key in ((True, None), (False, 5)):
        quantize.dequantize(*quantize.quantize(make(4096, I), signed, key, 3))
states = {  # moments, master
    "float32": (("float32", None),),
    "bfloat16": (("int8", "int8"), ("bfloat16", None), ("float32", "float32")),
    "float16": (("float16", "float32"), ("int8", None)),
}
for param, kinds in states.items() if dtype == "bfloat16" else ():
    for I, count in ((2048, 3), (2047, 16)):
        about = f"AdamW of {count} tensors of {param} in rows of {I}, moments and masters {kinds}"
        lists = [[], [], [], [], [], [], []]
        for moments, master in kinds * count:
            kept, param_type = (getattr(torch, name) for name in (moments, param))
            shapes = ((511, I), (511, -(-I // 32)), (0,))
            scales = [make(*shapes[1 if moments == "int8" else 2], dtype=torch.bfloat16) for _ in range(2)]
            one = [make(*shapes[0], dtype=t) for t in (param_type, param_type, kept, kept)]
            master = make(*shapes[0 if master else 2], dtype=getattr(torch, master or param))
            for values, tensor in zip(lists, (*one, *scales, master)):
                values.append(tensor)
        each = len(lists[0])
        for step, lr, grad_scale in ((1, 1e-3, 1), (2000, 0.0, 0.25)):
            rule = ([step] * each, [step] * each, [0] * each, [1.0] * each, lr, 0.9, 0.95, 1e-8, grad_scale)
            adamw.adamw_step(*lists, *rule)
print(json.dumps({"kernels": sorted(kernels), "found": found, "launches": launches}))
"""


@pytest.mark.apart
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("arch, dtype", [*((arch, "bfloat16") for arch in ARCHITECTURES), (90, "float32")])
def test_triton_kernels_compile(arch, dtype, tmp_path, record_property):
    words = json.dumps([arch, ARCHITECTURES[arch], dtype])
    done = run(sys.executable, "-c", COMPILE, words, TRITON_CACHE_DIR=str(tmp_path))
    compiled = json.loads(done.stdout.splitlines()[-1])
    record_property("resources", json.dumps(compiled["found"]))
    never = {"_adamw_step_kernel"} if dtype == "float32" else set()
    assert {usage["kernel"] for usage in compiled["found"]} == set(compiled["kernels"]) - never
    assert compiled["launches"] == 2, "build_routing takes two launches"
    for usage in compiled["found"]:
        assert usage["shared"] <= ARCHITECTURES[arch], f"more shared memory than a block may use: {usage}"
        # below 255 it is ptxas that spills a few words to have one more program on a processor; 8: Triton 3.6, sm_80
        assert usage["stack"] <= (32 if usage["registers"] < 255 else 8), f"registers spill: {usage}"
        if "rows of" in usage["for"]:
            assert usage["stack"] == 0 and (usage["wide"] > 0) == ("rows of 2048" in usage["for"]), usage
    steps = [usage for usage in compiled["found"] if usage["kernel"] == "_adamw_step_kernel"]
    assert len({usage["hash"] for usage in steps}) == len({usage["for"] for usage in steps}), "compiled for a number"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cuda_sources_compile(arch, tmp_path):
    for source in (ROOT / "csrc" / "cuda").glob("*.cu"):
        run(
            "nvcc",
            "-std=c++17",
            f"-arch=sm_{arch}",
            "-Werror",
            "all-warnings",
            "-cubin",
            source,
            "-o",
            tmp_path / "out.cubin",
        )


@pytest.fixture
def emulated(monkeypatch, tmp_path):
    """jit.load as on a GPU, with g++ for NVRTC and fibers for threads; emulated["descending"] is the order of these."""
    state = {"descending": 0, "libraries": {}}

    def load(source, function, defines):
        key = (source, *sorted(defines.items()))
        if key not in state["libraries"]:
            library = tmp_path / f"{len(state['libraries'])}.so"
            header, file = ROOT / "csrc" / "tests" / "cuda_emulation.h", ROOT / "csrc" / "cuda" / source
            flags = ("-std=c++17", "-O1", "-shared", "-fPIC", *(f"-D{name}={value}" for name, value in defines.items()))
            run("g++", *flags, "-include", header, "-x", "c++", file, "-o", library)
            state["libraries"][key] = ctypes.CDLL(str(library))
        library = state["libraries"][key]

        def launch(grid, block, *args):
            numbers = [arg.data_ptr() if isinstance(arg, torch.Tensor) else arg for arg in args]
            words = (ctypes.c_longlong * 9)(*numbers)
            kernel = ctypes.cast(getattr(library, function), ctypes.c_void_p)
            library.fm_emulate(kernel, ctypes.c_longlong(grid), ctypes.c_longlong(block), words, state["descending"])

        return launch

    monkeypatch.setattr(jit, "load", load)
    return state


DRAWS = (("random", -1), ("dropped", -1), ("all_to_one", 0), ("random", 9), ("dropped", 200), ("empty_expert", 40))


@pytest.mark.parametrize(
    "T, E, K, dtype",
    [(700, 5, 2, torch.int64), (1, 1, 1, torch.int32), (90, 40, 7, torch.int32), (300, 9000, 2, torch.int64)],
)
def test_cuda_build_routing_emulated(T, E, K, dtype, emulated):
    for routing, capacity in DRAWS:
        ids_TK = testing.draw_ids(testing.Shape(T, 1, 1, E, K, 1), routing).to(dtype)
        want = reference.build_routing(ids_TK, E, capacity)
        for emulated["descending"] in (0, 1):
            with testing.poison():
                got = cuda.build_routing(ids_TK, E, capacity)
            for name, got_tensor, want_tensor in zip(("src_row_R", "dst_row_TK", "offsets"), got, want):
                testing.assert_bit_equal(got_tensor, want_tensor, f"{name}, {routing}, capacity {capacity}")


def test_cuda_build_routing_drops_ids_outside(emulated):
    ids_TK = torch.tensor([[3, 0], [-7, 1], [2**32 + 1, 2], [1, -1]])
    want = reference.build_routing(ids_TK.masked_fill((ids_TK < 0) | (ids_TK > 2), -1), 3, -1)
    for got_tensor, want_tensor in zip(cuda.build_routing(ids_TK, 3, -1), want):
        testing.assert_bit_equal(got_tensor, want_tensor)


def test_cuda_sources_are_compiled_once_and_never_during_capture(monkeypatch):
    compiled = []

    class RawModule:
        def __init__(self, code, options):
            assert "fm_routing_count" in code
            compiled.append(options)

        def get_function(self, name):
            return SimpleNamespace(compile=lambda: None)

    cupy = SimpleNamespace(RawModule=RawModule, cuda=SimpleNamespace(Device=nullcontext))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    words = ("permutation.cu", "fm_routing_count", (("FM_E", 3),), 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="fm_routing_count.*must be compiled before a CUDA graph is captured"):
        jit._compile(*words)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert jit._compile(*words) is jit._compile(*words)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    jit._compile(*words)
    assert compiled == [("-std=c++17", "-DFM_E=3")]
    jit._compile.cache_clear()


def test_backends_say_what_is_missing(monkeypatch):
    assert jit.triton_missing() is None
    if not torch.cuda.is_available():
        assert jit.cuda_missing() == "PyTorch sees no CUDA device"
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install" in jit.triton_missing.__wrapped__()
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "pip install" in jit.cuda_missing.__wrapped__()
