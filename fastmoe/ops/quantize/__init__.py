"""Quantize: 8-bit codes with a scale for every block of 32, companded: small values survive beside large ones."""

from __future__ import annotations

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import define

BLOCK = 32


def quantize(
    x: torch.Tensor, signed: bool = True, key: int | None = None, first_row: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., I] as codes [..., I] and scales [..., ceil(I / 32)] bfloat16: blocks of 32 along the last dimension, a
    new one at the start of every row.

    scale: the block's largest magnitude, rounded up. signed: codes int8, c = 127 sqrt(|x| / scale) with the sign of x,
    for a value of scale (c / 127)^2. Not signed: codes uint8 of x >= 0, c = 255 sqrt(x / scale), at least 1 where x >
    0; second moments are kept so, as their square root. c is rounded to nearest, half to even; with a key it is rounded
    up with the probability of its fraction, by draws that key, row and column alone decide (`row_keys`, `bits`).
    first_row: the number of x's first row in a tensor of which x is a part; a part is then coded as in the whole.

    x: float32, bfloat16 or float16 (float64 on the reference), at least one dimension. Error of a value: at most scale
    * (2 c + 1) / (2 * 127^2), twice that with a key. A block with a value that is not finite gets scale NaN. Not
    differentiable. Errors: ValueError or TypeError naming the argument.
    """
    if not isinstance(x, torch.Tensor) or x.dtype not in check.FLOATS or not x.dim():
        check.fail("quantize", "x", "a float tensor of one or more dimensions", _what(x), TypeError)
    if first_row < 0:
        check.fail("quantize", "first_row", "at least 0", first_row)
    return _quantize(x, signed, key, first_row)


def dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The float32 values that `quantize` coded: codes [..., I] int8 or uint8, scales [..., ceil(I / 32)] bfloat16."""
    if not isinstance(codes, torch.Tensor) or codes.dtype not in (torch.int8, torch.uint8) or not codes.dim():
        check.fail("dequantize", "codes", "an int8 or uint8 tensor of one or more dimensions", _what(codes), TypeError)
    shape = tuple(scales_shape(codes.shape))
    check.tensor("dequantize", "scales", scales, shape, (torch.bfloat16,), codes, "..., ceil(I / 32)")
    return _dequantize(codes, scales)


def scales_shape(shape: torch.Size) -> torch.Size:
    """[..., I] -> [..., ceil(I / 32)]."""
    return torch.Size([*shape[:-1], -(-shape[-1] // BLOCK)])


def _what(value: object) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


_quantize = define(
    "quantize",
    "quantize(Tensor x, bool signed, int? key, int first_row) -> (Tensor, Tensor)",
    fake=lambda x, signed, key, first_row: (
        x.new_empty(x.shape, dtype=torch.int8 if signed else torch.uint8),
        x.new_empty(scales_shape(x.shape), dtype=torch.bfloat16),
    ),
)
_dequantize = define(
    "quantize",
    "dequantize(Tensor codes, Tensor scales) -> Tensor",
    fake=lambda codes, scales: codes.new_empty(codes.shape, dtype=torch.float32),
)
