"""One place where an op becomes a torch operator and where its backend is chosen.

An op lives in ``fastmoe/ops/<family>/``. Its backends are modules of that folder, each holding a function of the op's
own name and signature: ``native`` (native.py, C++), ``cuda`` (cuda.py, CUDA C++), ``triton`` (kernels.py),
``reference`` (reference.py, plain torch, always present). The first of these that exists for the op, suits the device
and can run here is used. ``FASTMOE_BACKEND`` asks for one by name (``triton``: every op that has it;
``experts=triton``: that family, or an error).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType

import torch

from fastmoe import native

_MODULES = {"native": "native", "cuda": "cuda", "triton": "kernels", "reference": "reference"}
_library = torch.library.Library("fastmoe", "DEF")
OPS: dict[str, Op] = {}


@dataclass
class Op:
    """A registered operator: its family, name, torch overload and the backend each kind of call took last."""

    family: str
    name: str
    overload: Callable = None
    ran: dict[str, tuple[str, str]] = field(default_factory=dict)  # device type -> (backend, why)
    chosen: dict[tuple, tuple] = field(default_factory=dict)  # (device type, is float64, wish) -> (function, ran)

    def __call__(self, *args):
        device, double = _traits(args)
        return self.on(device or "cpu", double)(*args)

    def on(self, device: str, double: bool) -> Callable:
        """The function of the backend that a call on this device type takes."""
        key = (device, double, os.environ.get("FASTMOE_BACKEND", ""))
        if key not in self.chosen:
            backend, why = select(self, device, double)
            function = getattr(backend_module(self.family, backend), self.name)
            if backend == "reference" and device == "cpu":
                function = _on_one_thread(function)
            self.chosen[key] = function, (backend, why)
        implementation, self.ran[device] = self.chosen[key]
        return implementation


def _on_one_thread(function: Callable) -> Callable:
    """torch's own sums depend on the number of threads; the definition of an op must not."""

    def call(*args):
        threads = torch.get_num_threads()
        if threads == 1:
            return function(*args)
        torch.set_num_threads(1)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(threads)

    return call


def define(
    family: str,
    schema: str,
    *,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    autocast: Callable | None = None,
) -> Callable:
    """Registers ``fastmoe::<schema>`` and returns the torch overload.

    family: folder under fastmoe/ops. fake: shapes and dtypes of the outputs (for torch.compile). setup_context,
    backward: as in torch.library.register_autograd; gradients of gradients are refused. autocast: maps (args, autocast
    dtype) to the args to call with; absent, inputs are taken as they come.
    """
    name = schema.split("(")[0]
    op = OPS[name] = Op(family, name)
    _library.define(schema)
    _library.impl(name, op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastmoe::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"fastmoe::{name}", _once(name, backward), setup_context=setup_context, lib=_library
        )
    op.overload = getattr(torch.ops.fastmoe, name).default
    for device, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _library.impl(name, _autocast_kernel(op, device, key, autocast or (lambda args, dtype: args)), key)
    return op.overload


def _once(name: str, backward: Callable) -> Callable:
    """A backward that refuses to be differentiated (create_graph=True) rather than to miss a term."""

    def refusing(ctx, *grads):
        if torch.is_grad_enabled():
            raise NotImplementedError(f"fastmoe.{name}: gradients of gradients (create_graph=True) are not served")
        return backward(ctx, *grads)

    return refusing


def _autocast_kernel(op: Op, device: str, key: str, rule: Callable) -> Callable:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

    def kernel(*args):
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op.overload(*rule(args, torch.get_autocast_dtype(device)))

    return kernel


def _traits(args) -> tuple[str | None, bool]:
    """Device type of the first tensor (None: there is none) and whether any is float64."""
    device, double = None, False
    for arg in args:
        if isinstance(arg, torch.Tensor):
            device = device or ("cpu" if arg.is_cpu else arg.device.type)
            double |= arg.dtype is torch.float64
        elif isinstance(arg, (list, tuple)):
            inner, inner_double = _traits(arg)
            device, double = device or inner, double | inner_double
    return device, double


def _wish(family: str) -> tuple[str | None, bool]:
    """The backend that FASTMOE_BACKEND asks of this family, and whether it was asked of the family by name."""
    general = None
    for word in filter(None, os.environ.get("FASTMOE_BACKEND", "").replace(" ", "").split(",")):
        name, equals, backend = word.rpartition("=")
        if backend not in _MODULES or (equals and name not in {op.family for op in OPS.values()}):
            raise ValueError(
                f"fastmoe: FASTMOE_BACKEND must be words like 'triton' or 'experts=triton' with backends "
                f"{sorted(_MODULES)} and families {sorted({op.family for op in OPS.values()})}, got {word!r}"
            )
        if equals and name == family:
            return backend, True
        if not equals:
            general = backend
    return general, False


@cache
def backend_module(family: str, backend: str) -> ModuleType | None:
    """The module that holds a family's backend, or None where the family has no such file."""
    name = f"fastmoe.ops.{family}.{_MODULES[backend]}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None


def unavailable(op: Op, backend: str, device: str, double: bool = False) -> str | None:
    """Why this backend cannot run this op on this device here, or None if it can."""
    if backend == "reference":
        return None
    if importlib.util.find_spec(f"fastmoe.ops.{op.family}.{_MODULES[backend]}") is None:
        return f"{op.family} has no {backend} backend"
    if double:
        return "float64 runs on the reference only"
    if backend == "native":
        missing = "native runs on CPU tensors" if device != "cpu" else native.missing()
    else:
        from fastmoe import jit

        interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if device != "cuda" and not (interpreted and device == "cpu"):
            missing = f"{backend} runs on CUDA tensors"
        else:
            missing = jit.triton_missing() if backend == "triton" else jit.cuda_missing()
    if missing is None and not hasattr(backend_module(op.family, backend), op.name):
        missing = f"{op.family} has no {backend} {op.name}"
    return missing


def select(op: Op, device: str, double: bool = False) -> tuple[str, str]:
    """(backend, why) for a call on this device. Raises where a backend was asked for by name and cannot run."""
    wish, by_name = _wish(op.family)
    if wish:
        missing = unavailable(op, wish, device, double)
        if missing is None:
            return wish, "asked for by FASTMOE_BACKEND"
        if by_name or not missing.startswith(f"{op.family} has no"):
            raise RuntimeError(f"fastmoe.{op.name}: FASTMOE_BACKEND asks for {wish}, which cannot run: {missing}")
    reasons = []
    for backend in _MODULES:
        missing = unavailable(op, backend, device, double)
        if missing is None:
            return backend, "; ".join(reasons) or "first choice"
        if not missing.startswith(f"{op.family} has no") and not missing.endswith("tensors"):
            reasons.append(f"no {backend}: {missing}")
    raise AssertionError("the reference backend is always available")


def explain(device: str | None = None) -> str:
    """A table of the backend each op takes on `device` (default: cuda where there is one, else cpu), why, and what ran
    last.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    rows = [("op", "backend", "why", "ran")]
    for op in OPS.values():
        ran = op.ran.get(device)
        rows.append((f"{op.family}.{op.name}", *select(op, device), ran[0] if ran else "-"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
