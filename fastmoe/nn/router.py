"""Router: tokens to experts and weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from fastmoe import ops


class RouterOutput(NamedTuple):
    topk_weights_TK: torch.Tensor  # float32
    topk_ids_TK: torch.Tensor  # int64
    probs_TE: torch.Tensor  # float32
    logits_TE: torch.Tensor  # float32


class Router(nn.Module):
    """A linear map to E logits in float32, then fastmoe.ops.topk_gate."""

    def __init__(self, d_model: int, num_experts: int, top_k: int, score: str = "softmax", renormalize: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model).normal_(std=d_model**-0.5))
        self.top_k, self.score, self.renormalize = top_k, score, renormalize

    def forward(self, x_TD: torch.Tensor) -> RouterOutput:
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = ops.linear(x_TD.float(), self.weight.float())
            return RouterOutput(*ops.topk_gate(logits_TE, self.top_k, self.score, self.renormalize), logits_TE)
