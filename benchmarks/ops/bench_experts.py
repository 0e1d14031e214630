"""moe_mlp, one full step (forward and backward). FLOPs: 18 T K D F, held against the float32 torch.mm rate.

Shapes T, D, F, E, K: A few wide experts, B more narrow ones, C many small ones. Routing uniform and Zipf (exponent 1).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import grouped_mm, linear, silu

from benchmarks.ops.harness import TOLERANCE, Case, name_of, topk_ids, with_grads
from fastmoe import ops

SHAPES = {"A": (4096, 512, 1024, 32, 2), "B": (2048, 512, 256, 32, 4), "C": (2048, 256, 128, 256, 8)}


def swiglu(z_R2F):
    gate_RF, up_RF = z_R2F.chunk(2, dim=1)
    return silu(gate_RF) * up_RF


def loop(x_RD, counts_E, gate_up_proj, down_proj):
    parts = zip(x_RD.split(counts_E.tolist()), gate_up_proj.unbind(), down_proj.unbind())
    return torch.cat([linear(swiglu(linear(x, gate_up)), down) for x, gate_up, down in parts])


def grouped(x_RD, counts_E, gate_up_proj, down_proj):
    ends_E = counts_E.cumsum(0).int()
    act_RF = swiglu(grouped_mm(x_RD, gate_up_proj.transpose(1, 2), offs=ends_E))
    return grouped_mm(act_RF, down_proj.transpose(1, 2), offs=ends_E)


def composite(experts):
    """Sort by expert, `experts` on the sorted rows, weigh and add up: torch alone."""

    def layer(x_TD, ids_TK, weights_TK, gate_up_proj, down_proj):
        order_R = ids_TK.view(-1).argsort(stable=True)
        token_R = order_R // ids_TK.shape[1]
        counts_E = torch.bincount(ids_TK.view(-1), minlength=gate_up_proj.shape[0])
        y_RD = experts(x_TD.index_select(0, token_R), counts_E, gate_up_proj, down_proj)
        return torch.zeros_like(x_TD).index_add(0, token_R, y_RD * weights_TK.view(-1)[order_R, None])

    return layer


def in_float32(layer):
    return lambda x, ids, *rest: layer(x.float(), ids, *(tensor.float() for tensor in rest)).to(x.dtype)


def case(name: str, T: int, D: int, F: int, E: int, K: int, routed: str, dtype: torch.dtype) -> Case:
    ids_TK = topk_ids(T, K, E, zipf=1.0 if routed == "Zipf" else 0.0)
    drawn = torch.randn(T, D), torch.rand(T, K), torch.randn(E, 2 * F, D) / D**0.5, torch.randn(E, D, F) / F**0.5
    inputs, dy_TD = [tensor.to(dtype) for tensor in drawn], torch.randn(T, D).to(dtype)

    def step(layer, to=dtype):
        return with_grads(lambda x, *rest: [layer(x, ids_TK, *rest)], [t.to(to) for t in inputs], [dy_TD.to(to)])

    arms = {"fastmoe": step(ops.moe_mlp), "torch grouped_mm": step(composite(grouped))}
    if dtype == torch.float32:
        arms["torch loop over experts"] = step(composite(loop))
    else:
        arms["torch grouped_mm in float32"] = step(in_float32(composite(grouped)))
        arms["torch loop in float32"] = step(in_float32(composite(loop)))
    return Case(
        f"{name} {name_of(dtype)} {routed} T{T} D{D} F{F} E{E} K{K}",
        arms,
        exact=step(composite(loop), torch.float64),
        work=18 * T * K * D * F,
        roof="mm",
        tolerance=TOLERANCE[dtype],
    )


def cases(quick: bool) -> Iterator[Case]:
    for name, shape in ({"tiny": (64, 64, 32, 8, 2)} if quick else SHAPES).items():
        for routed in ("uniform", "Zipf"):
            for dtype in TOLERANCE:
                yield case(name, *shape, routed, dtype)
