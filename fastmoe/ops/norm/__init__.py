"""Norm: root-mean-square and layer normalisation over the last dimension, alone or after a residual sum."""

from __future__ import annotations

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import define


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, over the last dimension D; sums in float32, y in x's dtype.

    x: [..., D] float. weight_D: [D] in x's dtype or float32. Differentiable in both; backward saves x and one float a
    row. Errors: ValueError or TypeError naming the argument. Source: Zhang and Sennrich, arXiv 1910.07467.
    """
    return _checked("rms_norm", x, None, weight_D, None, eps)[0]


def layer_norm(
    x: torch.Tensor, weight_D: torch.Tensor, bias_D: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias, over the last dimension D, var without correction.

    x: [..., D] float. weight_D, bias_D: [D], both in x's dtype or both float32. Differentiable in all; backward saves x
    and two floats a row. Errors: ValueError or TypeError naming the argument. Source: Ba et al., arXiv 1607.06450.
    """
    return _checked("layer_norm", x, None, weight_D, bias_D, eps, center=True)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(sum), sum) with sum = x + residual, rounded to residual's dtype, in one pass; backward likewise.

    residual: [..., D]. x: of residual's shape, in its dtype or, beside a float32 residual, in 16 bits. Otherwise as
    rms_norm of a residual.
    """
    return _checked("add_rms_norm", x, residual, weight_D, None, eps)[:2]


def add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor,
    bias_D: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(layer_norm(sum), sum) with sum = x + residual, rounded to residual's dtype, in one pass; backward likewise.

    residual: [..., D]. x: of residual's shape, in its dtype or, beside a float32 residual, in 16 bits. Otherwise as
    layer_norm of a residual.
    """
    return _checked("add_layer_norm", x, residual, weight_D, bias_D, eps, center=True)[:2]


def _checked(op, x, residual, weight_D, bias_D, eps, center=False):
    check.tensor(op, "weight_D", weight_D, (None,), legend="D")
    (D,) = weight_D.shape
    name, rows = ("x", x) if residual is None else ("residual", residual)
    dims = max(rows.dim(), 1) - 1 if isinstance(rows, torch.Tensor) else 0
    check.tensor(op, name, rows, (*(None,) * dims, D), like=weight_D, legend="..., D")
    check.positive(op, D=D)
    autocast = torch.is_autocast_enabled(rows.device.type)
    if weight_D.dtype not in (rows.dtype, torch.float32) and not autocast:
        check.fail(op, "weight_D", f"{rows.dtype} or torch.float32", weight_D.dtype, TypeError)
    if bias_D is not None:
        check.tensor(op, "bias_D", bias_D, (D,), (weight_D.dtype,), rows, "D")
    if residual is not None:
        lower = (torch.bfloat16, torch.float16) if residual.dtype == torch.float32 else ()
        check.tensor(op, "x", x, tuple(residual.shape), (residual.dtype, *lower), rows, "as residual")
    return _normalize(x, residual, weight_D, bias_D, eps, center)


def _fake(x, residual, weight_D, bias_D, eps, center):
    rows = x if residual is None else residual
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    return (
        torch.empty_like(rows, memory_format=torch.contiguous_format),
        rows.new_empty((0,) if residual is None else rows.shape),
        rows.new_empty(rows.shape[:-1] if center else (0,), dtype=wide),
        rows.new_empty(rows.shape[:-1], dtype=wide),
    )


def _setup(ctx, inputs, output):
    x, residual, weight_D, bias_D, _, ctx.center = inputs
    ctx.mark_non_differentiable(*output[2:], *(() if residual is not None else output[1:2]))
    ctx.set_materialize_grads(False)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype, None if bias_D is None else bias_D.dtype
    ctx.save_for_backward(x if residual is None else output[1], weight_D, *output[2:])


def _backward(ctx, dy, dsum, *_):
    x_dtype, residual_dtype, bias_dtype = ctx.dtypes
    if dy is None:
        if dsum is None:
            return (None,) * 6
        return dsum.to(x_dtype), dsum, None, None, None, None
    if residual_dtype is None:
        dsum = None
    dx, dweight_D, dbias_D = _normalize_backward(dy, dsum, *ctx.saved_tensors, ctx.center, bias_dtype is not None)
    dresidual = None if residual_dtype is None else dx
    return dx.to(x_dtype), dresidual, dweight_D, None if bias_dtype is None else dbias_D, None, None


def _fake_backward(dy, dsum, x, weight_D, mean, rstd, center, bias):
    return x.new_empty(x.shape), weight_D.new_empty(weight_D.shape), weight_D.new_empty(weight_D.shape if bias else 0)


_normalize = define(
    "norm",
    "normalize(Tensor x, Tensor? residual, Tensor weight_D, Tensor? bias_D, float eps, bool center) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
)
_normalize_backward = define(
    "norm",
    "normalize_backward(Tensor dy, Tensor? dsum, Tensor x, Tensor weight_D, Tensor mean, Tensor rstd, bool center, "
    "bool bias) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
