"""The MoE layer: router, routing, experts, losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from fastmoe import ops
from fastmoe.comm import Group
from fastmoe.nn.experts import Experts, FeedForward, ModuleExperts
from fastmoe.nn.router import NO_INPUTS, Router, RouterInputs, make_router
from fastmoe.ops import check


class MoEOutput(NamedTuple):
    y: torch.Tensor  # as x
    aux_loss: torch.Tensor  # scalar, the router's losses by their weights
    load_E: torch.Tensor  # [E] int64, slots that chose each expert, before capacity
    dropped: torch.Tensor  # scalar int64, slots past the capacity
    nan_tokens: torch.Tensor  # scalar int64, tokens whose logits or weights were NaN (where nothing raised)
    logit_norm: torch.Tensor  # scalar, root mean square of the router's logits; 0 where nothing is scored
    losses: dict[str, torch.Tensor]  # scalars by name, without weights and gradients
    routing: ops.Routing  # what went where
    topk_ids_TK: torch.Tensor | None  # int64, the choices before capacity; None where experts choose


class MoE(nn.Module):
    """A drop-in feed-forward: `y = MoE(d_model=512, d_ff=1024, num_experts=32, top_k=2)(x).y` for x [..., D].

    top_k: experts of a token; None: the router's own number. router: a name in fastmoe.nn.ROUTERS, with
    router_options, or a Router of these sizes. experts: None for fused ones; else a class or function called with
    (d_model, d_ff) for each, or a list of modules, of any kinds; each maps rows [n, D] to as many. num_shared_experts:
    feed-forwards of width d_ff that see every token, added to the routed sum.

    capacity_factor: an expert keeps ceil(factor * T * K / E) slots (Router.capacity), first choices first, and the rest
    are dropped; None: the router's own (most have none), 0: all are kept. eval_capacity_factor: the same in evaluation;
    None: as capacity_factor where that is given. aux_loss_weight: of the router's balancing losses, z_loss_weight: of
    its z loss; None: the router's own. activation, bias: of fused and shared experts. save: what fused ones keep for
    backward. All three as in Experts. expert_group: ranks over which fused experts are split; the router sees this
    rank's tokens.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        router: str | Router = "topk",
        router_options: Mapping[str, object] | None = None,
        experts: Callable[[int, int], nn.Module] | Sequence[nn.Module] | None = None,
        num_shared_experts: int = 0,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        activation: str = "swiglu",
        bias: bool = False,
        save: str = "z",
        aux_loss_weight: float | None = None,
        z_loss_weight: float | None = None,
        init_std: float = 0.02,
        out_std: float | None = None,
        expert_group: Group | None = None,
    ):
        super().__init__()
        check.positive("MoE", d_model=d_model, d_ff=d_ff, num_experts=num_experts)
        if num_shared_experts < 0:
            check.fail("MoE", "num_shared_experts", "at least 0", num_shared_experts)
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if factor is not None and factor < 0:
                check.fail("MoE", name, "None, 0 or positive", factor)
        if isinstance(router, str):
            router = make_router(router, d_model, num_experts, top_k, **(router_options or {}))
        else:
            sizes, wanted = (router.d_model, router.num_experts, router.top_k), (d_model, num_experts, top_k)
            if sizes[:2] != wanted[:2] or top_k not in (None, router.top_k):
                check.fail("MoE", "router", f"for d_model, num_experts and top_k {wanted}", sizes)
            if router_options:
                check.fail("MoE", "router_options", "None beside a Router", router_options)
        self.router, self.d_model, self.num_experts = router, d_model, num_experts
        if experts is None:
            self.experts = Experts(d_model, d_ff, num_experts, init_std, out_std, activation, bias, save, expert_group)
        elif expert_group is not None and expert_group.size > 1:
            check.fail("MoE", "experts", "None where expert_group splits them over ranks", type(experts).__name__)
        elif isinstance(experts, (Sequence, nn.ModuleList)):
            self.experts = ModuleExperts(experts)
            if len(experts) != num_experts:
                check.fail("MoE", "experts", f"{num_experts} modules (num_experts)", len(experts))
        elif callable(experts) and not isinstance(experts, nn.Module):
            self.experts = ModuleExperts(experts(d_model, d_ff) for _ in range(num_experts))
        else:
            check.fail("MoE", "experts", "None, a class, a function or a list of modules", type(experts).__name__)
        self.shared = (
            FeedForward(d_model, num_shared_experts * d_ff, init_std, out_std, activation, bias)
            if num_shared_experts
            else None
        )
        own = router.capacity_factors if capacity_factor is None else (capacity_factor, capacity_factor)
        self.capacity_factors = (own[0], own[1] if eval_capacity_factor is None else eval_capacity_factor)
        if any(self.capacity_factors) and not router.takes_capacity:
            check.fail("MoE", "capacity_factor", f"None or 0 with {type(router).__name__}", self.capacity_factors)
        self.aux_loss_weight, self.z_loss_weight = aux_loss_weight, z_loss_weight

    def forward(self, x: torch.Tensor, inputs: RouterInputs = NO_INPUTS) -> MoEOutput:
        """inputs: what the router needs beside x; x [B, S, D] counts as B sequences."""
        if x.shape[-1] != self.d_model:
            check.fail("MoE", "x", f"of shape [..., {self.d_model}]", list(x.shape))
        x_TD = x.reshape(-1, self.d_model)
        if x.dim() == 3:
            inputs = inputs._replace(num_sequences=x.shape[0])
        routed = self.router(x_TD, inputs)
        weights_TK, ids_TK, load_E, routing = routed.topk_weights_TK, routed.topk_ids_TK, routed.load_E, routed.routing
        zero = x_TD.new_zeros((), dtype=torch.float32)
        nan_T, mean_square = weights_TK[:, 0].isnan(), zero
        if routed.logits_TE is not None:
            square_T = routed.logits_TE.detach().square().mean(1)
            nan_T, mean_square = nan_T | square_T.isnan(), square_T.sum() / max(len(square_T), 1)
        if routing is None:
            factor = self.capacity_factors[0 if self.training else 1]
            capacity = self.router.capacity(x_TD.shape[0], factor) if factor else None
            routing = ops.build_routing(ids_TK, self.num_experts, capacity)
            if self.router.renormalize_kept:
                kept_TK = weights_TK.masked_fill(routing.dst_row_TK < 0, 0)
                weights_TK = kept_TK / (kept_TK.sum(1, keepdim=True) + 1e-20)
        y_TD = self.experts(x_TD, ids_TK, weights_TK, routing)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        aux_loss = sum((self._weight(name) * loss for name, loss in routed.losses.items()), zero)
        return MoEOutput(
            y_TD.view(x.shape),
            aux_loss,
            load_E,
            load_E.sum() - routing.offsets[-1],
            nan_T.sum(),
            mean_square.sqrt(),
            {name: loss.detach() for name, loss in routed.losses.items()},
            routing,
            ids_TK,
        )

    def _weight(self, loss: str) -> float:
        given = self.z_loss_weight if loss == "z" else self.aux_loss_weight
        return self.router.loss_weights.get(loss, 0.0) if given is None else given
