"""Assignment: tokens to experts or workers, each of which takes an exact number of them."""

from __future__ import annotations

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import define


def balanced_assignment(scores_TE: torch.Tensor) -> torch.Tensor:
    """The expert of each token, [T] int64, T / E tokens an expert, of nearly the largest total score.

    scores_TE: [T, E] float, T a multiple of E. The total is within T * (max - min of the scores) * 2e-5 of the
    largest possible. Deterministic, the same ids on every backend; equal scores go to the lower expert and the lower
    token. On a GPU the host waits for the device. Not differentiable.

    Errors: ValueError for a T that E does not divide and for scores that are not finite. Source: the auction for
    similar objects with epsilon scaling (Bertsekas and Castanon, 1989), for BASE layers (Lewis et al., arXiv
    2103.16716).

    Example: scores [[5, 4], [9, 1], [8, 2], [7, 6]] -> [1, 0, 0, 1].
    """
    op = "balanced_assignment"
    check.tensor(op, "scores_TE", scores_TE, (None, None), legend="T, E")
    T, E = scores_TE.shape
    check.positive(op, num_experts=E)
    if T % E:
        check.fail(op, "T", f"a multiple of {E} (experts)", T)
    return _balanced_assignment(scores_TE)


def swipe(topk_ids_TK: torch.Tensor, counts_WWK: torch.Tensor, rank: int, experts_per_rank: int) -> torch.Tensor:
    """Moves choices from workers that have their share to workers with room: [T, K] int64, no slot is dropped.

    topk_ids_TK: [T, K] int32 or int64, what the tokens of this rank chose of W * experts_per_rank experts; -1 chooses
    nothing and stays. counts_WWK: [W, W, K] int64 of all ranks, the same everywhere: [s, w, j] tokens of rank s have
    worker w's experts as choice j. A worker has room for as many slots as its own tokens choose, T * K, and is the
    target of exactly so many afterwards.

    Round j of K: each worker grants its tokens to ranks 0, 1, ... while there is room; what is left over of ranks 0, 1,
    ... goes to the workers 0, 1, ... that have room. On its rank the first tokens keep their choice, the others get
    expert j % experts_per_rank of their new worker, in order of both. Not differentiable; no host sync.

    Errors (the last two on the CPU): ValueError for a rank outside 0..W-1, ids outside -1..E-1 and counts below 0 or,
    of this rank, other than those of the ids. Source: SWIPE in BaGuaLu (Ma et al., PPoPP 2022).

    Example of 2 ranks with 2 experts: ids [[0, 1], [0, 2], [1, 0]] and [[0, 1], [1, 3], [0, 2]] become [[0, 3], [0, 2],
    [1, 3]] and [[0, 3], [1, 3], [0, 2]].
    """
    check.tensor("swipe", "topk_ids_TK", topk_ids_TK, (None, None), check.INTS, legend="T, K")
    check.tensor("swipe", "counts_WWK", counts_WWK, (None, None, None), (torch.int64,), topk_ids_TK, "W, W, K")
    K, W = topk_ids_TK.shape[1], counts_WWK.shape[0]
    check.positive("swipe", K=K, W=W, experts_per_rank=experts_per_rank)
    check.tensor("swipe", "counts_WWK", counts_WWK, (W, W, K), (torch.int64,), legend="W, W, K")
    if not 0 <= rank < W:
        check.fail("swipe", "rank", f"in 0..{W - 1}", rank)
    return _swipe(topk_ids_TK, counts_WWK, rank, experts_per_rank)


_balanced_assignment = define(
    "assignment",
    "balanced_assignment(Tensor scores_TE) -> Tensor",
    fake=lambda scores_TE: scores_TE.new_empty(scores_TE.shape[:1], dtype=torch.int64),
)
_swipe = define(
    "assignment",
    "swipe(Tensor topk_ids_TK, Tensor counts_WWK, int rank, int experts_per_rank) -> Tensor",
    fake=lambda topk_ids_TK, counts_WWK, rank, experts_per_rank: topk_ids_TK.new_empty(
        topk_ids_TK.shape, dtype=torch.int64
    ),
)
