"""Models of several domains (DEMix): mixing them at inference, adding and removing their experts."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from fastmoe.nn.experts import Experts
from fastmoe.nn.moe import MoE
from fastmoe.nn.router import DomainRouter, Router, RouterInputs, TopKRouter
from fastmoe.nn.transformer import Transformer
from fastmoe.ops import check

_ROWS = ("weight", "noise_weight", "bias_E")


class MixtureOutput(NamedTuple):
    log_probs_BSV: torch.Tensor  # float32, of the token after each position
    posterior_BSD: torch.Tensor  # float32, p(d | x_<=t): the weights of the domains in it


class DomainMixture(nn.Module):
    """The next token's distribution when the domain is not known: p(x | x_<t) = sum_d p(x | x_<t, d) p(d | x_<t).

    p(d | x_<t) is proportional to p(x_<t | d) p(d); of a sequence's first token, which nothing predicts, p(x | d) is 1.
    The model runs once for every domain. model: called as a Transformer, (ids_BS, inputs=RouterInputs) to an output
    with logits_BSV. num_domains: 0..num_domains-1 are mixed; None: all of the model's DomainRouters.

    prior, p(d): "uniform"; "updating", after each call (1 - rate) * prior + rate * posterior, the mean over the call's
    positions, so that calls are to be blocks of one text in order; "cached", the fixed outcome of such updates on other
    text, made by `estimate`. The prior is the buffer log_prior_D. Source: DEMix layers (Gururangan et al., arXiv
    2108.05036); the rate is its code's.
    """

    def __init__(self, model: nn.Module, prior: str = "uniform", num_domains: int | None = None, rate: float = 0.3):
        super().__init__()
        check.option("DomainMixture", "prior", prior, ("uniform", "updating", "cached"))
        if not 0 < rate < 1:
            check.fail("DomainMixture", "rate", "in (0, 1)", rate)
        if num_domains is None:
            found = {module.num_experts for module in model.modules() if isinstance(module, DomainRouter)}
            if len(found) != 1:
                check.fail("DomainMixture", "num_domains", "given for a model without router 'domain'", None)
            (num_domains,) = found
        check.positive("DomainMixture", num_domains=num_domains)
        self.model, self.prior, self.num_domains, self.rate = model, prior, num_domains, rate
        start = math.nan if prior == "cached" else -math.log(num_domains)
        self.register_buffer("log_prior_D", torch.full((num_domains,), start, dtype=torch.float64))

    @torch.no_grad()
    def forward(self, ids_BS: torch.Tensor) -> MixtureOutput:
        """ids_BS: [B, S] integer. ValueError where the cached prior was not estimated."""
        check.tensor("DomainMixture", "ids_BS", ids_BS, (None, None), check.INTS, legend="B, S")
        if self.log_prior_D.isnan().any():
            check.fail("DomainMixture", "the cached prior", "estimated before use (estimate)", "none")
        out = self._mix(ids_BS)
        if self.prior == "updating":
            self._update(out)
        return out

    @torch.no_grad()
    def estimate(self, blocks: Iterable[torch.Tensor]) -> None:
        """Makes the cached prior from held-out ids_BS, in order. ValueError for another prior or no blocks."""
        if self.prior != "cached":
            check.fail("DomainMixture", "prior", "'cached' for an estimate", repr(self.prior))
        self.log_prior_D.fill_(-math.log(self.num_domains))
        empty = True
        for ids_BS in blocks:
            self._update(self._mix(ids_BS))
            empty = False
        if empty:
            self.log_prior_D.fill_(math.nan)
            check.fail("DomainMixture", "blocks", "at least one", 0)

    def _mix(self, ids_BS: torch.Tensor) -> MixtureOutput:
        joint_DBS, mixed_BSV = [], None
        # of log p(x_<=t, d), which may be any number of nats below 0; sums are kept relative to the largest so far
        largest_BS = torch.full(ids_BS.shape, -1e300, dtype=torch.float64, device=ids_BS.device)
        for d, log_prior in enumerate(self.log_prior_D.double()):
            inputs = RouterInputs(domains_T=torch.full((ids_BS.numel(),), d, device=ids_BS.device))
            log_probs_BSV = self.model(ids_BS, inputs=inputs).logits_BSV.float().log_softmax(-1)
            said_BS = log_probs_BSV[:, :-1].gather(-1, ids_BS[:, 1:, None].long())[..., 0].double()
            joint_DBS.append(log_prior + nn.functional.pad(said_BS.cumsum(1), (1, 0)))
            before_BS, largest_BS = largest_BS, torch.maximum(largest_BS, joint_DBS[-1])
            log_probs_BSV += (joint_DBS[-1] - largest_BS).float()[..., None]
            if mixed_BSV is None:
                mixed_BSV = log_probs_BSV
            else:
                mixed_BSV += (before_BS - largest_BS).float()[..., None]
                torch.logaddexp(mixed_BSV, log_probs_BSV, out=mixed_BSV)
        joint_BSD = torch.stack(joint_DBS, -1)
        mixed_BSV -= (joint_BSD.logsumexp(-1) - largest_BS).float()[..., None]
        return MixtureOutput(mixed_BSV, joint_BSD.softmax(-1).float())

    def _update(self, out: MixtureOutput) -> None:
        # in logs: no domain is ever ruled out for good
        log_posterior_D = out.posterior_BSD.double().mean((0, 1)).log()
        kept_D = self.log_prior_D.double() + math.log1p(-self.rate)
        self.log_prior_D.copy_(torch.logaddexp(kept_D, log_posterior_D + math.log(self.rate)))


def add_expert(model: nn.Module, copy_of: int | str | None = None, frozen: bool = False) -> None:
    """One expert more in an MoE layer, or in every one of a model; it comes last.

    copy_of: the expert whose weights it starts with, "mean" for the mean of all, None for a fresh draw (experts that
    are modules: a number only). A router's row for it is made in the same way. The old experts are bit-equal, but all
    experts' weights are new parameters: make a new optimizer. frozen: gradients reach the new expert alone, as in
    DEMix; give that optimizer no weight decay, which moves weights without gradients too. Of a Transformer the config
    follows. ValueError for routers that tie experts to something else: "hash", "prototype", "topology", and groups.
    Source: DEMix layers (Gururangan et al., arXiv 2108.05036).
    """
    layers = _layers("add_expert", model)
    for moe in layers:
        number = isinstance(copy_of, int) and not isinstance(copy_of, bool)
        if not (number and 0 <= copy_of < moe.num_experts) and copy_of not in (None, "mean"):
            check.fail("add_expert", "copy_of", f"in 0..{moe.num_experts - 1}, 'mean' or None", repr(copy_of))
        if not number and not isinstance(moe.experts, Experts):
            check.fail("add_expert", "copy_of", "a number where experts are modules", repr(copy_of))
    if frozen:
        model.requires_grad_(False)
    for moe in layers:
        fresh = None
        if copy_of is None and any(_rows(moe.router)):
            fresh = copy.deepcopy(moe.router)
            fresh.num_experts = 1
            fresh._make_parameters(moe.d_model**-0.5)
        for name, rows in _rows(moe.router):
            if copy_of is None:
                new = rows.new_zeros(1) if name == "bias_E" else getattr(fresh, name).detach().to(rows)
            else:
                new = rows.detach().mean(0, keepdim=True) if copy_of == "mean" else rows.detach()[copy_of, None]
            _replace(moe.router, name, torch.cat([rows.detach(), new]))
        moe.experts.add(copy_of, frozen)
        moe.num_experts = moe.router.num_experts = moe.num_experts + 1
    _resize_config(model, 1)


def remove_expert(model: nn.Module, index: int) -> None:
    """Takes expert `index` out of an MoE layer, or of every one of a model; those after it move down by one.

    The others are bit-equal, but all experts' weights are new parameters: make a new optimizer. Of a Transformer the
    config follows. ValueError for the last expert, where fewer than top_k would stay, and as add_expert.
    """
    layers = _layers("remove_expert", model)
    for moe in layers:
        if not 0 <= index < moe.num_experts:
            check.fail("remove_expert", "index", f"in 0..{moe.num_experts - 1}", index)
        if moe.num_experts <= moe.router.top_k:
            check.fail("remove_expert", "model", f"of more than {moe.router.top_k} experts (top_k)", moe.num_experts)
    for moe in layers:
        for name, rows in _rows(moe.router):
            _replace(moe.router, name, torch.cat([rows.detach()[:index], rows.detach()[index + 1 :]]))
        moe.experts.remove(index)
        moe.num_experts = moe.router.num_experts = moe.num_experts - 1
    _resize_config(model, -1)


def _layers(op: str, model: nn.Module) -> list[MoE]:
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers:
        check.fail(op, "model", "an MoE layer or a model with some", type(model).__name__)
    for moe in layers:
        groups = moe.router.gate_options["num_groups"] if isinstance(moe.router, TopKRouter) else 1
        if not moe.router.resizable or groups > 1:
            got = type(moe.router).__name__ + (f" with {groups} groups" if groups > 1 else "")
            check.fail(op, "model", "of routers that are resizable, without groups", got)
    return layers


def _rows(router: Router) -> list[tuple[str, torch.Tensor]]:
    """What has a row for each expert."""
    found = ((name, getattr(router, name, None)) for name in _ROWS)
    return [(name, rows) for name, rows in found if rows is not None]


def _replace(module: nn.Module, name: str, value: torch.Tensor) -> None:
    old = getattr(module, name)
    setattr(module, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


def _resize_config(model: nn.Module, by: int) -> None:
    if isinstance(model, Transformer):
        model.config = replace(model.config, num_experts=model.config.num_experts + by)
