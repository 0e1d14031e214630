"""The MoE layer: router, routing, experts, losses."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn

from fastmoe import ops
from fastmoe.nn import losses
from fastmoe.nn.experts import Experts, FeedForward
from fastmoe.nn.router import Router
from fastmoe.ops import check
from fastmoe.ops.gating import SCORES


class MoEOutput(NamedTuple):
    y: torch.Tensor  # as x
    aux_loss: torch.Tensor  # scalar, weighted load-balancing + z loss
    load_E: torch.Tensor  # [E] int64, slots that chose each expert, before capacity
    dropped: torch.Tensor  # scalar int64, slots past the capacity
    nan_tokens: torch.Tensor  # scalar int64, tokens whose logits were NaN (a GPU sets this flag, the CPU raises)


class MoE(nn.Module):
    """A drop-in feed-forward: `y = MoE(d_model=512, d_ff=1024, num_experts=32, top_k=2)(x).y` for x [..., D].

    num_shared_experts: experts that see every token, added to the routed sum. capacity_factor: None keeps every row;
    else an expert keeps ceil(factor * T * K / E) rows, first choices first. activation, bias: of the routed and the
    shared experts. save: what the routed experts keep for backward. All three as in Experts.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        top_k: int,
        *,
        num_shared_experts: int = 0,
        capacity_factor: float | None = None,
        score: str = "softmax",
        renormalize: bool = True,
        activation: str = "swiglu",
        bias: bool = False,
        save: str = "z",
        aux_loss_weight: float = 0.01,
        z_loss_weight: float = 1e-3,
        init_std: float = 0.02,
        out_std: float | None = None,
    ):
        super().__init__()
        check.positive("MoE", d_model=d_model, d_ff=d_ff, num_experts=num_experts, top_k=top_k)
        if top_k > num_experts:
            raise ValueError(f"fastmoe.MoE: top_k must be in 1..{num_experts} (num_experts), got {top_k}")
        if num_shared_experts < 0:
            raise ValueError(f"fastmoe.MoE: num_shared_experts must be at least 0, got {num_shared_experts}")
        check.option("MoE", "score", score, SCORES)
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"fastmoe.MoE: capacity_factor must be None or positive, got {capacity_factor}")
        self.router = Router(d_model, num_experts, top_k, score, renormalize)
        self.experts = Experts(d_model, d_ff, num_experts, init_std, out_std, activation, bias, save)
        self.shared = (
            FeedForward(d_model, num_shared_experts * d_ff, init_std, out_std, activation, bias)
            if num_shared_experts
            else None
        )
        self.capacity_factor, self.aux_loss_weight, self.z_loss_weight = capacity_factor, aux_loss_weight, z_loss_weight

    def forward(self, x: torch.Tensor) -> MoEOutput:
        D = self.router.weight.shape[1]
        if x.shape[-1] != D:
            check.fail("MoE", "x", f"of shape [..., {D}]", list(x.shape))
        x_TD = x.reshape(-1, D)
        weights_TK, ids_TK, probs_TE, logits_TE = self.router(x_TD)
        (T, K), E = ids_TK.shape, probs_TE.shape[1]
        capacity = None if self.capacity_factor is None else math.ceil(self.capacity_factor * T * K / E)
        routing = ops.build_routing(ids_TK, E, capacity)
        y_TD = self.experts(x_TD, ids_TK, weights_TK, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        kept_E = routing.offsets.diff().long()
        chosen_TK = ids_TK >= 0
        load_E = (
            kept_E
            if capacity is None
            else torch.zeros_like(kept_E).scatter_add(0, ids_TK.clamp(min=0).reshape(-1), chosen_TK.long().reshape(-1))
        )
        aux_loss = self.aux_loss_weight * losses.load_balancing_loss(
            probs_TE, load_E
        ) + self.z_loss_weight * losses.z_loss(logits_TE)
        return MoEOutput(y_TD.view(x.shape), aux_loss, load_E, (load_E - kept_E).sum(), (~chosen_TK[:, 0]).sum())
