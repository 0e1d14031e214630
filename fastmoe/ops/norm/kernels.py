"""Norm in Triton: a program normalises a block of whole rows; the backward's programs each go through a run of rows and
leave their part of dweight and dbias, which are then summed in order.
"""

import torch
import triton
import triton.language as tl

from fastmoe import jit
from fastmoe.ops.permutation.kernels import to_storage

MAX_D = 65536  # a row lies in one program's registers; beyond 8192 the backward spills some of it


@triton.jit
def _normalize_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sum_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    T,
    D,
    eps,
    ADD: tl.constexpr,
    BIASED: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d_D = tl.arange(0, BLOCK_D)
    at_TD = t_T[:, None] * D + d_D[None, :]
    mask_TD = (t_T < T)[:, None] & (d_D < D)[None, :]
    x_TD = tl.load(x_ptr + at_TD, mask=mask_TD, other=0.0).to(tl.float32)
    if ADD:
        x_TD += tl.load(residual_ptr + at_TD, mask=mask_TD, other=0.0).to(tl.float32)
        sum_TD = to_storage(x_TD, sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at_TD, sum_TD, mask=mask_TD)
        x_TD = sum_TD.to(tl.float32)
    if CENTER:
        mean_T = tl.sum(x_TD, 1) / D
        tl.store(mean_ptr + t_T, mean_T, mask=t_T < T)
        x_TD = tl.where(mask_TD, x_TD - mean_T[:, None], 0.0)
    rstd_T = 1.0 / tl.sqrt_rn(tl.sum(x_TD * x_TD, 1) / D + eps)
    tl.store(rstd_ptr + t_T, rstd_T, mask=t_T < T)
    weight_D = tl.load(weight_ptr + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    y_TD = x_TD * rstd_T[:, None] * weight_D[None, :]
    if BIASED:
        y_TD += tl.load(bias_ptr + d_D, mask=d_D < D, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + at_TD, to_storage(y_TD, y_ptr.dtype.element_ty), mask=mask_TD)


@triton.jit
def _normalize_backward_kernel(
    dy_ptr,
    dsum_ptr,
    x_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dweight_ptr,
    dbias_ptr,
    T,
    D,
    tiles,
    ADD: tl.constexpr,
    BIASED: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    d_D = tl.arange(0, BLOCK_D)
    weight_D = tl.load(weight_ptr + d_D, mask=d_D < D, other=0.0).to(tl.float32)
    dweight_D = tl.zeros((BLOCK_D,), tl.float32)
    dbias_D = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(tiles):
        t_T = (program * tiles + tile) * BLOCK_T + tl.arange(0, BLOCK_T)
        at_TD = t_T[:, None] * D + d_D[None, :]
        mask_TD = (t_T < T)[:, None] & (d_D < D)[None, :]
        dy_TD = tl.load(dy_ptr + at_TD, mask=mask_TD, other=0.0).to(tl.float32)
        unit_TD = tl.load(x_ptr + at_TD, mask=mask_TD, other=0.0).to(tl.float32)
        rstd_T = tl.load(rstd_ptr + t_T, mask=t_T < T, other=0.0)
        if CENTER:
            mean_T = tl.load(mean_ptr + t_T, mask=t_T < T, other=0.0)
            unit_TD = tl.where(mask_TD, unit_TD - mean_T[:, None], 0.0)
        unit_TD = unit_TD * rstd_T[:, None]
        dunit_TD = dy_TD * weight_D[None, :]
        dx_TD = dunit_TD - unit_TD * (tl.sum(dunit_TD * unit_TD, 1) / D)[:, None]
        if CENTER:
            dx_TD -= (tl.sum(dunit_TD, 1) / D)[:, None]
        dx_TD = dx_TD * rstd_T[:, None]
        if ADD:
            dx_TD += tl.load(dsum_ptr + at_TD, mask=mask_TD, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at_TD, to_storage(dx_TD, dx_ptr.dtype.element_ty), mask=mask_TD)
        dweight_D += tl.sum(dy_TD * unit_TD, 0)
        if BIASED:
            dbias_D += tl.sum(dy_TD, 0)
    tl.store(dweight_ptr + program * D + d_D, dweight_D, mask=d_D < D)
    if BIASED:
        tl.store(dbias_ptr + program * D + d_D, dbias_D, mask=d_D < D)


def _blocks(D, held):
    """Rows and columns of a program's block and its warps; held: float32 blocks that it has in registers at once."""
    if D > MAX_D:
        raise ValueError(f"fastmoe.normalize: D must be at most {MAX_D} in Triton, got {D}")
    block_D = triton.next_power_of_2(D)
    warps = min(max(block_D * held // 4096, 4), 16 if block_D < 32768 else 32)
    return {"BLOCK_T": max(2048 // held // block_D, 1), "BLOCK_D": block_D, "num_warps": warps}


def normalize(x, residual, weight_D, bias_D, eps, center):
    rows = (x if residual is None else residual).contiguous()
    x, weight_D = x.contiguous(), weight_D.contiguous()
    bias_D = None if bias_D is None else bias_D.contiguous()
    D, T = rows.shape[-1], rows.numel() // rows.shape[-1]
    y, total = torch.empty_like(rows), rows.new_empty((0,) if residual is None else rows.shape)
    rstd = rows.new_empty(rows.shape[:-1], dtype=torch.float32)
    mean = rows.new_empty(rows.shape[:-1] if center else (0,), dtype=torch.float32)
    if T:
        blocks = _blocks(D, 2)
        with torch.cuda.device_of(rows):
            _normalize_kernel[(triton.cdiv(T, blocks["BLOCK_T"]),)](
                *(x, rows, weight_D, bias_D, total, y, mean, rstd, T, D, eps),
                ADD=residual is not None,
                BIASED=bias_D is not None,
                CENTER=center,
                **blocks,
            )
    return y, total, mean, rstd


def normalize_backward(dy, dsum, x, weight_D, mean, rstd, center, bias):
    dy, x, weight_D = dy.contiguous(), x.contiguous(), weight_D.contiguous()
    dsum = None if dsum is None else dsum.contiguous()
    mean, rstd = mean.contiguous(), rstd.contiguous()
    D, T = x.shape[-1], rstd.numel()
    blocks = _blocks(D, 4)
    programs = min(triton.cdiv(T, blocks["BLOCK_T"]), 4 * jit.device(x).processors)
    dx = torch.empty_like(x)
    dweight_PD = x.new_empty((programs, D), dtype=torch.float32)
    dbias_PD = torch.empty_like(dweight_PD) if bias else dweight_PD
    if T:
        tiles = triton.cdiv(T, programs * blocks["BLOCK_T"])
        with torch.cuda.device_of(x):
            _normalize_backward_kernel[(programs,)](
                *(dy, dsum, x, weight_D, mean, rstd, dx, dweight_PD, dbias_PD, T, D, tiles),
                ADD=dsum is not None,
                BIASED=bias,
                CENTER=center,
                **blocks,
            )
    dbias_D = dbias_PD.sum(0) if bias else dbias_PD.new_empty(0)
    return dx, dweight_PD.sum(0).to(weight_D.dtype), dbias_D.to(weight_D.dtype)
