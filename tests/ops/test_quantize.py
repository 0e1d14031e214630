import re

import pytest
import torch

from fastmoe import native, ops, testing
from fastmoe.ops.quantize import scales_shape
from fastmoe.ops.quantize.reference import bits, join, round_with, row_keys, split
from tests.ops.battery import Battery, Case
from tests.ops.test_isa import ISAS, limit_isa, needs_extension  # noqa: F401


def draw_spread(*shape, dtype=torch.float32, seed=0):
    """Normal values of sizes from 1 to below what dtype holds; of many of them a row of zeros, infinity and NaN."""
    x = testing.draw(*shape, seed=seed) * torch.exp(-110 * testing.draw(*shape[:-1], 1, seed=seed + 1).square() / 4)
    x = x.to(dtype)
    if x.numel() > 2000:
        x[0], x.view(-1)[700], x.view(-1)[1500] = 0, torch.inf, torch.nan
    return x


def quantize_case(*shape, signed=True, key=None, thorough=False, parallel=False):
    return Case(
        f"{'x'.join(map(str, shape))}-{'int8' if signed else 'uint8'}-key{key}",
        lambda x: ops.quantize(x["x"], signed, key, 3),
        lambda dtype: {"x": draw_spread(*shape, dtype=dtype)},
        frozen=("x",),
        moves_data=True,
        thorough=thorough,
        parallel=parallel,
    )


def dequantize_case(*shape, signed=True, thorough=False, parallel=False):
    largest = 127 if signed else 255
    codes = (largest * torch.rand(shape, generator=testing.generator(1))).round()
    codes = (codes * testing.draw(*shape).sign()).to(torch.int8) if signed else codes.to(torch.uint8)
    scales = testing.draw(*scales_shape(codes.shape), dtype=torch.bfloat16).abs()
    return Case(
        f"{'x'.join(map(str, shape))}-{'int8' if signed else 'uint8'}-back",
        lambda x: ops.dequantize(x["codes"], scales),
        lambda dtype: {"codes": codes},
        moves_data=True,
        thorough=thorough,
        parallel=parallel,
    )


class TestQuantize(Battery):
    family = "quantize"
    cases = [
        *(quantize_case(*s, signed=signed) for s in ((0, 4), (3, 0), (1,), (2, 3, 31)) for signed in (True, False)),
        *(quantize_case(5, 64, signed=signed, key=key) for signed in (True, False) for key in (None, 0, -7)),
        quantize_case(7, 45, thorough=True),
        quantize_case(7, 45, signed=False, key=9, thorough=True),
        quantize_case(40, 1000, key=2**63 - 1, parallel=True),
        quantize_case(40_000, signed=False, parallel=True),
        *(dequantize_case(*s, signed=signed) for s in ((0, 4), (3, 0), (1,), (2, 3, 31)) for signed in (True, False)),
        dequantize_case(7, 45, thorough=True),
        dequantize_case(50, 777, signed=False, parallel=True),
    ]

    @pytest.mark.parametrize("key", [None, 4])
    @pytest.mark.parametrize("signed", [True, False])
    def test_error_of_a_value(self, backend, signed, key):
        x = testing.draw(50, 70) if signed else testing.draw(50, 70).abs()
        with self.on(backend):
            codes, scales = ops.quantize(x, signed, key)
            values = ops.dequantize(codes, scales)
        blocks = torch.nn.functional.pad(x, (0, 26)).unflatten(1, (3, 32)).abs().amax(2)
        assert (scales >= blocks).all() and (scales <= blocks * (1 + 2**-7)).all()
        largest, unit = 127 if signed else 255, scales.float().repeat_interleave(32, 1)[:, :70]
        allowed = unit * (2 * codes.float().abs() + 1) / (2 * largest**2) * (1 if key is None else 2)
        assert ((values - x).abs() <= allowed * (1 + 1e-5)).all()

    def test_draws_round_without_bias_in_the_code(self, backend):
        x = torch.full((4000, 32), 0.3)
        x[:, 0] = 1  # the scale
        with self.on(backend):
            codes, _ = ops.quantize(x, True, 11)
        exact, drawn = 127 * 0.3**0.5, codes[:, 1:].double()
        assert set(drawn.unique().tolist()) == {int(exact), int(exact) + 1}
        assert abs(drawn.mean() - exact) < 5 * 0.5 / drawn.numel() ** 0.5 + 2**-9
        assert (torch.corrcoef(drawn.t()) - torch.eye(31)).abs().max() < 5 / 4000**0.5

    def test_a_part_is_coded_as_in_the_whole(self, backend):
        x = testing.draw(9, 40)
        with self.on(backend):
            whole, part = ops.quantize(x, True, 3, 100), ops.quantize(x[4:], True, 3, 104)
        for got, want in zip(part, whole):
            testing.assert_bit_equal(got, want[4:])

    def test_a_block_that_is_not_finite_spares_the_others(self, backend):
        x = testing.draw(2, 96)
        with self.on(backend):
            want = ops.quantize(x)
            for value in (torch.inf, -torch.inf, torch.nan):
                x[1, 40] = value
                codes, scales = ops.quantize(x)
                assert scales.isnan().tolist() == [[False] * 3, [False, True, False]]
                assert torch.equal(codes[:, :32], want[0][:, :32]) and torch.equal(codes[:, 64:], want[0][:, 64:])
                assert ops.dequantize(codes, scales)[1, 32:64].isnan().all()

    def test_small_values_keep_a_code(self, backend):
        x = torch.tensor([[1e-30, 0.0, 3.0, 1e-9]])
        for key in (None, 1):
            with self.on(backend):
                codes, scales = ops.quantize(x, False, key)
            assert codes.tolist() == [[1, 0, codes[0, 2], 1]] and codes[0, 2] >= 254 and scales.item() == 3


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_gives_the_same_bits(isa, limit_isa):  # noqa: F811
    if ISAS.index(isa) > ISAS.index(native._C.isa()):
        pytest.skip("not on this CPU")
    limit_isa(isa)
    for dtype in testing.DTYPES:
        for signed in (True, False):
            for key in (None, 8):
                x = draw_spread(31, 77, dtype=dtype)
                with testing.backend("quantize=native"), testing.poison():
                    got = ops.quantize(x, signed, key, 5)
                    got += (ops.dequantize(*got).nan_to_num(9.0),)
                with testing.backend("reference"):
                    want = ops.quantize(x, signed, key, 5)
                    want += (ops.dequantize(*want).nan_to_num(9.0),)
                for got_tensor, want_tensor in zip(got, want):
                    testing.assert_bit_equal(got_tensor, want_tensor)


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_nearest_and_their_values_as_close_as_stated(signed):
    x = testing.draw(20, 70) if signed else testing.draw(20, 70).abs()
    codes, scales = ops.quantize(x, signed)
    top = 127 if signed else 255
    wide = scales.double().repeat_interleave(32, -1)[:, :70]
    exact = top * (x.double().abs() / wide).sqrt()
    wanted = exact if signed else exact.clamp(min=1)
    assert bool(((codes.double().abs() - wanted).abs() <= 0.5 + 1e-4).all())
    values = ops.dequantize(codes, scales)
    assert values.dtype == torch.float32
    want = wide * (codes.double() / top) * (codes.double() / top).abs()
    torch.testing.assert_close(values.double(), want, rtol=1e-6, atol=0)
    if signed:
        bound = wide * (2 * codes.double().abs() + 1) / (2 * 127**2)
        assert bool(((values.double() - x.double()).abs() <= bound * (1 + 1e-4)).all())


def test_every_code_is_its_own_value():
    for kind, all_codes in ((torch.int8, torch.arange(-127, 128)), (torch.uint8, torch.arange(256))):
        top = int(all_codes.max())
        codes = torch.stack([all_codes, torch.full_like(all_codes, top)], 1).to(kind)  # a block: a code and the largest
        values = ops.dequantize(codes, torch.full((len(codes), 1), 0.375, dtype=torch.bfloat16))
        again, scales = ops.quantize(values, kind == torch.int8)
        assert torch.equal(again, codes) and bool((scales == 0.375).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounding_of_weights_is_unbiased(dtype):
    x = torch.cat([testing.draw(300), testing.draw(300, seed=1, scale=1e-6)])
    draws = torch.stack([bits(key, 0, (1, 600), "cpu")[0] for key in range(600)])
    rounded = torch.stack([round_with(x, dtype, some & 0xFFFF).double() for some in draws])
    step = 2.0 ** (x.double().abs().clamp(min=2.0**-14 if dtype == torch.float16 else 0).log2().floor() - 10)
    step = step * 8 if dtype == torch.bfloat16 else step
    off = (rounded - x.double()) / step
    assert bool((off.abs() < 1).all()) and abs(off.mean().item()) < 4 * 0.5 / off.numel() ** 0.5 + 2.0**-13
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0])
    testing.assert_bit_equal(round_with(special, dtype, draws[0, :4] & 0xFFFF), special.to(dtype))


def test_24_bit_weights():
    x = testing.draw(1000)
    param, residual = torch.empty(1000, dtype=torch.bfloat16), torch.empty(1000, dtype=torch.int8)
    split(x, torch.zeros(1000, dtype=torch.int64), param, residual)
    word = join(param, residual)
    assert bool(((x.double() - word).abs() < 2.0**-15 * x.abs()).all())
    assert bool(((param.double() - word).abs() <= 2.0**-8 * x.abs()).all())
    split(word, torch.full((1000,), 255), param, residual)
    assert torch.equal(join(param, residual), word), "a 24-bit weight stays as it is whatever is drawn"


def test_known_answers():
    """splitmix64 of the seed 1234567 as its author's program prints it, and the words of a row."""
    first = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    words = [row_keys(1234567, row) for row in range(3)]
    assert [low + (high << 32) for low, high in words] == first
    assert row_keys(1234567 - 2**64, 0) == row_keys(1234567, 0)
    drawn = bits(5, 2, (1000, 32), "cpu")
    assert drawn.min() >= 0 and drawn.max() < 2**32
    ones = torch.stack([(drawn >> bit & 1).double().mean() for bit in range(32)])
    assert (ones - 0.5).abs().max() < 5 * 0.5 / drawn.numel() ** 0.5


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            TypeError,
            "quantize: x must be a float tensor of one or more dimensions, got list",
            lambda: ops.quantize([1]),
        ),
        (TypeError, "quantize: x must be a float tensor", lambda: ops.quantize(torch.ones(3, dtype=torch.int64))),
        (TypeError, "quantize: x must be a float tensor", lambda: ops.quantize(torch.tensor(1.0))),
        (
            ValueError,
            "quantize: first_row must be at least 0, got -1",
            lambda: ops.quantize(torch.ones(3), True, 1, -1),
        ),
        (
            TypeError,
            "dequantize: codes must be an int8 or uint8 tensor of one or more dimensions, got torch.float32 [3]",
            lambda: ops.dequantize(torch.ones(3), torch.ones(1, dtype=torch.bfloat16)),
        ),
        (
            ValueError,
            "dequantize: scales must be of shape [..., ceil(I / 32)] = [2, 2], got [2, 1]",
            lambda: ops.dequantize(torch.ones(2, 33, dtype=torch.int8), torch.ones(2, 1, dtype=torch.bfloat16)),
        ),
        (
            TypeError,
            "dequantize: scales must be bfloat16, got torch.float32",
            lambda: ops.dequantize(torch.ones(2, 33, dtype=torch.int8), torch.ones(2, 2)),
        ),
    ],
)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=re.escape("fastmoe." + message)):
        call()
