"""What gating means, in plain torch."""

import torch


def topk_gate(logits_TE, k, score, renormalize):
    z_TE = (logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()).contiguous()
    bad_T = (z_TE.isnan() | z_TE.isposinf()).any(1) | z_TE.isneginf().all(1)
    if z_TE.device.type == "cpu" and bad_T.any():
        token = int(bad_T.nonzero()[0, 0])
        raise ValueError(f"fastmoe.topk_gate: logits_TE must be free of NaN and +inf, got one at token {token}")
    ids_TK = torch.sort(z_TE, dim=1, descending=True, stable=True).indices[:, :k]
    probs_TE = torch.softmax(z_TE, 1) if score == "softmax" else torch.sigmoid(z_TE)
    weights_TK = probs_TE.gather(1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    nan_T = torch.where(bad_T, torch.nan, 0.0)[:, None].to(z_TE.dtype)  # GPU only: the CPU has raised
    return weights_TK + nan_T, ids_TK.masked_fill(bad_T[:, None], -1), probs_TE + nan_T


def topk_gate_backward(dweights_TK, dprobs_TE, topk_ids_TK, probs_TE, score, renormalize):
    dweights_TK, dprobs_TE, probs_TE = (
        dweights_TK.to(probs_TE.dtype),
        dprobs_TE.to(probs_TE.dtype),
        probs_TE.contiguous(),
    )
    ids_TK = topk_ids_TK.clamp(min=0)
    if renormalize:
        p_TK = probs_TE.gather(1, ids_TK)
        total_T1 = p_TK.sum(1, keepdim=True)
        dweights_TK = (dweights_TK - (dweights_TK * p_TK).sum(1, keepdim=True) / total_T1) / total_T1
    dprobs_TE = dprobs_TE.scatter_add(1, ids_TK, dweights_TK)
    if score == "softmax":
        return probs_TE * (dprobs_TE - (dprobs_TE * probs_TE).sum(1, keepdim=True))
    return dprobs_TE * probs_TE * (1 - probs_TE)
