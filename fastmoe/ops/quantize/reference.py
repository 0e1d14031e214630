"""What the 8-bit codes and the random bits of rounding mean, in plain torch."""

import torch

BLOCK = 32
_WORD = 0xFFFFFFFF
_LONG = (1 << 64) - 1


def quantize(x, signed, key, first_row):
    return quantize_with(x.contiguous(), signed, None if key is None else bits(key, first_row, x.shape, x.device))


def quantize_with(x, signed, draws):
    """draws: the low 8 bits round up or down; None: to nearest."""
    wide = x if x.dtype == torch.float64 else x.float()
    blocks = torch.nn.functional.pad(wide, (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = round_up(blocks.abs().amax(-1))
    scale = scale.masked_fill(~blocks.isfinite().all(-1), torch.nan)
    part = (blocks.abs() / scale[..., None].to(wide.dtype)).masked_fill(scale[..., None] == 0, 0).flatten(-2)
    code = (127 if signed else 255) * part[..., : x.shape[-1]].clamp(max=1).sqrt().nan_to_num(0)
    code = code.round() if draws is None else (code + (draws & 0xFF) * 2.0**-8).floor()
    if signed:
        return (code.clamp(max=127) * x.sign().nan_to_num(0)).to(torch.int8), scale
    return torch.where(x > 0, code.clamp(1, 255), 0).to(torch.uint8), scale


def dequantize(codes, scales):
    return decode(codes, scales, torch.float32)


def decode(codes, scales, dtype):
    part = codes.to(dtype) / (127 if codes.dtype == torch.int8 else 255)
    unit = scales.to(dtype).repeat_interleave(BLOCK, -1)[..., : codes.shape[-1]]
    return unit * part * part.abs()


def round_up(x):
    """To bfloat16, never below x >= 0."""
    near = x.bfloat16()
    above = (near.view(torch.int16) + 1).view(torch.bfloat16)
    return torch.where(near.to(x.dtype) < x, above, near)


def round_with(x, dtype, draws):
    """To bfloat16 or float16, up or down with the probability of the fraction; draws: the low 16 bits (float16: 13 of
    them, from bit 3 on).
    """
    if dtype == torch.bfloat16:
        word = x.float().view(torch.int32)
        rounded = ((word + (draws & 0xFFFF).int()) >> 16).to(torch.int16).view(dtype)
    else:
        unit = torch.exp2(x.abs().clamp(min=2.0**-14).log2().floor() - 10)
        rounded = (x.sign() * ((x.abs() / unit + (draws >> 3 & 0x1FFF) * 2.0**-13).floor() * unit)).to(dtype)
    return torch.where(x.isfinite(), rounded, x.to(dtype))


def join(param, residual):
    """The float32 of a 24-bit weight."""
    return ((param.view(torch.int16).int() << 16) + (residual.int() << 8)).view(torch.float32)


def split(weight, draws, param, residual):
    """float32 to 24 bits, up or down by the low 8 bits of draws: bfloat16 to nearest and what is left of it."""
    word = (weight.view(torch.int32) + (draws & 0xFF).int()) >> 8
    high = (word + 0x80) >> 8
    param.copy_(torch.where(weight.isfinite(), high.to(torch.int16).view(torch.bfloat16), weight.bfloat16()))
    residual.copy_(torch.where(weight.isfinite(), word - (high << 8), 0))


def widen(param, master, dtype):
    """What an optimizer's weight is worth. master: int8 or float32 of param's shape, or empty."""
    if master.numel() and master.dtype == torch.int8:
        return join(param, master)
    return (master if master.numel() else param).to(dtype)


def narrow(weight, draws, param, master):
    """Stores a weight in param and master; draws: 16 bits."""
    if master.numel() and master.dtype == torch.int8:
        split(weight, draws, param, master)
    elif master.numel():
        master.copy_(weight), param.copy_(weight)
    elif param.dtype in (torch.bfloat16, torch.float16):
        param.copy_(round_with(weight, param.dtype, draws))
    else:
        param.copy_(weight)


def row_keys(key: int, row: int) -> tuple[int, int]:
    """Two words for a row: the halves of splitmix64 of key + row * 0x9E3779B97F4A7C15 (modulo 2^64)."""
    z = (key + (row + 1) * 0x9E3779B97F4A7C15) & _LONG
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & _LONG
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & _LONG
    z ^= z >> 31
    return z & _WORD, z >> 32


def bits(key, first_row, shape, device):
    """32 random bits of every element, int64: of column c in a row with the words k0, k1, x = (c * 0x9E3779B1) ^ k0,
    then x ^= x >> 16, x *= 0x85EBCA6B, x += k1, x ^= x >> 13, x *= 0xC2B2AE35, x ^= x >> 16, all modulo 2^32.
    """
    rows = torch.Size(shape[:-1]).numel()
    keys = torch.tensor([row_keys(key, first_row + row) for row in range(rows)], dtype=torch.int64, device=device)
    k0_R1, k1_R1 = keys.view(rows, 2, 1).unbind(1)
    x = (torch.arange(shape[-1], device=device) * 0x9E3779B1 & _WORD) ^ k0_R1
    x = (x ^ x >> 16) * 0x85EBCA6B & _WORD
    x = (x + k1_R1) & _WORD
    x = (x ^ x >> 13) * 0xC2B2AE35 & _WORD
    return (x ^ x >> 16).view(shape)
