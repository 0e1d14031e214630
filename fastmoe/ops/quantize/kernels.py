"""Quantize in Triton: a program codes a tile of blocks, one a row of the tile.

All is reference.py to the bit where no product is fused with a sum, so the kernels are launched with EXACT.
"""

import torch
import triton
import triton.language as tl

from fastmoe.ops.permutation.kernels import INTERPRETED
from fastmoe.ops.quantize import scales_shape

BLOCK = tl.constexpr(32)
TILE = 64  # blocks that a program holds at once
EXACT = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
_GOLDEN = 0x9E3779B97F4A7C15


def stream(key: int, first_row: int) -> int:
    """What splitmix64 makes the words of the first row from, as int64; every row adds _GOLDEN to it."""
    return (key + (first_row + 1) * _GOLDEN + (1 << 63)) % (1 << 64) - (1 << 63)


@triton.jit
def places(row0, block0, blocks, width, EVEN: tl.constexpr, BLOCKS: tl.constexpr):
    """Rows [G] and columns [G, 32] of BLOCKS blocks from block `block0` of row `row0` on, `blocks` of them in each row,
    where they lie and whether they are inside a row. EVEN: width and all addresses are multiples of 16.
    """
    if EVEN:
        width = width // 16 * 16  # so that the compiler knows
    at_G = (block0 + tl.arange(0, BLOCKS)).to(tl.uint32)
    row_G = row0 + (at_G // blocks.to(tl.uint32)).to(tl.int64)
    first_G = (at_G % blocks.to(tl.uint32)).to(tl.int64) * BLOCK
    offset_G = row_G * width + first_G
    column_GJ = first_G[:, None] + tl.arange(0, BLOCK)[None, :]
    return row_G, column_GJ, offset_G[:, None] + tl.arange(0, BLOCK)[None, :], column_GJ < width


@triton.jit
def bits(first, row_G, column_GJ):
    """32 random bits of every element; first: `stream` of row 0."""
    z_G = (first + row_G * -0x61C8864680B583EB).to(tl.uint64)  # 0x9E3779B97F4A7C15
    z_G = (z_G ^ (z_G >> 30)) * 0xBF58476D1CE4E5B9
    z_G = (z_G ^ (z_G >> 27)) * 0x94D049BB133111EB
    z_G = z_G ^ (z_G >> 31)
    x = (column_GJ.to(tl.uint32) * 0x9E3779B1) ^ z_G.to(tl.uint32)[:, None]
    x = (x ^ (x >> 16)) * 0x85EBCA6B + (z_G >> 32).to(tl.uint32)[:, None]
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def encode(x_GJ, draws_GJ, SIGNED: tl.constexpr, DRAWN: tl.constexpr):
    """Codes and the bits of the scales; what is outside a row is zero. The low 8 bits of draws round up or down."""
    magnitude_GJ = tl.abs(x_GJ)
    top_G = tl.max(magnitude_GJ.to(tl.int32, bitcast=True), 1)
    scale_G = tl.where(top_G < 0x7F800000, (top_G + 0xFFFF) >> 16, 0x7FC0)
    unit_G = (scale_G << 16).to(tl.float32, bitcast=True)
    share_GJ = tl.div_rn(magnitude_GJ, tl.broadcast_to(unit_G[:, None], magnitude_GJ.shape))
    share_GJ = tl.where(share_GJ >= 0, share_GJ, 0.0)  # NaN where the scale is 0 or NaN
    code_GJ = tl.sqrt_rn(share_GJ) * (127.0 if SIGNED else 255.0)
    if DRAWN:
        code_GJ = (code_GJ + (draws_GJ & 0xFF).to(tl.float32) * 0.00390625).to(tl.int32)
    else:
        code_GJ = ((code_GJ + 12582912.0) - 12582912.0).to(tl.int32)  # half to even
    if SIGNED:
        code_GJ = tl.where(x_GJ < 0, -code_GJ, code_GJ).to(tl.int8)
    else:
        code_GJ = tl.where(x_GJ > 0, tl.maximum(code_GJ, 1), 0).to(tl.uint8)
    return code_GJ, scale_G.to(tl.int16)


@triton.jit
def decode(codes_GJ, scale_G, SIGNED: tl.constexpr):
    """float32 of codes and the bits of their scales."""
    unit_G = (scale_G.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    code_GJ = codes_GJ.to(tl.float32)
    if INTERPRETED:  # its fma rounds twice
        share_GJ = tl.div_rn(code_GJ, 127.0 if SIGNED else 255.0)
    else:  # the same for every code, in a quarter of the instructions
        rest_GJ = code_GJ * (2.9332994366804144e-11 if SIGNED else -2.319175823606301e-10)
        share_GJ = tl.fma(code_GJ, tl.full(code_GJ.shape, 1 / 127 if SIGNED else 1 / 255, tl.float32), rest_GJ)
    return unit_G[:, None] * share_GJ * tl.abs(share_GJ)


@triton.jit
def _place(total, blocks, width, EVEN: tl.constexpr, BLOCKS: tl.constexpr):
    """Of this program's tile: blocks [G], whether they are there, and `places`."""
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    row0 = first // blocks
    row_G, column_GJ, at_GJ, mask_GJ = places(row0, (first - row0 * blocks).to(tl.int32), blocks, width, EVEN, BLOCKS)
    block_G = first + tl.arange(0, BLOCKS)
    return block_G, block_G < total, row_G, column_GJ, at_GJ, mask_GJ & (block_G < total)[:, None]


@triton.jit(do_not_specialize=["total", "blocks", "width", "first"])
def _quantize_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    total,
    blocks,
    width,
    first,
    SIGNED: tl.constexpr,
    DRAWN: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block_G, there_G, row_G, column_GJ, at_GJ, mask_GJ = _place(total, blocks, width, EVEN, BLOCKS)
    x_GJ = tl.load(x_ptr + at_GJ, mask=mask_GJ, other=0.0).to(tl.float32)
    codes_GJ, scale_G = encode(x_GJ, bits(first, row_G, column_GJ), SIGNED, DRAWN)
    tl.store(codes_ptr + at_GJ, codes_GJ, mask=mask_GJ)
    tl.store(scales_ptr + block_G, scale_G, mask=there_G)


@triton.jit(do_not_specialize=["total", "blocks", "width"])
def _dequantize_kernel(
    codes_ptr, scales_ptr, out_ptr, total, blocks, width, SIGNED: tl.constexpr, EVEN: tl.constexpr, BLOCKS: tl.constexpr
):
    block_G, there_G, _, _, at_GJ, mask_GJ = _place(total, blocks, width, EVEN, BLOCKS)
    scale_G = tl.load(scales_ptr + block_G, mask=there_G, other=0)
    codes_GJ = tl.load(codes_ptr + at_GJ, mask=mask_GJ, other=0)
    tl.store(out_ptr + at_GJ, decode(codes_GJ, scale_G, SIGNED), mask=mask_GJ)


def even(width: int, *addresses: int) -> bool:
    """Whether rows of width elements at these addresses can be moved 16 bytes at a time."""
    return not any(number % 16 for number in (width, *addresses))


def _launch(kernel, like, scales, tensors, *numbers, **flags):
    """The kernel over all blocks of tensors shaped as `like`."""
    total, blocks, width = scales.numel(), scales.shape[-1], like.shape[-1]
    if total:
        flags["EVEN"] = even(width, *(tensor.data_ptr() for tensor in tensors))
        flags["BLOCKS"] = TILE if flags["EVEN"] else TILE // 4  # else an address of every element would be held
        with torch.cuda.device_of(like):
            kernel[(triton.cdiv(total, flags["BLOCKS"]),)](*tensors, total, blocks, width, *numbers, **flags, **EXACT)


def quantize(x, signed, key, first_row):
    x = x.contiguous()
    codes = torch.empty_like(x, dtype=torch.int8 if signed else torch.uint8)
    scales = x.new_empty(scales_shape(x.shape), dtype=torch.bfloat16)
    first = 0 if key is None else stream(key, first_row)
    _launch(
        _quantize_kernel, x, scales, (x, codes, scales.view(torch.int16)), first, SIGNED=signed, DRAWN=key is not None
    )
    return codes, scales


def dequantize(codes, scales):
    codes, scales = codes.contiguous(), scales.contiguous()
    out = torch.empty_like(codes, dtype=torch.float32)
    _launch(_dequantize_kernel, codes, scales, (codes, scales.view(torch.int16), out), SIGNED=codes.dtype == torch.int8)
    return out
