"""Gates: a module called with the tokens [T, D] that returns expert ids [T, K] (-1 drops a slot) and weights [T, K].

Each keeps its balance loss until get_loss takes it, as FastMoE's training loops expect.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fastmoe import ops
from fastmoe.nn import losses
from fastmoe.nn.router import count


class BaseGate(nn.Module):
    """What the layer and training loops ask of a gate."""

    def __init__(self, num_expert: int, world_size: int):
        super().__init__()
        self.world_size, self.num_expert, self.tot_expert = world_size, num_expert, world_size * num_expert
        self.loss: torch.Tensor | None = None

    def forward(self, x: torch.Tensor):
        raise NotImplementedError(f"fastmoe.compat.fmoe: {type(self).__name__} must define forward")

    def set_loss(self, loss: torch.Tensor | None) -> None:
        self.loss = loss

    def get_loss(self, clear: bool = True) -> torch.Tensor | None:
        """The loss of the last forward; clear forgets it."""
        loss = self.loss
        if clear:
            self.loss = None
        return loss

    @property
    def has_loss(self) -> bool:
        return self.loss is not None


class ZeroGate(BaseGate):
    """Every slot goes to expert 0 with weight 1/K."""

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2):
        super().__init__(num_expert, world_size)
        self.top_k = top_k

    def forward(self, inp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = inp.shape[0], self.top_k
        return inp.new_zeros(shape, dtype=torch.int64), inp.new_full(shape, 1 / self.top_k)


class NaiveGate(BaseGate):
    """The K largest logits, softmax over these. Parameters gate.weight [E, D], gate.bias [E]. Its loss is zeros(1)."""

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2, gate_bias: bool = True):
        super().__init__(num_expert, world_size)
        self.gate = nn.Linear(d_model, self.tot_expert, bias=gate_bias)
        self.top_k = top_k

    def forward(self, inp: torch.Tensor, return_all_scores: bool = False) -> tuple[torch.Tensor, ...]:
        """(ids [T, K], weights [T, K]), in descending order, and with return_all_scores the logits [T, E] too."""
        logits_TE = self.gate(inp)
        score_TK, idx_TK, _, _ = ops.topk_gate(logits_TE, self.top_k)
        self.set_loss(torch.zeros(1, device=inp.device, requires_grad=True))
        return (idx_TK, score_TK, logits_TE) if return_all_scores else (idx_TK, score_TK)


class GShardGate(NaiveGate):
    """Top 2 with a capacity, the second sent at random in proportion to its weight. Lepikhin et al., arXiv 2006.16668.

    capacity: (training, evaluation) factors c; an expert keeps ceil(c*T)*K//E slots, first choices first. The loss is
    E^2 * mean_e(share of tokens that chose e first * mean probability of e).
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        topk: int = 2,
        capacity: tuple[float, float] = (1.2, 2.4),
        random_routing: bool = True,
        gate_bias: bool = True,
    ):
        if topk != 2:
            raise ValueError(f"fastmoe.compat.GShardGate: topk must be 2, got {topk}")
        super().__init__(d_model, num_expert, world_size, top_k=2, gate_bias=gate_bias)
        self.capacity, self.random_routing = capacity, random_routing

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        idx_TK, score_TK, logits_TE = super().forward(x, return_all_scores=True)
        E = self.tot_expert
        self.set_loss(losses.load_balancing_loss(logits_TE.float().softmax(dim=1), count(idx_TK[:, 0], E)))
        limit = math.ceil(self.capacity[0 if self.training else 1] * x.shape[0]) * self.top_k // E
        idx_TK = limit_by_capacity(idx_TK, E, limit)
        if self.random_routing:
            skipped_T = 2 * score_TK[:, 1] <= torch.rand(x.shape[0], device=x.device)
            idx_TK = torch.stack([idx_TK[:, 0], idx_TK[:, 1].masked_fill(skipped_T, -1)], dim=1)
        return idx_TK, score_TK


class SwitchGate(NaiveGate):
    """Top 1 with a capacity; the weight is the probability. Fedus et al., arXiv 2101.03961.

    switch_eps: in training, U(-eps, eps) is added to the logits. capacity: (training, evaluation) factors c; an expert
    keeps ceil(c*T/E) tokens. The loss is E * sum_e(share of the kept tokens at e * mean probability of e).
    """

    def __init__(
        self,
        d_model: int,
        num_expert: int,
        world_size: int,
        topk: int = 1,
        switch_eps: float = 0.1,
        capacity: tuple[float, float] = (1.2, 2.4),
        gate_bias: bool = True,
    ):
        if topk != 1:
            raise ValueError(f"fastmoe.compat.SwitchGate: topk must be 1, got {topk}")
        super().__init__(d_model, num_expert, world_size, top_k=1, gate_bias=gate_bias)
        self.switch_eps, self.capacity = switch_eps, capacity

    def forward(self, inp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        E, T = self.tot_expert, inp.shape[0]
        logits_TE = self.gate(inp).float()
        if self.training:
            logits_TE = logits_TE + torch.empty_like(logits_TE).uniform_(-self.switch_eps, self.switch_eps)
        score_T1, idx_T1, probs_TE, _ = ops.topk_gate(logits_TE, 1, renormalize=False)
        limit = math.ceil(self.capacity[0 if self.training else 1] * T / self.num_expert)
        idx_T1 = limit_by_capacity(idx_T1, E, limit)
        self.set_loss(losses.load_balancing_loss(probs_TE, count(idx_T1, E)))
        return idx_T1, score_T1


class NoisyGate(BaseGate):
    """Top K of logits with learned noise in training, softmax over these. Shazeer et al., arXiv 1701.06538.

    Parameters w_gate, w_noise [D, E]. The loss is CV^2 of the experts' summed weights plus, in training, CV^2 of the
    smooth load. Set upstream_init on the class for FastMoE's own initial bound 1/sqrt(E) in place of 1/sqrt(D).
    """

    upstream_init = False

    def __init__(self, d_model: int, num_expert: int, world_size: int, top_k: int = 2):
        super().__init__(num_expert, world_size)
        self.w_gate = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.w_noise = nn.Parameter(torch.empty(d_model, self.tot_expert))
        self.top_k, self.noise_epsilon = top_k, 1e-2
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = (self.tot_expert if self.upstream_init else self.w_gate.shape[0]) ** -0.5
        nn.init.uniform_(self.w_gate, -bound, bound)
        nn.init.uniform_(self.w_noise, -bound, bound)

    def forward(self, inp: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        clean_TE = noisy_TE = (inp @ self.w_gate).float()
        if self.training:
            std_TE = nn.functional.softplus((inp @ self.w_noise).float()) + self.noise_epsilon
            noisy_TE = clean_TE + torch.randn_like(clean_TE) * std_TE
        score_TK, idx_TK, _, _ = ops.topk_gate(noisy_TE, self.top_k)
        loss = losses.cv_squared(losses.importance(score_TK, idx_TK, self.tot_expert))
        if self.training:
            loss = loss + losses.cv_squared(losses.smooth_load(clean_TE, noisy_TE, std_TE, idx_TK))
        self.set_loss(loss)
        return idx_TK, score_TK


def limit_by_capacity(idx_TK: torch.Tensor, num_experts: int, limit: int) -> torch.Tensor:
    """idx with -1 in the slots past an expert's first `limit`, first choices of all tokens before second ones."""
    return idx_TK.masked_fill(ops.build_routing(idx_TK, num_experts, limit).dst_row_TK < 0, -1)


__all__ = ["BaseGate", "GShardGate", "NaiveGate", "NoisyGate", "SwitchGate", "ZeroGate"]

_LATER = ("DCGate", "FasterGate", "SwipeGate", "faster_gate", "utils")


def __getattr__(name: str):
    if name in _LATER:
        raise NotImplementedError(f"fastmoe.compat.fmoe.gates: {name} is not served yet; there are {__all__}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
