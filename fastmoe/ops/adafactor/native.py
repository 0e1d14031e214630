"""C++ on the CPU: csrc/cpu/adafactor.cpp."""

from __future__ import annotations

import math
from array import array

import torch

from fastmoe.native import _C, MASTERS, dtype_code, num_threads, ptr, workspace


def adafactor_step(
    params,
    grads,
    rows,
    columns,
    squares,
    masters,
    steps,
    keys,
    first_rows,
    lr,
    decay_rate,
    eps_square,
    eps_weight,
    clip_threshold,
    weight_decay,
    grad_scale,
):
    if not params:
        return
    grads = [grad.contiguous() for grad in grads]
    shapes = array("q")  # matrices of a stack, n, m; a vector: -1, n, 1
    for param in params:
        stack, size = param.shape[:-2], param.shape[-2:]
        shapes.extend((math.prod(stack), *size) if len(size) == 2 else (-1, param.numel(), 1))
    threads = num_threads()
    memory = workspace(_C.adafactor_step_workspace(shapes, threads))
    _C.adafactor_step(
        *(array("Q", map(ptr, tensors)) for tensors in (params, grads, rows, columns, squares, masters)),
        shapes,
        array("i", map(dtype_code, params)),
        array("i", [MASTERS[master.dtype] if master.numel() else 0 for master in masters]),
        array("q", keys),
        array("q", first_rows),
        array("d", [1 - step**-decay_rate for step in steps]),
        array("d", [min(1e-2, step**-0.5) if lr is None else lr for step in steps]),
        lr is None,
        eps_square,
        eps_weight,
        clip_threshold,
        weight_decay,
        grad_scale,
        ptr(memory),
        threads,
    )
    torch.autograd.graph.increment_version([*params, *rows, *columns, *squares, *masters])
