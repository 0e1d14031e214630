"""What permutation means, in plain torch."""

import torch


def build_routing(topk_ids_TK, num_experts, capacity):
    T, K = topk_ids_TK.shape
    ids_TK = topk_ids_TK.long()
    outside_TK = (ids_TK < -1) | (ids_TK >= num_experts)
    if ids_TK.device.type == "cpu" and outside_TK.any():
        raise ValueError(
            f"fastmoe.build_routing: topk_ids_TK must be in -1..{num_experts - 1}, got {int(ids_TK[outside_TK][0])}"
        )
    ids_TK = ids_TK.masked_fill(outside_TK | (ids_TK < 0), num_experts)  # dropped slots sort last
    if capacity >= 0:
        by_choice_KT = _rank_in_expert(ids_TK.t().reshape(-1), num_experts).view(K, T)
        ids_TK = ids_TK.masked_fill(by_choice_KT.t() >= capacity, num_experts)
    flat_R = ids_TK.reshape(-1)
    order_R = torch.sort(flat_R, stable=True).indices
    counts_E = torch.bincount(flat_R, minlength=num_experts + 1)[:num_experts]
    offsets = torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)])
    row_R = torch.arange(T * K, device=flat_R.device)
    used_R = row_R < offsets[-1]
    src_row_R = torch.where(used_R, order_R, -1)
    dst_row_R = torch.empty_like(row_R).scatter_(0, order_R, torch.where(used_R, row_R, -1))
    return src_row_R.int(), dst_row_R.view(T, K).int(), offsets.int()


def _rank_in_expert(ids, num_experts):
    """How many earlier entries name the same expert: ids [1, 0, 1] -> [0, 0, 1]."""
    order = torch.sort(ids, stable=True).indices
    counts = torch.bincount(ids, minlength=num_experts + 1)
    start = counts.cumsum(0) - counts
    return torch.empty_like(ids).scatter_(0, order, torch.arange(ids.numel(), device=ids.device) - start[ids[order]])


def build_routing_from_experts(token_R, offsets, num_tokens):
    R, E = token_R.shape[0], offsets.shape[0] - 1
    token_R, offsets = token_R.long(), offsets.long()
    row_R = torch.arange(R, device=token_R.device)
    expert_R = torch.searchsorted(offsets, row_R, right=True) - 1
    if token_R.device.type == "cpu":
        ascending = bool((offsets.diff() >= 0).all()) and int(offsets[0]) == 0 and int(offsets[-1]) == R
        if not ascending:
            raise ValueError(
                f"fastmoe.build_routing_from_experts: offsets must ascend from 0 to R = {R}, got {offsets.tolist()[:8]}"
            )
        if R and not bool(((token_R >= 0) & (token_R < num_tokens)).all()):
            raise ValueError(
                f"fastmoe.build_routing_from_experts: token_R must be in 0..{num_tokens - 1}, "
                f"got {int(token_R.min())}..{int(token_R.max())}"
            )
        if bool(((token_R.diff() <= 0) & (expert_R.diff() == 0)).any()):
            raise ValueError(
                "fastmoe.build_routing_from_experts: token_R must ascend inside each expert, got a step back"
            )
    src_row_R = token_R * E + expert_R
    dst_row = torch.full((num_tokens * E,), -1, device=token_R.device, dtype=torch.int64).scatter_(0, src_row_R, row_R)
    return src_row_R.int(), dst_row.view(num_tokens, E).int(), offsets.int()


def permute(x_TD, src_row_R, dst_row_TK):
    padding_R1 = (src_row_R < 0)[:, None]
    token_R = src_row_R.clamp(min=0).long() // dst_row_TK.shape[1]
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(src_row_R.shape[0], x_TD.shape[1])
    return x_TD[token_R].masked_fill(padding_R1, 0)


def unpermute(y_RD, src_row_R, dst_row_TK, weights_TK):
    T, K = dst_row_TK.shape
    D = y_RD.shape[1]
    if y_RD.shape[0] == 0:
        return y_RD.new_zeros(T, D)
    rows_TKD = y_RD[dst_row_TK.clamp(min=0).long()].masked_fill((dst_row_TK < 0)[..., None], 0)
    if weights_TK is not None:
        rows_TKD = rows_TKD * weights_TK.masked_fill(dst_row_TK < 0, 0)[..., None]
    return rows_TKD.sum(1).to(y_RD.dtype)


def unpermute_backward(dout_TD, y_RD, src_row_R, dst_row_TK, weights_TK):
    T, K = dst_row_TK.shape
    if y_RD.shape[0] == 0:
        return torch.zeros_like(y_RD), torch.zeros_like(weights_TK)
    dropped_TK = dst_row_TK < 0
    weight_R = weights_TK.reshape(-1)[src_row_R.clamp(min=0).long()]
    dy_RD = permute(dout_TD, src_row_R, dst_row_TK) * weight_R.masked_fill(src_row_R < 0, 0)[:, None]
    rows_TKD = y_RD[dst_row_TK.clamp(min=0).long()]
    dweights_TK = (rows_TKD * dout_TD[:, None]).sum(-1).masked_fill(dropped_TK, 0)
    return dy_RD.to(y_RD.dtype), dweights_TK.to(weights_TK.dtype)
