"""C++ on the CPU: csrc/cpu/loss.cpp."""

from __future__ import annotations

import torch

from fastmoe.native import _C, dtype_code, empty, num_threads, ptr, workspace


def linear_cross_entropy(x_TD, weight_VD, targets_T, ignore_index, need_x, need_weight):
    x_TD, weight_VD, targets_T = x_TD.contiguous(), weight_VD.contiguous(), targets_T.contiguous().long()
    (T, D), V, threads = x_TD.shape, weight_VD.shape[0], num_threads()
    loss, dx_TD, dweight_VD = (
        torch.empty(()),
        empty(*((T, D) if need_x else (0,))),
        empty(*((V, D) if need_weight else (0,))),
    )
    memory = workspace(_C.linear_cross_entropy_workspace(T, V, threads))
    _C.linear_cross_entropy(
        ptr(x_TD),
        ptr(weight_VD),
        ptr(targets_T),
        ptr(loss),
        ptr(dx_TD) if need_x else 0,
        ptr(dweight_VD) if need_weight else 0,
        T,
        D,
        V,
        ignore_index,
        dtype_code(x_TD),
        ptr(memory),
        threads,
    )
    return loss, dx_TD, dweight_VD
