"""Gemm: the linear layer. The native kernel widens 16 bits as it packs: they run at the speed of 32 on any CPU."""

from __future__ import annotations

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import define


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x @ weight.T + bias over the last dimension; products accumulate in float32 (float64 for float64).

    x: [..., I] float32, bfloat16 or float16 (float64 on the reference). weight: [O, I] and bias: [O] in x's dtype;
    under autocast all three are lowered to its dtype, as torch's linear does.

    Returns y [..., O] in x's dtype; differentiable in all three. Backward keeps x only for a weight that takes a
    gradient and the weight only for such an x: a frozen input costs neither memory nor work.

    Errors: ValueError or TypeError naming the argument for shapes, dtypes and devices that do not fit. Source:
    torch.nn.functional.linear's contract.
    """
    rows = (None,) * (x.dim() - 1 if isinstance(x, torch.Tensor) else 0)
    check.tensor("linear", "x", x, (*rows, None), legend="..., I")
    dtypes = check.FLOATS if torch.is_autocast_enabled(x.device.type) else (x.dtype,)
    check.tensor("linear", "weight", weight, (None, x.shape[-1]), dtypes, x, "O, I")
    check.positive("linear", I=weight.shape[1], O=weight.shape[0])
    if bias is not None:
        check.tensor("linear", "bias", bias, (weight.shape[0],), dtypes, x, "O")
    return _linear(x, weight, bias)


def _setup(ctx, inputs, output):
    x, weight_OI, _ = inputs
    needs_x, needs_weight, _ = ctx.needs_input_grad[:3]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if needs_weight else None, weight_OI if needs_x else None)


def _backward(ctx, dy):
    if dy is None:
        return None, None, None
    needs = ctx.needs_input_grad
    grads = _linear_backward(dy, *ctx.saved_tensors, needs[2])
    return tuple(grad if need else None for grad, need in zip(grads, needs))


def _fake_backward(dy, x, weight_OI, need_bias):
    return (
        dy.new_empty((*dy.shape[:-1], weight_OI.shape[1]) if weight_OI is not None else (0,)),
        dy.new_empty((dy.shape[-1], x.shape[-1]) if x is not None else (0,)),
        dy.new_empty(dy.shape[-1:] if need_bias else (0,)),
    )


def _autocast(args, dtype):
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in args)


_linear = define(
    "gemm",
    "linear(Tensor x, Tensor weight_OI, Tensor? bias_O) -> Tensor",
    fake=lambda x, weight_OI, bias_O: x.new_empty((*x.shape[:-1], weight_OI.shape[0])),
    setup_context=_setup,
    backward=_backward,
    autocast=_autocast,
)
_linear_backward = define(
    "gemm",
    "linear_backward(Tensor dy, Tensor? x, Tensor? weight_OI, bool need_bias) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
