from __future__ import annotations

import pytest
import torch

from fastmoe import jit, ops, testing
from fastmoe.ops.registry import OPS, select
from tests.triton.common import check

SHAPES = [(0, 8), (1, 1), (37, 19), (3, 5, 64), (9, 1030), (700, 3)]


def test_the_backend_is_triton():
    assert [select(OPS[name], "cpu")[0] for name in ("normalize", "normalize_backward")] == ["triton"] * 2


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_accurate(shape, dtype, monkeypatch):
    monkeypatch.setattr(jit, "device", lambda tensor: jit.Device(227 << 10, 2))  # so that a program has several tiles
    x, residual = (testing.draw(*shape, dtype=dtype, seed=seed) for seed in range(2))
    weight_D, bias_D = (testing.draw(shape[-1], dtype=dtype, seed=seed) for seed in (2, 3))
    inputs = {"x": x, "weight_D": weight_D}
    check(lambda i: ops.rms_norm(i["x"], i["weight_D"]), inputs)
    check(lambda i: ops.layer_norm(i["x"], i["weight_D"], i["bias_D"]), inputs | {"bias_D": bias_D})
    inputs["residual"] = residual
    check(lambda i: ops.add_rms_norm(i["x"], i["residual"], i["weight_D"]), inputs)
    check(lambda i: ops.add_layer_norm(i["x"], i["residual"], i["weight_D"]), inputs)


def test_a_branch_in_16_bits_and_a_weight_in_float32():
    x = testing.draw(37, 19, dtype=torch.bfloat16)
    residual, weight_D = testing.draw(37, 19, seed=1), testing.draw(19, seed=2)
    inputs = {"x": x, "residual": residual, "weight_D": weight_D}
    check(lambda i: ops.add_rms_norm(i["x"], i["residual"], i["weight_D"]), inputs)


def test_rows_that_are_too_long():
    with pytest.raises(ValueError, match=r"fastmoe.normalize: D must be at most 65536 in Triton, got 65537"):
        ops.rms_norm(torch.zeros(1, 65537), torch.zeros(65537))
