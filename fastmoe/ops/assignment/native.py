"""C++ on the CPU: csrc/cpu/assignment.cpp."""

import torch

from fastmoe.native import _C, num_threads, ptr, workspace


def balanced_assignment(scores_TE):
    scores_TE = scores_TE.float().contiguous()
    T, E = scores_TE.shape
    ids_T = torch.empty(T, dtype=torch.int64)
    memory = workspace(_C.balanced_assignment_workspace(T, E))
    _C.balanced_assignment(ptr(scores_TE), T, E, ptr(ids_T), ptr(memory), num_threads())
    return ids_T


def swipe(topk_ids_TK, counts_WWK, rank, experts_per_rank):
    chosen_TK, counts_WWK = topk_ids_TK.contiguous(), counts_WWK.contiguous()
    (T, K), W = chosen_TK.shape, counts_WWK.shape[0]
    ids_TK = torch.empty(T, K, dtype=torch.int64)
    _C.swipe(
        ptr(chosen_TK),
        chosen_TK.dtype == torch.int64,
        ptr(counts_WWK),
        T,
        K,
        W,
        rank,
        experts_per_rank,
        ptr(ids_TK),
        ptr(workspace(8 * _C.swipe_workspace(W, K, experts_per_rank))),
    )
    return ids_TK
