from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn.functional import gelu, relu, silu

from fastmoe import native, ops
from fastmoe.ops import check
from fastmoe.ops.experts import ACTIVATIONS, GATED, SAVES

_FUNCTIONS = {
    "swiglu": silu,
    "geglu": gelu,
    "geglu_tanh": partial(gelu, approximate="tanh"),
    "gelu": gelu,
    "gelu_tanh": partial(gelu, approximate="tanh"),
    "relu": relu,
    "relu2": lambda z: relu(z).square(),
}


def activate(z: torch.Tensor, activation: str, alpha: float = 1.702, limit: float = 7.0) -> torch.Tensor:
    """The activation of fastmoe.ops.moe_mlp on a pre-activation [..., 2F], gate first ([..., F] for kinds without)."""
    if activation not in GATED:
        return _FUNCTIONS[activation](z)
    gate, up = z.chunk(2, dim=-1)
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1)
    return _FUNCTIONS[activation](gate) * up


class _Projections(nn.Module):
    """gate_up_proj [*, 2F, D] ([*, F, D] without a gate), down_proj [*, D, F], and their biases or None."""

    def __init__(self, stack, d_model, d_ff, init_std, out_std, activation, bias):
        super().__init__()
        check.option(type(self).__name__, "activation", activation, ACTIVATIONS)
        self.activation, z = activation, 2 * d_ff if activation in GATED else d_ff
        gate_up, down = (native.huge_pages(torch.empty(*stack, *size)) for size in ((z, d_model), (d_model, d_ff)))
        self.gate_up_proj = nn.Parameter(gate_up.normal_(std=init_std))
        self.down_proj = nn.Parameter(down.normal_(std=out_std or init_std))
        self.gate_up_bias = nn.Parameter(torch.zeros(*stack, z)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(*stack, d_model)) if bias else None


class Experts(_Projections):
    """E experts as stacked weights, computed by one op.

    gate_up_proj: [E, 2F, D], or [E, F, D] for an activation without a gate. down_proj: [E, D, F]. bias: gate_up_bias
    [E, 2F or F] and down_bias [E, D], 0 at first. activation, save: as in fastmoe.ops.moe_mlp.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        init_std: float = 0.02,
        out_std: float | None = None,
        activation: str = "swiglu",
        bias: bool = False,
        save: str = "z",
    ):
        super().__init__((num_experts,), d_model, d_ff, init_std, out_std, activation, bias)
        check.option("Experts", "save", save, SAVES)
        self.save = save

    def forward(
        self,
        x_TD: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        routing: ops.Routing | None = None,
    ) -> torch.Tensor:
        return ops.moe_mlp(
            x_TD,
            topk_ids_TK,
            topk_weights_TK,
            self.gate_up_proj,
            self.down_proj,
            self.activation,
            routing=routing,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            save=self.save,
        )


class FeedForward(_Projections):
    """A dense feed-forward of width d_ff: leading dense layers and shared experts. As one of Experts, without E."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        init_std: float = 0.02,
        out_std: float | None = None,
        activation: str = "swiglu",
        bias: bool = False,
    ):
        super().__init__((), d_model, d_ff, init_std, out_std, activation, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = ops.linear(x, self.gate_up_proj, self.gate_up_bias)
        return ops.linear(activate(z, self.activation), self.down_proj, self.down_bias)
