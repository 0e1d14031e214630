"""The peers of moe_mlp, each with one signature: layer(x_TD, ids_TK, weights_TK, gate_up_proj, down_proj) -> y_TD.

gate_up_proj: [E, 2F, D], gate rows first. down_proj: [E, D, F]. Activation silu(gate) * up, differentiable in all but
the ids. A peer is used where it can be imported; `arms` says why the others are left out. ScatterMoE (0.3.0), Liger
(liger-kernel 0.8.5) and SonicMoE (sonic-moe 0.1.2.post1) need a GPU and have never run on one.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch.nn.functional import grouped_mm, linear, silu

from benchmarks.machine import free_bytes

Layer = Callable[..., torch.Tensor]
HALVES = (torch.bfloat16, torch.float16)
ALL = (torch.float32, *HALVES)


class Shape(NamedTuple):
    """T tokens of width D, E experts of width F, K of them a token."""

    T: int
    D: int
    F: int
    E: int
    K: int


@dataclass(frozen=True)
class Peer:
    """name: as results show it. package: the module it needs. unfit: why it is not run at a shape, dtype and device, or
    None.
    """

    name: str
    layer: Layer
    dtypes: tuple[torch.dtype, ...] = ALL
    devices: tuple[str, ...] = ("cpu", "cuda")
    package: str = "torch"
    unfit: Callable[[Shape, torch.dtype, str], str | None] = lambda shape, dtype, device: None


def arms(shape: Shape, dtype: torch.dtype, device: str) -> tuple[dict[str, Layer], dict[str, str]]:
    """The peers that can run here at this shape, and why each other one cannot, both by name."""
    found, left_out = {}, {}
    for peer in PEERS:
        reason = _missing(peer, dtype, device) or peer.unfit(shape, dtype, device)
        if reason:
            left_out[peer.name] = reason
        else:
            found[peer.name] = peer.layer
    return found, left_out


def _missing(peer: Peer, dtype: torch.dtype, device: str) -> str | None:
    if device not in peer.devices:
        return f"runs on {', '.join(peer.devices)} only"
    if dtype not in peer.dtypes:
        return f"does not serve {dtype}"
    try:
        importlib.import_module(peer.package)
    except ImportError as error:
        return f"cannot be imported: {error}"
    return None


def in_float32(layer: Layer) -> Layer:
    """The layer on float32 copies made at each call."""
    return lambda x, ids, *rest: layer(x.float(), ids, *(tensor.float() for tensor in rest)).to(x.dtype)


def swiglu(z_R2F: torch.Tensor) -> torch.Tensor:
    gate_RF, up_RF = z_R2F.chunk(2, dim=1)
    return silu(gate_RF) * up_RF


def loop(x_RD: torch.Tensor, counts_E: torch.Tensor, gate_up_proj: torch.Tensor, down_proj: torch.Tensor):
    """Rows sorted by expert through their experts, one expert after the other."""
    parts = zip(x_RD.split(counts_E.tolist()), gate_up_proj.unbind(), down_proj.unbind())
    return torch.cat([linear(swiglu(linear(x, gate_up)), down) for x, gate_up, down in parts])


def _grouped(x_RD, counts_E, gate_up_proj, down_proj):
    ends_E = counts_E.cumsum(0).int()
    act_RF = swiglu(grouped_mm(x_RD, gate_up_proj.transpose(1, 2), offs=ends_E))
    return grouped_mm(act_RF, down_proj.transpose(1, 2), offs=ends_E)


def _composite(experts: Callable[..., torch.Tensor]) -> Layer:
    """Sort by expert, `experts` on the sorted rows, weigh and add up: torch alone."""

    def layer(x_TD, ids_TK, weights_TK, gate_up_proj, down_proj):
        order_R = ids_TK.view(-1).argsort(stable=True)
        token_R = order_R // ids_TK.shape[1]
        counts_E = torch.bincount(ids_TK.view(-1), minlength=gate_up_proj.shape[0])
        y_RD = experts(x_TD.index_select(0, token_R), counts_E, gate_up_proj, down_proj)
        return torch.zeros_like(x_TD).index_add(0, token_R, y_RD * weights_TK.view(-1)[order_R, None])

    return layer


@cache
def _mixtral(E: int, D: int, F: int, implementation: str) -> torch.nn.Module:
    """Mixtral's experts without memory of their own."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E)
    config._experts_implementation = implementation
    with torch.device("meta"):
        return MixtralExperts(config)


def _transformers(implementation: str) -> Layer:
    def layer(x_TD, ids_TK, weights_TK, gate_up_proj, down_proj):
        E, D, F = down_proj.shape
        weights = {"gate_up_proj": gate_up_proj, "down_proj": down_proj}
        module = _mixtral(E, D, F, implementation)
        return torch.func.functional_call(module, weights, (x_TD, ids_TK, weights_TK))

    return layer


def _gathers_weights(shape: Shape, dtype: torch.dtype, device: str) -> str | None:
    if dtype != torch.float32:
        return f"adds up the gradients of a weight's copies in {dtype}, too far from float64"
    T, D, F, _, K = shape
    needed, free = 2 * T * K * 3 * D * F * 4, free_bytes(device)  # a copy for every slot, and its gradient
    return f"takes {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free" if needed > 0.6 * free else None


def _writes_whole_gradients(shape: Shape, dtype: torch.dtype, device: str) -> str | None:
    _, D, F, E, _ = shape
    written = E * E * 3 * D * F * dtype.itemsize  # the whole gradient once an expert
    most = 200e9 if device == "cpu" else 20e12
    return f"its backward writes {written / 1e9:,.0f} GB of gradients a step" if written > most else None


def _scattermoe(x_TD, ids_TK, weights_TK, gate_up_proj, down_proj):
    from scattermoe import flatten_sort_count, parallel_linear

    E, K = gate_up_proj.shape[0], ids_TK.shape[1]
    sorted_by = flatten_sort_count(ids_TK, num_experts=E)
    z_R2F = parallel_linear(x_TD, gate_up_proj.transpose(1, 2), K, *sorted_by, grouped_out=True)
    return parallel_linear(swiglu(z_R2F), down_proj.transpose(1, 2), 1, *sorted_by, gates=weights_TK, grouped_in=True)


def _liger(x_TD, ids_TK, weights_TK, gate_up_proj, down_proj):
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x_TD, gate_up_proj, down_proj, ids_TK.int(), weights_TK)


def _sonicmoe(x_TD, ids_TK, weights_TK, gate_up_proj, down_proj):
    from sonicmoe import moe_general_routing_inputs
    from sonicmoe.enums import ActivationType

    T, K = ids_TK.shape
    token_R = torch.arange(T, device=x_TD.device, dtype=torch.int32).repeat_interleave(K, output_size=T * K)
    return moe_general_routing_inputs(
        x_TD,
        weights_TK.reshape(-1),
        token_R,
        ids_TK.reshape(-1).int(),
        gate_up_proj.permute(1, 2, 0),
        None,
        down_proj.permute(1, 2, 0),
        None,
        E=gate_up_proj.shape[0],
        stream_id=None,
        activation_type=ActivationType.SWIGLU,
        concat_layout=True,
    )[0]


PEERS = (
    Peer("torch loop", _composite(loop)),
    Peer("torch grouped_mm", _composite(_grouped)),
    Peer("transformers grouped_mm", _transformers("grouped_mm"), package="transformers"),
    Peer("transformers batched_mm", _transformers("batched_mm"), package="transformers", unfit=_gathers_weights),
    Peer("transformers eager", _transformers("eager"), package="transformers", unfit=_writes_whole_gradients),
    Peer("ScatterMoE", _scattermoe, HALVES, ("cuda",), "scattermoe"),
    Peer("Liger", _liger, HALVES, ("cuda",), "liger_kernel.ops.fused_moe"),
    Peer("SonicMoE", _sonicmoe, HALVES, ("cuda",), "sonicmoe"),
)
