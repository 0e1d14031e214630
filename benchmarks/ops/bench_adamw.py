"""One AdamW step over a list of tensors.

Bytes: 28 a parameter, weight and two moments read and written, gradient read; held against an update in place.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.ops.harness import Case
from fastmoe.optim import AdamW

RULE = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def case(count: int, size: int) -> Case:
    # weights of the size of one update, so that an error in the update shows
    start, grads = ([scale * torch.randn(size) for _ in range(count)] for scale in (1e-3, 1.0))

    def step(optimizer, **options):
        params = [tensor.clone().requires_grad_() for tensor in start]
        for param, grad in zip(params, grads):
            param.grad = grad
        made = optimizer(params, **RULE, **options)

        def call():
            made.step()
            return params

        return call

    def first_step():
        """From zero moments, where m / (1 - beta1) = g and v / (1 - beta2) = g^2."""
        lr, decay, eps = RULE["lr"], RULE["weight_decay"], RULE["eps"]
        pairs = ((p.double(), g.double()) for p, g in zip(start, grads))
        return [p * (1 - lr * decay) - lr * g / (g.abs() + eps) for p, g in pairs]

    return Case(
        f"float32 {count:,} x {size:,} parameters",
        {"fastmoe": step(AdamW), "torch fused": step(torch.optim.AdamW, fused=True)},
        exact=first_step,
        work=28 * count * size,
        roof="update",
    )


def cases(quick: bool) -> Iterator[Case]:
    for shape in [(3, 1000), (20, 7)] if quick else [(40, 1_250_000), (10_000, 5_000), (1, 1_000_000)]:
        yield case(*shape)
