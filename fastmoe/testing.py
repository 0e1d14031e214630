"""What the checks of an op share: shapes, draws, the accuracy rule, poisoned memory, a recorder of operators."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastmoe import native
from fastmoe.ops.registry import OPS, unavailable


class Shape(NamedTuple):
    """T tokens of width D, E experts of width F, K of them a token, vocabulary V."""

    T: int
    D: int
    F: int
    E: int
    K: int
    V: int


SHAPES = {
    "empty": Shape(0, 8, 6, 4, 2, 16),
    "one": Shape(1, 1, 1, 1, 1, 1),
    "odd": Shape(37, 19, 13, 5, 3, 23),
    "one_expert": Shape(29, 24, 17, 1, 1, 31),
    "every_expert": Shape(31, 33, 20, 4, 4, 50),
    "tiny": Shape(256, 128, 256, 8, 2, 256),
    "fine": Shape(130, 64, 32, 64, 8, 1000),
}
ROUTINGS = ("random", "empty_expert", "all_to_one", "dropped")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Normal values of standard deviation `scale`: drawn in float32, rounded to dtype."""
    return (torch.randn(shape, generator=generator(seed)) * scale).to(dtype)


def draw_ids(shape: Shape, routing: str = "random", seed: int = 0) -> torch.Tensor:
    """Expert ids [T, K] int64. random: distinct ones a token; empty_expert: none is E // 2; all_to_one: every slot is
    E - 1; dropped: random with a third of the slots and the whole first token -1.
    """
    T, _, _, E, K, _ = shape
    ids_TK = torch.rand(T, E, generator=generator(seed)).argsort(1)[:, :K]
    if routing == "empty_expert":
        ids_TK = torch.where(ids_TK == E // 2, (ids_TK + 1) % E, ids_TK)
    elif routing == "all_to_one":
        ids_TK = torch.full_like(ids_TK, E - 1)
    elif routing == "dropped":
        ids_TK = ids_TK.masked_fill(torch.rand(T, K, generator=generator(seed + 1)) < 1 / 3, -1)
        ids_TK[:1] = -1
    elif routing != "random":
        raise ValueError(f"fastmoe.testing: routing must be one of {ROUTINGS}, got {routing!r}")
    return ids_TK


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of dtype at |value|."""
    info = torch.finfo(dtype)
    return info.eps * max(info.smallest_normal, 2.0 ** math.floor(math.log2(abs(value))) if value else 0.0)


def assert_accurate(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, name: str = "output") -> None:
    """The 2x rule: max |got - exact| <= 2 max |plain - exact| + 2 ulp at max |exact|.

    exact: the result in float64. plain: plain torch's in the dtype under test; got must have its shape and dtype.
    Integer results must be equal. Raises AssertionError with the figures.
    """
    assert got.shape == plain.shape, f"{name}: shape {list(got.shape)}, wanted {list(plain.shape)}"
    assert got.dtype == plain.dtype, f"{name}: {got.dtype}, wanted {plain.dtype}"
    if not got.dtype.is_floating_point:
        assert torch.equal(got, exact.to(got.dtype)), f"{name}: integers differ"
        return
    if got.numel() == 0:
        return
    error, allowed = ((x.double() - exact.double()).abs().max().item() for x in (got, plain))
    bound = 2 * allowed + 2 * ulp(exact.abs().max().item(), got.dtype)
    assert error <= bound, f"{name}: error {error:.3g}, plain torch's {allowed:.3g}, bound {bound:.3g} in {got.dtype}"


def assert_bit_equal(got: torch.Tensor, want: torch.Tensor, name: str = "output") -> None:
    """Same shape, dtype and bits (so NaN equals NaN and 0 differs from -0)."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), (
        f"{name}: {got.dtype} {list(got.shape)}, wanted {want.dtype} {list(want.shape)}"
    )
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    same = got.contiguous().view(-1).view(bits) == want.contiguous().view(-1).view(bits)
    assert bool(same.all()), f"{name}: {int((~same).sum())} of {same.numel()} elements differ in bits"


def forward_backward(
    call: Callable[[dict[str, torch.Tensor]], object], inputs: dict[str, torch.Tensor], frozen: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """Runs call(inputs), then backward from fixed normal gradients. Returns outputs by number, gradients by name.

    Floating inputs that are not `frozen` take gradients. The gradient of an output has few enough bits for every
    dtype, so that it is the same number in a run in bfloat16 and in float64.
    """
    leaves = {
        name: tensor.detach().requires_grad_(tensor.is_floating_point() and name not in frozen)
        for name, tensor in inputs.items()
    }
    outputs = call(leaves)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else tuple(outputs)
    pairs = [
        (output, draw(*output.shape, dtype=torch.float16, seed=i).bfloat16().to(output.dtype))
        for i, output in enumerate(outputs)
        if output.requires_grad
    ]
    results = {str(i): output.detach() for i, output in enumerate(outputs)}
    if pairs:
        torch.autograd.backward(*zip(*pairs))
        results |= {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return results


def to_float64(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Sets FASTMOE_BACKEND inside the block, as backend("experts=native")."""
    before = os.environ.get("FASTMOE_BACKEND")
    os.environ["FASTMOE_BACKEND"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTMOE_BACKEND"]
        else:
            os.environ["FASTMOE_BACKEND"] = before


def backends(family: str, device: str = "cpu") -> list[str]:
    """The backends that serve an op of this family on this device here, the reference last."""
    ops = [op for op in OPS.values() if op.family == family]
    return [
        name
        for name in ("native", "cuda", "triton", "reference")
        if any(unavailable(op, name, device) is None for op in ops)
    ]


@contextmanager
def poison() -> Iterator[None]:
    """Fresh memory holds NaN (integers: their maximum) inside the block: what an op leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    native._kept.workspace = None
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch.set_num_threads(count) inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Recorder(TorchDispatchMode):
    """Records (name, arguments, outputs) of every fastmoe operator that runs inside the block, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fastmoe":
            self.calls.append((func.__name__.split(".")[0], args, out))
        return out

    def count(self, name: str) -> int:
        return sum(call[0] == name for call in self.calls)
