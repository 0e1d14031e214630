from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn
from torch.nn.functional import gelu, relu, silu

from fastmoe import native, ops
from fastmoe.comm import Group, expert_parallel_moe
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

    def __init__(self, stack, d_model, d_ff, init_std, out_std, activation, bias, group=None):
        """group: ranks of which each has its part of the stack; drawn as the whole is."""
        super().__init__()
        check.option(type(self).__name__, "activation", activation, ACTIVATIONS)
        self.activation, z = activation, 2 * d_ff if activation in GATED else d_ff
        rank, ranks = (group.rank, group.size) if group else (0, 1)

        def drawn(*size: int, std: float) -> nn.Parameter:
            whole = native.huge_pages(torch.empty(*stack, *size)).normal_(std=std)
            part = whole if ranks == 1 else native.huge_pages(whole.chunk(ranks)[rank].clone())
            return nn.Parameter(part)

        self.gate_up_proj = drawn(z, d_model, std=init_std)
        self.down_proj = drawn(d_model, d_ff, std=out_std or init_std)
        own = (stack[0] // ranks, *stack[1:]) if stack else ()
        self.gate_up_bias = nn.Parameter(torch.zeros(*own, z)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(*own, d_model)) if bias else None
        if ranks > 1:
            for param in self.parameters():
                param.first_row = rank * param.shape[:-1].numel()  # in the whole: fastmoe.optim rounds by it


class Experts(_Projections):
    """E experts as stacked weights, computed by one op.

    gate_up_proj: [E, 2F, D], or [E, F, D] for an activation without a gate. down_proj: [E, D, F]. bias: gate_up_bias
    [E, 2F or F] and down_bias [E, D], 0 at first. activation, save: as in fastmoe.ops.moe_mlp.

    group: ranks over which the experts are split evenly, E / group.size on each, experts rank * L .. on `rank`. Rows
    then travel to their experts and back (fastmoe.comm.dispatch); all ranks must call it alike.
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
        group: Group | None = None,
    ):
        if group and num_experts % group.size:
            check.fail("Experts", "num_experts", f"a multiple of {group.size} (ranks of group)", num_experts)
        super().__init__((num_experts,), d_model, d_ff, init_std, out_std, activation, bias, group)
        check.option("Experts", "save", save, SAVES)
        self.save, self.num_experts, self.group = save, num_experts, group if group and group.size > 1 else None
        self.stds = {"gate_up_proj": init_std, "down_proj": out_std or init_std}

    def forward(
        self,
        x_TD: torch.Tensor,
        topk_ids_TK: torch.Tensor,
        topk_weights_TK: torch.Tensor,
        routing: ops.Routing | None = None,
    ) -> torch.Tensor:
        options = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias, "save": self.save}
        tensors = x_TD, topk_ids_TK, topk_weights_TK, self.gate_up_proj, self.down_proj
        if self.group is None:
            return ops.moe_mlp(*tensors, self.activation, routing=routing, **options)
        if topk_ids_TK is None:
            check.fail("Experts", "topk_ids_TK", "a tensor where experts are split over ranks", None)
        if routing is not None:  # what is over the capacity stays at home
            topk_ids_TK = topk_ids_TK.masked_fill(routing.dst_row_TK < 0, -1)
            tensors = x_TD, topk_ids_TK, *tensors[2:]
        return expert_parallel_moe(*tensors, self.group, activation=self.activation, **options)

    def add(self, copy_of: int | str | None, frozen: bool) -> None:
        """As fastmoe.nn.add_expert."""
        for name, old in list(self.named_parameters()):
            new = self._resized(name, old.shape[0] + 1)
            new[:-1] = old.detach()
            if copy_of is None:
                new[-1].normal_(std=self.stds[name]) if name in self.stds else new[-1].zero_()
            else:
                new[-1] = old.detach().mean(0) if copy_of == "mean" else old.detach()[copy_of]
            param = nn.Parameter(new, frozen or old.requires_grad)
            setattr(self, name, param)
            if frozen:
                param.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:-1]), grad[-1:]]))

    def remove(self, index: int) -> None:
        for name, old in list(self.named_parameters()):
            new = self._resized(name, old.shape[0] - 1)
            new[:index], new[index:] = old.detach()[:index], old.detach()[index + 1 :]
            setattr(self, name, nn.Parameter(new, old.requires_grad))

    def _resized(self, name: str, num_experts: int) -> torch.Tensor:
        old = getattr(self, name)
        return native.huge_pages(old.new_empty(num_experts, *old.shape[1:], requires_grad=False))


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


class ModuleExperts(nn.ModuleList):
    """Experts that are modules, of any kinds: expert e is called with its rows [n, D] and returns as many.

    An expert without tokens is called with no rows. Reads on the host how many rows each has.
    """

    def forward(
        self,
        x_TD: torch.Tensor,
        topk_ids_TK: torch.Tensor | None,
        topk_weights_TK: torch.Tensor,
        routing: ops.Routing | None = None,
    ) -> torch.Tensor:
        routing = routing or ops.build_routing(topk_ids_TK, len(self))
        counts = routing.offsets.diff().tolist()
        rows_RD = ops.permute(x_TD, routing)
        used, R = sum(counts), rows_RD.shape[0]
        parts = [expert(rows) for expert, rows in zip(self, rows_RD[:used].split(counts))]
        for e, (part, rows) in enumerate(zip(parts, counts)):
            check.tensor(
                "ModuleExperts", f"what expert {e} returns", part, (rows, x_TD.shape[1]), like=x_TD, legend="n, D"
            )
        y_RD = nn.functional.pad(torch.cat(parts), (0, 0, 0, R - used))
        return ops.unpermute(y_RD, routing, topk_weights_TK)

    def add(self, copy_of: int, frozen: bool) -> None:
        self.append(copy.deepcopy(self[copy_of]))
        if frozen:
            self[-1].requires_grad_(True)

    def remove(self, index: int) -> None:
        del self[index]
