from __future__ import annotations

import pytest
import torch

from fastmoe import testing
from fastmoe.ops import dequantize, quantize
from fastmoe.ops.quantize import reference
from fastmoe.ops.registry import OPS, select
from tests.ops.test_quantize import draw_spread


def test_the_backend_is_triton():
    assert [select(OPS[name], "cpu")[0] for name in ("quantize", "dequantize")] == ["triton"] * 2
    for signed in (True, False):
        torch.library.opcheck(OPS["quantize"].overload, (testing.draw(3, 35), signed, 7, 1))
        codes = reference.quantize(testing.draw(3, 35), signed, None, 0)
        torch.library.opcheck(OPS["dequantize"].overload, codes)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (1,), (2, 3, 31), (70, 33), (5, 64), (2, 2304)])
def test_codes_are_the_reference_s(shape, signed, dtype):
    x = draw_spread(*shape, dtype=dtype)
    for key, first_row in ((None, 0), (0, 0), (-7, 3), (2**63 - 1, 2**40)):
        with testing.poison():
            got = quantize(x, signed, key, first_row)
        want = reference.quantize(x, signed, key, first_row)
        for name, got_tensor, want_tensor in zip(("codes", "scales"), got, want):
            testing.assert_bit_equal(got_tensor, want_tensor, name)
    with testing.poison():
        values = dequantize(*got)
    finite = reference.dequantize(*got).isfinite()
    testing.assert_bit_equal(values.nan_to_num(9.0), reference.dequantize(*got).nan_to_num(9.0))
    assert shape != (70, 33) or not finite.all()


def test_any_layout():
    x = draw_spread(6, 64)
    moved = torch.empty(6 * 64 + 1)[1:].view(6, 64).copy_(x)
    for other in (moved, x.t().contiguous().t()):
        for got, want in zip(quantize(other, True, 5, 2), quantize(x, True, 5, 2)):
            testing.assert_bit_equal(got, want)
