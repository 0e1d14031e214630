"""C++ on the CPU: csrc/cpu/experts.cpp."""

from __future__ import annotations

import torch

from fastmoe.native import _C, dtype_code, empty, num_threads, ptr, workspace
from fastmoe.ops.experts import ACTIVATIONS, z_shape

_SAVES = ("none", "z", "z8", "x")  # fm_save


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
    inputs = _dense(x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj, gate_up_bias, down_bias)
    layer = _layer(inputs, activation, interleaved, transposed, alpha, limit, save)
    z, scale = z_shape(src_row_R.shape[0], down_proj.shape[1 if transposed else 2], activation, save)
    y_TD = empty(*x_TD.shape, dtype=x_TD.dtype)
    z_RZ = empty(*z, dtype=torch.int8 if save == "z8" else x_TD.dtype)
    z_scale = empty(*scale, dtype=torch.bfloat16)
    memory = workspace(_C.moe_mlp_workspace(layer))
    _C.moe_mlp(layer, *map(ptr, inputs), ptr(y_TD), ptr(z_RZ), ptr(z_scale), ptr(memory))
    return y_TD, z_RZ, z_scale


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
    z_RZ,
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
    dy_TD, z_RZ, z_scale = _dense(dy_TD, z_RZ, z_scale)
    inputs = _dense(x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj, gate_up_bias, down_bias)
    layer = _layer(inputs, activation, interleaved, transposed, alpha, limit, save)
    experts = int((offsets[1:] > offsets[:-1]).sum()) if sparse_grads else down_proj.shape[0]
    outputs = (
        (x_TD, x_TD.shape, need_x),
        (weights_TK, weights_TK.shape, need_weights),
        (x_TD, (experts, *gate_up_proj.shape[1:]), need_gate_up),
        (x_TD, (experts, *down_proj.shape[1:]), need_down),
        (x_TD, () if gate_up_bias is None else gate_up_bias.shape, need_gate_up_bias),
        (x_TD, () if down_bias is None else down_bias.shape, need_down_bias),
    )
    grads = tuple(empty(*(shape if need else (0,)), dtype=like.dtype) for like, shape, need in outputs)
    memory = workspace(_C.moe_mlp_backward_workspace(layer))
    addresses = [ptr(grad) if need else 0 for grad, (_, _, need) in zip(grads, outputs)]
    kept = ptr(z_RZ), ptr(z_scale)
    _C.moe_mlp_backward(layer, ptr(dy_TD), *map(ptr, inputs), *kept, sparse_grads, *addresses, ptr(memory))
    return grads


def _dense(*tensors):
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _layer(inputs, activation, interleaved, transposed, alpha, limit, save):
    """fm_moe_layer of fastmoe/experts.h, as python/experts.cpp takes it."""
    x_TD, weights_TK, src_row_R, dst_row_TK, offsets, _, down_proj, *_ = inputs
    D, F = down_proj.shape[1:][:: -1 if transposed else 1]
    sizes = (*dst_row_TK.shape, src_row_R.shape[0], offsets.shape[0] - 1, D, F)
    codes = dtype_code(x_TD), dtype_code(weights_TK), ACTIVATIONS.index(activation)
    return sizes, *codes, interleaved, transposed, alpha, limit, _SAVES.index(save), num_threads()
