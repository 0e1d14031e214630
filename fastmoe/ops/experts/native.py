"""C++ on the CPU: csrc/cpu/experts.cpp."""

from __future__ import annotations

import torch

from fastmoe.native import _C, dtype_code, empty, num_threads, ptr, workspace
from fastmoe.ops.experts import ACTIVATIONS, z_shape

_SAVES = ("none", "z", "z8", "x")  # fm_save


def _layer(
    x_TD, weights_TK, src_row_R, dst_row_TK, offsets, down_proj, activation, interleaved, transposed, alpha, limit, save
):
    D, F = down_proj.shape[1:][:: -1 if transposed else 1]
    sizes = (*dst_row_TK.shape, src_row_R.shape[0], offsets.shape[0] - 1, D, F)
    codes = dtype_code(x_TD), dtype_code(weights_TK), ACTIVATIONS.index(activation)
    return sizes, *codes, interleaved, transposed, alpha, limit, _SAVES.index(save), num_threads()


def moe_mlp(x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj, gate_up_bias, down_bias, *how):
    *how, _ = how
    activation, _, transposed, _, _, save = how
    inputs = (x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj, gate_up_bias, down_bias)
    inputs = [tensor if tensor is None else tensor.contiguous() for tensor in inputs]
    layer = _layer(*inputs[:5], down_proj, *how)
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
    *how,
):
    *how, need_x, need_weights, need_gate_up, need_down, need_gate_up_bias, need_down_bias, sparse = how
    inputs = (
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
    )
    inputs = [tensor if tensor is None else tensor.contiguous() for tensor in inputs]
    layer = _layer(*inputs[1:6], down_proj, *how)
    experts = int((offsets[1:] > offsets[:-1]).sum()) if sparse else down_proj.shape[0]
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
    _C.moe_mlp_backward(layer, *map(ptr, inputs), sparse, *addresses, ptr(memory))
    return grads
