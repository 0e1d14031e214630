from __future__ import annotations

import torch
from torch import nn

from fastmoe import ops


class Experts(nn.Module):
    """E SwiGLU experts as two stacked weights, gate_up_proj [E, 2F, D] and down_proj [E, D, F], computed by one op."""

    def __init__(self, d_model: int, d_ff: int, num_experts: int, init_std: float = 0.02, out_std: float | None = None):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * d_ff, d_model).normal_(std=init_std))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, d_ff).normal_(std=out_std or init_std))

    def forward(
        self,
        x_TD: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        routing: ops.Routing | None = None,
    ) -> torch.Tensor:
        return ops.moe_mlp(x_TD, topk_ids_TK, topk_weights_TK, self.gate_up_proj, self.down_proj, routing=routing)


class FeedForward(nn.Module):
    """A dense SwiGLU of width d_ff: leading dense layers and shared experts."""

    def __init__(self, d_model: int, d_ff: int, init_std: float = 0.02, out_std: float | None = None):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(2 * d_ff, d_model).normal_(std=init_std))
        self.down_proj = nn.Parameter(torch.empty(d_model, d_ff).normal_(std=out_std or init_std))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = nn.functional.linear(x, self.gate_up_proj).chunk(2, dim=-1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.down_proj)
