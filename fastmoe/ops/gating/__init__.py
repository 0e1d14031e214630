"""Gating: router logits to the K experts of each token and their weights."""

from __future__ import annotations

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import define

SCORES = ("softmax", "sigmoid")
GROUP_SCORES = ("max", "top2")


def topk_gate(
    logits_TE: torch.Tensor,
    k: int,
    score: str = "softmax",
    renormalize: bool = True,
    *,
    bias_E: torch.Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    group_score: str = "max",
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores the experts, picks the best k of each token, weighs them and counts how often each was picked.

    logits_TE: [T, E] float. score: "softmax" over the E experts or "sigmoid" of each. renormalize: divide a token's k
    weights by their sum (+ 1e-20). scale: what weights are multiplied by in the end. Experts come in descending order
    of logit; of equal logits the lower expert id wins.

    bias_E: [E] in float32 (float64 for float64 logits), no gradient: experts are picked and ordered by score + bias,
    weights have none of it. num_groups: the experts are so many equal runs, and a token picks among the top_groups best
    of them: by their best expert (group_score "max") or by the sum of their two best ("top2", of score + bias); of
    equal groups the lower one wins.

    Returns topk_weights_TK [T, K] and probs_TE [T, E], every expert's score (float32; float64 for float64 logits), both
    differentiable, topk_ids_TK [T, K] int64 between them, and load_E [E] int64: weights, ids, probs, load.

    Errors: ValueError for k outside 1..E or what the groups hold, groups that do not divide E or, with "top2", hold one
    expert, and on the CPU for a bias that is not finite and for a token whose logits hold NaN or +inf or are all -inf;
    on a GPU, where nothing waits for the host, the ids of such a token are -1, its weights and probabilities NaN, and
    it adds nothing to the load. Source: Shazeer et al., arXiv 1701.06538; softmax then top-k as in
    Mixtral, OLMoE and Qwen3; bias and groups as in DeepSeek-V2 and V3 (arXiv 2405.04434, 2412.19437).

    Example: logits [[0, 1, 1]], k=2 -> weights [[.5, .5]], ids [[1, 2]], probs [[.155, .422, .422]], load [0, 1, 1].
    """
    op = "topk_gate"
    check.tensor(op, "logits_TE", logits_TE, (None, None), legend="T, E")
    check.option(op, "score", score, SCORES)
    E = logits_TE.shape[1]
    check.positive(op, num_experts=E, num_groups=num_groups)
    if E % num_groups:
        check.fail(op, "num_groups", f"a divisor of {E} (the number of experts)", num_groups)
    if not 1 <= top_groups <= num_groups:
        check.fail(op, "top_groups", f"in 1..{num_groups} (num_groups)", top_groups)
    check.option(op, "group_score", group_score, GROUP_SCORES)
    if group_score == "top2" and num_groups > 1 and E // num_groups < 2:
        check.fail(op, "num_groups", f"at most {E // 2} (two experts a group) with group_score 'top2'", num_groups)
    within = E // num_groups * top_groups
    if not 1 <= k <= within:
        check.fail(op, "k", f"in 1..{within} ({'the number of experts' if within == E else 'those of top_groups'})", k)
    if bias_E is not None:
        check.tensor(op, "bias_E", bias_E, (E,), (_accumulate_dtype(logits_TE.dtype),), logits_TE, "E")
    groups = (num_groups, top_groups, group_score) if top_groups < num_groups else (1, 1, "max")
    return _topk_gate(logits_TE, bias_E, k, score, renormalize, *groups, float(scale))


def _accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _fake(logits_TE, bias_E, k, score, renormalize, num_groups, top_groups, group_score, scale):
    T, E = logits_TE.shape
    dtype = _accumulate_dtype(logits_TE.dtype)
    return (
        logits_TE.new_empty((T, k), dtype=dtype),
        logits_TE.new_empty((T, k), dtype=torch.int64),
        logits_TE.new_empty((T, E), dtype=dtype),
        logits_TE.new_empty((E,), dtype=torch.int64),
    )


def _setup(ctx, inputs, output):
    logits_TE, _, _, score, renormalize, _, _, _, scale = inputs
    _, topk_ids_TK, probs_TE, load_E = output
    ctx.save_for_backward(topk_ids_TK, probs_TE)
    ctx.mark_non_differentiable(topk_ids_TK, load_E)
    ctx.set_materialize_grads(False)
    ctx.score, ctx.renormalize, ctx.scale, ctx.dtype = score, renormalize, scale, logits_TE.dtype


def _backward(ctx, dweights_TK, _, dprobs_TE, __):
    topk_ids_TK, probs_TE = ctx.saved_tensors
    dweights_TK = torch.zeros_like(topk_ids_TK, dtype=probs_TE.dtype) if dweights_TK is None else dweights_TK
    dprobs_TE = torch.zeros_like(probs_TE) if dprobs_TE is None else dprobs_TE
    dlogits_TE = _topk_gate_backward(
        dweights_TK, dprobs_TE, topk_ids_TK, probs_TE, ctx.score, ctx.renormalize, ctx.scale
    )
    return dlogits_TE.to(ctx.dtype), *[None] * 8


def _in_float32(args, dtype):
    return args[0].float() if args[0].dtype != torch.float64 else args[0], *args[1:]


_topk_gate = define(
    "gating",
    "topk_gate(Tensor logits_TE, Tensor? bias_E, int k, str score, bool renormalize, int num_groups, int top_groups, "
    "str group_score, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_in_float32,
)
_topk_gate_backward = define(
    "gating",
    "topk_gate_backward(Tensor dweights_TK, Tensor dprobs_TE, Tensor topk_ids_TK, Tensor probs_TE, str score, "
    "bool renormalize, float scale) -> Tensor",
    fake=lambda dweights_TK, dprobs_TE, topk_ids_TK, probs_TE, score, renormalize, scale: probs_TE.new_empty(
        probs_TE.shape
    ),
)
