"""AdamW: one update of a whole list of tensors."""

from __future__ import annotations

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import OPS, define


def adamw_step(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """Updates params, exp_avgs and exp_avg_sqs in place, all tensors in one call.

    g = grad * grad_scale; m = m + (1-beta1)(g-m); v = beta2 v + (1-beta2) g^2; p = p (1 - lr weight_decay)
    - lr / (1-beta1^step) * m / (sqrt(v / (1-beta2^step)) + eps). step counts from 1.

    params: float32, bfloat16 or float16 (float64 on the reference), each grad in its param's dtype, both moments
    float32 (float64 with float64 params), all of one shape and contiguous in the same order. grad_scale: the clip
    factor. Errors: ValueError or TypeError naming the argument and its index. Source: Loshchilov and Hutter, arXiv
    1711.05101.
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            check.fail("adamw_step", name, f"a list of {len(params)} tensors like params", len(tensors))
    for i, (param, grad, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs)):
        wide = (torch.float64,) if param.dtype == torch.float64 else (torch.float32,)
        check.tensor("adamw_step", f"params[{i}]", param, tuple(param.shape))
        check.tensor("adamw_step", f"grads[{i}]", grad, tuple(param.shape), (param.dtype,), param)
        check.tensor("adamw_step", f"exp_avgs[{i}]", m, tuple(param.shape), wide, param)
        check.tensor("adamw_step", f"exp_avg_sqs[{i}]", v, tuple(param.shape), wide, param)
        for name, tensor in ((f"params[{i}]", param), (f"exp_avgs[{i}]", m), (f"exp_avg_sqs[{i}]", v)):
            if not tensor.is_contiguous():
                check.fail("adamw_step", name, "contiguous (it is updated in place)", f"strides {tensor.stride()}")
    if step < 1:
        check.fail("adamw_step", "step", "at least 1", step)
    call = _adamw_step if torch.compiler.is_compiling() else OPS["adamw_step"]  # the dispatcher costs 2 us a tensor
    call(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay, grad_scale)


_adamw_step = define(
    "adamw",
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, int step, "
    "float lr, float beta1, float beta2, float eps, float weight_decay, float grad_scale) -> ()",
    fake=lambda *args: None,
)
