"""Loss: the output projection and cross entropy in one op, so that the logits of all tokens never exist at once."""

from __future__ import annotations

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import define


def linear_cross_entropy(
    x_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_T: torch.Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> torch.Tensor:
    """Cross entropy in nats of softmax(x @ weight.T) against the targets, for a vocabulary of V.

    x_TD: [T, D] float. weight_VD: [V, D] in x's dtype. targets_T: [T] int32 or int64 in 0..V-1 or ignore_index.
    reduction: "mean" over the targets that count (0 if there are none) or "sum". Logits and sums in float32 (float64
    for float64). The gradients of x and weight are formed with the loss, tile by tile, and scaled in backward.

    Returns a scalar, float32 (float64 for float64). Errors: ValueError or TypeError naming the argument; ValueError for
    targets outside the vocabulary on the CPU (on a GPU the loss is NaN). Source: the fused form is Liger's
    (Hsu et al., arXiv 2410.10989).
    """
    check.tensor("linear_cross_entropy", "x_TD", x_TD, (None, None), legend="T, D")
    T, D = x_TD.shape
    dtypes = check.FLOATS if torch.is_autocast_enabled(x_TD.device.type) else (x_TD.dtype,)
    check.tensor("linear_cross_entropy", "weight_VD", weight_VD, (None, D), dtypes, x_TD, "V, D")
    check.positive("linear_cross_entropy", V=weight_VD.shape[0], D=D)
    check.tensor("linear_cross_entropy", "targets_T", targets_T, (T,), check.INTS, x_TD, "T")
    check.option("linear_cross_entropy", "reduction", reduction, ("mean", "sum"))
    grad = torch.is_grad_enabled()
    loss, _, _ = _linear_cross_entropy(
        x_TD, weight_VD, targets_T, ignore_index, grad and x_TD.requires_grad, grad and weight_VD.requires_grad
    )
    return loss / (targets_T != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss


def _fake(x_TD, weight_VD, targets_T, ignore_index, need_x, need_weight):
    wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    return (
        x_TD.new_empty((), dtype=wide),
        x_TD.new_empty(x_TD.shape if need_x else (0,), dtype=wide),
        x_TD.new_empty(weight_VD.shape if need_weight else (0,), dtype=wide),
    )


def _setup(ctx, inputs, output):
    _, dx_TD, dweight_VD = output
    ctx.mark_non_differentiable(dx_TD, dweight_VD)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dx_TD, dweight_VD)
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 6
    dx_TD, dweight_VD = ctx.saved_tensors
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    return (
        (dx_TD * dloss).to(ctx.dtypes[0]) if needs_x else None,
        (dweight_VD * dloss).to(ctx.dtypes[1]) if needs_weight else None,
        None,
        None,
        None,
        None,
    )


def _autocast(args, dtype):
    x_TD, weight_VD, *rest = args
    return args if x_TD.dtype == torch.float64 else (x_TD.to(dtype), weight_VD.to(dtype), *rest)


_linear_cross_entropy = define(
    "loss",
    "linear_cross_entropy(Tensor x_TD, Tensor weight_VD, Tensor targets_T, int ignore_index, bool need_x, "
    "bool need_weight) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_autocast,
)
