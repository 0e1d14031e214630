"""The expert layer in Triton: grouped GEMMs over ragged row tiles, the gather fused in front and the activation behind.

A row tile is BLOCK_M rows of one expert. How many there are is known on the device only, so the tables are made for the
upper bound R / BLOCK_M + min(E, R), and a persistent grid walks the tiles that there are. Rows past offsets[E] are not
read; those of z are zero. LAYOUT says how z lies: "plain" (no gate), "halves" (gate, then up) or "pairs" (alternating,
one product whose neighbouring columns are a pair).
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastmoe import jit
from fastmoe.ops import autotune
from fastmoe.ops.experts import GATED, Z8_BLOCK, reference, z_shape
from fastmoe.ops.permutation import reference as permutation
from fastmoe.ops.permutation.kernels import INTERPRETED, to_storage, unpermute

SCALE_BLOCK = tl.constexpr(Z8_BLOCK)


@triton.jit
def _dot(a_MK, b_KN, sum_MN):
    if INTERPRETED:  # its product of bfloat16 is garbage
        a_MK, b_KN = a_MK.to(tl.float32), b_KN.to(tl.float32)
    return tl.dot(a_MK, b_KN, sum_MN, input_precision="ieee")


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    """gelu(x) and its slope."""
    if TANH:
        double = 1.5957691216057308 * (x + 0.044715 * x * x * x)  # tanh(u) = 2 sigmoid(2u) - 1
        small = tl.exp(-tl.abs(double))
        inverse = 1.0 / (1.0 + small)
        half = tl.where(double >= 0, inverse, small * inverse)
        value = x * half
        slope = half + x * small * inverse * inverse * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        half = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        value = x * half
        slope = half + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    return value, slope


@triton.jit
def _activate(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """(act, d act / d gate, d act / d up); for the kinds without a gate, gate is up and the second is unused."""
    if ACTIVATION == "swiglu":
        sigmoid = _sigmoid(gate)
        silu = gate * sigmoid
        act, by_gate, by_up = silu * up, up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), silu
    elif ACTIVATION == "clamped_swiglu":
        g = tl.where(gate > limit, limit, gate)
        u = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up)) + 1.0
        sigmoid = _sigmoid(alpha * g)
        act = g * sigmoid * u
        by_gate = tl.where(gate <= limit, u * sigmoid * (1.0 + alpha * g * (1.0 - sigmoid)), 0.0)
        by_up = tl.where(tl.abs(up) <= limit, g * sigmoid, 0.0)
    elif ACTIVATION == "relu":
        act, by_gate, by_up = tl.where(up <= 0, 0.0, up), gate, tl.where(up > 0, 1.0, 0.0)
    elif ACTIVATION == "relu2":
        relu = tl.where(up <= 0, 0.0, up)
        act, by_gate, by_up = relu * relu, gate, 2.0 * relu
    elif ACTIVATION == "geglu" or ACTIVATION == "geglu_tanh":
        value, slope = _gelu(gate, ACTIVATION == "geglu_tanh")
        act, by_gate, by_up = value * up, up * slope, value
    else:
        act, by_up = _gelu(up, ACTIVATION == "gelu_tanh")
        by_gate = gate
    return act, by_gate, by_up


@triton.jit
def _halve(z_MW, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The even and the odd columns."""
    return tl.split(tl.reshape(z_MW, (BLOCK_M, BLOCK_N, 2)))


@triton.jit
def _pair(gate_MN, up_MN, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    return tl.reshape(tl.join(gate_MN, up_MN), (BLOCK_M, 2 * BLOCK_N))


@triton.jit
def _columns(x_MN, part: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Part number `part` of a tile's columns, of 2 or 4 of a size."""
    HALF: tl.constexpr = BLOCK_N // 2
    low, high = tl.split(tl.permute(tl.reshape(x_MN, (BLOCK_M, 2, HALF)), (0, 2, 1)))
    half = low if part < PARTS // 2 else high
    if PARTS == 4:
        low, high = tl.split(tl.permute(tl.reshape(half, (BLOCK_M, 2, HALF // 2)), (0, 2, 1)))
        half = low if part % 2 == 0 else high
    return half


@triton.jit
def _quantize(z_MN, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """int8 values and the bfloat16 scale of every GROUP columns, bit-equal to reference.quantize."""
    z_MBG = tl.reshape(z_MN, (BLOCK_M, BLOCK_N // GROUP, GROUP))
    scale_MB = to_storage(tl.max(tl.abs(z_MBG), 2) * (1.0 / 127.0), tl.bfloat16)
    step_MBG = tl.broadcast_to(scale_MB.to(tl.float32)[:, :, None], (BLOCK_M, BLOCK_N // GROUP, GROUP))
    ratio_MBG = tl.div_rn(z_MBG, tl.where(step_MBG > 0, step_MBG, 1.0))
    nearest_MBG = (ratio_MBG + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to even; a zero scale has |z| < 2^-120
    q_MBG = tl.minimum(tl.maximum(nearest_MBG, -127.0), 127.0).to(tl.int8)
    return tl.reshape(q_MBG, (BLOCK_M, BLOCK_N)), scale_MB


@triton.jit
def _tile_kernel(
    offsets_ptr, tiles_ptr, first_ptr, E, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """tiles[i] = (expert, first row, end of the expert's rows); first = number of tiles, then each expert's first."""
    tile0 = tl.program_id(0) * BLOCK
    tile_I = tile0 + tl.arange(0, BLOCK)
    expert_I = tl.zeros((BLOCK,), tl.int32)
    first_I = tl.zeros((BLOCK,), tl.int32)
    passed = tl.sum(tl.zeros((BLOCK_E,), tl.int32), 0)
    for e0 in range(0, E, BLOCK_E):
        e_E = e0 + tl.arange(0, BLOCK_E)
        begin_E = tl.load(offsets_ptr + e_E, mask=e_E < E, other=0)
        tiles_E = (tl.load(offsets_ptr + e_E + 1, mask=e_E < E, other=0) - begin_E + BLOCK_M - 1) // BLOCK_M
        end_E = passed + tl.cumsum(tiles_E, 0)
        tl.store(first_ptr + 1 + e_E, end_E - tiles_E, mask=e_E < tl.where(tl.program_id(0) == 0, E, 0))
        total = tl.sum(tiles_E, 0)
        if passed + total <= tile0:
            expert_I += tl.minimum(E - e0, BLOCK_E)
            first_I = tl.maximum(first_I, passed + total)
        elif passed < tile0 + BLOCK:
            before_IE = (end_E[None, :] <= tile_I[:, None]) & (e_E < E)[None, :]
            expert_I += tl.sum(before_IE.to(tl.int32), 1)
            first_I = tl.maximum(first_I, tl.max(tl.where(before_IE, end_E[None, :], 0), 1))
        passed += total
    used_I = tile_I < passed
    row_I = tl.load(offsets_ptr + expert_I, mask=used_I, other=0) + (tile_I - first_I) * BLOCK_M
    end_I = tl.load(offsets_ptr + expert_I + 1, mask=used_I, other=0)
    tl.store(tiles_ptr + tile_I * 3, expert_I, mask=used_I)
    tl.store(tiles_ptr + tile_I * 3 + 1, row_I, mask=used_I)
    tl.store(tiles_ptr + tile_I * 3 + 2, end_I, mask=used_I)
    tl.store(first_ptr, passed, mask=tl.program_id(0) == 0)


@triton.jit
def _tile_and_column(index, num_tiles, columns, GROUP: tl.constexpr):
    """GROUP row tiles share a column before the next one, so that tiles of an expert find its weights in L2."""
    group = index // (GROUP * columns)
    place = index % (GROUP * columns)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    return group * GROUP + place % size, place // size


@triton.jit
def _gate_up_kernel(
    x_ptr,
    src_row_ptr,
    tiles_ptr,
    first_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    scale_ptr,
    act_ptr,
    columns,
    K,
    D,
    F,
    stride_e,
    stride_z,
    stride_d,
    up_at,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    SAVE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """z = x[token] @ gate_up[e].T + bias[e] and act of it, for row tiles and BLOCK_N columns of F; up_at: its weights'
    distance from gate's.
    """
    WIDTH: tl.constexpr = 2 * BLOCK_N if LAYOUT == "pairs" else BLOCK_N
    HALVES: tl.constexpr = 1 if LAYOUT == "plain" else 2
    Z = HALVES * F
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m_M = tl.arange(0, BLOCK_M)
    d_K = tl.arange(0, BLOCK_K)
    num_tiles = tl.load(first_ptr)
    for index in range(tl.program_id(0), num_tiles * columns, tl.num_programs(0)):
        tile, column = _tile_and_column(index, num_tiles, columns, GROUP)
        expert = tl.load(tiles_ptr + tile * 3).to(tl.int64)
        row = tl.load(tiles_ptr + tile * 3 + 1)
        used_M = row + m_M < tl.load(tiles_ptr + tile * 3 + 2)
        slot_M = tl.load(src_row_ptr + row + m_M, mask=used_M, other=0)
        c_W = column * WIDTH + tl.arange(0, WIDTH)
        in_W = c_W < (Z if LAYOUT == "pairs" else F)
        x_ptrs = x_ptr + (tl.maximum(slot_M, 0) // K).to(tl.int64)[:, None] * D + d_K[None, :]
        weight_ptrs = weight_ptr + expert * stride_e + c_W.to(tl.int64)[None, :] * stride_z + d_K[:, None] * stride_d
        z_MW = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        up_MN = z_MW
        for d0 in range(0, D, BLOCK_K):
            x_MK = tl.load(x_ptrs + d0, mask=used_M[:, None] & (d0 + d_K < D)[None, :], other=0.0)
            mask_KW = (d0 + d_K < D)[:, None] & in_W[None, :]
            z_MW = _dot(x_MK, tl.load(weight_ptrs, mask=mask_KW, other=0.0), z_MW)
            if LAYOUT == "halves":
                up_MN = _dot(x_MK, tl.load(weight_ptrs + up_at, mask=mask_KW, other=0.0), up_MN)
            weight_ptrs += BLOCK_K * stride_d
        if bias_ptr is not None:
            z_MW += tl.load(bias_ptr + expert * Z + c_W, mask=in_W, other=0.0).to(tl.float32)[None, :]
            if LAYOUT == "halves":
                up_MN += tl.load(bias_ptr + expert * Z + F + c_W, mask=in_W, other=0.0).to(tl.float32)[None, :]
        mask_MW = used_M[:, None] & in_W[None, :]
        z_ptrs = z_ptr + row.to(tl.int64) * Z + (m_M[:, None] * Z + c_W[None, :])
        if SAVE == "z":
            tl.store(z_ptrs, to_storage(z_MW, dtype), mask=mask_MW)
            if LAYOUT == "halves":
                tl.store(z_ptrs + F, to_storage(up_MN, dtype), mask=mask_MW)
        if LAYOUT == "pairs":
            gate_MN, up_MN = _halve(z_MW, BLOCK_M, BLOCK_N)
        elif LAYOUT == "halves":
            gate_MN = z_MW
        else:
            gate_MN, up_MN = z_MW, z_MW
        if SAVE == "z8":
            STEP: tl.constexpr = SCALE_BLOCK if BLOCK_N > SCALE_BLOCK else BLOCK_N
            blocks = (F + SCALE_BLOCK - 1) // SCALE_BLOCK
            b_B = column * (BLOCK_N // STEP) + tl.arange(0, BLOCK_N // STEP)
            mask_MB = used_M[:, None] & (b_B < blocks)[None, :]
            scale_ptrs = scale_ptr + row.to(tl.int64) * (HALVES * blocks)
            scale_ptrs += m_M[:, None] * (HALVES * blocks) + b_B[None, :]
            q_MW, scale_MB = _quantize(to_storage(gate_MN, dtype).to(tl.float32), BLOCK_M, BLOCK_N, STEP)
            tl.store(scale_ptrs, scale_MB, mask=mask_MB)
            if LAYOUT != "plain":
                q_MN, scale_MB = _quantize(to_storage(up_MN, dtype).to(tl.float32), BLOCK_M, BLOCK_N, STEP)
                tl.store(scale_ptrs + blocks, scale_MB, mask=mask_MB)
                if LAYOUT == "pairs":
                    q_MW = _pair(q_MW, q_MN, BLOCK_M, BLOCK_N)
                else:
                    tl.store(z_ptrs + F, q_MN, mask=mask_MW)
            tl.store(z_ptrs, q_MW, mask=mask_MW)
        if act_ptr is not None:
            f_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
            act_MN, _, _ = _activate(gate_MN, up_MN, alpha, limit, ACTIVATION)
            act_ptrs = act_ptr + row.to(tl.int64) * F + (m_M[:, None] * F + f_N[None, :])
            tl.store(act_ptrs, to_storage(act_MN, dtype), mask=used_M[:, None] & (f_N < F)[None, :])


@triton.jit
def _clear_padding_kernel(out_ptr, offsets_ptr, E, R, N, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zeroes the rows past offsets[E]."""
    used = tl.load(offsets_ptr + E)
    for row in range(used + tl.program_id(0) * BLOCK_R, R, tl.num_programs(0) * BLOCK_R):
        row_R = row + tl.arange(0, BLOCK_R)
        for n0 in range(0, N, BLOCK_N):
            n_N = n0 + tl.arange(0, BLOCK_N)
            tl.store(
                out_ptr + row_R.to(tl.int64)[:, None] * N + n_N[None, :],
                tl.zeros((BLOCK_R, BLOCK_N), out_ptr.dtype.element_ty),
                mask=(row_R < R)[:, None] & (n_N < N)[None, :],
            )


@triton.jit
def _rows_kernel(
    a_ptr,
    tiles_ptr,
    first_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    columns,
    N,
    J,
    stride_e,
    stride_n,
    stride_j,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[r, n] = sum_j a[r, j] * weight[e][n, j] + bias[e, n]; the strides of weight serve both of its orders."""
    m_M = tl.arange(0, BLOCK_M)
    j_K = tl.arange(0, BLOCK_K)
    num_tiles = tl.load(first_ptr)
    for index in range(tl.program_id(0), num_tiles * columns, tl.num_programs(0)):
        tile, column = _tile_and_column(index, num_tiles, columns, GROUP)
        expert = tl.load(tiles_ptr + tile * 3).to(tl.int64)
        row = tl.load(tiles_ptr + tile * 3 + 1)
        used_M = row + m_M < tl.load(tiles_ptr + tile * 3 + 2)
        n_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
        a_ptrs = a_ptr + row.to(tl.int64) * J + (m_M[:, None] * J + j_K[None, :])
        weight_ptrs = weight_ptr + expert * stride_e + n_N.to(tl.int64)[None, :] * stride_n + j_K[:, None] * stride_j
        sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for j0 in range(0, J, BLOCK_K):
            a_MK = tl.load(a_ptrs + j0, mask=used_M[:, None] & (j0 + j_K < J)[None, :], other=0.0)
            weight_KN = tl.load(weight_ptrs, mask=(j0 + j_K < J)[:, None] & (n_N < N)[None, :], other=0.0)
            sum_MN = _dot(a_MK, weight_KN, sum_MN)
            weight_ptrs += BLOCK_K * stride_j
        if bias_ptr is not None:
            sum_MN += tl.load(bias_ptr + expert * N + n_N, mask=n_N < N, other=0.0).to(tl.float32)[None, :]
        tl.store(
            out_ptr + row.to(tl.int64) * N + (m_M[:, None] * N + n_N[None, :]),
            to_storage(sum_MN, out_ptr.dtype.element_ty),
            mask=used_M[:, None] & (n_N < N)[None, :],
        )


@triton.jit
def _down_backward_kernel(
    dy_ptr,
    src_row_ptr,
    tiles_ptr,
    first_ptr,
    weight_ptr,
    bias_ptr,
    z_ptr,
    scale_ptr,
    weights_ptr,
    dz_ptr,
    scaled_ptr,
    partial_ptr,
    columns,
    R,
    K,
    D,
    F,
    stride_e,
    stride_d,
    stride_f,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dact = dy[token] @ down[e], then from z: dz, weight * act, and this column's part of dweight = <dact, act> +
    <dy, bias[e]>.
    """
    PARTS: tl.constexpr = 4 if BLOCK_N > 64 else 2
    PART: tl.constexpr = BLOCK_N // PARTS
    WIDTH: tl.constexpr = 2 * PART if LAYOUT == "pairs" else PART
    HALVES: tl.constexpr = 1 if LAYOUT == "plain" else 2
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    m_M = tl.arange(0, BLOCK_M)
    d_K = tl.arange(0, BLOCK_K)
    num_tiles = tl.load(first_ptr)
    for index in range(tl.program_id(0), num_tiles * columns, tl.num_programs(0)):
        tile, column = _tile_and_column(index, num_tiles, columns, GROUP)
        expert = tl.load(tiles_ptr + tile * 3).to(tl.int64)
        row = tl.load(tiles_ptr + tile * 3 + 1)
        end = tl.load(tiles_ptr + tile * 3 + 2)
        used_M = row + m_M < end
        slot_M = tl.load(src_row_ptr + row + m_M, mask=used_M, other=-1)
        f_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
        dact_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if dz_ptr is not None or partial_ptr is not None:
            dy_ptrs = dy_ptr + (tl.maximum(slot_M, 0) // K).to(tl.int64)[:, None] * D + d_K[None, :]
            weight_ptrs = weight_ptr + expert * stride_e + d_K.to(tl.int64)[:, None] * stride_d
            weight_ptrs += f_N.to(tl.int64)[None, :] * stride_f
            for d0 in range(0, D, BLOCK_K):
                dy_MK = tl.load(dy_ptrs + d0, mask=used_M[:, None] & (d0 + d_K < D)[None, :], other=0.0)
                weight_KN = tl.load(weight_ptrs, mask=(d0 + d_K < D)[:, None] & (f_N < F)[None, :], other=0.0)
                dact_MN = _dot(dy_MK, weight_KN, dact_MN)
                weight_ptrs += BLOCK_K * stride_d
        weight_M = tl.load(weights_ptr + slot_M, mask=slot_M >= 0, other=0.0).to(tl.float32)
        part_M = tl.zeros((BLOCK_M,), tl.float32)
        z_at = row.to(tl.int64) * (HALVES * F)
        for part in tl.static_range(PARTS):  # what follows holds six such tiles at once
            dact_MP = _columns(dact_MN, part, PARTS, BLOCK_M, BLOCK_N)
            f0 = column * BLOCK_N + part * PART
            f_P = f0 + tl.arange(0, PART)
            c_W = f0 * (WIDTH // PART) + tl.arange(0, WIDTH)
            mask_MP = used_M[:, None] & (f_P < F)[None, :]
            mask_MW = used_M[:, None] & (c_W < (HALVES * F if LAYOUT == "pairs" else F))[None, :]
            at_MW = m_M[:, None] * (HALVES * F) + c_W[None, :]
            gate_MP = tl.load(z_ptr + z_at + at_MW, mask=mask_MW, other=0.0)
            if LAYOUT == "pairs":
                gate_MP, up_MP = _halve(gate_MP, BLOCK_M, PART)
            elif LAYOUT == "halves":
                up_MP = tl.load(z_ptr + z_at + F + at_MW, mask=mask_MW, other=0.0)
            else:
                up_MP = gate_MP
            gate_MP, up_MP = gate_MP.to(tl.float32), up_MP.to(tl.float32)
            if scale_ptr is not None:
                blocks = (F + SCALE_BLOCK - 1) // SCALE_BLOCK
                scale_ptrs = scale_ptr + (row + m_M).to(tl.int64) * (HALVES * blocks) + f0 // SCALE_BLOCK
                used_scale_M = row + m_M < tl.where(f0 < F, end, 0)
                scale_M = tl.load(scale_ptrs, mask=used_scale_M, other=0.0).to(tl.float32)
                gate_MP = to_storage(gate_MP * scale_M[:, None], dtype).to(tl.float32)
                if LAYOUT != "plain":
                    scale_M = tl.load(scale_ptrs + blocks, mask=used_scale_M, other=0.0).to(tl.float32)
                    up_MP = to_storage(up_MP * scale_M[:, None], dtype).to(tl.float32)
                else:
                    up_MP = gate_MP
            act_MP, by_gate_MP, by_up_MP = _activate(gate_MP, up_MP, alpha, limit, ACTIVATION)
            part_M += tl.sum(dact_MP * act_MP, 1)
            if scaled_ptr is not None:
                scaled_ptrs = scaled_ptr + row.to(tl.int64) * F + (m_M[:, None] * F + f_P[None, :])
                tl.store(scaled_ptrs, to_storage(act_MP * weight_M[:, None], dtype), mask=mask_MP)
            if dz_ptr is not None:
                dact_MP *= weight_M[:, None]
                dz_ptrs = dz_ptr + z_at + at_MW
                dup_MP = to_storage(dact_MP * by_up_MP, dtype)
                if LAYOUT == "plain":
                    tl.store(dz_ptrs, dup_MP, mask=mask_MW)
                else:
                    dgate_MP = to_storage(dact_MP * by_gate_MP, dtype)
                    if LAYOUT == "pairs":
                        tl.store(dz_ptrs, _pair(dgate_MP, dup_MP, BLOCK_M, PART), mask=mask_MW)
                    else:
                        tl.store(dz_ptrs, dgate_MP, mask=mask_MW)
                        tl.store(dz_ptrs + F, dup_MP, mask=mask_MW)
        if partial_ptr is not None:
            if bias_ptr is not None:
                for d0 in range(0, tl.where(column == 0, D, 0), BLOCK_K):
                    dy_MK = tl.load(dy_ptrs + d0, mask=used_M[:, None] & (d0 + d_K < D)[None, :], other=0.0)
                    bias_K = tl.load(bias_ptr + expert * D + d0 + d_K, mask=d0 + d_K < D, other=0.0)
                    part_M += tl.sum(dy_MK.to(tl.float32) * bias_K.to(tl.float32)[None, :], 1)
            tl.store(partial_ptr + column.to(tl.int64) * R + row + m_M, part_M, mask=used_M)


@triton.jit
def _dweight_kernel(partial_ptr, src_row_ptr, dweights_ptr, R, columns, BLOCK: tl.constexpr):
    row_R = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot_R = tl.load(src_row_ptr + row_R, mask=row_R < R, other=-1)
    sum_R = tl.zeros((BLOCK,), tl.float32)
    for _ in range(columns):
        sum_R += tl.load(partial_ptr + row_R, mask=slot_R >= 0, other=0.0)
        partial_ptr += R
    tl.store(dweights_ptr + slot_R, to_storage(sum_R, dweights_ptr.dtype.element_ty), mask=slot_R >= 0)


@triton.jit
def _wgrad_kernel(
    a_ptr,
    b_ptr,
    src_row_ptr,
    offsets_ptr,
    experts_ptr,
    out_ptr,
    tiles_m,
    tiles_n,
    K,
    M,
    N,
    GATHER_A: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[i] = a_rows.T @ b_rows over the rows of expert experts[i] (absent: i), a or b gathered by token; zero where
    it has none.
    """
    place = tl.program_id(0) % (tiles_m * tiles_n)
    index = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    expert = index
    if experts_ptr is not None:
        expert = tl.load(experts_ptr + index)
    m_M = place // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = place % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    begin, end = tl.load(offsets_ptr + expert), tl.load(offsets_ptr + expert + 1)
    k_K = tl.arange(0, BLOCK_K)
    slot_K = tl.load(src_row_ptr + begin + k_K, mask=begin + k_K < end, other=0)
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(begin, end, BLOCK_K):
        row_K = row + k_K
        used_K = row_K < end
        token_K = (tl.maximum(slot_K, 0) // K).to(tl.int64)
        a_row_K = token_K if GATHER_A else row_K.to(tl.int64)
        b_row_K = row_K.to(tl.int64) if GATHER_A else token_K
        a_MK = tl.load(
            a_ptr + a_row_K[None, :] * M + m_M[:, None], mask=used_K[None, :] & (m_M < M)[:, None], other=0.0
        )
        b_KN = tl.load(
            b_ptr + b_row_K[:, None] * N + n_N[None, :], mask=used_K[:, None] & (n_N < N)[None, :], other=0.0
        )
        sum_MN = _dot(a_MK, b_KN, sum_MN)
        # a step ahead: behind a load of its own step, the gathers would be pipelined half as deep
        slot_K = tl.load(src_row_ptr + row_K + BLOCK_K, mask=row_K + BLOCK_K < end, other=0)
    out_ptrs = out_ptr + index * M * N + m_M.to(tl.int64)[:, None] * N + n_N[None, :]
    tl.store(out_ptrs, to_storage(sum_MN, out_ptr.dtype.element_ty), mask=(m_M < M)[:, None] & (n_N < N)[None, :])


@triton.jit
def _tile_sum_kernel(
    rows_ptr,
    src_row_ptr,
    weights_ptr,
    tiles_ptr,
    first_ptr,
    partial_ptr,
    K,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """partial[tile, n]: the sum of a tile's rows; with weights, of weight * rows[token]."""
    tile = tl.program_id(0).to(tl.int64)
    if tile >= tl.load(first_ptr):
        return
    row_M = (tl.load(tiles_ptr + tile * 3 + 1) + tl.arange(0, BLOCK_M)).to(tl.int64)
    used_M = row_M < tl.load(tiles_ptr + tile * 3 + 2)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if weights_ptr is not None:
        slot_M = tl.load(src_row_ptr + row_M, mask=used_M, other=-1)
        weight_M = tl.load(weights_ptr + slot_M, mask=slot_M >= 0, other=0.0).to(tl.float32)
        row_M = (tl.maximum(slot_M, 0) // K).to(tl.int64)
    row_MN = tl.load(
        rows_ptr + row_M[:, None] * N + n_N[None, :], mask=used_M[:, None] & (n_N < N)[None, :], other=0.0
    ).to(tl.float32)
    if weights_ptr is not None:
        row_MN *= weight_M[:, None]
    tl.store(partial_ptr + tile * N + n_N, tl.sum(row_MN, 0), mask=n_N < N)


@triton.jit
def _expert_sum_kernel(
    partial_ptr, first_ptr, offsets_ptr, out_ptr, N, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out[e]: the sum of the partial sums of its tiles, in their order."""
    expert = tl.program_id(0).to(tl.int64)
    n_N = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.load(offsets_ptr + expert + 1) - tl.load(offsets_ptr + expert)
    tiles = (rows + BLOCK_M - 1) // BLOCK_M
    partial_ptr += tl.load(first_ptr + 1 + expert).to(tl.int64) * N
    sum_TN = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for t0 in range(0, tiles, BLOCK_T):
        t_T = t0 + tl.arange(0, BLOCK_T)
        mask_TN = (t_T < tiles)[:, None] & (n_N < N)[None, :]
        sum_TN += tl.load(partial_ptr + t_T.to(tl.int64)[:, None] * N + n_N[None, :], mask=mask_TN, other=0.0)
    tl.store(out_ptr + expert * N + n_N, to_storage(tl.sum(sum_TN, 0), out_ptr.dtype.element_ty), mask=n_N < N)


class _Layer(NamedTuple):
    """What the layer is: the strides of both projections as if they were not transposed, the layout of z."""

    activation: str
    layout: str
    alpha: float
    limit: float
    transposed: bool
    gate_up_strides: tuple[int, int, int]  # expert, column of z, column of x
    up_at: int
    down_strides: tuple[int, int, int]  # expert, column of y, column of act
    E: int
    D: int
    F: int
    Z: int


def _layer(gate_up_proj, down_proj, activation, interleaved, transposed, alpha, limit) -> _Layer:
    gate_up, down = (p.transpose(1, 2) if transposed else p for p in (gate_up_proj, down_proj))
    layout = "plain" if activation not in GATED else "pairs" if interleaved else "halves"
    (E, D, F), Z = down.shape, gate_up.shape[1]
    strides, up_at = gate_up.stride(), F * gate_up.stride(1)
    return _Layer(activation, layout, alpha, limit, transposed, strides, up_at, down.stride(), E, D, F, Z)


class _Tiles:
    """The row tiles of a routing, one table for every BLOCK_M asked for."""

    def __init__(self, offsets: torch.Tensor, R: int):
        self.offsets, self.R, self.E, self.tables = offsets, R, offsets.shape[0] - 1, {}

    def __call__(self, block_M: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """(tiles, first, the most tiles there can be) for tiles of block_M rows."""
        if block_M not in self.tables:
            most = triton.cdiv(self.R, block_M) + min(self.E, self.R)
            tiles, first = self.offsets.new_empty((most, 3)), self.offsets.new_empty((self.E + 1,))
            block_E = min(512, triton.next_power_of_2(self.E))
            _tile_kernel[(triton.cdiv(most, 32),)](
                self.offsets, tiles, first, self.E, BLOCK_M=block_M, BLOCK=32, BLOCK_E=block_E
            )
            self.tables[block_M] = tiles, first, most
        return self.tables[block_M]


def _fit(size: int, most: int) -> int:
    """The block for a dimension: a power of two from 16 (the least of a matrix product) to `most`."""
    return min(most, max(16, triton.next_power_of_2(size)))


def _config(like: torch.Tensor, M: int, N: int, K: int, products: int = 1, warps: int = 0) -> dict[str, int]:
    """Blocks M, N and K of a product with `products` right-hand sides, with warps and stages, and the programs that a
    processor is given.
    """
    sums = M * N * products
    warps = warps or (8 if sums >= 128 * 64 else 4)
    stage = (M + products * N) * K * like.element_size()
    device = jit.device(like)
    stages = max(1, min(4, (device.shared_memory - 1024) // stage))
    programs = max(1, min(16 // warps, device.shared_memory // (stages * stage + 1024)))
    return {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_K": K, "num_warps": warps, "num_stages": stages, "programs": programs}


def _row_block(rows: int, most: int) -> int:
    """BLOCK_M for experts of `rows` rows: the last tile is half empty, smaller tiles are slower per row."""
    slower = {128: 1.0, 64: 1.15, 32: 1.6, 16: 2.5}
    return min((M for M in slower if most >= M), key=lambda M: (rows + M / 2) * slower[M])


def _configs(
    like: torch.Tensor, rows: int, n: int, k: int, most_n: int = 128, products: int = 1
) -> list[dict[str, int]]:
    """Candidates of a product over row tiles, the one that is taken untried first."""
    half = like.element_size() == 2
    M, N, K = _row_block(rows, 128 if half else 64), _fit(n, most_n if half else 64), _fit(k, 64 if half else 32)
    other_N = _fit(n, 192 - most_n if half else 64)
    shapes = ((M, N, K), (M, other_N, K), (max(16, M // 2), N, K), (min(128, 2 * M), N, K), (M, N, max(16, K // 2)))
    return [_config(like, *shape, products) for shape in dict.fromkeys(shapes)]


def _programs(config: dict[str, int], like: torch.Tensor, most: int) -> tuple[tuple[int], dict[str, int]]:
    """The persistent grid for up to `most` pieces of work, and what the kernel takes of the config."""
    kernel = {name: value for name, value in config.items() if name != "programs"}
    return (min(most, config["programs"] * jit.device(like).processors),), kernel


def _tuned(kernel: str, like: torch.Tensor, key: tuple, configs: list[dict[str, int]], work: int, layer: _Layer, run):
    """run(config) with the config that autotune chooses for this kernel and key; the first where there is little work,
    in multiplications.
    """
    agrees = partial(_agrees, kernel, layer=layer, like=like)
    configs = configs if work >= 1 << 31 else configs[:1]
    return run(autotune.choose(kernel, (like.dtype, *key), configs, run, agrees, like, SOURCES))


def _bucket(R: int, E: int) -> int:
    """Rows per expert to the next power of two."""
    return triton.next_power_of_2(triton.cdiv(R, E))


def _up(x_TD, src_row_R, tiles, K, gate_up_proj, bias, layer, z_RZ, z_scale, act_RF, save):
    """z (as `save` says) and act, each where it is wanted, into the given tensors."""

    def run(config):
        table, first, most = tiles(config["BLOCK_M"])
        columns = triton.cdiv(layer.F, config["BLOCK_N"])
        grid, config = _programs(config, x_TD, most * columns)
        _gate_up_kernel[grid](
            x_TD,
            src_row_R,
            table,
            first,
            gate_up_proj,
            bias,
            z_RZ,
            z_scale,
            act_RF,
            columns,
            K,
            layer.D,
            layer.F,
            *layer.gate_up_strides,
            layer.up_at,
            layer.alpha,
            layer.limit,
            ACTIVATION=layer.activation,
            LAYOUT=layer.layout,
            SAVE=save,
            GROUP=8,
            **config,
        )

    rows = _bucket(tiles.R, tiles.E)
    configs = _configs(x_TD, rows, layer.F, layer.D, 64, 1 if layer.layout == "plain" else 2)
    _tuned(
        "gate_up",
        x_TD,
        (rows, layer.D, layer.F, layer.layout, layer.transposed),
        configs,
        tiles.R * layer.D * layer.Z,
        layer,
        run,
    )


def _rows(a, tiles, weight, bias, layer, n, j, strides):
    """[R, n]: row tiles of a times weight[e], whose strides are those of (expert, n, j)."""
    out = a.new_empty((a.shape[0], n))

    def run(config):
        table, first, most = tiles(config["BLOCK_M"])
        columns = triton.cdiv(n, config["BLOCK_N"])
        grid, config = _programs(config, a, most * columns)
        _rows_kernel[grid](a, table, first, weight, bias, out, columns, n, j, *strides, GROUP=8, **config)

    rows = _bucket(tiles.R, tiles.E)
    _tuned("rows", a, (rows, n, j, strides[2] == 1), _configs(a, rows, n, j), tiles.R * n * j, layer, run)
    return out


def _wgrad(a, b, src_row_R, offsets, experts, K, layer, like, gather_a):
    """[E, M, N] (with experts, a row of each): the sum over an expert's rows of a's times b's, one of them by token."""
    M, N = like.shape[1:]
    out = like.new_empty((layer.E if experts is None else experts.shape[0], M, N))

    def run(config):
        tiles_m, tiles_n = triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"])
        config = {name: value for name, value in config.items() if name != "programs"}
        _wgrad_kernel[(out.shape[0] * tiles_m * tiles_n,)](
            a, b, src_row_R, offsets, experts, out, tiles_m, tiles_n, K, M, N, GATHER_A=gather_a, **config
        )

    if out.shape[0]:
        half, rows = a.element_size() == 2, _bucket(src_row_R.shape[0], layer.E)
        m, n = (128, 128) if half else (64, 64)
        k = _fit(rows, 64 if half else 32)
        blocks = ((m, n, k), (m, n // 2, k), (m // 2, n, k), (m, 2 * n, k), (m, n, max(16, k // 2)))
        shapes = dict.fromkeys((_fit(M, m), _fit(N, n), k) for m, n, k in blocks)
        configs = [_config(a, *shape) for shape in shapes]
        _tuned("wgrad", a, (rows, M, N, gather_a), configs, src_row_R.shape[0] * M * N, layer, run)
    return out


def _bias_grad(rows, src_row_R, weights_TK, tiles, K, N):
    """[E, N] in the dtype of rows: the sum of each expert's rows; with weights, of weight * rows[token]."""
    table, first, most = tiles(64)
    partial_IN, out = rows.new_empty((most, N), dtype=torch.float32), rows.new_empty((tiles.E, N))
    block_N = _fit(N, 128)
    columns = triton.cdiv(N, block_N)
    _tile_sum_kernel[(most, columns)](
        rows, src_row_R, weights_TK, table, first, partial_IN, K, N, BLOCK_M=64, BLOCK_N=block_N
    )
    _expert_sum_kernel[(tiles.E, columns)](
        partial_IN, first, tiles.offsets, out, N, BLOCK_M=64, BLOCK_T=16, BLOCK_N=block_N
    )
    return out


def moe_mlp(
    x_TD,
    weights_TK,
    src_row_R,
    dst_row_TK,
    offsets,
    gate_up_proj,
    down_proj,
    gate_up_bias,
    down_bias,
    activation,
    interleaved,
    transposed,
    alpha,
    limit,
    save,
    sparse_grads,
):
    layer = _layer(gate_up_proj, down_proj, activation, interleaved, transposed, alpha, limit)
    R, K = src_row_R.shape[0], dst_row_TK.shape[1]
    z, scale = z_shape(R, layer.F, activation, save)
    z_RZ = x_TD.new_empty(z, dtype=torch.int8 if save == "z8" else x_TD.dtype)
    z_scale = x_TD.new_empty(scale, dtype=torch.bfloat16)
    if R == 0 or x_TD.shape[0] == 0:
        return x_TD.new_zeros(x_TD.shape), z_RZ, z_scale
    x_TD, src_row_R, offsets = (tensor.contiguous() for tensor in (x_TD, src_row_R, offsets))
    gate_up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (gate_up_bias, down_bias))
    tiles, act_RF = _Tiles(offsets, R), x_TD.new_empty((R, layer.F))
    with torch.cuda.device_of(x_TD):
        for saved in (z_RZ, z_scale):
            if saved.shape[0]:
                grid = (min(triton.cdiv(R, 16), jit.device(x_TD).processors),)
                _clear_padding_kernel[grid](saved, offsets, layer.E, R, saved.shape[1], BLOCK_R=16, BLOCK_N=256)
        _up(x_TD, src_row_R, tiles, K, gate_up_proj, gate_up_bias, layer, z_RZ, z_scale, act_RF, save)
        y_RD = _rows(act_RF, tiles, down_proj, down_bias, layer, layer.D, layer.F, layer.down_strides)
    return unpermute(y_RD, src_row_R, dst_row_TK, weights_TK), z_RZ, z_scale


def moe_mlp_backward(
    dy_TD,
    x_TD,
    weights_TK,
    src_row_R,
    dst_row_TK,
    offsets,
    gate_up_proj,
    down_proj,
    gate_up_bias,
    down_bias,
    z_RZ,
    z_scale,
    activation,
    interleaved,
    transposed,
    alpha,
    limit,
    save,
    need_x,
    need_weights,
    need_gate_up,
    need_down,
    need_gate_up_bias,
    need_down_bias,
    sparse_grads,
):
    layer = _layer(gate_up_proj, down_proj, activation, interleaved, transposed, alpha, limit)
    (D, F, Z), R, K = layer[-3:], src_row_R.shape[0], dst_row_TK.shape[1]
    experts = None
    if sparse_grads and (need_gate_up or need_down):
        experts = (offsets[1:] > offsets[:-1]).nonzero().view(-1)  # waits for the device
    if R == 0 or x_TD.shape[0] == 0:
        likes = (x_TD, weights_TK, gate_up_proj, down_proj, gate_up_bias, down_bias)
        needs = (need_x, need_weights, need_gate_up, need_down, need_gate_up_bias, need_down_bias)
        zeros = [like.new_zeros(like.shape) if need else x_TD.new_empty(0) for like, need in zip(likes, needs)]
        if sparse_grads:
            zeros[2:4] = [zero[:0].clone() for zero in zeros[2:4]]
        return tuple(zeros)
    dx_TD, dgate_up, ddown, dgate_up_bias, ddown_bias = (x_TD.new_empty(0) for _ in range(5))
    dweights_TK = weights_TK.new_empty(0)
    dy_TD, x_TD, weights_TK, src_row_R, offsets, z_RZ, z_scale = (
        tensor.contiguous() for tensor in (dy_TD, x_TD, weights_TK, src_row_R, offsets, z_RZ, z_scale)
    )
    gate_up_bias, down_bias = (None if bias is None else bias.contiguous() for bias in (gate_up_bias, down_bias))
    tiles, want_dz = _Tiles(offsets, R), need_x or need_gate_up or need_gate_up_bias
    with torch.cuda.device_of(x_TD):
        if save == "x":
            z_RZ = x_TD.new_empty((R, Z))
            _up(x_TD, src_row_R, tiles, K, gate_up_proj, gate_up_bias, layer, z_RZ, None, None, "z")
        dz_RZ = x_TD.new_empty((R, Z)) if want_dz else None
        scaled_RF = x_TD.new_empty((R, F)) if need_down else None
        if want_dz or need_weights or need_down:
            dweights = torch.zeros_like(weights_TK) if need_weights else None
            _down_backward(
                dy_TD,
                src_row_R,
                tiles,
                K,
                down_proj,
                down_bias,
                layer,
                z_RZ,
                z_scale if save == "z8" else None,
                weights_TK,
                dz_RZ,
                scaled_RF,
                dweights,
            )
            dweights_TK = dweights if need_weights else dweights_TK
        wgrad = partial(_wgrad, src_row_R=src_row_R, offsets=offsets, experts=experts, K=K, layer=layer)
        if need_down:
            pair = (scaled_RF, dy_TD) if transposed else (dy_TD, scaled_RF)
            ddown = wgrad(*pair, like=down_proj, gather_a=not transposed)
        if need_gate_up:
            pair = (x_TD, dz_RZ) if transposed else (dz_RZ, x_TD)
            dgate_up = wgrad(*pair, like=gate_up_proj, gather_a=transposed)
        if need_gate_up_bias:
            dgate_up_bias = _bias_grad(dz_RZ, src_row_R, None, tiles, K, Z)
        if need_down_bias:
            ddown_bias = _bias_grad(dy_TD, src_row_R, weights_TK, tiles, K, D)
        if need_x:
            expert, column, row = layer.gate_up_strides
            dx_RD = _rows(dz_RZ, tiles, gate_up_proj, None, layer, D, Z, (expert, row, column))
            dx_TD = unpermute(dx_RD, src_row_R, dst_row_TK, None)
    return dx_TD, dweights_TK, dgate_up, ddown, dgate_up_bias, ddown_bias


def _down_backward(
    dy_TD, src_row_R, tiles, K, down_proj, bias, layer, z_RZ, z_scale, weights_TK, dz_RZ, scaled_RF, dweights_TK
):
    """dz, weight * act and dweights, each where a tensor is given for it."""

    def run(config):
        table, first, most = tiles(config["BLOCK_M"])
        columns = triton.cdiv(layer.F, config["BLOCK_N"])
        grid, config = _programs(config, dy_TD, most * columns)
        parts = None if dweights_TK is None else dy_TD.new_empty((columns, tiles.R), dtype=torch.float32)
        _down_backward_kernel[grid](
            dy_TD,
            src_row_R,
            table,
            first,
            down_proj,
            bias,
            z_RZ,
            z_scale,
            weights_TK,
            dz_RZ,
            scaled_RF,
            parts,
            columns,
            tiles.R,
            K,
            layer.D,
            layer.F,
            *layer.down_strides,
            layer.alpha,
            layer.limit,
            ACTIVATION=layer.activation,
            LAYOUT=layer.layout,
            GROUP=8,
            **config,
        )
        if parts is not None:
            _dweight_kernel[(triton.cdiv(tiles.R, 256),)](parts, src_row_R, dweights_TK, tiles.R, columns, BLOCK=256)

    rows = _bucket(tiles.R, tiles.E)
    wide = jit.device(dy_TD).shared_memory > 200 << 10 and z_scale is None  # elsewhere 128 columns spill registers
    configs = _configs(dy_TD, rows, layer.F, layer.D, 128 if wide else 64)
    key = rows, layer.D, layer.F, layer.layout, layer.transposed, wide
    _tuned("down_backward", dy_TD, key, configs, tiles.R * layer.D * layer.F, layer, run)


SOURCES = (Path(__file__), Path(permutation.__file__).with_name("kernels.py"))


def _agrees(kernel: str, config: dict[str, int], layer: _Layer, like: torch.Tensor) -> bool:
    """Whether this config of a kernel computes the layer on a small problem: the 2x rule against float64."""
    T, E, K, D, F = 200, 3, 2, 2 * config["BLOCK_K"] + 24, config["BLOCK_N"] + 40
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=generator).to(like.device, like.dtype)
    ids_TK = torch.randint(0, E, (T, K), generator=generator).to(like.device)
    routing = permutation.build_routing(ids_TK, E, -1)
    shape = (E, layer.Z // layer.F * F, D), (E, D, F)
    gate_up, down = (draw(*s).transpose(1, 2).contiguous() if layer.transposed else draw(*s) for s in shape)
    dy_TD, *inputs = draw(T, D), draw(T, D), draw(T, K), *routing, gate_up * D**-0.5, down * F**-0.5
    options = layer.activation, layer.layout == "pairs", layer.transposed, layer.alpha, layer.limit, "z"

    def compute(forward: Callable, backward: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        floats = [t.to(dtype) if t.is_floating_point() else t for t in (dy_TD, *inputs)]
        y_TD, *saved = forward(*floats[1:], None, None, *options, False)
        return [y_TD, *backward(*floats, None, None, *saved, *options, True, True, True, True, False, False, False)[:4]]

    exact, plain = (compute(reference.moe_mlp, reference.moe_mlp_backward, t) for t in (torch.float64, like.dtype))
    with autotune.forced({kernel: config}):
        got = compute(moe_mlp, moe_mlp_backward, like.dtype)
    return all(autotune.close(*tensors) for tensors in zip(got, exact, plain))
