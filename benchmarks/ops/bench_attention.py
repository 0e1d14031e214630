"""attention, forward and with backward. FLOPs: 4 H a pair of query and visible key, 14 H with backward, held against
the float32 torch.mm rate; what a tile computes beyond them is loss.

The shapes: 8 heads of 64 at 1024 and 4096 tokens, the attention of the recipe `tiny`, grouped keys, a window of 1024 of
8192 tokens, where torch's arm takes a boolean mask. rope: the bytes of the projection read and written, twice with
backward, held against the triad rate.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.ops.harness import TOLERANCE, Case, name_of, with_grads
from fastmoe import ops

SHAPES = [  # (B, N, M, S, H), window
    ((1, 8, 8, 1024, 64), 1024),
    ((1, 8, 8, 4096, 64), 4096),
    ((8, 4, 4, 256, 32), 256),
    ((1, 16, 4, 2048, 128), 2048),
    ((1, 8, 8, 8192, 64), 1024),
]


def case(B: int, N: int, M: int, S: int, H: int, window: int, causal: bool, dtype: torch.dtype, backward: bool) -> Case:
    heads = N, M, M
    inputs = torch.randn(B, S, sum(heads), H).to(dtype).transpose(1, 2).split(heads, 1)
    grads = [torch.randn(B, S, N, H).to(dtype).transpose(1, 2)]
    windowed = window < S
    mask = torch.ones(S, S, dtype=torch.bool).tril().triu(1 - window) if windowed else None

    def torch_attention(q, k, v):
        return [scaled_dot_product_attention(q, k, v, mask, is_causal=causal and not windowed, enable_gqa=M < N)]

    def ours(q, k, v):
        return [ops.attention(q, k, v, causal, window=(window - 1, None) if windowed else (None, None))]

    def in_float32(q, k, v):
        return [y.to(dtype) for y in torch_attention(*(x.float() for x in (q, k, v)))]

    def step(attention, to=dtype):
        if not backward:
            leaves = [x.to(to) for x in inputs]
            return lambda: attention(*leaves)
        return with_grads(attention, [x.to(to) for x in inputs], [x.to(to) for x in grads])

    arms = {"fastmoe": step(ours), "torch": step(torch_attention)}
    if dtype != torch.float32:
        arms["torch in float32"] = step(in_float32)
    pairs = sum(min(i + 1, window) for i in range(S)) if causal else S * S
    seen = f"window {window}" if windowed else "causal" if causal else "full"
    return Case(
        f"forward {'+ backward ' * backward}{name_of(dtype)} {seen} B{B} N{N} M{M} S{S} H{H}",
        arms,
        exact=step(torch_attention, torch.float64),
        work=(14 if backward else 4) * B * N * H * pairs,
        roof="mm",
        tolerance=TOLERANCE[dtype],
    )


def turned(x_BSNH: torch.Tensor, theta: float = 10000.0) -> torch.Tensor:
    S, _, H = x_BSNH.shape[1:]
    half = torch.arange(0, H, 2).float() / H
    angle_SH = torch.outer(torch.arange(S).float(), theta**-half).repeat(1, 2)[:, None]
    left, right = x_BSNH.chunk(2, -1)
    y_BSNH = x_BSNH * angle_SH.cos().to(x_BSNH.dtype)
    return y_BSNH + torch.cat([-right, left], -1) * angle_SH.sin().to(x_BSNH.dtype)


def rope_case(B: int, S: int, N: int, M: int, H: int, dtype: torch.dtype) -> Case:
    qkv_BSAH = torch.randn(B, S, N + 2 * M, H).to(dtype)
    grads = [torch.randn(B, S, heads, H).to(dtype).transpose(1, 2) for heads in (N, M, M)]

    def torch_rope(qkv):
        q, k, v = qkv.split((N, M, M), 2)
        return [x.transpose(1, 2) for x in (turned(q), turned(k), v)]

    def step(rope, to=dtype):
        return with_grads(rope, [qkv_BSAH.to(to)], [x.to(to) for x in grads])

    return Case(
        f"rope forward + backward {name_of(dtype)} B{B} S{S} N{N} M{M} H{H}",
        {"fastmoe": step(lambda qkv: ops.rope(qkv, N, M)), "torch": step(torch_rope)},
        exact=step(torch_rope, torch.float64),
        work=4 * qkv_BSAH.nbytes,
        roof="triad",
        tolerance=TOLERANCE[dtype],
    )


def cases(quick: bool) -> Iterator[Case]:
    for dtype in TOLERANCE:
        yield rope_case(*((2, 9, 4, 2, 8) if quick else (8, 256, 4, 4, 32)), dtype)
        for backward in (False, True):
            for shape, window in [((1, 4, 2, 96, 32), 96), ((1, 2, 2, 96, 16), 40)] if quick else SHAPES:
                yield case(*shape, window, True, dtype, backward)
            yield case(*((1, 2, 2, 80, 16) if quick else (1, 8, 8, 1024, 64)), 1 << 30, False, dtype, backward)
