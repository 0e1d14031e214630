"""One Adafactor step over a list of matrices.

Bytes: weight read and written, gradient read, each once; a matrix that leaves the cache between the passes over it is
read up to three times. Held against an update in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.ops.harness import TOLERANCE, Case, name_of
from fastmoe.optim import Adafactor


def case(count: int, shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    # weights of the size of one update, so that an error in the update shows
    start, grads = ([(scale * torch.randn(shape)).to(dtype) for _ in range(count)] for scale in (1e-5, 1.0))

    def step(optimizer, **options):
        params = [tensor.clone().requires_grad_() for tensor in start]
        for param, grad in zip(params, grads):
            param.grad = grad
        made = optimizer(params, eps=(1e-30, 1e-3), **options)

        def call():
            made.step()
            return params

        return call

    def first_step():
        """From zero states, where the means of G^2 are what they hold; weights below eps take the least step, 1e-5."""
        exact = []
        for param, grad in zip(start, grads):
            g = grad.double()
            row, column = g.square().mean(-1, keepdim=True), g.square().mean(-2, keepdim=True)
            update = g * (row.mean(-2, keepdim=True) / row / column).sqrt()
            excess = update.square().mean((-2, -1), keepdim=True).sqrt().clamp(min=1)
            exact.append(param.double() - 1e-5 * update / excess)
        return exact

    arms, left_out = {"fastmoe": step(Adafactor)}, {}
    if len(shape) == 2:
        arms["torch foreach"] = step(torch.optim.Adafactor, lr=1e-2, foreach=True)
    else:
        left_out["torch foreach"] = "scales and clips a stack of matrices as one"
    elements = count * torch.Size(shape).numel()
    name = " x ".join(map(str, shape))
    return Case(
        f"{name_of(dtype)} {count:,} of {name}",
        arms,
        exact=first_step,
        work=3 * dtype.itemsize * elements,
        roof="update",
        tolerance=TOLERANCE[dtype],
        left_out=left_out,
    )


def cases(quick: bool) -> Iterator[Case]:
    shapes = [(3, (20, 30)), (2, (3, 8, 9))] if quick else [(40, (1250, 1000)), (1000, (128, 256)), (8, (64, 256, 256))]
    for count, shape in shapes:
        for dtype in TOLERANCE:
            yield case(count, shape, dtype)
