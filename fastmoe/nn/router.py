"""Routers: which experts a token goes to and with which weights. `ROUTERS` has them all by name, behind one interface.

Scores, softmax and losses are computed in float32, under autocast too (float64 for float64 rows). Of equal scores the
lower expert id wins.
"""

from __future__ import annotations

import ast
import heapq
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from fastmoe import ops
from fastmoe.nn import losses
from fastmoe.ops import check

if TYPE_CHECKING:
    from fastmoe.comm import Group


class RouterInputs(NamedTuple):
    """What a router may need beside the rows of its tokens. All may be left out but for the routers that say so."""

    token_ids_T: torch.Tensor | None = None  # integer; for "hash"
    domains_T: torch.Tensor | None = None  # integer; for "domain"
    key: torch.Tensor | None = (
        None  # int64 [3] seed, step, index of the first token; None: drawn from torch's generator
    )
    layer: int = 0  # makes draws differ from layer to layer
    num_sequences: int = 1  # the tokens are so many rows of equal length
    group: Group | None = None  # ranks that share the batch: global-batch balance, "swipe", "topology"
    replay_ids_TK: torch.Tensor | None = None  # int64; the router then only weighs these, -1 chooses nothing


NO_INPUTS = RouterInputs()


class RouterOutput(NamedTuple):
    topk_weights_TK: torch.Tensor  # float32 (float64 for float64 rows); [T, E] where there is a routing
    topk_ids_TK: torch.Tensor | None  # int64, -1 chooses nothing; None where there is a routing
    load_E: torch.Tensor  # int64, slots that chose each expert
    losses: dict[str, torch.Tensor]  # scalars without their weights, by name
    logits_TE: torch.Tensor | None = None  # as the weights; None where nothing is scored
    routing: ops.Routing | None = None  # of a router without a fixed K, where experts choose


class Router(nn.Module):
    """What all routers share. A subclass sets the class attributes and defines `route`.

    top_k: experts of a token; None: the router's own number. balance: which balancing loss: "assignment" or "token"
    (fastmoe.nn.losses.load_balancing_loss), "sequence" (sequence_balance_loss), "none". global_balance: its loads are
    added up over the group of RouterInputs. loss_weights: by name, in place of the class's own.
    """

    own_top_k: int | None = 2
    fixed_top_k = False  # top_k may not be another number
    capacity_factors: tuple[float | None, float | None] = (None, None)  # training, evaluation; None: dropless
    loss_weights = {"balance": 0.01, "z": 1e-3}  # what the layer uses unless told otherwise
    takes_capacity = True  # False: experts choose, the layer can not bound them
    renormalize_kept = False  # the layer divides a token's weights by their sum over the slots within capacity
    causal = True  # False: a token's experts depend on tokens after it
    resizable = False  # True: another number of experts changes no more than the rows of its weights and biases

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        balance: str = "assignment",
        global_balance: bool = False,
        loss_weights: Mapping[str, float] | None = None,
        std: float | None = None,
    ):
        super().__init__()
        if loss_weights is not None:
            self.loss_weights = dict(loss_weights)
        top_k = self.own_top_k if top_k is None else top_k
        if self.fixed_top_k and top_k != self.own_top_k:
            self._fail("top_k", self.own_top_k, top_k)
        if not 1 <= top_k <= num_experts:
            self._fail("top_k", f"in 1..{num_experts} (num_experts)", top_k)
        if balance not in ("assignment", "token", "sequence", "none"):
            self._fail("balance", "'assignment', 'token', 'sequence' or 'none'", repr(balance))
        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.balance, self.global_balance = balance, global_balance
        self._make_parameters(d_model**-0.5 if std is None else std)

    def _make_parameters(self, std: float) -> None:
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.d_model).normal_(std=std))

    def forward(self, x_TD: torch.Tensor, inputs: RouterInputs = NO_INPUTS) -> RouterOutput:
        """x_TD: [T, D]. ValueError, on the CPU, for logits that are not finite and ids that are out of range."""
        name = type(self).__name__
        check.tensor(name, "x_TD", x_TD, (None, self.d_model), legend="T, D")
        if inputs.replay_ids_TK is not None:
            shape = (x_TD.shape[0], self.top_k)
            check.tensor(name, "inputs.replay_ids_TK", inputs.replay_ids_TK, shape, (torch.int64,), x_TD, "T, K")
        with torch.autocast(x_TD.device.type, enabled=False):
            return self.route(x_TD if x_TD.dtype == torch.float64 else x_TD.float(), inputs)

    def route(self, x_TD: torch.Tensor, inputs: RouterInputs) -> RouterOutput:
        raise NotImplementedError

    def capacity(self, num_tokens: int, factor: float) -> int:
        """Slots an expert keeps: ceil(factor * T * K / E)."""
        return _ceil(factor * num_tokens * self.top_k / self.num_experts)

    def update(self, load_E: torch.Tensor) -> None:
        """To be called once an optimizer step with its loads, summed over micro-batches and ranks."""

    def _fail(self, argument: str, wanted: object, got: object):
        check.fail(type(self).__name__, argument, wanted, got)

    def _logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        return ops.linear(x_TD, self.weight.to(x_TD.dtype))

    def _gate(self, logits_TE: torch.Tensor, inputs: RouterInputs, top_k: int | None = None, **options):
        """ops.topk_gate. Replayed ids take the place of its own, its weights stay where these are the same."""
        own_TK, own_ids_TK, probs_TE, load_E = ops.topk_gate(logits_TE, top_k or self.top_k, **options)
        ids_TK = inputs.replay_ids_TK
        if ids_TK is None:
            return own_TK, own_ids_TK, probs_TE, load_E
        weights_TK, _, _, load_E = weigh(logits_TE, ids_TK, **options)
        same_T1 = ((own_ids_TK == ids_TK) | (ids_TK < 0)).all(1, keepdim=True)
        return own_TK.where(same_T1, weights_TK), ids_TK, probs_TE, load_E

    def _losses(self, logits_TE, probs_TE, ids_TK, load_E, inputs: RouterInputs) -> dict[str, torch.Tensor]:
        found = {"z": losses.z_loss(logits_TE)}
        if self.balance == "sequence":
            found["balance"] = losses.sequence_balance_loss(probs_TE, ids_TK, inputs.num_sequences)
        elif self.balance != "none":
            group = inputs.group if self.global_balance else None
            found["balance"] = losses.load_balancing_loss(probs_TE, load_E, self.balance, group)
        return found

    def _known(self, name: str, ids_T: torch.Tensor | None, num_tokens: int, limit: int) -> torch.Tensor:
        """ids_T of RouterInputs as int64, -1 for what is outside 0..limit-1, which the CPU refuses."""
        if ids_T is None:
            self._fail(f"inputs.{name}", "given", None)
        check.tensor(type(self).__name__, f"inputs.{name}", ids_T, (num_tokens,), check.INTS, legend="T")
        outside_T = (ids_T < 0) | (ids_T >= limit)
        if ids_T.is_cpu and not torch.compiler.is_compiling() and outside_T.any():
            self._fail(f"inputs.{name}", f"in 0..{limit - 1}", int(ids_T[outside_T][0]))
        return ids_T.long().masked_fill(outside_T, -1)

    def _uniform(self, inputs: RouterInputs, x_TD: torch.Tensor, num_draws: int) -> torch.Tensor:
        """[T, num_draws] in [0, 1), the same for the same key."""
        key = inputs.key
        if key is None:
            key = torch.randint(0, 1 << 31, (3,), device=x_TD.device)
        return ops.random_uniform(key, inputs.layer, x_TD.shape[0], num_draws).to(x_TD.dtype)

    def _normal(self, inputs: RouterInputs, x_TD: torch.Tensor, num_draws: int) -> torch.Tensor:
        """[T, num_draws] from N(0, 1), by Box and Muller."""
        u_TN = self._uniform(inputs, x_TD, 2 * num_draws)
        radius_TN = (-2 * torch.log1p(-u_TN[:, :num_draws])).sqrt()
        return radius_TN * torch.cos(2 * math.pi * u_TN[:, num_draws:])


def count(ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """How often each expert is named: [E] int64; -1 is left out."""
    ids_R = ids_TK.reshape(-1)
    return ids_R.new_zeros(num_experts, dtype=torch.int64).scatter_add(
        0, ids_R.clamp(min=0).long(), (ids_R >= 0).long()
    )


def weigh(
    logits_TE: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    score: str = "softmax",
    renormalize: bool = True,
    scale: float = 1.0,
    **_,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """What ops.topk_gate returns, for experts chosen elsewhere. An id of -1 has weight 0 and is left out of the sum."""
    probs_TE = logits_TE.softmax(1) if score == "softmax" else logits_TE.sigmoid()
    weights_TK = probs_TE.gather(1, topk_ids_TK.clamp(min=0)).masked_fill(topk_ids_TK < 0, 0)
    if renormalize:
        weights_TK = weights_TK / (weights_TK.sum(1, keepdim=True) + 1e-20)
    return weights_TK * scale, topk_ids_TK, probs_TE, count(topk_ids_TK, logits_TE.shape[1])


def softmax_at(logits_TE: torch.Tensor, topk_ids_TK: torch.Tensor) -> torch.Tensor:
    """[T, K], the softmax over the logits of the experts named alone, however low they are; -1 is left out."""
    lowest = torch.finfo(logits_TE.dtype).min  # not -inf, of which a row has no softmax
    return logits_TE.gather(1, topk_ids_TK.clamp(min=0)).masked_fill(topk_ids_TK < 0, lowest).softmax(1)


def _ceil(slots: float) -> int:
    return math.ceil(slots - 1e-9)  # 1.1 * 50 is above 55 in floating point


class TopKRouter(Router):
    """The K best of a linear map's scores: Mixtral, OLMoE, Qwen3, DeepSeek-V2 and V3 by their options.

    score, renormalize, num_groups, top_groups, group_score, scale: as in fastmoe.ops.topk_gate. bias_rate: where given,
    experts are chosen by score + bias_E, and `update` moves every bias by this rate towards the mean load (DeepSeek-V3;
    Wang et al., arXiv 2408.15664); center_bias: and takes the mean of the moves off. Weights have no bias.
    """

    resizable = True

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        score: str = "softmax",
        renormalize: bool = True,
        num_groups: int = 1,
        top_groups: int = 1,
        group_score: str = "max",
        scale: float = 1.0,
        bias_rate: float | None = None,
        center_bias: bool = False,
        **options,
    ):
        super().__init__(d_model, num_experts, top_k, **options)
        self.gate_options = {
            "score": score,
            "renormalize": renormalize,
            "num_groups": num_groups,
            "top_groups": top_groups,
            "group_score": group_score,
            "scale": scale,
        }
        ops.topk_gate(torch.empty(0, num_experts, device="meta"), self.top_k, **self.gate_options)  # refuses bad ones
        self.bias_rate, self.center_bias = bias_rate, center_bias
        self.register_buffer("bias_E", None if bias_rate is None else torch.zeros(num_experts))

    def _apply(self, fn, recurse=True):
        bias_E = self.bias_E
        super()._apply(fn, recurse)
        if bias_E is not None and self.bias_E.dtype != bias_E.dtype:  # too fine for module.bfloat16()
            self.bias_E = bias_E.to(self.bias_E.device)
        return self

    def route(self, x_TD, inputs):
        logits_TE = self._logits(x_TD)
        bias_E = None if self.bias_E is None else self.bias_E.to(logits_TE.dtype)
        weights_TK, ids_TK, probs_TE, load_E = self._gate(logits_TE, inputs, bias_E=bias_E, **self.gate_options)
        found = self._losses(logits_TE, probs_TE, ids_TK, load_E, inputs)
        return RouterOutput(weights_TK, ids_TK, load_E, found, logits_TE)

    @torch.no_grad()
    def update(self, load_E: torch.Tensor) -> None:
        if self.bias_E is None:
            return
        load_E = load_E.to(self.bias_E)
        move_E = self.bias_rate * torch.sign(load_E.mean() - load_E)
        self.bias_E += move_E - move_E.mean() if self.center_bias else move_E


class NoisyTopKRouter(Router):
    """The K best of logits with learned noise in training. Weights: softmax over the K.

    Losses "importance" and "load" (the latter in training only). Source: Shazeer et al., arXiv 1701.06538.
    """

    resizable = True
    loss_weights = {"importance": 0.1, "load": 0.1}
    noise_floor = 1e-2

    def _make_parameters(self, std):
        super()._make_parameters(std)
        self.noise_weight = nn.Parameter(torch.zeros(self.num_experts, self.d_model))

    def route(self, x_TD, inputs):
        logits_TE = noisy_TE = self._logits(x_TD)
        if self.training:
            std_TE = nn.functional.softplus(ops.linear(x_TD, self.noise_weight.to(x_TD.dtype))) + self.noise_floor
            noisy_TE = logits_TE + self._normal(inputs, x_TD, self.num_experts) * std_TE
        weights_TK, ids_TK, _, load_E = self._gate(noisy_TE, inputs)
        found = {"importance": losses.cv_squared(losses.importance(weights_TK, ids_TK, self.num_experts))}
        if self.training:
            found["load"] = losses.cv_squared(losses.smooth_load(logits_TE, noisy_TE, std_TE, ids_TK))
        return RouterOutput(weights_TK, ids_TK, load_E, found, logits_TE)


class SwitchRouter(Router):
    """The best expert, weighed by its probability. In training the router's input is multiplied by U(1-eps, 1+eps).

    Source: Fedus et al., arXiv 2101.03961.
    """

    resizable = True
    own_top_k, fixed_top_k = 1, True
    capacity_factors = (1.25, 2.0)
    loss_weights = {"balance": 0.01}

    def __init__(self, *args, jitter: float = 1e-2, **options):
        super().__init__(*args, **options)
        if not 0 <= jitter < 1:
            self._fail("jitter", "in [0, 1)", jitter)
        self.jitter = jitter

    def route(self, x_TD, inputs):
        if self.training and self.jitter:
            x_TD = x_TD * (1 - self.jitter + 2 * self.jitter * self._uniform(inputs, x_TD, x_TD.shape[1]))
        logits_TE = self._logits(x_TD)
        weights_TK, ids_TK, probs_TE, load_E = self._gate(logits_TE, inputs, renormalize=False)
        found = self._losses(logits_TE, probs_TE, ids_TK, load_E, inputs)
        return RouterOutput(weights_TK, ids_TK, load_E, found, logits_TE)


class GShardRouter(Router):
    """The best two, the second sent at random in training. First choices of all tokens come before second ones.

    second: "random" sends it with probability 2 g2 / (g1 + g2), "probability" with 2 p2 (FastNN), "all" always; in
    evaluation always. A skipped second takes no slot. The loss counts first choices. renormalize_kept: weights are
    divided by their sum after drops, not before (FastNN). slot_multiple: the slots of an expert are rounded up to a
    multiple (4 in FastNN). Source: Lepikhin et al., arXiv 2006.16668; ST-MoE (Zoph et al., arXiv 2202.08906) adds the
    z loss.
    """

    resizable = True
    fixed_top_k = True
    capacity_factors = (1.25, 2.0)
    loss_weights = {"balance": 0.01}

    def __init__(
        self, *args, second: str = "random", renormalize_kept: bool = False, slot_multiple: int = 1, **options
    ):
        super().__init__(*args, **options)
        check.option(type(self).__name__, "second", second, ("random", "probability", "all"))
        check.positive(type(self).__name__, slot_multiple=slot_multiple)
        self.second, self.renormalize_kept, self.slot_multiple = second, renormalize_kept, slot_multiple

    def capacity(self, num_tokens, factor):
        return -(-super().capacity(num_tokens, factor) // self.slot_multiple) * self.slot_multiple

    def route(self, x_TD, inputs):
        logits_TE = self._logits(x_TD)
        weights_TK, ids_TK, probs_TE, load_E = self._gate(logits_TE, inputs, renormalize=not self.renormalize_kept)
        if self.training and self.second != "all" and inputs.replay_ids_TK is None:
            chosen_TK = probs_TE.detach().gather(1, ids_TK.clamp(min=0))
            share_T = chosen_TK[:, 1] / (chosen_TK.sum(1) if self.second == "random" else 1)
            sent_T = 2 * share_T > self._uniform(inputs, x_TD, 1)[:, 0]
            ids_TK = torch.stack([ids_TK[:, 0], ids_TK[:, 1].where(sent_T, -1)], 1)
            load_E = count(ids_TK, self.num_experts)
        found = self._losses(logits_TE, probs_TE, ids_TK, count(ids_TK[:, 0], self.num_experts), inputs)
        return RouterOutput(weights_TK, ids_TK, load_E, found, logits_TE)


class PrototypeRouter(Router):
    """K prototypes of E / K experts, the best expert of each, weighed by the softmax inside its prototype ("k top-1").

    slots: "kx" gives an expert gamma * K * T / E of them, "1x" gamma * T / E. The losses are means over the prototypes
    and off by default. Source: M6-T (Yang et al., arXiv 2105.15082).
    """

    capacity_factors = (1.25, 1.25)
    loss_weights = {}

    def __init__(self, *args, slots: str = "kx", **options):
        super().__init__(*args, **options)
        check.option(type(self).__name__, "slots", slots, ("kx", "1x"))
        if self.num_experts % self.top_k:
            self._fail("top_k", f"a divisor of {self.num_experts} (num_experts)", self.top_k)
        self.slots = slots

    def capacity(self, num_tokens, factor):
        return super().capacity(num_tokens, factor if self.slots == "kx" else factor / self.top_k)

    def route(self, x_TD, inputs):
        (T, _), E, K = x_TD.shape, self.num_experts, self.top_k
        logits_TE = self._logits(x_TD)
        logits_RE = logits_TE.view(T * K, E // K)
        first_K = torch.arange(0, E, E // K, device=x_TD.device)
        if inputs.replay_ids_TK is not None:
            ids_TK = inputs.replay_ids_TK
            local_R1 = torch.where(ids_TK < 0, -1, ids_TK - first_K).view(T * K, 1)
            inputs = inputs._replace(replay_ids_TK=local_R1)
        weights_R1, ids_R1, probs_RE, _ = self._gate(logits_RE, inputs, 1, renormalize=False)
        ids_TK = torch.where(ids_R1.view(T, K) < 0, -1, ids_R1.view(T, K) + first_K)
        load_E = count(ids_TK, E)
        # f is a share of all slots, P of all prototypes: 1 when uniform
        found = self._losses(logits_RE, probs_RE.view(T, E) / K, ids_TK, load_E, inputs)
        return RouterOutput(weights_R1.view(T, K), ids_TK, load_E, found, logits_TE)


class SwipeRouter(Router):
    """The K best; in training choices past a worker's share go to workers with room, so that each gets exactly T * K.

    A worker is a rank of the group of RouterInputs; alone there is one, and nothing moves. Weights: softmax over the K
    logits at the new experts. No drop, no loss. Experts of one worker are not balanced. Source: BaGuaLu (Ma et al.,
    PPoPP 2022).
    """

    resizable = True
    loss_weights = {}

    def route(self, x_TD, inputs):
        logits_TE = self._logits(x_TD)
        weights_TK, ids_TK, _, load_E = self._gate(logits_TE, inputs)
        group = inputs.group
        if self.training and group is not None and group.size > 1 and inputs.replay_ids_TK is None:
            if self.num_experts % group.size:
                self._fail("num_experts", f"a multiple of {group.size} (ranks)", self.num_experts)
            local = self.num_experts // group.size
            counts_WK = torch.stack([count(column_T // local, group.size) for column_T in ids_TK.t()], 1)
            ids_TK = ops.swipe(ids_TK, group.all_gather(counts_WK), group.rank, local)
            weights_TK = softmax_at(logits_TE, ids_TK)
            load_E = count(ids_TK, self.num_experts)
        return RouterOutput(weights_TK, ids_TK, load_E, {}, logits_TE)


class BaseRouter(Router):
    """In training a balanced assignment of best total score, T / E tokens an expert; in evaluation the best one.

    The weight is sigmoid(x . w_e). T that E does not divide is padded with rows that score nothing, so an expert gets
    ceil(T / E) tokens at most. A score that is not finite counts as the lowest one. Source: BASE layers (Lewis et al.,
    arXiv 2103.16716).
    """

    resizable = True
    own_top_k, fixed_top_k = 1, True
    loss_weights = {}

    def _make_parameters(self, std):
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.d_model))
        nn.init.orthogonal_(self.weight, gain=0.1)
        self._said = False

    def route(self, x_TD, inputs):
        (T, _), E = x_TD.shape, self.num_experts
        logits_TE = self._logits(x_TD)
        if inputs.replay_ids_TK is not None:
            ids_T1 = inputs.replay_ids_TK
        elif self.training:
            score_TE = logits_TE.detach()
            finite_TE = score_TE.isfinite()
            lowest = score_TE.where(finite_TE, torch.finfo(score_TE.dtype).max).amin() if T else 0.0
            score_TE = score_TE.where(finite_TE, lowest)
            if T % E and not self._said:
                warnings.warn(f"fastmoe.BaseRouter: {T} tokens are padded to a multiple of {E} experts", stacklevel=2)
                self._said = True
            ids_T1 = ops.balanced_assignment(nn.functional.pad(score_TE, (0, 0, 0, -T % E)))[:T, None]
        else:
            ids_T1 = ops.topk_gate(logits_TE, 1, renormalize=False)[1]
        weights_T1 = logits_TE.gather(1, ids_T1.clamp(min=0)).sigmoid()
        return RouterOutput(weights_T1, ids_T1, count(ids_T1, E), {}, logits_TE)


class HashRouter(Router):
    """Experts by a table over token ids: no parameters, no loss, weights of 1. K > 1: K tables (MultiHash).

    vocab_size: entries of a table. The tables are random, drawn by `seed`; `balance_tables` makes balanced ones, and
    balanced asks the trainer to call it at the start. RouterInputs must hold token_ids_T. Source: Roller et al., arXiv
    2106.04426.
    """

    own_top_k = 1
    loss_weights = {}

    def __init__(self, *args, vocab_size: int | None = None, seed: int = 0, balanced: bool = False, **options):
        super().__init__(*args, **options)
        self.balanced = balanced
        if vocab_size is None:
            self._fail("vocab_size", "given, the number of token ids", None)
        check.positive("HashRouter", vocab_size=vocab_size)
        draws = torch.Generator().manual_seed(seed)
        size = (vocab_size, self.top_k)
        self.register_buffer("table_VK", torch.randint(self.num_experts, size, generator=draws, device="cpu"))

    def _make_parameters(self, std):
        pass

    @torch.no_grad()
    def balance_tables(self, counts_V: torch.Tensor, seed: int = 0) -> None:
        """Each token id, from the most frequent on, into the expert with the least so far. counts_V: [V] counts; an id
        without any counts as one, so that they are spread too.

        Further tables do so in another order of ids of equal counts, drawn by seed.
        """
        check.tensor("HashRouter", "counts_V", counts_V, self.table_VK.shape[:1], check.INTS, legend="V")
        draws, counts_V = torch.Generator().manual_seed(seed), counts_V.cpu().clamp(min=1)
        for k in range(self.top_k):
            ids_V = torch.randperm(len(counts_V), generator=draws) if k else torch.arange(len(counts_V))
            ids_V = ids_V[counts_V[ids_V].sort(descending=True, stable=True).indices]
            loads = [(0, e) for e in range(self.num_experts)]
            for token, tokens in zip(ids_V.tolist(), counts_V[ids_V].tolist()):
                load, expert = loads[0]
                heapq.heapreplace(loads, (load + tokens, expert))
                self.table_VK[token, k] = expert

    def route(self, x_TD, inputs):
        ids_TK = inputs.replay_ids_TK
        if ids_TK is None:
            ids_T = self._known("token_ids_T", inputs.token_ids_T, x_TD.shape[0], self.table_VK.shape[0])
            ids_TK = self.table_VK[ids_T.clamp(min=0)].masked_fill(ids_T[:, None] < 0, -1)
        return RouterOutput(x_TD.new_ones(ids_TK.shape), ids_TK, count(ids_TK, self.num_experts), {})


class DomainRouter(Router):
    """One expert a domain, with weight 1: the domain of each token is given (RouterInputs.domains_T), 0..E-1.

    Source: DEMix layers (Gururangan et al., arXiv 2108.05036).
    """

    resizable = True
    own_top_k, fixed_top_k = 1, True
    loss_weights = {}

    def _make_parameters(self, std):
        pass

    def route(self, x_TD, inputs):
        ids_T1 = inputs.replay_ids_TK
        if ids_T1 is None:
            ids_T1 = self._known("domains_T", inputs.domains_T, x_TD.shape[0], self.num_experts)[:, None]
        return RouterOutput(x_TD.new_ones(ids_T1.shape), ids_T1, count(ids_T1, self.num_experts), {})


class ExpertChoiceRouter(Router):
    """Each expert takes the T * K / E tokens with the largest softmax in its column (K: the capacity factor c).

    A token may have any number of experts. An expert's choice depends on all tokens of the batch, later ones too, so a
    decoder refuses it; in_decoder: not, and its loss then says nothing about text that it writes. Source: Zhou et al.,
    arXiv 2202.09368.
    """

    resizable = True
    loss_weights = {}
    takes_capacity = False

    def __init__(self, *args, in_decoder: bool = False, **options):
        super().__init__(*args, **options)
        self.causal = in_decoder

    def route(self, x_TD, inputs):
        (T, _), E = x_TD.shape, self.num_experts
        if inputs.replay_ids_TK is not None:
            self._fail("inputs.replay_ids_TK", "None, as experts choose", list(inputs.replay_ids_TK.shape))
        logits_TE = self._logits(x_TD)
        probs_TE = self._gate(logits_TE, inputs, 1, renormalize=False)[2]
        C = min(T, max(1, T * self.top_k // E))
        best_EC = probs_TE.detach().t().sort(dim=1, descending=True, stable=True).indices[:, :C]
        token_R = best_EC.sort(dim=1).values.reshape(-1)
        offsets = torch.arange(E + 1, device=x_TD.device) * C
        routing = ops.build_routing_from_experts(token_R, offsets, T)
        load_E = torch.full((E,), C, device=x_TD.device)
        return RouterOutput(probs_TE, None, load_E, {}, logits_TE, routing)


class TokenRoundingRouter(Router):
    """The K best; in training each expert's tokens are then rounded to a multiple of the tile (ops.round_routing).

    Weights of the chosen are divided by their sum, those of added tokens are the bare probability. Source: SonicMoE
    (Guo et al., arXiv 2512.14080).
    """

    resizable = True
    takes_capacity = False

    def __init__(self, *args, tile: int = 128, rounding: str = "nearest", **options):
        super().__init__(*args, **options)
        check.positive("TokenRoundingRouter", tile=tile)
        check.option(type(self).__name__, "rounding", rounding, ("nearest", "up", "down"))
        self.tile, self.rounding = tile, rounding

    def route(self, x_TD, inputs):
        logits_TE = self._logits(x_TD)
        weights_TK, ids_TK, probs_TE, load_E = self._gate(logits_TE, inputs)
        found = self._losses(logits_TE, probs_TE, ids_TK, load_E, inputs)
        if not self.training or inputs.replay_ids_TK is not None:
            return RouterOutput(weights_TK, ids_TK, load_E, found, logits_TE)
        routing, weights_TE = ops.round_routing(weights_TK, ids_TK, probs_TE, self.tile, self.rounding)
        return RouterOutput(weights_TE, None, routing.offsets.diff().long(), found, logits_TE, routing)


class CosineRouter(Router):
    """The K best by cosine in a space of `projection` dimensions, times exp(temperature) of at most 100.

    Weights: the probability, divided by their sum for K > 1. noise: in training N(0, noise / E) is added to the logits
    that choose. cv: the loss is half of CV^2 of the summed probabilities plus CV^2 of the smooth load (with noise)
    instead of the balancing loss, the expected number of tokens whose logit with noise drawn again would reach the K-th
    best. With a capacity factor an expert keeps K * floor(factor * ceil(T / E)) slots. Source: Tutel (Hwang et al.,
    arXiv 2206.03382), after Chi et al., arXiv 2204.09179.
    """

    resizable = True
    loss_weights = {"balance": 0.01}

    def __init__(self, *args, projection: int = 256, noise: float = 0.0, cv: bool = False, **options):
        check.positive("CosineRouter", projection=projection)
        self.projection = projection
        super().__init__(*args, **options)
        if noise < 0 or (cv and not noise):
            self._fail("noise", "positive with cv" if cv else "at least 0", noise)
        self.noise, self.cv = noise, cv

    def _make_parameters(self, std):
        self.projection_weight = nn.Parameter(torch.empty(self.projection, self.d_model).normal_(std=std))
        self.weight = nn.Parameter(torch.empty(self.num_experts, self.projection).normal_(std=0.01))
        self.temperature = nn.Parameter(torch.tensor(math.log(2)))

    def capacity(self, num_tokens, factor):
        return self.top_k * max(1, math.floor(factor * -(-num_tokens // self.num_experts) + 1e-9))

    def route(self, x_TD, inputs):
        at_TP = nn.functional.normalize(ops.linear(x_TD, self.projection_weight.to(x_TD.dtype)), dim=1)
        cosine_TE = ops.linear(at_TP, nn.functional.normalize(self.weight.to(x_TD.dtype), dim=1))
        logits_TE = noisy_TE = cosine_TE * self.temperature.to(x_TD.dtype).clamp(max=math.log(100)).exp()
        std = self.noise / self.num_experts
        noisy = self.training and self.noise
        if noisy:
            noisy_TE = logits_TE + std * self._normal(inputs, x_TD, self.num_experts)
        weights_TK, ids_TK, probs_TE, load_E = self._gate(noisy_TE, inputs, renormalize=self.top_k > 1)
        if noisy:  # noise chooses, it does not weigh
            weights_TK, _, probs_TE, _ = weigh(logits_TE, ids_TK, renormalize=self.top_k > 1)
        found = self._losses(logits_TE, probs_TE, ids_TK, load_E, inputs)
        if self.cv and noisy:
            last_T1 = noisy_TE.gather(1, ids_TK[:, -1:].clamp(min=0))
            smooth_E = torch.special.ndtr((logits_TE - last_T1) / std).sum(0)
            found["balance"] = (losses.cv_squared(probs_TE.sum(0)) + losses.cv_squared(smooth_E)) / 2
        return RouterOutput(weights_TK, ids_TK, load_E, found, logits_TE)


class TopologyRouter(Router):
    """Top 2 with a bound on how many tokens' first choice leaves this node. Weights: softmax of the two logits.

    The experts are num_nodes equal runs; this is node `node` (None: from the group of RouterInputs, ranks being equal
    runs of nodes too; alone 0). Where the best expert of fewer than int(fraction * T) tokens is on another node, plain
    top 2. Otherwise the int(fraction * T) of them with the largest logit get [best in the node, that expert], all other
    tokens the best two in the node. limit_all_slots: in the first case the second choices that leave the node are
    bounded too, to what the first ones leave, those with the largest logits. The loss counts first choices. Source:
    FasterMoE (He et al., PPoPP 2022).
    """

    fixed_top_k = True
    loss_weights = {"balance": 0.01}

    def __init__(
        self,
        *args,
        num_nodes: int = 2,
        node: int | None = None,
        fraction: float = 0.14,
        limit_all_slots: bool = False,
        **options,
    ):
        super().__init__(*args, **options)
        if num_nodes < 1 or self.num_experts % num_nodes or (num_nodes > 1 and self.num_experts // num_nodes < 2):
            self._fail("num_nodes", f"a divisor of {self.num_experts} (num_experts), 2 or more experts each", num_nodes)
        if node is not None and not 0 <= node < num_nodes:
            self._fail("node", f"None or in 0..{num_nodes - 1}", node)
        if not 0 <= fraction <= 1:
            self._fail("fraction", "in [0, 1]", fraction)
        self.num_nodes, self.node, self.fraction, self.limit_all_slots = num_nodes, node, fraction, limit_all_slots

    def route(self, x_TD, inputs):
        E, logits_TE = self.num_experts, self._logits(x_TD)
        _, ids_TK, probs_TE, _ = self._gate(logits_TE, inputs)
        if inputs.replay_ids_TK is None:
            ids_TK = self._limited(logits_TE.detach(), ids_TK, inputs)
        weights_TK = softmax_at(logits_TE, ids_TK)
        load_E = count(ids_TK, E)
        found = self._losses(logits_TE, probs_TE, ids_TK, count(ids_TK[:, 0], E), inputs)
        return RouterOutput(weights_TK, ids_TK, load_E, found, logits_TE)

    def _limited(self, logits_TE, ids_TK, inputs):
        (T, E), group = logits_TE.shape, inputs.group
        node = self.node
        if node is None:
            node = 0 if group is None else group.rank * self.num_nodes // group.size
        each, limit = E // self.num_nodes, int(self.fraction * T)
        first, last = node * each, (node + 1) * each
        away_TK = (ids_TK < first) | (ids_TK >= last)
        local_TK = ops.topk_gate(logits_TE[:, first:last], 2)[1] + first
        value_TK = logits_TE.gather(1, ids_TK.clamp(min=0))
        sent_T = _largest(value_TK[:, 0], away_TK[:, 0], limit)
        bounded_TK = torch.stack([local_TK[:, 0], ids_TK[:, 0].where(sent_T, local_TK[:, 1])], 1)
        num_away = away_TK[:, 0].sum()
        if self.limit_all_slots:
            kept_T = _largest(value_TK[:, 1], away_TK[:, 1], limit - num_away)
            other_T = local_TK[:, 0].where(local_TK[:, 0] != ids_TK[:, 0], local_TK[:, 1])
            ids_TK = torch.stack([ids_TK[:, 0], ids_TK[:, 1].where(kept_T | ~away_TK[:, 1], other_T)], 1)
        return ids_TK.where(num_away < limit, bounded_TK)


def _largest(value_T: torch.Tensor, among_T: torch.Tensor, limit: int | torch.Tensor) -> torch.Tensor:
    """[T] bool, the `limit` largest values among those marked, the lower index first among equals."""
    order_T = value_T.masked_fill(~among_T, -torch.inf).sort(descending=True, stable=True).indices
    place_T = torch.empty_like(order_T).scatter(0, order_T, torch.arange(len(order_T), device=order_T.device))
    return among_T & (place_T < limit)


def _deepseek(
    d_model: int, num_experts: int, top_k: int | None = None, *, kept: float, num_groups: int | None = None, **options
) -> TopKRouter:
    """Groups of at least two experts, 8 where E allows, of which a token sees the share `kept`, or what K needs."""
    if num_groups is None:
        num_groups = next(n for n in range(min(8, max(num_experts // 2, 1)), 0, -1) if num_experts % n == 0)
    needed = -(-num_groups * (TopKRouter.own_top_k if top_k is None else top_k) // num_experts)
    top_groups = min(max(math.ceil(kept * num_groups), needed), num_groups)
    return TopKRouter(d_model, num_experts, top_k, **{"num_groups": num_groups, "top_groups": top_groups, **options})


ROUTERS: dict[str, Callable[..., Router]] = {
    "topk": TopKRouter,
    "mixtral": partial(TopKRouter, balance="token", loss_weights={"balance": 1e-3}),
    "olmoe": partial(TopKRouter, balance="token", renormalize=False),
    "qwen3": partial(TopKRouter, balance="token", global_balance=True, loss_weights={"balance": 1e-3}),
    "deepseek-v2": partial(_deepseek, kept=3 / 8, renormalize=False, scale=16.0),
    "deepseek-v3": partial(
        _deepseek,
        kept=4 / 8,
        score="sigmoid",
        group_score="top2",
        scale=2.5,
        bias_rate=1e-3,
        balance="sequence",
        loss_weights={"balance": 1e-4},
    ),
    "noisy-topk": NoisyTopKRouter,
    "switch": SwitchRouter,
    "gshard": GShardRouter,
    "prototype": PrototypeRouter,
    "swipe": SwipeRouter,
    "base": BaseRouter,
    "hash": HashRouter,
    "domain": DomainRouter,
    "expert-choice": ExpertChoiceRouter,
    "token-rounding": TokenRoundingRouter,
    "cosine": CosineRouter,
    "topology": TopologyRouter,
}


def make_router(name: str, d_model: int, num_experts: int, top_k: int | None = None, **options) -> Router:
    """The router of this name. ValueError where there is none or it has no such option."""
    if name not in ROUTERS:
        check.fail("make_router", "name", f"one of {', '.join(ROUTERS)}", repr(name))
    try:
        return ROUTERS[name](d_model, num_experts, top_k, **options)
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        raise ValueError(f"fastmoe.make_router: router {name!r}: {str(error).split(') ')[-1]}") from None


def own_top_k(name: str) -> int:
    """Experts of a token where none are asked for, of the router of this name."""
    maker = ROUTERS[name]
    return getattr(maker.func if isinstance(maker, partial) else maker, "own_top_k", Router.own_top_k)


def parse_options(text: str) -> dict[str, object]:
    """ "noise=0.5, cv=True, second='all'" as keyword arguments. ValueError for anything else."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if call.args or any(word.arg is None for word in call.keywords):
            raise ValueError
        return {word.arg: ast.literal_eval(word.value) for word in call.keywords}
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(f'fastmoe.router_options: must be like "noise=0.5, cv=True", got {text!r}') from None
