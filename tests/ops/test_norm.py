import re

import pytest
import torch

from fastmoe import ops
from fastmoe.testing import SHAPES, draw
from tests.ops.battery import Battery, Case


def norm_case(name, shape, weight_dtype=None, kind="rms", bias=False, branch=None, **checks):
    def make(dtype):
        inputs = {
            "x": draw(*shape, dtype=dtype, scale=2),
            "weight_D": 1 + draw(shape[-1], dtype=weight_dtype or dtype, seed=1),
        }
        if bias:
            inputs["bias_D"] = draw(shape[-1], dtype=weight_dtype or dtype, seed=2)
        if "add" in kind:
            inputs["residual"] = draw(*shape, dtype=dtype, seed=3)
            lower = branch and dtype == torch.float32
            inputs["x"] = draw(*shape, dtype=branch if lower else dtype, scale=2)
        return inputs

    def call(x):
        op = {"rms": ops.rms_norm, "layer": ops.layer_norm, "add_rms": ops.add_rms_norm}.get(kind, ops.add_layer_norm)
        rows = (x["x"], x["residual"]) if "add" in kind else (x["x"],)
        return op(*rows, x["weight_D"], *((x["bias_D"],) if bias else ()), eps=1e-5)

    return Case(f"{kind}_{name}", call, make, **checks)


class TestNorm(Battery):
    family = "norm"
    cases = [
        *(norm_case(size, (s.T, s.D), thorough=size == "odd") for size, s in SHAPES.items()),
        norm_case("float32_weight", (37, 19), torch.float32, thorough=True),
        norm_case("vector", (48,)),
        norm_case("four_dimensions", (2, 3, 5, 33)),
        norm_case("empty_middle", (2, 0, 8)),
        norm_case("many_rows", (20000, 5), parallel=True),
        norm_case("long_rows", (3, 4099)),
        *(
            case
            for kind in ("layer", "add_rms", "add_layer")
            for case in (
                norm_case("odd", (37, 19), kind=kind, bias="layer" in kind, thorough=True),
                norm_case("no_bias", (70, 32), kind=kind),
                norm_case("float32_weight", (9, 40), torch.float32, kind=kind, bias="layer" in kind),
                norm_case("vector", (48,), kind=kind),
                norm_case("empty_middle", (2, 0, 8), kind=kind, bias="layer" in kind),
                norm_case("many_rows", (20000, 5), kind=kind, bias="layer" in kind, parallel=True),
                norm_case("long_rows", (2, 3, 4099), kind=kind),
            )
        ),
        norm_case("bfloat16_branch", (37, 19), kind="add_rms", branch=torch.bfloat16, thorough=True),
        norm_case("float16_branch", (37, 19), torch.float32, kind="add_layer", bias=True, branch=torch.float16),
    ]

    def test_matches_torch(self, backend):
        x, weight_D = draw(40, 33).requires_grad_(), draw(33, seed=1).requires_grad_()
        x64, weight64 = (t.detach().double().requires_grad_() for t in (x, weight_D))
        dy = draw(40, 33, seed=2)
        with self.on(backend):
            y = ops.rms_norm(x, weight_D, 1e-5)
            y.backward(dy)
        want = torch.nn.functional.rms_norm(x64, (33,), weight64, 1e-5)
        want.backward(dy.double())
        for got, exact in ((y, want), (x.grad, x64.grad), (weight_D.grad, weight64.grad)):
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)

    def test_layer_norm_matches_torch(self, backend):
        """Of rows whose mean is far larger than their spread; residual and x get the same gradient, not shared."""
        x, residual = (draw(40, 33, seed=seed).add(100).requires_grad_() for seed in (0, 3))
        weight_D, bias_D = (draw(33, seed=seed).requires_grad_() for seed in (1, 2))
        leaves = [x, residual, weight_D, bias_D]
        doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
        dy, dsum = (draw(40, 33, seed=seed) for seed in (4, 5))
        with self.on(backend):
            y, total = ops.add_layer_norm(x, residual, weight_D, bias_D)
            torch.autograd.backward([y, total], [dy, dsum])
        exact = doubles[0] + doubles[1]
        want = torch.nn.functional.layer_norm(exact, (33,), *doubles[2:], 1e-5)
        torch.autograd.backward([want, exact], [dy.double(), dsum.double()])
        torch.testing.assert_close(total.double(), exact, rtol=1e-6, atol=0)
        for got, double in zip([y, *(leaf.grad for leaf in leaves)], [want, *(leaf.grad for leaf in doubles)]):
            torch.testing.assert_close(got.double(), double, rtol=1e-4, atol=1e-4)
        x.grad.zero_()
        assert residual.grad.any(), "two gradients in one memory"

    def test_gradients_of_one_output_alone(self, backend):
        x, residual, weight_D = draw(4, 8), draw(4, 8, seed=1), draw(8, seed=2)
        dy = draw(4, 8, seed=3)
        with self.on(backend):
            for used in (0, 1):
                leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, weight_D)]
                ops.add_rms_norm(*leaves)[used].backward(dy)
                if used:
                    assert leaves[2].grad is None and all(torch.equal(leaf.grad, dy) for leaf in leaves[:2])
                else:
                    total = (x + residual).requires_grad_()
                    ops.rms_norm(total, weight_D).backward(dy)
                    assert all(torch.equal(leaf.grad, total.grad) for leaf in leaves[:2])

    def test_a_row_of_zeros_gives_zeros(self, backend, dtype):
        x = torch.zeros(3, 16, dtype=dtype).requires_grad_()
        with self.on(backend):
            y = ops.rms_norm(x, torch.ones(16, dtype=dtype))
            y.sum().backward()
        assert bool((y == 0).all()) and x.grad.isfinite().all()

    def test_autocast_takes_inputs_as_they_come(self, backend):
        x, weight_D = draw(4, 8), draw(8)
        with self.on(backend):

            def norms():
                branch = x.bfloat16()
                return ops.rms_norm(x, weight_D), ops.rms_norm(branch, weight_D), *ops.add_rms_norm(branch, x, weight_D)

            want = norms()
            with torch.autocast("cpu", torch.bfloat16):
                got = norms()
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want))


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "weight_D must be of shape [D]", (draw(4, 5), draw(5, 1))),
        (ValueError, "x must be of shape [..., D] = [any, 4]", (draw(4, 5), draw(4))),
        (ValueError, "x must be of shape", (torch.tensor(1.0), draw(4))),
        (ValueError, "D must be at least 1", (draw(4, 0), draw(0))),
        (ValueError, "x must be on cpu, got meta", (draw(4, 5).to("meta"), draw(5))),
        (TypeError, "x must be float32", (torch.ones(4, 5, dtype=torch.int32), draw(5))),
        (
            TypeError,
            "weight_D must be torch.float16 or torch.float32, got torch.bfloat16",
            (draw(4, 5).half(), draw(5).bfloat16()),
        ),
        (TypeError, "weight_D must be", (draw(4, 5), draw(5).double())),
        (TypeError, "weight_D must be a torch.Tensor, got NoneType", (draw(4, 5), None)),
    ],
)
def test_bad_input(error, message, arguments):
    with pytest.raises(error, match=re.escape("fastmoe.rms_norm: " + message)):
        ops.rms_norm(*arguments)


@pytest.mark.parametrize(
    ("error", "message", "op", "arguments"),
    [
        (ValueError, "x must be of shape [as residual] = [4, 5], got [1, 5]", "add_rms_norm", (draw(1, 5), draw(4, 5))),
        (TypeError, "x must be float32 or bfloat16 or float16, got", "add_rms_norm", (draw(4, 5).double(), draw(4, 5))),
        (TypeError, "x must be bfloat16, got torch.float32", "add_layer_norm", (draw(4, 5), draw(4, 5).bfloat16())),
        (TypeError, "residual must be a torch.Tensor, got float", "add_rms_norm", (draw(4, 5), 1.0)),
        (ValueError, "residual must be of shape [..., D] = [any, 5]", "add_layer_norm", (draw(4, 6), draw(4, 6))),
    ],
)
def test_bad_sums(error, message, op, arguments):
    with pytest.raises(error, match=re.escape(f"fastmoe.{op}: {message}")):
        getattr(ops, op)(*arguments, draw(5))


def test_bad_bias():
    with pytest.raises(ValueError, match=re.escape("fastmoe.layer_norm: bias_D must be of shape [D] = [5], got [4]")):
        ops.layer_norm(draw(4, 5), draw(5), draw(4))
    with pytest.raises(TypeError, match="fastmoe.layer_norm: bias_D must be float32, got torch.bfloat16"):
        ops.layer_norm(draw(4, 5), draw(5), draw(5).bfloat16())


def test_gradients_twice_are_refused():
    x = draw(4, 5).requires_grad_()
    with pytest.raises(NotImplementedError, match="fastmoe.normalize: gradients of gradients"):
        torch.autograd.grad(ops.rms_norm(x, draw(5)).square().sum(), x, create_graph=True)
