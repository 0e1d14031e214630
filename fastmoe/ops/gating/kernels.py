"""Gating in Triton: one program scores a block of tokens, a row of experts in registers."""

import torch
import triton
import triton.language as tl


@triton.jit
def _ordered_key(value, id_E, BLOCK_E: tl.constexpr):
    """A 64-bit key that orders by value, then by lower id: ordered float bits (-0 as 0), then the reversed id."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered.to(tl.int64) * 0x100000000 + (BLOCK_E - 1 - id_E)[None, :]


@triton.jit
def _topk_gate_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    ids_ptr,
    probs_ptr,
    load_ptr,
    T,
    E,
    K,
    num_groups,
    top_groups,
    scale,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPED: tl.constexpr,
    TOP2: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e_E = tl.arange(0, BLOCK_E)
    k_K = tl.arange(0, BLOCK_K)
    mask_TE = (t_T < T)[:, None] & (e_E < E)[None, :]
    at_TE = t_T[:, None] * E + e_E[None, :]
    z_TE = tl.load(logits_ptr + at_TE, mask=mask_TE, other=float("-inf")).to(tl.float32)
    top_T = tl.max(z_TE, 1)
    poison_T = tl.sum(((z_TE != z_TE) | (z_TE == float("inf"))).to(tl.int32), 1)
    bad_T = (poison_T > 0) | (top_T == float("-inf"))
    z_TE = tl.where(bad_T[:, None], 0.0, z_TE)
    if SOFTMAX:
        exp_TE = tl.where(mask_TE, tl.exp(z_TE - tl.where(bad_T, 0.0, top_T)[:, None]), 0.0)
        probs_TE = exp_TE / tl.sum(exp_TE, 1)[:, None]
    else:
        probs_TE = 1.0 / (1.0 + tl.exp(-z_TE))
    nan_T = tl.where(bad_T, float("nan"), 0.0)
    tl.store(probs_ptr + at_TE, probs_TE + nan_T[:, None], mask=mask_TE)

    lowest = -0x7FFFFFFFFFFFFFFF  # below the key of -inf
    rank_TE = z_TE
    if BIASED:
        rank_TE = probs_TE + tl.load(bias_ptr + e_E, mask=e_E < E, other=0.0)[None, :]
        rank_TE = tl.where(rank_TE == rank_TE, rank_TE, float("-inf"))  # NaN in the bias: ids stay below E
    key_TE = tl.where((e_E < E)[None, :], _ordered_key(rank_TE, e_E, BLOCK_E), lowest)
    if GROUPED:
        g_G = tl.arange(0, BLOCK_G)
        group_E = e_E // (E // num_groups)
        score_TE = probs_TE if TOP2 and not BIASED else rank_TE
        score_TG = tl.zeros((BLOCK_T, BLOCK_G), tl.float32)
        for g in range(num_groups):
            inside_TE = tl.where((group_E == g)[None, :], score_TE, float("-inf"))
            score_T = tl.max(inside_TE, 1)
            if TOP2:
                first_T = tl.min(tl.where(inside_TE == score_T[:, None], e_E[None, :], BLOCK_E), 1)
                score_T += tl.max(tl.where(e_E[None, :] == first_T[:, None], float("-inf"), inside_TE), 1)
            score_TG = tl.where((g_G == g)[None, :], score_T[:, None], score_TG)
        key_TG = tl.where((g_G < num_groups)[None, :], _ordered_key(score_TG, g_G, BLOCK_G), lowest)
        kept_TE = tl.zeros((BLOCK_T, BLOCK_E), tl.int32)
        for _ in range(top_groups):
            group_T = BLOCK_G - 1 - (tl.max(key_TG, 1) & 0xFFFFFFFF).to(tl.int32)
            key_TG = tl.where(g_G[None, :] == group_T[:, None], lowest, key_TG)
            kept_TE = tl.where(group_E[None, :] == group_T[:, None], 1, kept_TE)
        key_TE = tl.where(kept_TE > 0, key_TE, lowest)
    counted_T = (t_T < T) & (bad_T == 0)
    weights_TK = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    ids_TK = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for k in range(K):
        best_T = tl.max(key_TE, 1)
        id_T = BLOCK_E - 1 - (best_T & 0xFFFFFFFF).to(tl.int32)
        chosen_TE = e_E[None, :] == id_T[:, None]
        key_TE = tl.where(chosen_TE, lowest, key_TE)
        weight_T = tl.sum(tl.where(chosen_TE, probs_TE, 0.0), 1)
        weights_TK = tl.where((k_K == k)[None, :], weight_T[:, None], weights_TK)
        ids_TK = tl.where((k_K == k)[None, :], id_T[:, None], ids_TK)
        tl.atomic_add(load_ptr + id_T, tl.full((BLOCK_T,), 1, tl.int64), mask=counted_T, sem="relaxed")
    if RENORMALIZE:
        weights_TK = weights_TK / (tl.sum(weights_TK, 1) + 1e-20)[:, None]
    at_TK = t_T[:, None] * K + k_K[None, :]
    mask_TK = (t_T < T)[:, None] & (k_K < K)[None, :]
    tl.store(weights_ptr + at_TK, weights_TK * scale + nan_T[:, None], mask=mask_TK)
    tl.store(ids_ptr + at_TK, tl.where(bad_T[:, None], -1, ids_TK).to(tl.int64), mask=mask_TK)


@triton.jit
def _topk_gate_backward_kernel(
    dweights_ptr,
    dprobs_ptr,
    ids_ptr,
    probs_ptr,
    dlogits_ptr,
    T,
    E,
    K,
    scale,
    SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    e_E = tl.arange(0, BLOCK_E)
    k_K = tl.arange(0, BLOCK_K)
    mask_TE = (t_T < T)[:, None] & (e_E < E)[None, :]
    at_TE = t_T[:, None] * E + e_E[None, :]
    probs_TE = tl.load(probs_ptr + at_TE, mask=mask_TE, other=0.0)
    dprobs_TE = tl.load(dprobs_ptr + at_TE, mask=mask_TE, other=0.0)
    total_T = tl.full((BLOCK_T,), 1.0, tl.float32)
    shift_T = tl.zeros((BLOCK_T,), tl.float32)
    if RENORMALIZE:
        mask_TK = (t_T < T)[:, None] & (k_K < K)[None, :]
        at_TK = t_T[:, None] * K + k_K[None, :]
        id_TK = tl.load(ids_ptr + at_TK, mask=mask_TK, other=-1)
        p_TK = tl.load(probs_ptr + t_T[:, None] * E + id_TK, mask=mask_TK & (id_TK >= 0), other=0.0)
        total_T = tl.sum(p_TK, 1) + 1e-20
        shift_T = tl.sum(tl.load(dweights_ptr + at_TK, mask=mask_TK, other=0.0) * p_TK, 1) / total_T
    for k in range(K):
        id_T = tl.load(ids_ptr + t_T * K + k, mask=t_T < T, other=-1)
        dweight_T = tl.load(dweights_ptr + t_T * K + k, mask=t_T < T, other=0.0)
        dweight_T = (dweight_T - shift_T) / total_T * scale
        dprobs_TE += tl.where(e_E[None, :] == id_T[:, None], dweight_T[:, None], 0.0)
    if SOFTMAX:
        dlogits_TE = probs_TE * (dprobs_TE - tl.sum(dprobs_TE * probs_TE, 1)[:, None])
    else:
        dlogits_TE = dprobs_TE * probs_TE * (1.0 - probs_TE)
    tl.store(dlogits_ptr + at_TE, dlogits_TE, mask=mask_TE)


def _blocks(E: int, K: int) -> dict[str, int]:
    block_E = triton.next_power_of_2(E)
    return {
        "BLOCK_T": max(1, 2048 // block_E),
        "BLOCK_E": block_E,
        "BLOCK_K": triton.next_power_of_2(K),
        "num_warps": 8 if block_E > 2048 else 4,
    }


def topk_gate(logits_TE, bias_E, k, score, renormalize, num_groups, top_groups, group_score, scale):
    T, E = logits_TE.shape
    weights_TK = logits_TE.new_empty((T, k), dtype=torch.float32)
    ids_TK = logits_TE.new_empty((T, k), dtype=torch.int64)
    probs_TE = logits_TE.new_empty((T, E), dtype=torch.float32)
    load_E = logits_TE.new_zeros((E,), dtype=torch.int64)
    if T:
        blocks = _blocks(E, k)
        with torch.cuda.device_of(logits_TE):
            _topk_gate_kernel[(triton.cdiv(T, blocks["BLOCK_T"]),)](
                logits_TE.contiguous(),
                None if bias_E is None else bias_E.contiguous(),
                weights_TK,
                ids_TK,
                probs_TE,
                load_E,
                T,
                E,
                k,
                num_groups,
                top_groups,
                float(scale),
                SOFTMAX=score == "softmax",
                RENORMALIZE=renormalize,
                BIASED=bias_E is not None,
                GROUPED=num_groups > 1,
                TOP2=group_score == "top2",
                BLOCK_G=triton.next_power_of_2(num_groups),
                **blocks,
            )
    return weights_TK, ids_TK, probs_TE, load_E


def topk_gate_backward(dweights_TK, dprobs_TE, topk_ids_TK, probs_TE, score, renormalize, scale):
    (T, E), K = probs_TE.shape, topk_ids_TK.shape[1]
    dlogits_TE = torch.empty_like(probs_TE, memory_format=torch.contiguous_format)
    if T:
        blocks = _blocks(E, K)
        with torch.cuda.device_of(probs_TE):
            _topk_gate_backward_kernel[(triton.cdiv(T, blocks["BLOCK_T"]),)](
                dweights_TK.to(torch.float32).contiguous(),
                dprobs_TE.to(torch.float32).contiguous(),
                topk_ids_TK.contiguous(),
                probs_TE.contiguous(),
                dlogits_TE,
                T,
                E,
                K,
                float(scale),
                SOFTMAX=score == "softmax",
                RENORMALIZE=renormalize,
                **blocks,
            )
    return dlogits_TE
