"""C++ on the CPU: csrc/cpu/gating.cpp."""

from __future__ import annotations

import torch

from fastmoe.native import _C, dtype_code, empty, num_threads, ptr


def topk_gate(logits_TE, bias_E, k, score, renormalize, num_groups, top_groups, group_score, scale):
    logits_TE = logits_TE.contiguous()
    bias_E = None if bias_E is None else bias_E.contiguous()
    (T, E), threads = logits_TE.shape, num_threads()
    weights_TK, ids_TK, probs_TE = torch.empty(T, k), torch.empty(T, k, dtype=torch.int64), empty(T, E)
    load_E = torch.empty(E, dtype=torch.int64)
    workspace = torch.empty(_C.topk_gate_workspace(E, threads))
    _C.topk_gate(
        ptr(logits_TE),
        ptr(bias_E),
        T,
        E,
        k,
        dtype_code(logits_TE),
        score == "sigmoid",
        renormalize,
        num_groups,
        top_groups,
        group_score == "top2",
        scale,
        ptr(weights_TK),
        ptr(ids_TK),
        ptr(probs_TE),
        ptr(load_E),
        ptr(workspace),
        threads,
    )
    return weights_TK, ids_TK, probs_TE, load_E


def topk_gate_backward(dweights_TK, dprobs_TE, topk_ids_TK, probs_TE, score, renormalize, scale):
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
        scale,
        ptr(dlogits_TE),
        num_threads(),
    )
    return dlogits_TE
