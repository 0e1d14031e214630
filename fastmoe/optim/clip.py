from __future__ import annotations

from collections.abc import Iterable

import torch


def grad_norm(params: Iterable[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all gradients together, a scalar tensor, float32 for gradients in 16 bits. Pass min(1, clip / norm)
    to an optimizer's step as grad_scale.
    """
    grads = [p.grad for p in params if p.grad is not None]
    if any(grad.dtype in (torch.bfloat16, torch.float16) for grad in grads):
        grads = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    return torch.nn.utils.get_total_norm(grads)
