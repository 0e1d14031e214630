"""Router losses. Functions of the routing's tensors; nothing is stored. Every one is a scalar without its weight, and 0
for no tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastmoe.ops import check

if TYPE_CHECKING:
    from fastmoe.comm import Group


def load_balancing_loss(
    probs_TE: torch.Tensor, load_E: torch.Tensor, per: str = "assignment", group: Group | None = None
) -> torch.Tensor:
    """E * sum_e f_e P_e: f_e the share of the load that expert e has, P_e the mean probability. 1 when uniform.

    probs_TE: [T, E] float. load_E: [E] integer counts. per: "assignment" f sums to 1 (Switch, OLMoE); "token" f_e is a
    share of the tokens, so f sums to K and the loss is K when uniform (Mixtral, Qwen3). group: ranks whose loads are
    added up, so that f is of the global batch. With the counts of first choices alone it is GShard's, E^2 times its
    mean over experts. Gradient flows through P alone. Source: Fedus et al., arXiv 2101.03961; Lepikhin et al., arXiv
    2006.16668; Qiu et al., arXiv 2501.11873 (global batch).
    """
    T, E = probs_TE.shape
    load_E = load_E.to(probs_TE.dtype)
    tokens = probs_TE.new_full((), T)
    if group is not None and group.size > 1:
        summed = group.all_reduce(torch.cat([load_E, tokens.view(1)]))
        load_E, tokens = summed[:-1], summed[-1]
    whole = load_E.sum() if per == "assignment" else tokens
    return E * (load_E / whole.clamp(min=1) * probs_TE.sum(0)).sum() / max(T, 1)


def sequence_balance_loss(probs_TE: torch.Tensor, topk_ids_TK: torch.Tensor, num_sequences: int) -> torch.Tensor:
    """The mean over sequences of E * sum_e f_e P_e, both of one sequence: f_e its share of that sequence's slots.

    probs_TE: [T, E] scores; a token's are divided by their sum. topk_ids_TK: [T, K], -1 adds nothing. T is
    num_sequences rows of equal length. 1 when uniform. Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2.
    """
    (T, E), K, B = probs_TE.shape, topk_ids_TK.shape[1], num_sequences
    if T % max(B, 1) or (T and B < 1):
        check.fail("sequence_balance_loss", "num_sequences", f"a divisor of {T} (tokens)", B)
    S = T // max(B, 1)
    slots_BE = probs_TE.new_zeros(B, E)
    ids_BR = topk_ids_TK.reshape(B, S * K)
    slots_BE.scatter_add_(1, ids_BR.clamp(min=0), (ids_BR >= 0).to(slots_BE.dtype))
    shares_TE = probs_TE / (probs_TE.sum(1, keepdim=True) + 1e-20)
    return E * (slots_BE / max(S * K, 1) * shares_TE.view(B, S, E).sum(1) / max(S, 1)).sum() / max(B, 1)


def cv_squared(value_E: torch.Tensor) -> torch.Tensor:
    """The squared coefficient of variation, var / (mean^2 + 1e-10) with the unbiased variance; 0 for one expert.

    Source: Shazeer et al., arXiv 1701.06538, of the experts' importance (summed weights) and load.
    """
    if value_E.shape[0] == 1:
        return value_E.sum() * 0
    return value_E.var() / (value_E.mean().square() + 1e-10)


def importance(topk_weights_TK: torch.Tensor, topk_ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[E], the sum of each expert's weights over the batch; differentiable in them. A token's ids differ or are -1."""
    ids_TK = topk_ids_TK.masked_fill(topk_ids_TK < 0, num_experts)
    weights_TE = topk_weights_TK.new_zeros(ids_TK.shape[0], num_experts + 1).scatter(1, ids_TK, topk_weights_TK)
    return weights_TE[:, :num_experts].sum(0)


def smooth_load(
    clean_TE: torch.Tensor, noisy_TE: torch.Tensor, std_TE: torch.Tensor, topk_ids_TK: torch.Tensor
) -> torch.Tensor:
    """[E], the expected number of tokens of each expert if only its own noise were drawn again; differentiable.

    clean_TE, noisy_TE, std_TE: logits without and with noise, and the noise's standard deviation (broadcast).
    topk_ids_TK: the K best of noisy_TE. With K = E every expert has every token. Source: Shazeer et al., arXiv
    1701.06538, appendix A.
    """
    (T, E), K = noisy_TE.shape, topk_ids_TK.shape[1]
    if K == E:
        return noisy_TE.new_full((E,), float(T))
    ids_TK = topk_ids_TK.clamp(min=0)  # -1 stands for logits that are NaN, and so is the result
    chosen_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter(1, ids_TK, True)
    last_T1 = noisy_TE.gather(1, ids_TK[:, -1:])
    next_T1 = noisy_TE.masked_fill(chosen_TE, -torch.inf).amax(dim=1, keepdim=True)
    above_TE = (clean_TE - torch.where(chosen_TE, next_T1, last_T1)) / std_TE
    return torch.special.ndtr(above_TE).sum(dim=0)


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """mean_t logsumexp(logits_t)^2. Source: ST-MoE (Zoph et al., arXiv 2202.08906)."""
    return torch.logsumexp(logits_TE, 1).square().sum() / max(logits_TE.shape[0], 1)
