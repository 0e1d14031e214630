"""linear, one full step (forward and backward). FLOPs: 6 T I O, held against the float32 torch.mm rate.

The shapes: the experts' up-projection as one dense layer, a fused qkv projection, a router, a square layer of a big
model, and the decoding of one token (forward alone, 2 T I O).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear

from benchmarks.ops.harness import TOLERANCE, Case, name_of, with_grads
from fastmoe import ops

SHAPES = [(4096, 512, 1024), (2048, 128, 384), (2048, 512, 64), (1024, 4096, 4096)]


def in_float32(x_TI, weight_OI):
    return linear(x_TI.float(), weight_OI.float()).to(x_TI.dtype)


def case(T: int, inputs: int, outputs: int, dtype: torch.dtype, backward: bool = True) -> Case:
    x_TI, weight_OI = torch.randn(T, inputs).to(dtype), (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    dy_TO = torch.randn(T, outputs).to(dtype)

    def step(layer, to=dtype):
        leaves = [x_TI.to(to), weight_OI.to(to)]
        if not backward:
            return lambda: [layer(*leaves)]
        return with_grads(lambda *args: [layer(*args)], leaves, [dy_TO.to(to)])

    arms = {"fastmoe": step(ops.linear), "torch linear": step(linear)}
    if dtype != torch.float32:
        arms["torch linear in float32"] = step(in_float32)
    return Case(
        f"forward {'+ backward ' * backward}{name_of(dtype)} T{T} I{inputs} O{outputs}",
        arms,
        exact=step(linear, torch.float64),
        work=(6 if backward else 2) * T * inputs * outputs,
        roof="mm",
        tolerance=TOLERANCE[dtype],
    )


def cases(quick: bool) -> Iterator[Case]:
    for dtype in TOLERANCE:
        for shape in [(64, 32, 48)] if quick else SHAPES:
            yield case(*shape, dtype)
        yield case(1, *((32, 48) if quick else (1024, 1024)), dtype, backward=False)
