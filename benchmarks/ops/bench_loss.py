"""linear_cross_entropy forward and backward. FLOPs: 6 T D V, held against the float32 torch.mm rate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import cross_entropy, linear

from benchmarks.ops.harness import TOLERANCE, Case, name_of, with_grads
from fastmoe import ops


def composite(x_TD, weight_VD, targets_T):
    """Logits in the inputs' dtype, the softmax in float32, as trainers do it."""
    logits_TV = linear(x_TD, weight_VD)
    return cross_entropy(logits_TV if logits_TV.dtype == torch.float64 else logits_TV.float(), targets_T)


def case(T: int, D: int, V: int, dtype: torch.dtype) -> Case:
    x_TD, weight_VD = torch.randn(T, D).to(dtype), (torch.randn(V, D) / D**0.5).to(dtype)
    targets_T = torch.randint(0, V, (T,))

    def step(loss, to=dtype):
        one = torch.ones((), dtype=torch.float64 if to == torch.float64 else torch.float32)
        return with_grads(lambda *args: [loss(*args, targets_T)], [x_TD.to(to), weight_VD.to(to)], [one])

    return Case(
        f"forward + backward {name_of(dtype)} T{T} D{D} V{V}",
        {"fastmoe": step(ops.linear_cross_entropy), "torch cross_entropy(linear)": step(composite)},
        exact=step(composite, torch.float64),
        work=6 * T * D * V,
        roof="mm",
        tolerance=TOLERANCE[dtype],
    )


def cases(quick: bool) -> Iterator[Case]:
    for shape in [(64, 32, 100)] if quick else [(16384, 128, 256), (2048, 512, 16384), (1024, 1024, 32768)]:
        for dtype in TOLERANCE:
            yield case(*shape, dtype)
