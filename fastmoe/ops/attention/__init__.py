"""Attention: softmax of scaled scores times values, in tiles that are never stored."""

from __future__ import annotations

import math

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import define

BLOCK = 64  # queries and keys of a block: FM_ATTENTION_BLOCK
MAX_HEAD_DIM = 256


def attention(
    q_BNSH: torch.Tensor,
    k_BMSH: torch.Tensor,
    v_BMSH: torch.Tensor,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    *,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T) v; products, sums and the softmax in float32 (float64 for float64).

    q_BNSH: [B, N, Sq, H] float32, bfloat16 or float16 (float64 on the reference), H in 1..256. k_BMSH, v_BMSH: [B, M,
    Sk, H] in q's dtype; M divides N, and N / M query heads in a row share a key head. Views of a fused projection are
    read where they are: any strides but that of H, which is 1. Under autocast all three are lowered to its dtype.

    Query i stands at key i + Sk - Sq, so the last ones meet. window: it sees the keys from `left` before to `right`
    after its own; None: all. causal: right = 0. mask: bool [ceil(Sq / 64), ceil(Sk / 64)], the blocks of 64 queries by
    64 keys that are seen, of which the window takes its part. Blocks that are not seen cost nothing. scale: > 0, None:
    H**-0.5.

    Returns out_BNSH in q's dtype, in memory [B, Sq, N, H]; zero for a query that sees no key. Backward keeps q, k, v,
    out and one float a query, computes the scores again and gives the same bits at any thread count.

    Errors: ValueError or TypeError naming the argument. Source: Dao et al., arXiv 2205.14135 and 2307.08691.
    """
    return attention_with_lse(q_BNSH, k_BMSH, v_BMSH, causal, mask, window=window, scale=scale)[0]


def attention_with_lse(
    q_BNSH: torch.Tensor,
    k_BMSH: torch.Tensor,
    v_BMSH: torch.Tensor,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    *,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention gives, and lse_BNS float32: log sum exp(scale * q k^T) over the keys a query sees, -inf without.

    Two results over different keys join as out = sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i).
    Differentiable in both. Arguments and errors as for attention.
    """
    op = "attention"
    check.tensor(op, "q_BNSH", q_BNSH, (None,) * 4, legend="B, N, Sq, H")
    B, N, Sq, H = q_BNSH.shape
    dtypes = check.FLOATS if torch.is_autocast_enabled(q_BNSH.device.type) else (q_BNSH.dtype,)
    check.tensor(op, "k_BMSH", k_BMSH, (B, None, None, H), dtypes, q_BNSH, "B, M, Sk, H")
    check.tensor(op, "v_BMSH", v_BMSH, tuple(k_BMSH.shape), dtypes, q_BNSH, "B, M, Sk, H")
    M, Sk = k_BMSH.shape[1:3]
    check.positive(op, N=N, M=M, H=H)
    if N % M:
        check.fail(op, "N", f"a multiple of M = {M}", N)
    if H > MAX_HEAD_DIM:
        check.fail(op, "H", f"at most {MAX_HEAD_DIM}", H)
    if mask is not None:
        blocks = -(-Sq // BLOCK), -(-Sk // BLOCK)
        check.tensor(op, "mask", mask, blocks, (torch.bool,), q_BNSH, "ceil(Sq / 64), ceil(Sk / 64)")
    scale = H**-0.5 if scale is None else float(scale)
    if not (0 < scale < math.inf):
        check.fail(op, "scale", "positive", scale)
    left, right = (Sq + Sk if side is None else side for side in window)
    if left < 0 or right < 0:
        check.fail(op, "window", "(left, right), each None or at least 0", window)
    return _attention(q_BNSH, k_BMSH, v_BMSH, mask, left, 0 if causal else right, scale)


def rope(
    qkv_BSAH: torch.Tensor, num_heads: int, num_kv_heads: int, start: int = 0, theta: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A fused projection to q, k and v, with rotary positions start .. start + S - 1 in q and k.

    qkv_BSAH: [B, S, A, H] float32, bfloat16 or float16 (float64 on the reference), its A = num_heads + 2 num_kv_heads
    heads those of q, of k and of v; H even. The halves (l, r) of a head become (l cos - r sin, r cos + l sin) at the
    angles position * theta^(-2h / H), cosine and sine in float32.

    Returns q_BNSH, k_BMSH, v_BMSH in qkv's dtype, in memory [B, S, heads, H]. Differentiable; backward keeps nothing.
    Errors: ValueError or TypeError naming the argument. Source: Su et al., arXiv 2104.09864, halves paired as in
    Hugging Face transformers.
    """
    check.tensor("rope", "qkv_BSAH", qkv_BSAH, (None,) * 4, legend="B, S, A, H")
    check.positive("rope", num_heads=num_heads, num_kv_heads=num_kv_heads, H=qkv_BSAH.shape[3])
    A, H = qkv_BSAH.shape[2:]
    if num_heads + 2 * num_kv_heads != A:
        check.fail("rope", "A", f"num_heads + 2 num_kv_heads = {num_heads + 2 * num_kv_heads}", A)
    if H % 2:
        check.fail("rope", "H", "even", H)
    if start < 0:
        check.fail("rope", "start", "at least 0", start)
    return _rope(qkv_BSAH, num_heads, num_kv_heads, start, theta)


def _like(x_BNSH):
    """Memory of x's shape, laid out as [B, S, N, H]."""
    B, N, S, H = x_BNSH.shape
    return x_BNSH.new_empty((B, S, N, H)).transpose(1, 2)


def _fake(q_BNSH, k_BMSH, v_BMSH, mask, left, right, scale):
    double = q_BNSH.dtype == torch.float64
    return _like(q_BNSH), q_BNSH.new_empty(q_BNSH.shape[:3], dtype=torch.float64 if double else torch.float32)


def _setup(ctx, inputs, output):
    q_BNSH, k_BMSH, v_BMSH, mask, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q_BNSH, k_BMSH, v_BMSH, *output, mask)


def _backward(ctx, dout_BNSH, dlse_BNS):
    *saved, mask = ctx.saved_tensors
    if dout_BNSH is None and dlse_BNS is None:
        return (None,) * 7
    if dout_BNSH is None:
        dout_BNSH = torch.zeros_like(saved[3])
    return *_attention_backward(dout_BNSH, dlse_BNS, *saved, mask, *ctx.options), None, None, None, None


def _autocast(args, dtype):
    q_BNSH, k_BMSH, v_BMSH, *rest = args
    return *(x if x.dtype == torch.float64 else x.to(dtype) for x in (q_BNSH, k_BMSH, v_BMSH)), *rest


_attention = define(
    "attention",
    "attention(Tensor q_BNSH, Tensor k_BMSH, Tensor v_BMSH, Tensor? mask, SymInt left, SymInt right, float scale) "
    "-> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_autocast,
)
_attention_backward = define(
    "attention",
    "attention_backward(Tensor dout_BNSH, Tensor? dlse_BNS, Tensor q_BNSH, Tensor k_BMSH, Tensor v_BMSH, "
    "Tensor out_BNSH, Tensor lse_BNS, Tensor? mask, SymInt left, SymInt right, float scale) "
    "-> (Tensor, Tensor, Tensor)",
    fake=lambda dout_BNSH, dlse_BNS, q_BNSH, k_BMSH, v_BMSH, *rest: (_like(q_BNSH), _like(k_BMSH), _like(v_BMSH)),
)


def _fake_rope(qkv_BSAH, N, M, start, theta):
    B, S, _, H = qkv_BSAH.shape
    return tuple(qkv_BSAH.new_empty((B, S, heads, H)).transpose(1, 2) for heads in (N, M, M))


def _setup_rope(ctx, inputs, output):
    ctx.options = inputs[3:]


def _backward_rope(ctx, dq_BNSH, dk_BMSH, dv_BMSH):
    return _rope_backward(dq_BNSH, dk_BMSH, dv_BMSH, *ctx.options), None, None, None, None


def _fake_rope_backward(dq_BNSH, dk_BMSH, dv_BMSH, start, theta):
    (B, N, S, H), M = dq_BNSH.shape, dk_BMSH.shape[1]
    return dq_BNSH.new_empty((B, S, N + 2 * M, H))


_rope = define(
    "attention",
    "rope(Tensor qkv_BSAH, SymInt N, SymInt M, SymInt start, float theta) -> (Tensor, Tensor, Tensor)",
    fake=_fake_rope,
    setup_context=_setup_rope,
    backward=_backward_rope,
)
_rope_backward = define(
    "attention",
    "rope_backward(Tensor dq_BNSH, Tensor dk_BMSH, Tensor dv_BMSH, SymInt start, float theta) -> Tensor",
    fake=_fake_rope_backward,
)
