from __future__ import annotations

from collections.abc import Iterable

import torch


def grad_norm(params: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together, a scalar tensor. Pass min(1, clip / norm) to AdamW.step as grad_scale."""
    return torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
