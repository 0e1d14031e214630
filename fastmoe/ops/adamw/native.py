"""C++ on the CPU: csrc/cpu/adamw.cpp."""

from __future__ import annotations

from array import array
from operator import attrgetter

import torch

from fastmoe.native import _C, MASTERS, num_threads, ptrs

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}  # of params and moments
_dtype = attrgetter("dtype")


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
    states = [exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, masters]
    used = [None if _absent(tensors) else tensors for tensors in states]
    grads = [grad if grad.is_contiguous() else grad.contiguous() for grad in grads]
    none = array("q", bytes(8 * len(params)))
    addresses = [none if tensors is None else ptrs(tensors) for tensors in (params, grads, *used)]
    columns = [param.shape[-1] if param.dim() else 1 for param in params]
    kinds = [[_CODES[dtype] for dtype in map(_dtype, tensors)] for tensors in (params, exp_avgs)]
    kinds.append([MASTERS[t.dtype] if t.numel() else 0 for t in masters] if used[-1] else none)
    sizes = list(map(torch.Tensor.numel, params)), columns, steps, keys, first_rows
    _C.adamw_step(
        addresses,
        [array("i", codes) for codes in kinds],
        [array("q", numbers) for numbers in sizes],
        array("d", decays),
        lr,
        beta1,
        beta2,
        eps,
        grad_scale,
        array("q", bytes(8 * len(params) + 8)),
        num_threads(),
    )
    written = [tensor for tensors in (params, *used) if tensors for tensor in tensors]
    torch.autograd.graph.increment_version(written)


def _absent(tensors):
    """Whether a list holds nothing but one empty tensor, again and again."""
    first = tensors[0]
    return not first.numel() and all(tensor is first for tensor in tensors)
