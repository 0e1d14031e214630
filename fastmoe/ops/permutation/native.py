"""C++ on the CPU: csrc/cpu/permutation.cpp."""

from __future__ import annotations

import torch

from fastmoe.native import _C, dtype_code, empty, num_threads, ptr, workspace


def build_routing(topk_ids_TK, num_experts, capacity):
    ids_TK = topk_ids_TK.contiguous()
    T, K = ids_TK.shape
    src_row_R = torch.empty(T * K, dtype=torch.int32)
    dst_row_TK = torch.empty(T, K, dtype=torch.int32)
    offsets = torch.empty(num_experts + 1, dtype=torch.int32)
    memory = workspace(4 * _C.build_routing_workspace(T, K, num_experts))
    _C.build_routing(
        ptr(ids_TK),
        ids_TK.dtype == torch.int64,
        T,
        K,
        num_experts,
        capacity,
        src_row_R.data_ptr(),  # fresh ones need no check
        dst_row_TK.data_ptr(),
        offsets.data_ptr(),
        memory.data_ptr(),
        num_threads(),
    )
    return src_row_R, dst_row_TK, offsets


def build_routing_from_experts(token_R, offsets, num_tokens):
    token_R, offsets_in = token_R.contiguous(), offsets.contiguous()
    R, E = token_R.shape[0], offsets.shape[0] - 1
    src_row_R, dst_row_TE, offsets = (
        torch.empty(shape, dtype=torch.int32) for shape in ((R,), (num_tokens, E), (E + 1,))
    )
    _C.build_routing_from_experts(
        ptr(token_R),
        token_R.dtype == torch.int64,
        ptr(offsets_in),
        offsets_in.dtype == torch.int64,
        R,
        num_tokens,
        E,
        ptr(src_row_R),
        ptr(dst_row_TE),
        ptr(offsets),
    )
    return src_row_R, dst_row_TE, offsets


def permute(x_TD, src_row_R, dst_row_TK):
    x_TD, src_row_R = x_TD.contiguous(), src_row_R.contiguous()
    R, D = src_row_R.shape[0], x_TD.shape[1]
    y_RD = empty(R, D, dtype=x_TD.dtype)
    _C.permute(ptr(x_TD), ptr(src_row_R), ptr(y_RD), R, D, dst_row_TK.shape[1], x_TD.element_size(), num_threads())
    return y_RD


def unpermute(y_RD, src_row_R, dst_row_TK, weights_TK):
    y_RD, dst_row_TK = y_RD.contiguous(), dst_row_TK.contiguous()
    weights_TK = None if weights_TK is None else weights_TK.contiguous()
    (T, K), D = dst_row_TK.shape, y_RD.shape[1]
    out_TD = empty(T, D, dtype=y_RD.dtype)
    _C.unpermute(
        ptr(y_RD),
        ptr(dst_row_TK),
        ptr(weights_TK),
        ptr(out_TD),
        T,
        K,
        D,
        dtype_code(y_RD),
        0 if weights_TK is None else dtype_code(weights_TK),
        num_threads(),
    )
    return out_TD


def unpermute_backward(dout_TD, y_RD, src_row_R, dst_row_TK, weights_TK):
    dout_TD, y_RD, src_row_R, dst_row_TK, weights_TK = (
        tensor.contiguous() for tensor in (dout_TD, y_RD, src_row_R, dst_row_TK, weights_TK)
    )
    (R, D), (T, K) = y_RD.shape, dst_row_TK.shape
    dy_RD, dweights_TK = empty(R, D, dtype=y_RD.dtype), torch.empty_like(weights_TK)
    _C.unpermute_backward(
        ptr(dout_TD),
        ptr(y_RD),
        ptr(src_row_R),
        ptr(dst_row_TK),
        ptr(weights_TK),
        ptr(dy_RD),
        ptr(dweights_TK),
        R,
        T,
        K,
        D,
        dtype_code(y_RD),
        dtype_code(weights_TK),
        num_threads(),
    )
    return dy_RD, dweights_TK
