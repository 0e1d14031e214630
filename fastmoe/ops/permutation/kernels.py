"""Permutation in Triton: a counting sort of the slots, and the movement of rows into expert order and back."""

import torch
import triton
import triton.language as tl

from fastmoe import jit

INTERPRETED = tl.constexpr(jit.interpreted())
SLOTS = 256  # slots of one chunk of the counting sort


@triton.jit
def to_storage(value, dtype: tl.constexpr):
    """float32 to the storage dtype, rounded to nearest even (the interpreter's own cast cuts, and spoils zero)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        stored = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        stored = value.to(dtype)
    return stored


@triton.jit
def _count_kernel(
    ids_ptr, counts_ptr, N, E, J, chunks, SLOTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """counts[e, j, chunk]: slots of the chunk that name expert e and are of choice j (J = 1: of any choice)."""
    chunk = tl.program_id(0)
    e_E = tl.arange(0, BLOCK_E)
    place_S = tl.arange(0, BLOCK)
    slot_S = chunk.to(tl.int64) * SLOTS + place_S
    id_S = tl.load(ids_ptr + slot_S, mask=(place_S < SLOTS) & (slot_S < N), other=-1)
    named_S = (id_S >= 0) & (id_S < E)
    id_S = tl.where(named_S, id_S, 0).to(tl.int32)
    for j in range(J):
        count_E = tl.histogram(id_S, BLOCK_E, mask=named_S & (place_S % J == j))
        tl.store(counts_ptr + (e_E.to(tl.int64) * J + j) * chunks + chunk, count_E, mask=e_E < E)


@triton.jit
def _scan_kernel(
    counts_ptr,
    quota_ptr,
    before_ptr,
    totals_ptr,
    J,
    chunks,
    capacity,
    CAPPED: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One expert: before[e, chunk] = rows it keeps in earlier chunks, quota[e, j, chunk] = how many it may keep."""
    e = tl.program_id(0).to(tl.int64)
    j_J = tl.arange(0, BLOCK_J)
    seen_J = tl.zeros((BLOCK_J,), tl.int32)
    if CAPPED:
        for c0 in range(0, chunks, BLOCK_C):
            c_C = c0 + tl.arange(0, BLOCK_C)
            at_JC = (e * J + j_J)[:, None] * chunks + c_C[None, :]
            seen_J += tl.sum(tl.load(counts_ptr + at_JC, mask=(j_J < J)[:, None] & (c_C < chunks)[None, :], other=0), 1)
        seen_J = tl.cumsum(seen_J, 0) - seen_J
    kept = tl.sum(tl.zeros((BLOCK_C,), tl.int32), 0)
    for c0 in range(0, chunks, BLOCK_C):
        c_C = c0 + tl.arange(0, BLOCK_C)
        at_JC = (e * J + j_J)[:, None] * chunks + c_C[None, :]
        mask_JC = (j_J < J)[:, None] & (c_C < chunks)[None, :]
        count_JC = tl.load(counts_ptr + at_JC, mask=mask_JC, other=0)
        if CAPPED:
            quota_JC = tl.maximum(capacity - (seen_J[:, None] + tl.cumsum(count_JC, 1) - count_JC), 0)
            tl.store(quota_ptr + at_JC, quota_JC, mask=mask_JC)
            seen_J += tl.sum(count_JC, 1)
            count_JC = tl.minimum(count_JC, quota_JC)
        count_C = tl.sum(count_JC, 0)
        tl.store(before_ptr + e * chunks + c_C, kept + tl.cumsum(count_C, 0) - count_C, mask=c_C < chunks)
        kept += tl.sum(count_C, 0)
    tl.store(totals_ptr + 1 + e, kept)
    tl.store(totals_ptr, 0, mask=e == 0)


@triton.jit
def _place_kernel(
    ids_ptr,
    quota_ptr,
    before_ptr,
    offsets_ptr,
    src_row_ptr,
    dst_row_ptr,
    N,
    E,
    J,
    chunks,
    groups,
    CAPPED: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """One chunk: a slot's row = its expert's first row + rows kept in earlier chunks + kept before it in this one."""
    chunk = tl.program_id(0)
    place_S = tl.arange(0, BLOCK)
    slot_S = chunk.to(tl.int64) * SLOTS + place_S
    inside_S = (place_S < SLOTS) & (slot_S < N)
    id_S = tl.load(ids_ptr + slot_S, mask=inside_S, other=-1)
    keep_S = (id_S >= 0) & (id_S < E)
    id_S = tl.where(keep_S, id_S, -1)
    rank_S = tl.zeros((BLOCK,), tl.int32)
    for j in range(groups):  # capped: the slots of choice j; else the next BLOCK_G slots
        if CAPPED:
            place_G = tl.arange(0, BLOCK_G) * J + j
        else:
            place_G = tl.arange(0, BLOCK_G) + j * BLOCK_G
        slot_G = chunk.to(tl.int64) * SLOTS + place_G
        id_G = tl.load(ids_ptr + slot_G, mask=(place_G < SLOTS) & (slot_G < N), other=-1)
        same_SG = (id_S[:, None] == id_G[None, :]) & (place_G[None, :] < place_S[:, None])
        earlier_S = tl.sum(same_SG.to(tl.int32), 1)
        if CAPPED:
            quota_S = tl.load(quota_ptr + (id_S.to(tl.int64) * J + j) * chunks + chunk, mask=id_S >= 0, other=0)
            keep_S = keep_S & ((place_S % J != j) | (earlier_S < quota_S))
            earlier_S = tl.minimum(earlier_S, quota_S)
        rank_S += earlier_S
    row_S = tl.load(offsets_ptr + id_S, mask=keep_S, other=0) + rank_S
    row_S += tl.load(before_ptr + id_S.to(tl.int64) * chunks + chunk, mask=keep_S, other=0)
    tl.store(dst_row_ptr + slot_S, tl.where(keep_S, row_S, -1), mask=inside_S)
    tl.store(src_row_ptr + row_S, slot_S.to(tl.int32), mask=keep_S)
    tl.store(src_row_ptr + slot_S, -1, mask=inside_S & (slot_S >= tl.load(offsets_ptr + E)))


@triton.jit
def _from_experts_kernel(
    token_ptr, offsets_ptr, src_row_ptr, dst_row_ptr, R, E, T, STEPS: tl.constexpr, BLOCK: tl.constexpr
):
    row_R = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token_R = tl.load(token_ptr + row_R, mask=row_R < R, other=-1).to(tl.int64)
    low_R = tl.zeros((BLOCK,), tl.int32)
    high_R = low_R + (E - 1)
    for _ in range(STEPS):  # the last expert that begins at or before the row
        middle_R = (low_R + high_R + 1) // 2
        begun_R = tl.load(offsets_ptr + middle_R) <= row_R
        low_R = tl.where(begun_R, middle_R, low_R)
        high_R = tl.where(begun_R, high_R, middle_R - 1)
    valid_R = (token_R >= 0) & (token_R < T)
    slot_R = token_R * E + low_R
    tl.store(src_row_ptr + row_R, tl.where(valid_R, slot_R, -1).to(tl.int32), mask=row_R < R)
    tl.store(dst_row_ptr + slot_R, row_R.to(tl.int32), mask=valid_R)


@triton.jit
def _permute_kernel(x_ptr, src_row_ptr, y_ptr, R, D, K, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    slot_R = tl.load(src_row_ptr + row_R, mask=row_R < R, other=-1)
    token_R = (tl.maximum(slot_R, 0) // K).to(tl.int64)
    x_RD = tl.load(
        x_ptr + token_R[:, None] * D + d_D[None, :], mask=(slot_R >= 0)[:, None] & (d_D < D)[None, :], other=0.0
    )
    tl.store(y_ptr + row_R[:, None] * D + d_D[None, :], x_RD, mask=(row_R < R)[:, None] & (d_D < D)[None, :])


@triton.jit
def _unpermute_kernel(
    y_ptr,
    dst_row_ptr,
    weights_ptr,
    out_ptr,
    T,
    D,
    K,
    WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    t_T = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d_D = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in range(K):
        row_T = tl.load(dst_row_ptr + t_T * K + k, mask=t_T < T, other=-1).to(tl.int64)
        mask_TD = (row_T >= 0)[:, None] & (d_D < D)[None, :]
        y_TD = tl.load(y_ptr + row_T[:, None] * D + d_D[None, :], mask=mask_TD, other=0.0).to(tl.float32)
        if WEIGHTED:
            y_TD *= tl.load(weights_ptr + t_T * K + k, mask=row_T >= 0, other=0.0).to(tl.float32)[:, None]
        sum_TD += y_TD
    out_TD = to_storage(sum_TD, out_ptr.dtype.element_ty)
    tl.store(out_ptr + t_T[:, None] * D + d_D[None, :], out_TD, mask=(t_T < T)[:, None] & (d_D < D)[None, :])


@triton.jit
def _unpermute_backward_kernel(
    dout_ptr,
    y_ptr,
    src_row_ptr,
    weights_ptr,
    dy_ptr,
    dweights_ptr,
    R,
    D,
    K,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row_R = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    slot_R = tl.load(src_row_ptr + row_R, mask=row_R < R, other=-1)
    token_R = (tl.maximum(slot_R, 0) // K).to(tl.int64)
    weight_R = tl.load(weights_ptr + slot_R, mask=slot_R >= 0, other=0.0).to(tl.float32)
    dweight_R = tl.zeros((BLOCK_R,), tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d_D = d0 + tl.arange(0, BLOCK_D)
        used_RD = (slot_R >= 0)[:, None] & (d_D < D)[None, :]
        at_RD = row_R[:, None] * D + d_D[None, :]
        dout_RD = tl.load(dout_ptr + token_R[:, None] * D + d_D[None, :], mask=used_RD, other=0.0).to(tl.float32)
        y_RD = tl.load(y_ptr + at_RD, mask=used_RD, other=0.0).to(tl.float32)
        dweight_R += tl.sum(dout_RD * y_RD, 1)
        dy_RD = to_storage(dout_RD * weight_R[:, None], dy_ptr.dtype.element_ty)
        tl.store(dy_ptr + at_RD, dy_RD, mask=(row_R < R)[:, None] & (d_D < D)[None, :])
    tl.store(dweights_ptr + slot_R, to_storage(dweight_R, dweights_ptr.dtype.element_ty), mask=slot_R >= 0)


def _rows_block(D: int) -> dict[str, int]:
    block_D = min(1024, triton.next_power_of_2(D))
    return {"rows": max(1, 4096 // block_D), "BLOCK_D": block_D}


def build_routing(topk_ids_TK, num_experts, capacity):
    (T, K), N, E = topk_ids_TK.shape, topk_ids_TK.numel(), num_experts
    make = lambda *shape: topk_ids_TK.new_empty(shape, dtype=torch.int32)  # noqa: E731
    if N == 0:
        return make(0), make(T, K), make(E + 1).zero_()
    capped = 0 <= capacity < N
    J, slots = (K, max(1, SLOTS // K) * K) if capped else (1, SLOTS)
    chunks, block = triton.cdiv(N, slots), triton.next_power_of_2(slots)
    block_J = triton.next_power_of_2(J)
    block_C = min(triton.next_power_of_2(chunks), max(1, 4096 // block_J))
    block_G = triton.next_power_of_2(slots // K) if capped else 32
    ids_TK = topk_ids_TK.contiguous()
    counts_EJC, before_EC, totals, src_row_R, dst_row_TK = (
        make(E, J, chunks),
        make(E, chunks),
        make(E + 1),
        make(N),
        make(T, K),
    )
    quota_EJC = make(E, J, chunks) if capped else None
    with torch.cuda.device_of(ids_TK):
        _count_kernel[(chunks,)](
            ids_TK, counts_EJC, N, E, J, chunks, SLOTS=slots, BLOCK=block, BLOCK_E=max(32, triton.next_power_of_2(E))
        )
        _scan_kernel[(E,)](
            counts_EJC,
            quota_EJC,
            before_EC,
            totals,
            J,
            chunks,
            capacity,
            CAPPED=capped,
            BLOCK_J=block_J,
            BLOCK_C=block_C,
        )
        offsets = torch.cumsum(totals, 0, dtype=torch.int32)
        _place_kernel[(chunks,)](
            ids_TK,
            quota_EJC,
            before_EC,
            offsets,
            src_row_R,
            dst_row_TK,
            N,
            E,
            J,
            chunks,
            J if capped else block // block_G,
            CAPPED=capped,
            SLOTS=slots,
            BLOCK=block,
            BLOCK_G=block_G,
        )
    return src_row_R, dst_row_TK, offsets


def build_routing_from_experts(token_R, offsets, num_tokens):
    R, E = token_R.shape[0], offsets.shape[0] - 1
    src_row_R = token_R.new_empty((R,), dtype=torch.int32)
    dst_row_TE = token_R.new_full((num_tokens, E), -1, dtype=torch.int32)
    if R:
        with torch.cuda.device_of(token_R):
            _from_experts_kernel[(triton.cdiv(R, 1024),)](
                token_R.contiguous(),
                offsets.contiguous(),
                src_row_R,
                dst_row_TE,
                R,
                E,
                num_tokens,
                STEPS=(E - 1).bit_length(),
                BLOCK=1024,
            )
    return src_row_R, dst_row_TE, offsets.to(torch.int32, copy=True)


def permute(x_TD, src_row_R, dst_row_TK):
    R, D, K = src_row_R.shape[0], x_TD.shape[1], dst_row_TK.shape[1]
    y_RD = x_TD.new_empty((R, D))
    if y_RD.numel():
        block = _rows_block(D)
        grid = (triton.cdiv(R, block["rows"]), triton.cdiv(D, block["BLOCK_D"]))
        with torch.cuda.device_of(x_TD):
            _permute_kernel[grid](
                x_TD.contiguous(),
                src_row_R.contiguous(),
                y_RD,
                R,
                D,
                K,
                BLOCK_R=block["rows"],
                BLOCK_D=block["BLOCK_D"],
            )
    return y_RD


def unpermute(y_RD, src_row_R, dst_row_TK, weights_TK):
    (T, K), D = dst_row_TK.shape, y_RD.shape[1]
    out_TD = y_RD.new_empty((T, D))
    if out_TD.numel():
        block = _rows_block(D)
        grid = (triton.cdiv(T, block["rows"]), triton.cdiv(D, block["BLOCK_D"]))
        with torch.cuda.device_of(y_RD):
            _unpermute_kernel[grid](
                y_RD.contiguous(),
                dst_row_TK.contiguous(),
                None if weights_TK is None else weights_TK.contiguous(),
                out_TD,
                T,
                D,
                K,
                WEIGHTED=weights_TK is not None,
                BLOCK_T=block["rows"],
                BLOCK_D=block["BLOCK_D"],
            )
    return out_TD


def unpermute_backward(dout_TD, y_RD, src_row_R, dst_row_TK, weights_TK):
    (R, D), K = y_RD.shape, dst_row_TK.shape[1]
    dy_RD = y_RD.new_empty((R, D))
    dweights_TK = torch.zeros_like(weights_TK, memory_format=torch.contiguous_format)
    if dy_RD.numel():
        block = _rows_block(D)
        with torch.cuda.device_of(y_RD):
            _unpermute_backward_kernel[(triton.cdiv(R, block["rows"]),)](
                dout_TD.contiguous(),
                y_RD.contiguous(),
                src_row_R.contiguous(),
                weights_TK.contiguous(),
                dy_RD,
                dweights_TK,
                R,
                D,
                K,
                BLOCK_R=block["rows"],
                BLOCK_D=block["BLOCK_D"],
            )
    return dy_RD, dweights_TK
