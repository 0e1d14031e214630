"""Gating in Triton: one program scores a block of tokens, a row of experts in registers."""

import torch
import triton
import triton.language as tl


@triton.jit
def _topk_gate_kernel(
    logits_ptr,
    weights_ptr,
    ids_ptr,
    probs_ptr,
    T,
    E,
    K,
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

    # A 64-bit key orders by logit, then by lower id: float bits as an ordered integer (-0 as 0), then the reversed id.
    bits_TE = tl.where(z_TE == 0.0, 0.0, z_TE).to(tl.int32, bitcast=True)
    ordered_TE = tl.where(bits_TE < 0, bits_TE ^ 0x7FFFFFFF, bits_TE)
    key_TE = ordered_TE.to(tl.int64) * 0x100000000 + (BLOCK_E - 1 - e_E)[None, :]
    lowest = -0x7FFFFFFFFFFFFFFF
    key_TE = tl.where((e_E < E)[None, :], key_TE, lowest)
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
    if RENORMALIZE:
        weights_TK = weights_TK / tl.sum(weights_TK, 1)[:, None]
    at_TK = t_T[:, None] * K + k_K[None, :]
    mask_TK = (t_T < T)[:, None] & (k_K < K)[None, :]
    tl.store(weights_ptr + at_TK, weights_TK + nan_T[:, None], mask=mask_TK)
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
        total_T = tl.sum(p_TK, 1)
        shift_T = tl.sum(tl.load(dweights_ptr + at_TK, mask=mask_TK, other=0.0) * p_TK, 1) / total_T
    for k in range(K):
        id_T = tl.load(ids_ptr + t_T * K + k, mask=t_T < T, other=-1)
        dweight_T = tl.load(dweights_ptr + t_T * K + k, mask=t_T < T, other=0.0)
        dweight_T = (dweight_T - shift_T) / total_T
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


def topk_gate(logits_TE, k, score, renormalize):
    T, E = logits_TE.shape
    weights_TK = logits_TE.new_empty((T, k), dtype=torch.float32)
    ids_TK = logits_TE.new_empty((T, k), dtype=torch.int64)
    probs_TE = logits_TE.new_empty((T, E), dtype=torch.float32)
    if T:
        blocks = _blocks(E, k)
        with torch.cuda.device_of(logits_TE):
            _topk_gate_kernel[(triton.cdiv(T, blocks["BLOCK_T"]),)](
                logits_TE.contiguous(), weights_TK, ids_TK, probs_TE, T, E, k, score == "softmax", renormalize, **blocks
            )
    return weights_TK, ids_TK, probs_TE


def topk_gate_backward(dweights_TK, dprobs_TE, topk_ids_TK, probs_TE, score, renormalize):
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
                score == "softmax",
                renormalize,
                **blocks,
            )
    return dlogits_TE
