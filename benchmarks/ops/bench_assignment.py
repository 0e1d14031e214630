"""balanced_assignment against scipy's exact assignment, where that ends in time, and swipe against its reference.

Bytes: scores read and ids written; ids read and written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.ops.harness import Case, topk_ids
from fastmoe import ops, testing


def reference(call):
    def run():
        with testing.backend("reference"):
            return call()

    return run


def assignment_case(T: int, E: int, exact: bool) -> Case:
    """Compared: the total score."""
    scores_TE = torch.randn(T, E)

    def scipy():
        from scipy.optimize import linear_sum_assignment

        columns = linear_sum_assignment(scores_TE.double().repeat_interleave(T // E, dim=1).numpy(), maximize=True)[1]
        return [torch.from_numpy(columns) // (T // E)]

    total = lambda ids: [scores_TE.double().gather(1, ids[0][:, None]).sum()]
    call = lambda: [ops.balanced_assignment(scores_TE)]
    arms = {"fastmoe": call, "reference": reference(call)}
    return Case(
        f"balanced_assignment T{T} E{E}",
        {**arms, "scipy": scipy} if exact else arms,
        exact=lambda: total((scipy if exact else call)()),
        work=4 * T * E + 8 * T,
        roof="triad",
        tolerance=1e-3,
        compared=total,
        left_out={} if exact else {"scipy": "takes minutes"},
    )


def swipe_case(T: int, K: int, W: int, E: int) -> Case:
    ids_WTK = [topk_ids(T, K, E, zipf=0.5) for _ in range(W)]
    counts_WWK = torch.stack(
        [(ids_TK[None] // (E // W) == torch.arange(W)[:, None, None]).sum(1) for ids_TK in ids_WTK]
    )
    call = lambda: [ops.swipe(ids_WTK[W - 1], counts_WWK, W - 1, E // W)]
    arms = {"fastmoe": call, "reference": reference(call)}
    return Case(f"swipe T{T} K{K} W{W} E{E}", arms, reference(call), work=16 * T * K, roof="triad", tolerance=0)


def cases(quick: bool) -> Iterator[Case]:
    for shape in [(64, 8, True)] if quick else [(2048, 16, True), (8192, 64, False), (16384, 128, False)]:
        yield assignment_case(*shape)
    for shape in [(64, 2, 4, 8)] if quick else [(8192, 2, 8, 64), (65536, 2, 8, 256)]:
        yield swipe_case(*shape)
