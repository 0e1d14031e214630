"""C++ on the CPU: csrc/cpu/quantize.cpp."""

import torch

from fastmoe.native import _C, dtype_code, empty, num_threads, ptr
from fastmoe.ops.quantize import scales_shape


def quantize(x, signed, key, first_row):
    x = x.contiguous()
    codes = empty(*x.shape, dtype=torch.int8 if signed else torch.uint8)
    scales = empty(*scales_shape(x.shape), dtype=torch.bfloat16)
    outputs = ptr(codes), ptr(scales)
    options = dtype_code(x), signed, key is not None, key or 0, first_row
    _C.quantize(ptr(x), *outputs, x.shape[:-1].numel(), x.shape[-1], *options, num_threads())
    return codes, scales


def dequantize(codes, scales):
    codes, scales = codes.contiguous(), scales.contiguous()
    out = empty(*codes.shape)
    inputs = ptr(codes), ptr(scales)
    _C.dequantize(
        *inputs, ptr(out), codes.shape[:-1].numel(), codes.shape[-1], codes.dtype == torch.int8, num_threads()
    )
    return out
