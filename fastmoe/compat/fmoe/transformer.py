"""The feed-forward of a transformer layer as an FMoE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastmoe.compat.fmoe.layers import FMoE
from fastmoe.compat.fmoe.linear import FMoELinear, grouped_linear


class _Expert(nn.Module):
    """num_expert two-layer perceptrons: htoh4, activation, h4toh."""

    def __init__(self, num_expert: int, d_model: int, d_hidden: int, activation: Callable, rank: int = 0):
        super().__init__()
        self.htoh4 = FMoELinear(num_expert, d_model, d_hidden, bias=True, rank=rank)
        self.h4toh = FMoELinear(num_expert, d_hidden, d_model, bias=True, rank=rank)
        self.activation = activation

    def forward(self, inp: torch.Tensor, fwd_expert_count: torch.Tensor) -> torch.Tensor:
        return self.h4toh(self.activation(self.htoh4(inp, fwd_expert_count)), fwd_expert_count)


class FMoETransformerMLP(FMoE):
    """y = sum_k weight_k * h4toh_e(activation(htoh4_e(x))) for x of any shape [..., d_model].

    Parameters are experts.{i}.htoh4.weight [1, d_hidden, d_model], .bias [1, d_hidden] and experts.{i}.h4toh.weight
    [1, d_model, d_hidden], .bias [1, d_model]; all experts run as one grouped product, unless one has been replaced.
    activation (None: GELU) works row by row. Further options are those of FMoE.
    """

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        d_hidden: int = 4096,
        activation: Callable | None = None,
        expert_dp_comm: str = "none",
        expert_rank: int = 0,
        **kwargs,
    ):
        activation = nn.GELU() if activation is None else activation
        make = lambda width: _Expert(1, width, d_hidden, activation, expert_rank)
        super().__init__(num_expert=num_expert, d_model=d_model, expert=make, **kwargs)
        self.d_hidden = d_hidden
        self.mark_parallel_comm(expert_dp_comm)

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        return super().forward(inp.reshape(-1, self.d_model)).reshape(inp.shape)

    @property
    def pads_rows(self) -> bool:
        return type(self).expert_fn is FMoETransformerMLP.expert_fn and self._uniform()

    def _uniform(self) -> bool:
        """Whether all experts are as they were made, so that one product serves them."""
        return type(self).expert_fn_single is FMoE.expert_fn_single and all(
            type(expert) is _Expert
            and type(expert.htoh4) is type(expert.h4toh) is FMoELinear
            and expert.activation is self.experts[0].activation
            for expert in self.experts
        )

    def expert_fn(self, inp: torch.Tensor, fwd_expert_count: torch.Tensor) -> torch.Tensor:
        if not self._uniform():
            return super().expert_fn(inp, fwd_expert_count)
        ends_E = fwd_expert_count.cumsum(0).int()
        for name in ("htoh4", "h4toh"):
            linears = [getattr(expert, name) for expert in self.experts]
            weight_EFD = torch.cat([linear.weight for linear in linears])
            inp = grouped_linear(inp, weight_EFD, torch.cat([linear.bias for linear in linears]), ends_E)
            inp = self.experts[0].activation(inp) if name == "htoh4" else inp
        return inp


__all__ = ["FMoETransformerMLP"]
