"""C++ on the CPU: csrc/cpu/gemm.cpp."""

from __future__ import annotations

import torch

from fastmoe.native import _C, dtype_code, empty, num_threads, ptr, workspace


def linear(x, weight_OI, bias_O):
    x, weight_OI, bias_O = map(_dense, (x, weight_OI, bias_O))
    outputs, inputs = weight_OI.shape
    y, threads = empty(*x.shape[:-1], outputs, dtype=x.dtype), num_threads()
    memory = workspace(_C.linear_workspace(threads))
    sizes = x.numel() // inputs, inputs, outputs
    _C.linear(ptr(x), ptr(weight_OI), ptr(bias_O), ptr(y), *sizes, dtype_code(x), ptr(memory), threads)
    return y


def linear_backward(dy, x, weight_OI, need_bias):
    dy, x, weight_OI = map(_dense, (dy, x, weight_OI))
    outputs, inputs = dy.shape[-1], next((t.shape[-1] for t in (x, weight_OI) if t is not None), 0)
    grads = (
        None if weight_OI is None else empty(*dy.shape[:-1], inputs, dtype=dy.dtype),
        None if x is None else empty(outputs, inputs, dtype=dy.dtype),
        empty(outputs, dtype=dy.dtype) if need_bias else None,
    )
    threads = num_threads()
    memory = workspace(_C.linear_workspace(threads))
    sizes = dy.numel() // outputs, inputs, outputs
    addresses = map(ptr, (dy, x, weight_OI, *grads))
    _C.linear_backward(*addresses, *sizes, dtype_code(dy), ptr(memory), threads)
    return tuple(torch.empty(0, dtype=dy.dtype) if grad is None else grad for grad in grads)


def _dense(tensor):
    return None if tensor is None else tensor.contiguous()
