"""Router losses. Functions of the routing's tensors; nothing is stored. Counts and probabilities are of this
micro-batch.
"""

from __future__ import annotations

import torch


def load_balancing_loss(probs_TE: torch.Tensor, load_E: torch.Tensor) -> torch.Tensor:
    """E * sum_e f_e P_e: f_e the share of all assignments that went to expert e, P_e the mean probability. 1 when
    uniform.

    probs_TE: [T, E] float32. load_E: [E] integer counts. Gradient flows through P alone. Returns a scalar; 0 for T = 0.
    Source: Switch (Fedus et al., arXiv 2101.03961), f over assignments.
    """
    T, E = probs_TE.shape
    share_E = load_E.to(probs_TE.dtype) / load_E.sum().clamp(min=1)
    return E * (share_E * probs_TE.sum(0)).sum() / max(T, 1)


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """mean_t logsumexp(logits_t)^2, a scalar; 0 for T = 0. Source: ST-MoE (Zoph et al., arXiv 2202.08906)."""
    return torch.logsumexp(logits_TE, 1).square().sum() / max(logits_TE.shape[0], 1)
