from __future__ import annotations

from collections.abc import Iterable

import torch

from fastmoe.comm import Group


def grad_norm(
    params: Iterable[torch.Tensor], parts: Iterable[torch.Tensor] = (), group: Group | None = None
) -> torch.Tensor:
    """The 2-norm of all gradients together, a scalar tensor, float32 for gradients in 16 bits. Pass min(1, clip / norm)
    to an optimizer's step as grad_scale.

    parts: parameters of which every rank of the group has its own, while all have the same params.
    """
    if group is None or group.size == 1:
        return _norm([*params, *parts])
    norm, own = _norm(params), _norm(parts)
    return (norm.square() + group.all_reduce(own.square())).sqrt()


def _norm(params: Iterable[torch.Tensor]) -> torch.Tensor:
    grads = [p.grad for p in params if p.grad is not None]
    if any(grad.dtype in (torch.bfloat16, torch.float16) for grad in grads):
        grads = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    return torch.nn.utils.get_total_norm(grads)
