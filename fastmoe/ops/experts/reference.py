"""What the expert layer means, in plain torch: experts padded to the longest, then batched products. No loop over
experts.
"""

import math

import torch
from torch.nn.functional import gelu, relu

from fastmoe.ops.experts import PLAIN, Z8_BLOCK, z_shape
from fastmoe.ops.permutation.reference import permute, unpermute, unpermute_backward


def _slots(src_row_R, offsets):
    """(expert, place inside it, longest expert) of every used row; padding rows are left out."""
    used = int(offsets[-1])
    row = torch.arange(used, device=offsets.device)
    expert = torch.searchsorted(offsets[1:].contiguous(), row.to(offsets.dtype), right=True)
    return expert, row - offsets[expert].long(), int(offsets.diff().max()) if used else 0


def _pad(rows_RN, slots, num_experts):
    """[R, N] -> [E, longest, N], zero where an expert has fewer rows."""
    expert, place, longest = slots
    out_ECN = rows_RN.new_zeros(num_experts, longest, rows_RN.shape[1])
    out_ECN[expert, place] = rows_RN[: expert.numel()]
    return out_ECN


def _unpad(rows_ECN, slots, R):
    expert, place, _ = slots
    out_RN = rows_ECN.new_zeros(R, rows_ECN.shape[2])
    out_RN[: expert.numel()] = rows_ECN[expert, place]
    return out_RN


def _split(z, activation, interleaved):
    """gate and up of a pre-activation [..., 2F]; without a gate, None and z."""
    if activation in PLAIN:
        return None, z
    return (z[..., 0::2], z[..., 1::2]) if interleaved else z.chunk(2, dim=-1)


def _join(dgate, dup, interleaved):
    if dgate is None:
        return dup
    return torch.stack([dgate, dup], dim=-1).flatten(-2) if interleaved else torch.cat([dgate, dup], dim=-1)


def _gelu_slope(x, tanh):
    if not tanh:
        return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * torch.exp(-0.5 * x * x) * (0.5 / math.pi) ** 0.5
    scale = (2 / math.pi) ** 0.5
    t = torch.tanh(scale * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * scale * (1 + 3 * 0.044715 * x * x)


def activate(gate, up, activation, alpha, limit):
    """The activation; gate is None for the kinds without one."""
    if activation == "swiglu":
        return gate * torch.sigmoid(gate) * up
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    if activation in ("geglu", "geglu_tanh"):
        return gelu(gate, approximate="tanh" if activation == "geglu_tanh" else "none") * up
    if activation in ("gelu", "gelu_tanh"):
        return gelu(up, approximate="tanh" if activation == "gelu_tanh" else "none")
    return relu(up) if activation == "relu" else relu(up) * relu(up)


def activate_backward(dact, gate, up, activation, alpha, limit):
    """(dgate, dup); dgate is None for the kinds without a gate."""
    tanh = activation.endswith("tanh")
    if activation == "swiglu":
        s = torch.sigmoid(gate)
        return dact * up * s * (1 + gate * (1 - s)), dact * gate * s
    if activation == "clamped_swiglu":
        g, u = gate.clamp(max=limit), up.clamp(-limit, limit)
        s = torch.sigmoid(alpha * g)
        dgate = dact * (u + 1) * s * (1 + alpha * g * (1 - s))
        return torch.where(gate <= limit, dgate, 0), torch.where(up.abs() <= limit, dact * g * s, 0)
    if activation in ("geglu", "geglu_tanh"):
        return dact * up * _gelu_slope(gate, tanh), dact * gelu(gate, approximate="tanh" if tanh else "none")
    if activation in ("gelu", "gelu_tanh"):
        return None, dact * _gelu_slope(up, tanh)
    return None, torch.where(up > 0, dact, 0) if activation == "relu" else dact * 2 * relu(up)


def quantize(z_RZ, activation, interleaved):
    """(int8 [R, Z], bfloat16 scales [R, halves * ceil(F / 64)]): each 64 columns of gate, then of up, over their
    largest magnitude / 127, rounded to nearest.
    """
    halves = [half for half in _split(z_RZ, activation, interleaved) if half is not None]
    quantized, scales = [], []
    for half_RF in halves:
        R, F = half_RF.shape
        blocks = torch.nn.functional.pad(half_RF.float(), (0, -F % Z8_BLOCK)).view(R, -(-F // Z8_BLOCK), Z8_BLOCK)
        scale = (blocks.abs().amax(2) * (1 / 127)).bfloat16()
        step = scale.float()[:, :, None]
        ratio = torch.where(step > 0, blocks / step, 0)
        quantized.append(ratio.round().clamp(-127, 127).to(torch.int8).flatten(1)[:, :F])
        scales.append(scale)
    joined = quantized[0] if len(halves) == 1 else _join(*quantized, interleaved)
    return joined.contiguous(), torch.cat(scales, 1)


def dequantize(q_RZ, scales, activation, interleaved, dtype):
    halves = [half for half in _split(q_RZ, activation, interleaved) if half is not None]
    F = halves[0].shape[1]
    parts = [
        (half.float() * scale.float().repeat_interleave(Z8_BLOCK, 1)[:, :F]).to(dtype)
        for half, scale in zip(halves, scales.chunk(len(halves), 1))
    ]
    return parts[0] if len(parts) == 1 else _join(*parts, interleaved)


def _bias(bias, like):
    return 0 if bias is None else bias.to(like.dtype)[:, None]


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
    E, R = gate_up_proj.shape[0], src_row_R.shape[0]
    if not transposed:
        gate_up_proj, down_proj = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    slots = _slots(src_row_R, offsets)
    x_ECD = _pad(permute(x_TD, src_row_R, dst_row_TK), slots, E)
    z_ECZ = x_ECD @ gate_up_proj + _bias(gate_up_bias, x_TD)
    act_ECF = activate(*_split(z_ECZ, activation, interleaved), activation, alpha, limit)
    y_ECD = act_ECF @ down_proj + _bias(down_bias, x_TD)
    y_TD = unpermute(_unpad(y_ECD, slots, R), src_row_R, dst_row_TK, weights_TK)
    z_RZ, scale = (
        x_TD.new_empty(0, z_ECZ.shape[2]),
        x_TD.new_empty(z_shape(0, act_ECF.shape[2], activation, "none")[1], dtype=torch.bfloat16),
    )
    if save in ("z", "z8"):
        z_RZ = _unpad(z_ECZ, slots, R)
    if save == "z8":
        z_RZ, scale = quantize(z_RZ, activation, interleaved)
    return y_TD, z_RZ, scale


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
    E, R = gate_up_proj.shape[0], src_row_R.shape[0]
    if not transposed:
        gate_up_proj, down_proj = gate_up_proj.transpose(1, 2), down_proj.transpose(1, 2)
    slots = _slots(src_row_R, offsets)
    x_ECD = _pad(permute(x_TD, src_row_R, dst_row_TK), slots, E)
    if save == "z8":
        z_RZ = dequantize(z_RZ, z_scale, activation, interleaved, x_TD.dtype)
    elif save == "x":
        z_RZ = _unpad(x_ECD @ gate_up_proj + _bias(gate_up_bias, x_TD), slots, R)
    z_ECZ = _pad(z_RZ, slots, E)
    gate_ECF, up_ECF = _split(z_ECZ, activation, interleaved)
    act_ECF = activate(gate_ECF, up_ECF, activation, alpha, limit)
    dweights_TK = weights_TK.new_empty(0)
    ddown, dgate_up, dx_TD, dgate_up_bias, ddown_bias = (x_TD.new_empty(0) for _ in range(5))
    y_RD = _unpad(act_ECF @ down_proj + _bias(down_bias, x_TD), slots, R)
    dy_RD, dweights = unpermute_backward(dy_TD, y_RD, src_row_R, dst_row_TK, weights_TK)
    if need_weights:
        dweights_TK = dweights
    dy_ECD = _pad(dy_RD, slots, E)
    if need_down:
        ddown = act_ECF.transpose(1, 2) @ dy_ECD
    if need_down_bias:
        ddown_bias = dy_ECD.sum(1)
    if need_x or need_gate_up or need_gate_up_bias:
        dact_ECF = dy_ECD @ down_proj.transpose(1, 2)
        dz_ECZ = _join(*activate_backward(dact_ECF, gate_ECF, up_ECF, activation, alpha, limit), interleaved)
        dz_ECZ = _pad(
            _unpad(dz_ECZ, slots, R), slots, E
        )  # zero again where an expert has fewer rows: biases reach there
        if need_gate_up:
            dgate_up = x_ECD.transpose(1, 2) @ dz_ECZ
        if need_gate_up_bias:
            dgate_up_bias = dz_ECZ.sum(1)
        if need_x:
            dx_TD = unpermute(_unpad(dz_ECZ @ gate_up_proj.transpose(1, 2), slots, R), src_row_R, dst_row_TK, None)
    finish = lambda grad: _touched(grad if transposed else grad.transpose(1, 2), offsets, sparse_grads)  # noqa: E731
    dgate_up, ddown = finish(dgate_up) if need_gate_up else dgate_up, finish(ddown) if need_down else ddown
    return dx_TD, dweights_TK, dgate_up, ddown, dgate_up_bias, ddown_bias


def _touched(grad, offsets, sparse):
    return (grad[offsets[1:] > offsets[:-1]] if sparse else grad).contiguous()
