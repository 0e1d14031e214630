"""The checks that every op passes on every backend, forward and backward. A family's test class lists its cases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch

from fastmoe import testing
from fastmoe.ops.registry import OPS
from fastmoe.testing import DTYPES, assert_accurate, assert_bit_equal, forward_backward, to_float64

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One op through its public door. make(dtype) draws the inputs, call(inputs) returns the outputs."""

    id: str
    call: Callable[[Tensors], object]
    make: Callable[[torch.dtype], Tensors]
    frozen: tuple[str, ...] = ()  # floating inputs that take no gradient
    thorough: bool = False  # also layouts, opcheck, gradcheck, compile: a small or odd size of each kind of call
    parallel: bool = False  # also thread counts: a size that several threads share
    moves_data: bool = False  # results are bit-equal to the reference's
    exact: Callable[[Tensors], object] | None = None  # what call approximates; absent, call itself

    def run(self, dtype: torch.dtype) -> Tensors:
        return forward_backward(self.call, self.make(dtype), self.frozen)

    def oracle(self, dtype: torch.dtype) -> Tensors:
        """The reference in float64 on the very numbers that run(dtype) gets."""
        return forward_backward(self.exact or self.call, to_float64(self.make(dtype)), self.frozen)


@lru_cache(maxsize=len(DTYPES))  # the backends of a case follow one another
def expected(case: Case, dtype: torch.dtype) -> tuple[Tensors, Tensors]:
    """The oracle's results and the reference's in dtype."""
    with testing.backend("reference"):
        return case.oracle(dtype), case.run(dtype)


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, column-major and from the middle of a storage whose first element is unaligned."""
    order = tuple(reversed(range(tensor.dim())))
    base = torch.empty(tensor.numel() + 5, dtype=tensor.dtype)
    view = base[3 : 3 + tensor.numel()].view([tensor.shape[i] for i in order]).permute(order)
    return view.copy_(tensor)


def expanded(tensor: torch.Tensor) -> torch.Tensor:
    """The first slice of a floating tensor repeated with stride 0; others as they are."""
    return tensor[:1].expand_as(tensor) if tensor.is_floating_point() and tensor.dim() else tensor


def compare(got: Tensors, want: Tensors, same: Callable) -> None:
    assert got.keys() == want.keys()
    for name in want:
        same(got[name], want[name], name)


def close(got: torch.Tensor, want: torch.Tensor, name: str) -> None:
    tolerance = 64 * torch.finfo(want.dtype).eps if want.dtype.is_floating_point else 0
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    torch.testing.assert_close(got, want, rtol=0, atol=tolerance * scale, msg=lambda text: f"{name}: {text}")


def names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Battery:
    family: str
    cases: list[Case]

    def pytest_generate_tests(self, metafunc):
        cls = metafunc.cls
        if "case" in metafunc.fixturenames:
            only = {
                "test_accurate": lambda case: True,
                "test_repeats_at_any_thread_count": lambda case: case.thorough or case.parallel,
            }
            wanted = only.get(metafunc.function.__name__, lambda case: case.thorough)
            metafunc.parametrize("case", [case for case in cls.cases if wanted(case)], ids=lambda case: case.id)
        if "backend" in metafunc.fixturenames:
            metafunc.parametrize("backend", [b for b in testing.backends(cls.family) if b in ("native", "reference")])
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", DTYPES, ids=names)

    def on(self, backend: str):
        return testing.backend(f"{self.family}={backend}")

    def test_accurate(self, case, backend, dtype):
        exact, plain = expected(case, dtype)
        with self.on(backend), testing.poison():
            got = case.run(dtype)
        assert got.keys() == plain.keys() == exact.keys()
        for name in plain:
            if case.moves_data:
                assert_bit_equal(got[name], plain[name], name)
            else:
                assert_accurate(got[name], exact[name], plain[name], name)

    def test_repeats_at_any_thread_count(self, case, backend, dtype):
        with self.on(backend):
            results = []
            for count in (1, 1, 2, 3):
                with testing.threads(count):
                    results.append(case.run(dtype))
        for result in results[1:]:
            compare(result, results[0], assert_bit_equal)

    @pytest.mark.parametrize("layout", [flipped, expanded])
    def test_takes_any_layout(self, case, backend, dtype, layout):
        inputs = {name: layout(tensor) for name, tensor in case.make(dtype).items()}
        dense = {name: tensor.contiguous().clone() for name, tensor in inputs.items()}
        with self.on(backend):
            got, want = (forward_backward(case.call, tensors, case.frozen) for tensors in (inputs, dense))
        compare(got, want, close if backend == "reference" else assert_bit_equal)

    def test_opcheck(self, case, backend):
        with self.on(backend):
            with testing.Recorder() as recorder:
                case.run(torch.float32)
            assert recorder.calls
            for name, args, _ in recorder.calls:
                if name.endswith("_backward"):
                    args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args]
                torch.library.opcheck(OPS[name].overload, args)
                args = [flipped(arg.detach()) if isinstance(arg, torch.Tensor) else arg for arg in args]
                torch.library.opcheck(OPS[name].overload, args, test_utils=("test_schema", "test_faketensor"))

    def test_gradcheck(self, case):
        inputs = to_float64(case.make(torch.float32))
        names = [name for name, tensor in inputs.items() if tensor.is_floating_point() and name not in case.frozen]
        if not names:
            return

        def call(*leaves):
            outputs = case.call(inputs | dict(zip(names, leaves)))
            outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
            return tuple(output for output in outputs if output.requires_grad)

        torch.autograd.gradcheck(call, [inputs[name].requires_grad_() for name in names], fast_mode=True)

    def test_compiles(self, case):
        torch._dynamo.reset()
        compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
        got = forward_backward(compiled, case.make(torch.float32), case.frozen)
        compare(got, case.run(torch.float32), assert_bit_equal)

    def test_returns_neither_inputs_nor_views(self, case, backend, dtype):
        with self.on(backend), testing.Recorder() as recorder:
            case.run(dtype)
        for name, args, outputs in recorder.calls:
            outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs or ())
            taken = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor) and arg.numel()}
            for output in outputs:
                storage = output.untyped_storage()
                assert storage.nbytes() == output.nbytes, f"{name} returns a view into memory of its own making"
                if output.numel():
                    address = storage.data_ptr()
                    assert address not in taken, f"{name} returns memory of an input or of another output"
                    taken.add(address)
