"""Every instruction set of the extension that this CPU can run, not only the one it takes by itself."""

import pytest
import torch

from fastmoe import native, ops, testing
from fastmoe.testing import DTYPES, SHAPES, assert_accurate, draw, forward_backward, to_float64
from tests.ops.battery import names
from tests.ops.test_experts import draw_inputs

ISAS = ("baseline", "avx2", "avx512", "avx512bf16")
needs_extension = pytest.mark.skipif(native.missing() is not None, reason="no extension")


@pytest.fixture
def limit_isa():
    own = native._C.isa()
    yield native._C.limit_isa
    native._C.limit_isa(own)


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_accurate(isa, dtype, limit_isa):
    if ISAS.index(isa) > ISAS.index(native._C.isa()):
        with pytest.raises(ValueError, match=f"fastmoe.limit_isa: name must be .* got {isa}"):
            limit_isa(isa)
        return
    limit_isa(isa)
    assert native._C.isa() == isa
    calls = {
        "moe_mlp": (lambda x: ops.moe_mlp(*x.values()), draw_inputs(SHAPES["tiny"], dtype)),
        "moe_mlp, few rows": (lambda x: ops.moe_mlp(*x.values()), draw_inputs(SHAPES["odd"], dtype)),
        "linear": (
            lambda x: ops.linear(*x.values()),
            {"x": draw(70, 33, dtype=dtype), "weight": draw(45, 33, dtype=dtype, scale=33**-0.5, seed=1)},
        ),
        "linear_cross_entropy": (
            lambda x: ops.linear_cross_entropy(x["x"], x["weight"], torch.arange(29) % 23),
            {"x": draw(29, 19, dtype=dtype), "weight": draw(23, 19, dtype=dtype, seed=1)},
        ),
    }
    for name, (call, inputs) in calls.items():
        with testing.backend("reference"):
            exact, plain = forward_backward(call, to_float64(inputs)), forward_backward(call, inputs)
        with testing.backend("native"), testing.poison():
            got = forward_backward(call, inputs)
        for key in plain:
            assert_accurate(got[key], exact[key], plain[key], f"{name}: {key} with {isa}")
