"""What gating means, in plain torch."""

import torch


def topk_gate(logits_TE, bias_E, k, score, renormalize, num_groups, top_groups, group_score, scale):
    z_TE = (logits_TE if logits_TE.dtype == torch.float64 else logits_TE.float()).contiguous()
    bad_T = (z_TE.isnan() | z_TE.isposinf()).any(1) | z_TE.isneginf().all(1)
    if z_TE.device.type == "cpu" and bad_T.any():
        token = int(bad_T.nonzero()[0, 0])
        raise ValueError(f"fastmoe.topk_gate: logits_TE must be free of NaN and +inf, got one at token {token}")
    if bias_E is not None and bias_E.device.type == "cpu" and not bias_E.isfinite().all():
        raise ValueError("fastmoe.topk_gate: bias_E must be finite, got NaN or infinity")
    T, E = z_TE.shape
    probs_TE = torch.softmax(z_TE, 1) if score == "softmax" else torch.sigmoid(z_TE)
    rank_TE = z_TE if bias_E is None else probs_TE + bias_E
    if num_groups == 1:
        ids_TK = _best(rank_TE, k)
    else:
        each = E // num_groups
        # scores, not logits, are added up; logits order groups by their best where scores round to the same number
        score_TE = probs_TE if group_score == "top2" and bias_E is None else rank_TE
        score_TGE = score_TE.view(T, num_groups, each)
        score_TG = score_TGE.amax(2) if group_score == "max" else score_TGE.topk(2, dim=2).values.sum(2)
        first_TG = _best(score_TG, top_groups).sort(1).values * each
        # a shortlist, not a fill of the others: -inf may stand inside a group that is kept, and score + bias below 0
        ids_TE = (first_TG[:, :, None] + torch.arange(each, device=z_TE.device)).view(T, top_groups * each)
        ids_TK = ids_TE.gather(1, _best(rank_TE.gather(1, ids_TE), k))
    weights_TK = probs_TE.gather(1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-20)
    ids_TK = ids_TK.masked_fill(bad_T[:, None], -1)
    load_E = torch.zeros(E, dtype=torch.int64, device=z_TE.device)
    load_E.scatter_add_(0, ids_TK.clamp(min=0).view(-1), (ids_TK >= 0).long().view(-1))
    nan_T = torch.where(bad_T, torch.nan, 0.0)[:, None].to(z_TE.dtype)  # GPU only: the CPU has raised
    return weights_TK * scale + nan_T, ids_TK, probs_TE + nan_T, load_E


def _best(value_TE, count):
    """Where the largest of each row stand, the lower index first among equals."""
    return torch.sort(value_TE, dim=1, descending=True, stable=True).indices[:, :count]


def topk_gate_backward(dweights_TK, dprobs_TE, topk_ids_TK, probs_TE, score, renormalize, scale):
    dweights_TK, dprobs_TE, probs_TE = (
        dweights_TK.to(probs_TE.dtype) * scale,
        dprobs_TE.to(probs_TE.dtype),
        probs_TE.contiguous(),
    )
    ids_TK = topk_ids_TK.clamp(min=0)
    if renormalize:
        p_TK = probs_TE.gather(1, ids_TK)
        total_T1 = p_TK.sum(1, keepdim=True) + 1e-20
        dweights_TK = (dweights_TK - (dweights_TK * p_TK).sum(1, keepdim=True) / total_T1) / total_T1
    dprobs_TE = dprobs_TE.scatter_add(1, ids_TK, dweights_TK)
    if score == "softmax":
        return probs_TE * (dprobs_TE - (dprobs_TE * probs_TE).sum(1, keepdim=True))
    return dprobs_TE * probs_TE * (1 - probs_TE)
