"""What the expert layer means, in plain torch: experts padded to the longest, then batched products. No loop over
experts.
"""

import torch
from torch.nn.functional import silu

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


def moe_mlp(x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj, activation, save_z):
    E, R = gate_up_proj.shape[0], src_row_R.shape[0]
    slots = _slots(src_row_R, offsets)
    x_ECD = _pad(permute(x_TD, src_row_R, dst_row_TK), slots, E)
    z_EC2F = x_ECD @ gate_up_proj.transpose(1, 2)
    gate_ECF, up_ECF = z_EC2F.chunk(2, dim=2)
    y_ECD = (silu(gate_ECF) * up_ECF) @ down_proj.transpose(1, 2)
    y_TD = unpermute(_unpad(y_ECD, slots, R), src_row_R, dst_row_TK, weights_TK)
    return y_TD, _unpad(z_EC2F, slots, R) if save_z else x_TD.new_empty(0, gate_up_proj.shape[1])


def moe_mlp_backward(
    dy_TD,
    x_TD,
    weights_TK,
    src_row_R,
    dst_row_TK,
    offsets,
    gate_up_proj,
    down_proj,
    z_R2F,
    activation,
    need_x,
    need_weights,
    need_gate_up,
    need_down,
):
    E, R = gate_up_proj.shape[0], src_row_R.shape[0]
    slots = _slots(src_row_R, offsets)
    z_EC2F = _pad(z_R2F, slots, E)
    gate_ECF, up_ECF = z_EC2F.chunk(2, dim=2)
    sigmoid_ECF = torch.sigmoid(gate_ECF)
    act_ECF = gate_ECF * sigmoid_ECF * up_ECF
    none = x_TD.new_empty(0)
    dweights_TK, ddown, dgate_up, dx_TD = weights_TK.new_empty(0), none, none, none
    y_RD = _unpad(act_ECF @ down_proj.transpose(1, 2), slots, R)
    dy_RD, dweights = unpermute_backward(dy_TD, y_RD, src_row_R, dst_row_TK, weights_TK)
    if need_weights:
        dweights_TK = dweights
    dy_ECD = _pad(dy_RD, slots, E)
    if need_down:
        ddown = dy_ECD.transpose(1, 2) @ act_ECF
    if need_x or need_gate_up:
        dact_ECF = dy_ECD @ down_proj
        dgate_ECF = dact_ECF * up_ECF * sigmoid_ECF * (1 + gate_ECF * (1 - sigmoid_ECF))
        dz_EC2F = torch.cat([dgate_ECF, dact_ECF * gate_ECF * sigmoid_ECF], dim=2)
        if need_gate_up:
            dgate_up = dz_EC2F.transpose(1, 2) @ _pad(permute(x_TD, src_row_R, dst_row_TK), slots, E)
        if need_x:
            dx_TD = unpermute(_unpad(dz_EC2F @ gate_up_proj, slots, R), src_row_R, dst_row_TK, None)
    return dx_TD, dweights_TK, dgate_up, ddown
