"""Norm: root-mean-square normalisation over the last dimension."""

from __future__ import annotations

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import define


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension D; sums in float32, y in x's dtype.

    x: [..., D] float. weight_D: [D] in x's dtype or float32. Differentiable in both; backward saves x and one float a
    row. Errors: ValueError or TypeError naming the argument. Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    check.tensor("rms_norm", "weight_D", weight_D, (None,), legend="D")
    check.tensor(
        "rms_norm", "x", x, (*(None,) * (max(x.dim(), 1) - 1), weight_D.shape[0]), like=weight_D, legend="..., D"
    )
    check.positive("rms_norm", D=weight_D.shape[0])
    if weight_D.dtype not in (x.dtype, torch.float32) and not torch.is_autocast_enabled(x.device.type):
        check.fail("rms_norm", "weight_D", f"{x.dtype} or torch.float32", weight_D.dtype, TypeError)
    return _rms_norm(x, weight_D, eps)[0]


def _fake(x, weight_D, eps):
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape[:-1], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32),
    )


def _setup(ctx, inputs, output):
    x, weight_D, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight_D, output[1])


def _backward(ctx, dy, _):
    if dy is None:
        return None, None, None
    dx, dweight_D = _rms_norm_backward(dy, *ctx.saved_tensors)
    return dx, dweight_D, None


_rms_norm = define(
    "norm",
    "rms_norm(Tensor x, Tensor weight_D, float eps) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
)
_rms_norm_backward = define(
    "norm",
    "rms_norm_backward(Tensor dy, Tensor x, Tensor weight_D, Tensor rstd) -> (Tensor, Tensor)",
    fake=lambda dy, x, weight_D, rstd: (x.new_empty(x.shape), weight_D.new_empty(weight_D.shape)),
)
