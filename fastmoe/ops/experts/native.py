"""C++ on the CPU: csrc/cpu/experts.cpp."""

from __future__ import annotations

import torch

from fastmoe.native import _C, dtype_code, empty, num_threads, ptr, workspace


def _served(gate_up_bias, down_bias, activation, interleaved, transposed, save, sparse_grads):
    if gate_up_bias is not None or down_bias is not None or activation != "swiglu" or interleaved or transposed:
        raise NotImplementedError("fastmoe.moe_mlp: native serves plain swiglu so far")
    if save not in ("z", "none") or sparse_grads:
        raise NotImplementedError("fastmoe.moe_mlp: native serves save='z' so far")


def moe_mlp(
    x_TD,
    weights_TK,
    src_row_R,
    dst_row_TK,
    offsets,
    gate_up_proj,
    down_proj,
    gate_up_bias,
    down_bias,
    activation,
    interleaved,
    transposed,
    alpha,
    limit,
    save,
    sparse_grads,
):
    _served(gate_up_bias, down_bias, activation, interleaved, transposed, save, sparse_grads)
    save_z = save == "z"
    inputs = [
        tensor.contiguous() for tensor in (x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj)
    ]
    sizes, codes, threads = _sizes(*inputs), (dtype_code(x_TD), dtype_code(weights_TK)), num_threads()
    T, _, R, E, D, F = sizes
    y_TD, z_R2F = empty(T, D, dtype=x_TD.dtype), empty(R if save_z else 0, 2 * F, dtype=x_TD.dtype)
    memory = workspace(_C.moe_mlp_workspace(R, E, D, F, threads))
    _C.moe_mlp(*map(ptr, inputs), ptr(y_TD), ptr(z_R2F) if save_z else 0, *sizes, *codes, ptr(memory), threads)
    return y_TD, z_R2F, x_TD.new_empty(0, 2 * -(-F // 64), dtype=torch.bfloat16)


def moe_mlp_backward(
    dy_TD,
    x_TD,
    weights_TK,
    src_row_R,
    dst_row_TK,
    offsets,
    gate_up_proj,
    down_proj,
    gate_up_bias,
    down_bias,
    z_R2F,
    z_scale,
    activation,
    interleaved,
    transposed,
    alpha,
    limit,
    save,
    need_x,
    need_weights,
    need_gate_up,
    need_down,
    need_gate_up_bias,
    need_down_bias,
    sparse_grads,
):
    _served(gate_up_bias, down_bias, activation, interleaved, transposed, save, sparse_grads)
    inputs = [
        tensor.contiguous() for tensor in (x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj)
    ]
    sizes, codes, threads = _sizes(*inputs), (dtype_code(x_TD), dtype_code(weights_TK)), num_threads()
    _, _, R, E, D, F = sizes
    needed = zip((x_TD, weights_TK, gate_up_proj, down_proj), (need_x, need_weights, need_gate_up, need_down))
    grads = tuple(empty(*(tensor.shape if need else (0,)), dtype=tensor.dtype) for tensor, need in needed)
    memory = workspace(_C.moe_mlp_backward_workspace(R, E, D, F, threads))
    addresses = [ptr(grad) if grad.numel() else 0 for grad in grads]
    dy_TD, z_R2F = dy_TD.contiguous(), z_R2F.contiguous()
    _C.moe_mlp_backward(ptr(dy_TD), *map(ptr, inputs), ptr(z_R2F), *addresses, *sizes, *codes, ptr(memory), threads)
    return *grads, x_TD.new_empty(0), x_TD.new_empty(0)


def _sizes(x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj):
    return *dst_row_TK.shape, src_row_R.shape[0], offsets.shape[0] - 1, x_TD.shape[1], down_proj.shape[2]
