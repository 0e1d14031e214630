"""topk_gate forward and backward.

Bytes: logits read and probabilities written, then the probabilities and their gradient read and the logits' written;
weights and ids written, weights' gradient and ids read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.ops.harness import Case, with_grads
from fastmoe import ops


def composite(logits_TE, k):
    probs_TE = torch.softmax(logits_TE, 1)
    weights_TK, ids_TK = probs_TE.topk(k, dim=1)
    return weights_TK / weights_TK.sum(1, keepdim=True), ids_TK, probs_TE


def case(T: int, E: int, K: int) -> Case:
    logits_TE, dweights_TK, dprobs_TE = torch.randn(T, E), torch.randn(T, K), torch.randn(T, E)

    def step(gate, dtype=torch.float32):
        differentiable = lambda logits: gate(logits, K)[::2]
        return with_grads(differentiable, [logits_TE.to(dtype)], [dweights_TK.to(dtype), dprobs_TE.to(dtype)])

    return Case(
        f"forward + backward T{T} E{E} K{K}",
        {"fastmoe": step(ops.topk_gate), "torch softmax, topk": step(composite)},
        exact=step(composite, torch.float64),
        work=5 * 4 * T * E + 24 * T * K,
        roof="triad",
    )


def cases(quick: bool) -> Iterator[Case]:
    for shape in [(128, 16, 4)] if quick else [(4096, 32, 2), (8192, 64, 8), (8192, 256, 8), (2048, 2048, 8)]:
        yield case(*shape)
