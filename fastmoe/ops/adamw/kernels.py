"""AdamW in Triton: one launch for tensors of any sizes and kinds.

A tensor is cut into chunks of CHUNK blocks of 32 along its rows, and a program updates one. The table it reads from
holds FIELDS words a tensor, then the tensor of each chunk; it goes to the device in one copy that nobody waits for. A
kind is what a tensor's param, moments and master are kept in and whether 16 bytes can be moved at a time (`_kind`); the
kernel is compiled for the set of kinds that a call has.
"""

from array import array

import torch
import triton
import triton.language as tl

from fastmoe.ops import check
from fastmoe.ops.adamw import MOMENTS
from fastmoe.ops.permutation.kernels import to_storage
from fastmoe.ops.quantize import BLOCK
from fastmoe.ops.quantize.kernels import EXACT, TILE, bits, decode, encode, even, places
from fastmoe.ops.quantize.kernels import stream as stream_of

CHUNK = 512  # blocks
FIELDS = tl.constexpr(16)  # 7 addresses, 6 whole numbers, 3 doubles
PARAMS = (torch.float32, torch.bfloat16, torch.float16)
MASTERS = (None, torch.int8, torch.float32)
KINDS = tl.constexpr(72)
_FLOAT32, _BFLOAT16, _CODES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(3)  # places in PARAMS and MOMENTS
_RESIDUAL, _WIDE = tl.constexpr(1), tl.constexpr(2)  # in MASTERS


def _kind(param: torch.dtype, moments: torch.dtype, master: torch.dtype | None, aligned: bool) -> int:
    return 24 * PARAMS.index(param) + 6 * MOMENTS.index(moments) + 2 * MASTERS.index(master) + aligned


@triton.jit
def _pointer(words_ptr, dtype: tl.constexpr, EVEN: tl.constexpr):
    pointer = tl.load(words_ptr).to(tl.pointer_type(dtype))
    if EVEN:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _number(words_ptr):
    return tl.load(words_ptr).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _round(x, draws, dtype: tl.constexpr):
    """To bfloat16 or float16, up or down by the low 16 bits of draws (float16: 13 of them, from bit 3 on)."""
    word = x.to(tl.int32, bitcast=True)
    if dtype == tl.bfloat16:
        finite = (word & 0x7FFFFFFF) < 0x7F800000
        word = tl.where(finite, word + (draws & 0xFFFF).to(tl.int32), tl.where(x == x, word, 0x7FC00000))
        rounded = (word >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        magnitude = tl.abs(x)
        unit = (tl.maximum(word & 0x7F800000, 0x38800000)) - 0x05000000  # 2^-10 of the power of two, from 2^-14 on
        steps = magnitude * (0x7F000000 - unit).to(tl.float32, bitcast=True)
        steps = tl.floor(steps + ((draws >> 3) & 0x1FFF).to(tl.float32) * 0.0001220703125)
        magnitude = steps * unit.to(tl.float32, bitcast=True)
        rounded = tl.where(x < 0, -magnitude, magnitude).to(tl.float16)
    return rounded


@triton.jit
def _update_chunk(
    words_ptr,
    pid,
    rate1,
    beta2,
    rate2,
    eps,
    grad_scale,
    PARAM: tl.constexpr,
    MOMENT: tl.constexpr,
    MASTER: tl.constexpr,
    EVEN: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    BLOCKS: tl.constexpr = TILE if EVEN else TILE // 4  # else an address of every element would be held
    param_type: tl.constexpr = tl.float32 if PARAM == _FLOAT32 else tl.bfloat16 if PARAM == _BFLOAT16 else tl.float16
    moment_type: tl.constexpr = tl.float32 if MOMENT == _FLOAT32 else tl.bfloat16 if MOMENT == _BFLOAT16 else tl.float16
    param_ptr = _pointer(words_ptr, param_type, EVEN)
    grad_ptr = _pointer(words_ptr + 1, param_type, EVEN)
    if MOMENT == _CODES:
        m_ptr, v_ptr = _pointer(words_ptr + 2, tl.int8, EVEN), _pointer(words_ptr + 3, tl.uint8, EVEN)
    else:
        m_ptr, v_ptr = _pointer(words_ptr + 2, moment_type, EVEN), _pointer(words_ptr + 3, moment_type, EVEN)
    m_scales_ptr, v_scales_ptr = _pointer(words_ptr + 4, tl.int16, False), _pointer(words_ptr + 5, tl.int16, False)
    master_ptr = _pointer(words_ptr + 6, tl.int8 if MASTER == _RESIDUAL else tl.float32, EVEN)
    width, blocks, total = tl.load(words_ptr + 8), tl.load(words_ptr + 9), tl.load(words_ptr + 10)
    first = (pid - tl.load(words_ptr + 11)) * CHUNK
    stream = tl.load(words_ptr + 12)
    decay, step_size, root = _number(words_ptr + 13), _number(words_ptr + 14), _number(words_ptr + 15)
    row0 = first // blocks
    block0 = (first - row0 * blocks).to(tl.int32)
    for start in range(0, tl.minimum(total - first, CHUNK).to(tl.int32), BLOCKS):
        row_G, column_GJ, at_GJ, mask_GJ = places(row0, block0 + start, blocks, width, EVEN, BLOCKS)
        block_G = first + start + tl.arange(0, BLOCKS)
        there_G = block_G < total
        mask_GJ = mask_GJ & there_G[:, None]
        g = tl.load(grad_ptr + at_GJ, mask=mask_GJ, other=0.0).to(tl.float32) * grad_scale
        m = tl.load(m_ptr + at_GJ, mask=mask_GJ, other=0)
        v = tl.load(v_ptr + at_GJ, mask=mask_GJ, other=0)
        if MASTER == _WIDE:
            weight = tl.load(master_ptr + at_GJ, mask=mask_GJ, other=0.0)
        else:
            weight = tl.load(param_ptr + at_GJ, mask=mask_GJ, other=0.0).to(tl.float32)
        if MASTER == _RESIDUAL:
            residual = tl.load(master_ptr + at_GJ, mask=mask_GJ, other=0).to(tl.int32) << 8
            weight = (weight.to(tl.int32, bitcast=True) + residual).to(tl.float32, bitcast=True)
        if MOMENT == _CODES:
            m = decode(m, tl.load(m_scales_ptr + block_G, mask=there_G, other=0), True)
            v = decode(v, tl.load(v_scales_ptr + block_G, mask=there_G, other=0), False)
        else:
            m, v = m.to(tl.float32), v.to(tl.float32)
        if MOMENT > _BFLOAT16:  # v holds its square root
            v = v * v

        m = m + rate1 * (g - m)
        v = v * beta2 + rate2 * g * g
        v_root = tl.sqrt_rn(v)
        weight = weight * decay - step_size * (m / (v_root * root + eps))

        draws = bits(stream, row_G, column_GJ)
        if MOMENT > _BFLOAT16:
            v = v_root
        if MOMENT == _CODES:
            m, m_scale_G = encode(m, draws, True, True)
            v, v_scale_G = encode(v, draws >> 8, False, True)
            tl.store(m_scales_ptr + block_G, m_scale_G, mask=there_G)
            tl.store(v_scales_ptr + block_G, v_scale_G, mask=there_G)
        elif MOMENT != _FLOAT32:
            m, v = _round(m, draws, moment_type), _round(v, (draws * 0x9E3779B1) >> 8, moment_type)
        tl.store(m_ptr + at_GJ, m, mask=mask_GJ)
        tl.store(v_ptr + at_GJ, v, mask=mask_GJ)
        if MASTER == _RESIDUAL:
            word = weight.to(tl.int32, bitcast=True)
            finite = (word & 0x7FFFFFFF) < 0x7F800000
            word = (word + ((draws >> 16) & 0xFF).to(tl.int32)) >> 8
            high = (word + 0x80) >> 8
            tl.store(master_ptr + at_GJ, tl.where(finite, word - (high << 8), 0).to(tl.int8), mask=mask_GJ)
            high = high.to(tl.int16).to(tl.bfloat16, bitcast=True)
            weight = tl.where(finite, high, to_storage(weight, tl.bfloat16))
        elif MASTER == _WIDE:
            tl.store(master_ptr + at_GJ, weight, mask=mask_GJ)
            weight = to_storage(weight, param_type)
        elif PARAM != _FLOAT32:
            weight = _round(weight, draws >> 16, param_type)
        tl.store(param_ptr + at_GJ, weight, mask=mask_GJ)


@triton.jit(do_not_specialize=["count"])
def _adamw_step_kernel(
    table_ptr,
    count,
    rate1,
    beta2,
    rate2,
    eps,
    grad_scale,
    PRESENT: tl.constexpr,  # bit k: the call has tensors of kind k
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    pid = tl.program_id(0)
    tensor = tl.load(table_ptr + FIELDS * count + pid)
    words_ptr = table_ptr + FIELDS * tensor
    kind = tl.load(words_ptr + 7)
    for k in tl.static_range(KINDS):
        if (PRESENT >> k) & 1:  # noqa: SIM102 (known when compiling, what follows is not)
            if kind == k:
                _update_chunk(
                    words_ptr,
                    pid,
                    rate1,
                    beta2,
                    rate2,
                    eps,
                    grad_scale,
                    k // 24,
                    k // 6 % 4,
                    k // 2 % 3,
                    k % 2,
                    TILE,
                    CHUNK,
                )


def adamw_step(
    params,
    grads,
    exp_avgs,
    exp_avg_sqs,
    exp_avg_scales,
    exp_avg_sq_scales,
    masters,
    steps,
    keys,
    first_rows,
    decays,
    lr,
    beta1,
    beta2,
    eps,
    grad_scale,
):
    if not params:
        return
    device = params[0].device
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("fastmoe.adamw_step: a CUDA graph would repeat one step's number and lr; call it outside")
    grads = [grad.contiguous() for grad in grads]
    written = (params, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, masters)
    words, numbers, chunks, present, first_chunk = array("q"), array("d"), [], 0, 0
    states = zip(params, grads, *written[1:])
    for i, (tensors, step, key, row, decay) in enumerate(zip(states, steps, keys, first_rows, decays)):
        param, _, m, *_, master = tensors
        if param.device != device:
            check.fail("adamw_step", f"params[{i}]", f"on {device} as the first", param.device)
        width, master_type = param.shape[-1] if param.dim() else 1, master.dtype if master.numel() else None
        if m.dtype == torch.float32 and (param.dtype == torch.float32 or master_type == torch.float32):
            width = param.numel()  # nothing depends on rows
        blocks = -(-width // BLOCK)
        total = param.numel() // width * blocks if width else 0
        addresses = [tensor.data_ptr() for tensor in tensors]
        kind = _kind(param.dtype, m.dtype, master_type, even(width, *addresses[:4], addresses[6]))
        words.extend((*addresses, kind, width, blocks, total, first_chunk, stream_of(key, row), 0, 0, 0))
        numbers.extend((decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5))
        chunks.append(-(-total // CHUNK))
        first_chunk += chunks[-1]
        present |= (total > 0) << kind
    if not first_chunk:
        return
    count = len(params)
    table = torch.empty(len(words) + first_chunk, dtype=torch.int64, pin_memory=device.type == "cuda")
    rows = table[: len(words)].copy_(torch.frombuffer(words, dtype=torch.int64)).view(count, -1)
    rows[:, -3:] = torch.frombuffer(numbers, dtype=torch.int64).view(count, 3)
    table[len(words) :] = torch.repeat_interleave(torch.tensor(chunks))
    rates = (float(number) for number in (1 - beta1, beta2, 1 - beta2, eps, grad_scale))
    with torch.cuda.device_of(params[0]):
        _adamw_step_kernel[(first_chunk,)](
            table.to(device, non_blocking=True), count, *rates, PRESENT=present, TILE=TILE, CHUNK=CHUNK, **EXACT
        )
    torch.autograd.graph.increment_version([tensor for tensors in written for tensor in tensors])
