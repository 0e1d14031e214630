"""C++ on the CPU: csrc/cpu/norm.cpp."""

from __future__ import annotations

import torch

from fastmoe.native import _C, dtype_code, empty, num_threads, ptr


def _served(weight_D, x):
    """The weight in x's dtype or float32 (under autocast it may come in another)."""
    return weight_D.contiguous() if weight_D.dtype == x.dtype else weight_D.float().contiguous()


def rms_norm(x, weight_D, eps):
    x, weight_D = x.contiguous(), _served(weight_D, x)
    D = x.shape[-1]
    y, rstd = empty(*x.shape, dtype=x.dtype), torch.empty(x.shape[:-1])
    _C.rms_norm(
        ptr(x),
        ptr(weight_D),
        ptr(y),
        ptr(rstd),
        rstd.numel(),
        D,
        eps,
        dtype_code(x),
        dtype_code(weight_D),
        num_threads(),
    )
    return y, rstd


def rms_norm_backward(dy, x, weight_D, rstd):
    dy, x, rstd = dy.to(x.dtype).contiguous(), x.contiguous(), rstd.contiguous()
    served_D, D, T = _served(weight_D, x), x.shape[-1], rstd.numel()
    dx, dweight_D = empty(*x.shape, dtype=x.dtype), torch.empty_like(served_D)
    workspace = torch.empty(_C.rms_norm_backward_workspace(T, D))
    _C.rms_norm_backward(
        ptr(dy),
        ptr(x),
        ptr(served_D),
        ptr(rstd),
        ptr(dx),
        ptr(dweight_D),
        ptr(workspace),
        T,
        D,
        dtype_code(x),
        dtype_code(served_D),
        num_threads(),
    )
    return dx, dweight_D.to(weight_D.dtype)
