"""Gating: router logits to the K experts of each token and their weights."""

from __future__ import annotations

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import define

SCORES = ("softmax", "sigmoid")


def topk_gate(
    logits_TE: torch.Tensor, k: int, score: str = "softmax", renormalize: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores the experts, picks the best k of each token and weighs them.

    logits_TE: [T, E] float. score: "softmax" over the E experts or "sigmoid" of each. renormalize: divide a token's k
    weights by their sum. Experts come in descending order of logit; of equal logits the lower expert id wins.

    Returns topk_weights_TK [T, K] and probs_TE [T, E] (float32; float64 for float64 logits), both differentiable, and
    topk_ids_TK [T, K] int64.

    Errors: ValueError for k outside 1..E or NaN or +inf logits on the CPU; on a GPU, where nothing waits for the host,
    the ids of such a token are -1 and its weights and probabilities NaN. Source: Shazeer et al., arXiv 1701.06538;
    softmax then top-k as in Mixtral, OLMoE and Qwen3.

    Example: logits [[0, 1, 1]], k=2 -> ids [[1, 2]], weights [[.5, .5]], probs [[.155, .422, .422]].
    """
    check.tensor("topk_gate", "logits_TE", logits_TE, (None, None), legend="T, E")
    check.option("topk_gate", "score", score, SCORES)
    E = logits_TE.shape[1]
    check.positive("topk_gate", num_experts=E)
    if not 1 <= k <= E:
        check.fail("topk_gate", "k", f"in 1..{E} (the number of experts)", k)
    return _topk_gate(logits_TE, k, score, renormalize)


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(logits_TE, k, score, renormalize):
    T, E = logits_TE.shape
    dtype = _accumulate_dtype(logits_TE.dtype)
    return (
        logits_TE.new_empty((T, k), dtype=dtype),
        logits_TE.new_empty((T, k), dtype=torch.int64),
        logits_TE.new_empty((T, E), dtype=dtype),
    )


def _setup(ctx, inputs, output):
    logits_TE, _, score, renormalize = inputs
    _, topk_ids_TK, probs_TE = output
    ctx.save_for_backward(topk_ids_TK, probs_TE)
    ctx.mark_non_differentiable(topk_ids_TK)
    ctx.set_materialize_grads(False)
    ctx.score, ctx.renormalize, ctx.dtype = score, renormalize, logits_TE.dtype


def _backward(ctx, dweights_TK, _, dprobs_TE):
    topk_ids_TK, probs_TE = ctx.saved_tensors
    dweights_TK = torch.zeros_like(topk_ids_TK, dtype=probs_TE.dtype) if dweights_TK is None else dweights_TK
    dprobs_TE = torch.zeros_like(probs_TE) if dprobs_TE is None else dprobs_TE
    return (
        _topk_gate_backward(dweights_TK, dprobs_TE, topk_ids_TK, probs_TE, ctx.score, ctx.renormalize).to(ctx.dtype),
        None,
        None,
        None,
    )


def _in_float32(args, dtype):
    return args[0].float() if args[0].dtype != torch.float64 else args[0], *args[1:]


_topk_gate = define(
    "gating",
    "topk_gate(Tensor logits_TE, int k, str score, bool renormalize) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_in_float32,
)
_topk_gate_backward = define(
    "gating",
    "topk_gate_backward(Tensor dweights_TK, Tensor dprobs_TE, Tensor topk_ids_TK, Tensor probs_TE, str score, "
    "bool renormalize) -> Tensor",
    fake=lambda dweights_TK, dprobs_TE, topk_ids_TK, probs_TE, score, renormalize: probs_TE.new_empty(probs_TE.shape),
)
