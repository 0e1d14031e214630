import re

import pytest
import torch

from fastmoe import ops
from fastmoe.testing import SHAPES, draw
from tests.ops.battery import Battery, Case


def norm_case(name, shape, weight_dtype=None, thorough=False, parallel=False):
    def make(dtype):
        return {
            "x": draw(*shape, dtype=dtype, scale=2),
            "weight_D": 1 + draw(shape[-1], dtype=weight_dtype or dtype, seed=1),
        }

    return Case(name, lambda x: ops.rms_norm(x["x"], x["weight_D"], 1e-5), make, thorough=thorough, parallel=parallel)


class TestNorm(Battery):
    family = "norm"
    cases = [norm_case(size, (s.T, s.D), thorough=size == "odd") for size, s in SHAPES.items()] + [
        norm_case("float32_weight", (37, 19), torch.float32, thorough=True),
        norm_case("vector", (48,)),
        norm_case("four_dimensions", (2, 3, 5, 33)),
        norm_case("empty_middle", (2, 0, 8)),
        norm_case("many_rows", (20000, 5), parallel=True),
        norm_case("long_rows", (3, 4099)),
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

    def test_a_row_of_zeros_gives_zeros(self, backend, dtype):
        x = torch.zeros(3, 16, dtype=dtype).requires_grad_()
        with self.on(backend):
            y = ops.rms_norm(x, torch.ones(16, dtype=dtype))
            y.sum().backward()
        assert bool((y == 0).all()) and x.grad.isfinite().all()

    def test_autocast_takes_inputs_as_they_come(self, backend):
        x, weight_D = draw(4, 8), draw(8)
        with self.on(backend):
            want = ops.rms_norm(x, weight_D), ops.rms_norm(x.bfloat16(), weight_D)
            with torch.autocast("cpu", torch.bfloat16):
                got = ops.rms_norm(x, weight_D), ops.rms_norm(x.bfloat16(), weight_D)
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


def test_gradients_twice_are_refused():
    x = draw(4, 5).requires_grad_()
    with pytest.raises(NotImplementedError, match="fastmoe.rms_norm: gradients of gradients"):
        torch.autograd.grad(ops.rms_norm(x, draw(5)).square().sum(), x, create_graph=True)
