"""C++ on the CPU: csrc/cpu/adamw.cpp."""

from __future__ import annotations

from array import array
from operator import attrgetter

import torch

from fastmoe.native import _C, MASTERS, noted, num_threads, ptrs

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
    used = [None if noted(tensors, "absent", lambda t=tensors: _absent(t)) else tensors for tensors in states]
    grads = [grad if grad.is_contiguous() else grad.contiguous() for grad in grads]
    none = array("q", bytes(8 * len(params)))
    addresses = [none if tensors is None else ptrs(tensors) for tensors in (params, grads, *used)]
    codes = [noted(tensors, "codes", lambda t=tensors: _codes(t)) for tensors in (params, exp_avgs)]
    codes.append(noted(masters, "kinds", lambda: _kinds(masters)) if used[-1] else array("i", none))
    numels = noted(params, "numels", lambda: array("q", map(torch.Tensor.numel, params)))
    columns = noted(params, "columns", lambda: array("q", [p.shape[-1] if p.dim() else 1 for p in params]))
    _C.adamw_step(
        addresses,
        codes,
        [numels, columns, *(array("q", numbers) for numbers in (steps, keys, first_rows))],
        array("d", decays),
        lr,
        beta1,
        beta2,
        eps,
        grad_scale,
        array("q", bytes(8 * len(params) + 8)),
        num_threads(),
    )
    torch.autograd.graph.increment_version(params)  # states are in no graph


def _codes(tensors):
    return array("i", [_CODES[dtype] for dtype in map(_dtype, tensors)])


def _kinds(masters):
    return array("i", [MASTERS[t.dtype] if t.numel() else 0 for t in masters])


def _absent(tensors):
    """Whether a list holds nothing but one empty tensor, again and again."""
    first = tensors[0]
    return not first.numel() and all(tensor is first for tensor in tensors)
