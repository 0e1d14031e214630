"""C++ on the CPU: csrc/cpu/norm.cpp."""

from __future__ import annotations

import torch

from fastmoe.native import _C, dtype_code, empty, num_threads, ptr


def _served(tensor_D, x):
    """A weight or bias in x's dtype or float32 (under autocast it may come in another)."""
    if tensor_D is None:
        return None
    return tensor_D.contiguous() if tensor_D.dtype == x.dtype else tensor_D.float().contiguous()


def normalize(x, residual, weight_D, bias_D, eps, center):
    rows = (x if residual is None else residual).contiguous()
    weight_D, bias_D = _served(weight_D, rows), _served(bias_D, rows)
    y, rstd = empty(*rows.shape, dtype=rows.dtype), torch.empty(rows.shape[:-1])
    mean = torch.empty(rows.shape[:-1] if center else 0)
    total = torch.empty(0, dtype=rows.dtype) if residual is None else empty(*rows.shape, dtype=rows.dtype)
    if residual is not None:
        x = x.to(rows.dtype).contiguous()
    _C.normalize(
        ptr(rows if residual is None else x),
        0 if residual is None else ptr(rows),
        ptr(weight_D),
        ptr(bias_D),
        0 if residual is None else ptr(total),
        ptr(y),
        ptr(mean) if center else 0,
        ptr(rstd),
        rstd.numel(),
        rows.shape[-1],
        eps,
        dtype_code(rows),
        dtype_code(weight_D),
        num_threads(),
    )
    return y, total, mean, rstd


def normalize_backward(dy, dsum, x, weight_D, mean, rstd, center, bias):
    dy, x, mean, rstd = dy.to(x.dtype).contiguous(), x.contiguous(), mean.contiguous(), rstd.contiguous()
    dsum = None if dsum is None else dsum.to(x.dtype).contiguous()
    served_D, D, T = _served(weight_D, x), x.shape[-1], rstd.numel()
    dx, dweight_D = empty(*x.shape, dtype=x.dtype), torch.empty_like(served_D)
    dbias_D = torch.empty_like(served_D) if bias else served_D.new_empty(0)
    workspace = torch.empty(_C.normalize_backward_workspace(T, D))
    _C.normalize_backward(
        ptr(dy),
        ptr(dsum),
        ptr(x),
        ptr(served_D),
        ptr(mean) if center else 0,
        ptr(rstd),
        ptr(dx),
        ptr(dweight_D),
        ptr(dbias_D) if bias else 0,
        ptr(workspace),
        T,
        D,
        dtype_code(x),
        dtype_code(served_D),
        num_threads(),
    )
    return dx, dweight_D.to(weight_D.dtype), dbias_D.to(weight_D.dtype)
