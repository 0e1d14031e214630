"""rms_norm forward and backward. Bytes: x read and y written, then x and dy read and dx written."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import rms_norm

from benchmarks.ops.harness import TOLERANCE, Case, name_of, with_grads
from fastmoe import ops


def torch_norm(x_TD, weight_D):
    return rms_norm(x_TD, weight_D.shape, weight_D, 1e-6)


def case(T: int, D: int, dtype: torch.dtype) -> Case:
    x_TD, weight_D, dy_TD = (torch.randn(shape).to(dtype) for shape in ((T, D), (D,), (T, D)))

    def step(norm, to=dtype):
        return with_grads(lambda *args: [norm(*args)], [x_TD.to(to), weight_D.to(to)], [dy_TD.to(to)])

    return Case(
        f"forward + backward {name_of(dtype)} T{T} D{D}",
        {"fastmoe": step(ops.rms_norm), "torch rms_norm": step(torch_norm)},
        exact=step(torch_norm, torch.float64),
        work=5 * T * D * dtype.itemsize,
        roof="triad",
        tolerance=TOLERANCE[dtype],
    )


def cases(quick: bool) -> Iterator[Case]:
    for shape in [(64, 48)] if quick else [(4096, 128), (8192, 512), (8192, 2048)]:
        for dtype in TOLERANCE:
            yield case(*shape, dtype)
