"""How the cost of moe_mlp, one full step in float32 on the CPU, goes with experts, tokens and skew.

experts: E grows, all else is fixed, so the work is too. slices: E grows and F falls, the experts' size together is
fixed. Both once with sparse gradients, and once with dense ones beside torch's grouped_mm. tokens: T grows. skew:
routing from uniform to all to one expert. Weights lie in huge pages, as those of fastmoe.nn.Experts do, for every arm.
Every case says how many bytes of weights and gradients no layer can avoid: those of experts with tokens, read forward,
read backward, written once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from benchmarks import peers
from benchmarks.machine import free_bytes
from benchmarks.ops.bench_experts import Problem, draw_ids
from benchmarks.ops.harness import Case, topk_ids
from benchmarks.peers import Shape
from fastmoe import ops

EXPERTS = (64, 256, 1024, 4096, 16384, 32768, 65536)
SLICES = (64, 512, 4096, 32768, 65536)
TOKENS = (16, 64, 256, 1024, 4096, 16384)
SKEWS = (0.0, 0.5, 1.0, 1.5)


def sparse(*args: torch.Tensor) -> torch.Tensor:
    return ops.moe_mlp(*args, sparse_grads=True)


def memory(needed: float, free: float) -> str:
    return f"needs {needed / 2**30:.0f} GiB, {free / 2**30:.0f} are free"


def case(
    sweep: str, axis: str, at: float | str, shape: Shape, ids_TK: torch.Tensor | None = None, alone: bool = False
) -> Case:
    """One point of a sweep. alone: the op with sparse gradients and no other arm, whose memory would take the place of
    what the op keeps for its next call.
    """
    T, D, F, E, K = shape
    over_experts = axis == "E"
    labels = {"sweep": sweep, "axis": axis, "at": at}
    name = f"{sweep} {axis} {at}: T{T} D{D} F{F} E{E} K{K}"
    weights = 4 * 3 * D * F * E
    touched = weights * (1 - math.exp(-T * K / E)) if over_experts else weights
    needed, free = weights + 3 * touched + 2**30, 0.9 * free_bytes()  # gradients once in float32, once in float64
    needed += 0 if alone else 2 * weights + touched  # dense gradients, and those that fastmoe keeps for its next call
    if needed > free:
        return Case(name, {}, list, 1, "mm", labels=labels, left_out={"fastmoe": memory(needed, free)})
    problem = Problem(shape, topk_ids(T, K, E) if ids_TK is None else ids_TK, huge_pages=True)
    arms = {"fastmoe": problem.step(sparse if alone else ops.moe_mlp)}
    if not alone:
        found, _ = peers.arms(shape, torch.float32, "cpu")
        arms["torch grouped_mm"] = problem.step(found["torch grouped_mm"])
    return Case(
        name,
        arms,
        problem.exact,
        work=18 * T * K * D * F,
        roof="mm",
        compared=problem.compared,
        labels={**labels, "touched_bytes": 3 * 4 * 3 * D * F * len(problem.touched)},
    )


def cases(quick: bool) -> Iterator[Case]:
    for alone in (True, False):
        for E in (8, 256) if quick else EXPERTS:
            shape = Shape(64, 32, 16, E, 2) if quick else Shape(16384, 128, 64, E, 2)
            yield case("experts_sparse" if alone else "experts", "E", E, shape, alone=alone)
        for E in (8, 64) if quick else SLICES:
            shape = Shape(64, 32, 512 // E, E, 2) if quick else Shape(2048, 128, (1 << 19) // E, E, 2)
            yield case("slices_sparse" if alone else "slices", "E", E, shape, alone=alone)
    for T in (1, 32) if quick else TOKENS:
        yield case("tokens", "T", T, Shape(T, 32, 16, 8, 2) if quick else Shape(T, 512, 256, 32, 4))
    shape = Shape(64, 32, 16, 8, 2) if quick else Shape(2048, 512, 256, 32, 4)
    for zipf in SKEWS:
        yield case("skew", "Zipf exponent", zipf, shape, topk_ids(shape.T, shape.K, shape.E, zipf))
    yield case("skew", "Zipf exponent", "all-to-one", shape, draw_ids(shape, "all-to-one", "cpu"))
