"""C++ on the CPU: csrc/cpu/adamw.cpp."""

from __future__ import annotations

from array import array

import torch

from fastmoe.native import _C, dtype_code, num_threads, ptr


def adamw_step(params, grads, exp_avgs, exp_avg_sqs, step, lr, beta1, beta2, eps, weight_decay, grad_scale):
    grads = [grad.contiguous() for grad in grads]
    addresses = (array("Q", map(ptr, tensors)) for tensors in (params, grads, exp_avgs, exp_avg_sqs))
    numels, dtypes = array("q", [param.numel() for param in params]), array("i", map(dtype_code, params))
    workspace = array("q", bytes(8 * len(params) + 8))
    _C.adamw_step(
        *addresses, numels, dtypes, workspace, step, lr, beta1, beta2, eps, weight_decay, grad_scale, num_threads()
    )
    torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])
