from __future__ import annotations

import torch
from torch import nn

from fastmoe import ops


class RMSNorm(nn.Module):
    """fastmoe.ops.rms_norm with its weight [D]."""

    def __init__(self, d_model: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm of x + residual, and x + residual: fastmoe.ops.add_rms_norm."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)
