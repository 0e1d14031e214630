"""What linear_cross_entropy means, in plain torch, 1024 tokens at a time."""

import torch


def linear_cross_entropy(x_TD, weight_VD, targets_T, ignore_index, need_x, need_weight):
    wide = torch.float64 if x_TD.dtype == torch.float64 else torch.float32
    V = weight_VD.shape[0]
    counts_T = targets_T != ignore_index
    outside_T = counts_T & ((targets_T < 0) | (targets_T >= V))
    if x_TD.device.type == "cpu" and outside_T.any():
        raise ValueError(
            f"fastmoe.linear_cross_entropy: targets_T must be in 0..{V - 1} or {ignore_index}, "
            f"got {int(targets_T[outside_T][0])}"
        )
    loss = torch.where(outside_T.any(), torch.nan, 0.0).to(wide)
    dx_TD = x_TD.new_empty(x_TD.shape, dtype=wide) if need_x else x_TD.new_empty(0, dtype=wide)
    dweight_VD = weight_VD.new_zeros(weight_VD.shape, dtype=wide) if need_weight else x_TD.new_empty(0, dtype=wide)
    weight = weight_VD.to(wide)
    for x, counts, targets, t in zip(
        x_TD.split(1024), counts_T.split(1024), targets_T.split(1024), range(0, x_TD.shape[0], 1024)
    ):
        target_T1 = targets.clamp(0, V - 1).long()[:, None]
        logprobs_TV = torch.log_softmax(x.to(wide) @ weight.t(), 1)
        loss = loss - (logprobs_TV.gather(1, target_T1)[:, 0] * counts).sum()
        if need_x or need_weight:
            dlogits_TV = (
                logprobs_TV.exp().scatter_add(1, target_T1, torch.full_like(target_T1, -1, dtype=wide))
                * counts[:, None]
            )
            if need_x:
                dx_TD[t : t + 1024] = dlogits_TV @ weight
            if need_weight:
                dweight_VD += dlogits_TV.t() @ x.to(wide)
    return loss, dx_TD, dweight_VD
