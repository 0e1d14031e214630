"""Norms forward and backward. Bytes: x read and y written, then x and dy read and dx written; with a residual also that
read and the sum written, then the sum's gradient read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import layer_norm, rms_norm

from benchmarks.ops.harness import TOLERANCE, Case, name_of, with_grads
from fastmoe import ops


def torch_norm(x_TD, weight_D):
    return rms_norm(x_TD, weight_D.shape, weight_D, 1e-6)


def torch_layer_norm(x_TD, weight_D):
    return layer_norm(x_TD, weight_D.shape, weight_D, eps=1e-5)


def torch_add_norm(x_TD, residual_TD, weight_D):
    sum_TD = x_TD + residual_TD
    return torch_norm(sum_TD, weight_D), sum_TD


KINDS = {  # ours, torch's name and function, inputs of [T, D], rows of D read and written
    "rms_norm": (ops.rms_norm, "torch rms_norm", torch_norm, 1, 5),
    "layer_norm": (ops.layer_norm, "torch layer_norm", torch_layer_norm, 1, 5),
    "add_rms_norm": (ops.add_rms_norm, "torch add, rms_norm", torch_add_norm, 2, 8),
}


def case(kind: str, T: int, D: int, dtype: torch.dtype) -> Case:
    ours, name, theirs, rows, moved = KINDS[kind]
    *xs, weight_D = (torch.randn(shape).to(dtype) for shape in (*[(T, D)] * rows, (D,)))
    grads = [torch.randn(T, D).to(dtype) for _ in range(rows)]

    def step(norm, to=dtype):
        def call(*args):
            got = norm(*args)
            return [got] if isinstance(got, torch.Tensor) else list(got)

        return with_grads(call, [x.to(to) for x in (*xs, weight_D)], [grad.to(to) for grad in grads])

    return Case(
        f"{kind} forward + backward {name_of(dtype)} T{T} D{D}",
        {"fastmoe": step(ours), name: step(theirs)},
        exact=step(theirs, torch.float64),
        work=moved * T * D * dtype.itemsize,
        roof="triad",
        tolerance=TOLERANCE[dtype],
    )


def cases(quick: bool) -> Iterator[Case]:
    for kind in KINDS:
        for shape in [(64, 48)] if quick else [(4096, 128), (8192, 512), (8192, 2048)]:
            for dtype in TOLERANCE:
                yield case(kind, *shape, dtype)
