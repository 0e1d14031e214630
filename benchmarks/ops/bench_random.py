"""random_uniform against torch.rand, whose generator is one stream. Compared: the first two moments. Bytes: draws."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.ops.harness import Case
from fastmoe import ops


def moments(outputs):
    return [torch.stack([outputs[0].double().pow(power).mean() for power in (1, 2)])]


def case(T: int, N: int) -> Case:
    key = torch.tensor([1, 2, 3])
    return Case(
        f"random_uniform T{T} N{N}",
        {"fastmoe": lambda: [ops.random_uniform(key, 4, T, N)], "torch rand": lambda: [torch.rand(T, N)]},
        exact=lambda: [torch.tensor([1 / 2, 1 / 3])],
        work=4 * T * N,
        roof="triad",
        tolerance=10 / (T * N) ** 0.5,
        compared=moments,
    )


def cases(quick: bool) -> Iterator[Case]:
    for shape in [(128, 6), (128, 16)] if quick else [(8192, 1), (8192, 64), (8192, 1024)]:
        yield case(*shape)
