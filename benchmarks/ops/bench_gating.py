"""topk_gate forward and backward.

Bytes: logits read and probabilities written, then the probabilities and their gradient read and the logits' written;
weights and ids written, weights' gradient and ids read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.ops.harness import Case, Outputs, with_grads
from fastmoe import ops

V3 = {"score": "sigmoid", "num_groups": 8, "top_groups": 4, "group_score": "top2", "scale": 2.5}


def composite(logits_TE: torch.Tensor, k: int) -> Outputs:
    probs_TE = torch.softmax(logits_TE, 1)
    weights_TK, ids_TK = probs_TE.topk(k, dim=1)
    return weights_TK / weights_TK.sum(1, keepdim=True), ids_TK, probs_TE


def composite_v3(logits_TE: torch.Tensor, k: int, bias_E: torch.Tensor) -> Outputs:
    """DeepSeek-V3's gate in torch, shut groups at -inf."""
    probs_TE = logits_TE.sigmoid()
    ids_TK = grouped(probs_TE.detach() + bias_E)[1].topk(k, dim=1).indices
    weights_TK = probs_TE.gather(1, ids_TK)
    return weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-20) * V3["scale"], ids_TK, probs_TE


def grouped(rank_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scores of the groups, and the ranks with -inf outside the best groups."""
    T, E = rank_TE.shape
    score_TG = rank_TE.view(T, V3["num_groups"], -1).topk(2, dim=2).values.sum(2)
    kept_TG = torch.zeros_like(score_TG).scatter_(1, score_TG.topk(V3["top_groups"], dim=1).indices, 1)
    shut_TE = (kept_TG == 0)[:, :, None].expand(-1, -1, E // V3["num_groups"]).reshape(T, E)
    return score_TG, rank_TE.masked_fill(shut_TE, -torch.inf)


def without_near_ties(logits_TE: torch.Tensor, k: int, bias_E: torch.Tensor) -> torch.Tensor:
    """The logits, with another token's where rounding a score could change what is chosen or its order."""
    score_TG, rank_TE = grouped(logits_TE.double().sigmoid() + bias_E)
    gap_TK = -rank_TE.topk(min(k + 1, rank_TE.shape[1]), dim=1).values.diff(dim=1)
    sorted_TG = score_TG.sort(1, descending=True).values
    clear_T = (gap_TK.amin(1) > 1e-6) & (-sorted_TG.diff(dim=1)[:, V3["top_groups"] - 1] > 1e-6)
    return torch.where(clear_T[:, None], logits_TE, logits_TE[int(clear_T.nonzero()[0])])


def case(logits_TE: torch.Tensor, K: int, name: str, gates: dict[str, Callable], peer: Callable, **tensors) -> Case:
    T, E = logits_TE.shape
    dweights_TK, dprobs_TE = torch.randn(T, K), torch.randn(T, E)

    def step(gate, dtype=torch.float32):
        others = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        differentiable = lambda logits: gate(logits, K, **others)[:3:2]
        return with_grads(differentiable, [logits_TE.to(dtype)], [dweights_TK.to(dtype), dprobs_TE.to(dtype)])

    return Case(
        f"forward + backward T{T} E{E} K{K}{name}",
        {arm: step(gate) for arm, gate in gates.items()},
        exact=step(peer, torch.float64),
        work=5 * 4 * T * E + 24 * T * K,
        roof="triad",
    )


def cases(quick: bool) -> Iterator[Case]:
    shapes = [(2048, 8, 2), (4096, 32, 2), (8192, 64, 8), (8192, 256, 8), (2048, 2048, 8)]
    for T, E, K in [(128, 16, 4)] if quick else shapes:
        gates = {"fastmoe": ops.topk_gate, "torch softmax, topk": composite}
        yield case(torch.randn(T, E), K, "", gates, composite)
    T, E, K = (128, 16, 4) if quick else (8192, 256, 8)
    bias_E = torch.randn(E) / 8
    logits_TE = without_near_ties(torch.randn(T, E), K, bias_E)
    gates = {"fastmoe": partial(ops.topk_gate, **V3), "torch sigmoid, groups, topk": composite_v3}
    yield case(logits_TE, K, " DeepSeek-V3", gates, composite_v3, bias_E=bias_E)
