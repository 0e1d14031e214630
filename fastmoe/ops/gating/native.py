"""C++ on the CPU: csrc/cpu/gating.cpp."""

from __future__ import annotations

import torch

from fastmoe.native import _C, dtype_code, empty, num_threads, ptr


def topk_gate(logits_TE, k, score, renormalize):
    logits_TE = logits_TE.contiguous()
    (T, E), threads = logits_TE.shape, num_threads()
    weights_TK, ids_TK, probs_TE = torch.empty(T, k), torch.empty(T, k, dtype=torch.int64), empty(T, E)
    workspace = torch.empty(_C.topk_gate_workspace(E, threads))
    _C.topk_gate(
        ptr(logits_TE),
        T,
        E,
        k,
        dtype_code(logits_TE),
        score == "sigmoid",
        renormalize,
        ptr(weights_TK),
        ptr(ids_TK),
        ptr(probs_TE),
        ptr(workspace),
        threads,
    )
    return weights_TK, ids_TK, probs_TE


def topk_gate_backward(dweights_TK, dprobs_TE, topk_ids_TK, probs_TE, score, renormalize):
    dweights_TK, dprobs_TE, probs_TE = (tensor.float().contiguous() for tensor in (dweights_TK, dprobs_TE, probs_TE))
    ids_TK = topk_ids_TK.contiguous()
    (T, E), K = probs_TE.shape, ids_TK.shape[1]
    dlogits_TE = empty(T, E)
    _C.topk_gate_backward(
        ptr(dweights_TK),
        ptr(dprobs_TE),
        ptr(ids_TK),
        ptr(probs_TE),
        T,
        E,
        K,
        score == "sigmoid",
        renormalize,
        ptr(dlogits_TE),
        num_threads(),
    )
    return dlogits_TE
