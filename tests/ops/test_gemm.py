import re

import pytest
import torch

from fastmoe import ops, testing
from fastmoe.testing import draw
from tests.ops.battery import Battery, Case


def linear_case(name, rows, inputs, outputs, bias=True, frozen=(), thorough=False, parallel=False):
    """rows: the leading shape of x, or their number."""
    rows = (rows,) if isinstance(rows, int) else rows

    def make(dtype):
        drawn = {
            "x": draw(*rows, inputs, dtype=dtype),
            "weight": draw(outputs, inputs, dtype=dtype, scale=inputs**-0.5, seed=1),
        }
        return drawn | ({"bias": draw(outputs, dtype=dtype, seed=2)} if bias else {})

    call = lambda x: ops.linear(x["x"], x["weight"], x.get("bias"))
    return Case(name, call, make, frozen, thorough=thorough, parallel=parallel)


EDGES = [(n + d, n + e, n - d) for n in (32, 64, 192) for d, e in ((-1, 0), (0, 1), (1, -1))]


class TestGemm(Battery):
    family = "gemm"
    cases = [
        linear_case("no_rows", 0, 8, 6),
        linear_case("one", 1, 1, 1),
        linear_case("odd", 37, 19, 23, thorough=True),
        linear_case("no_bias", 37, 19, 23, bias=False, thorough=True),
        linear_case("few_rows", 3, 19, 23, thorough=True),
        linear_case("five_rows", 5, 260, 130, parallel=True),
        linear_case("six_rows", 6, 41, 30),
        linear_case("seven_rows", 7, 41, 30),
        linear_case("vector", (), 48, 20),
        linear_case("four_dimensions", (2, 3, 5), 33, 17),
        linear_case("empty_middle", (2, 0), 8, 6),
        linear_case("one_output", 70, 50, 1),
        linear_case("one_input", 70, 1, 50),
        linear_case("frozen_x", 37, 19, 23, frozen=("x",)),
        linear_case("frozen_weight", 37, 19, 23, frozen=("weight",)),
        linear_case("frozen_bias", 37, 19, 23, frozen=("bias",)),
        linear_case("bias_alone", 37, 19, 23, frozen=("x", "weight")),
        linear_case("few_blocks", 1000, 40, 8, parallel=True),
        linear_case("many_blocks", 600, 400, 500, parallel=True),
        *(linear_case("x".join(map(str, sizes)), *sizes) for sizes in EDGES),
    ]

    def test_matches_torch(self, backend):
        leaves = [t.requires_grad_() for t in (draw(4, 10, 33), draw(21, 33, seed=1), draw(21, seed=2))]
        leaves64 = [t.detach().double().requires_grad_() for t in leaves]
        dy = draw(4, 10, 21, seed=3)
        with self.on(backend):
            y = ops.linear(*leaves)
            y.backward(dy)
        want = torch.nn.functional.linear(*leaves64)
        want.backward(dy.double())
        for got, exact in ((y, want), *((a.grad, b.grad) for a, b in zip(leaves, leaves64))):
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)

    def test_sixteen_bits_lose_only_the_rounding_of_the_result(self, backend):
        """Each term is 1, so a sum kept in 16 bits would stop at 256."""
        x, weight = torch.ones(40, 1000, dtype=torch.bfloat16), torch.ones(9, 1000, dtype=torch.bfloat16)
        with self.on(backend):
            y = ops.linear(x.requires_grad_(), weight.requires_grad_())
            y.backward(torch.ones_like(y))
        assert bool((y == 1000).all()) and bool((weight.grad == 40).all()) and bool((x.grad == 9).all())

    def test_autocast_lowers_all(self, backend):
        leaves = [t.requires_grad_() for t in (draw(9, 8), draw(7, 8, seed=1), draw(7, seed=2))]
        with self.on(backend):
            want = ops.linear(*(t.bfloat16() for t in leaves))
            with torch.autocast("cpu", torch.bfloat16):
                got = ops.linear(*leaves)
                mixed = ops.linear(leaves[0].bfloat16(), *leaves[1:])
            got.sum().backward()
        assert got.dtype == torch.bfloat16 and torch.equal(got, want) and torch.equal(mixed, want)
        assert all(t.grad.dtype == torch.float32 for t in leaves)

    @pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
    def test_frozen_inputs_cost_nothing(self, backend, needed):
        leaves = [draw(9, 8), draw(7, 8, seed=1), draw(7, seed=2)]
        for i in needed:
            leaves[i].requires_grad_()
        saved = []
        with (
            self.on(backend),
            testing.Recorder() as recorder,
            torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
        ):
            ops.linear(*leaves).sum().backward()
        grads = recorder.calls[-1][2]
        assert [i for i in range(3) if grads[i].numel()] == list(needed)
        assert [t.shape for t in saved] == [leaves[i].shape for i in (0, 1) if 1 - i in needed]
        assert [i for i in range(3) if leaves[i].grad is not None] == list(needed)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "x must be a torch.Tensor, got list", {"x": [1.0]}),
        (ValueError, "x must be of shape [..., I] = [any], got []", {"x": torch.tensor(1.0)}),
        (TypeError, "x must be float32 or", {"x": torch.ones(9, 8, dtype=torch.int32)}),
        (ValueError, "weight must be of shape [O, I] = [any, 8], got [7, 9]", {"weight": draw(7, 9)}),
        (ValueError, "weight must be of shape [O, I] = [any, 8], got [8]", {"weight": draw(8)}),
        (ValueError, "weight must be on cpu, got meta", {"weight": draw(7, 8).to("meta")}),
        (TypeError, "weight must be float32, got torch.bfloat16", {"weight": draw(7, 8).bfloat16()}),
        (TypeError, "weight must be a torch.Tensor, got NoneType", {"weight": None}),
        (ValueError, "bias must be of shape [O] = [7], got [8]", {"bias": draw(8)}),
        (TypeError, "bias must be float32, got torch.float64", {"bias": draw(7).double()}),
        (ValueError, "I must be at least 1, got 0", {"x": draw(9, 0), "weight": draw(7, 0)}),
        (ValueError, "O must be at least 1, got 0", {"weight": draw(0, 8)}),
    ],
)
def test_bad_input(error, message, changes):
    arguments = {"x": draw(9, 8), "weight": draw(7, 8), "bias": draw(7)} | changes
    with pytest.raises(error, match=re.escape("fastmoe.linear: " + message)):
        ops.linear(**arguments)


def test_autocast_leaves_float64_alone():
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(draw(4, 5).double(), draw(3, 5).double()).dtype == torch.float64


def test_gradients_twice_are_refused():
    x = draw(4, 5).requires_grad_()
    with pytest.raises(NotImplementedError, match="fastmoe.linear: gradients of gradients"):
        torch.autograd.grad(ops.linear(x, draw(3, 5)).square().sum(), x, create_graph=True)
