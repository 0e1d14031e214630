"""Permutation in Triton: a counting sort of the slots in two launches, and the movement of rows into expert order and
back.
"""

import torch
import triton
import triton.language as tl

from fastmoe import jit

INTERPRETED = tl.constexpr(jit.interpreted())
SLOTS = 256  # slots that find their places at once
CHUNKS = 128  # parts of the slots in build_routing, each of SLOTS to 4096


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
def _count_kernel(ids_ptr, counts_ptr, N, E, J, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr):
    """counts[j, chunk, e]: slots of the chunk that name expert e and are of choice j (J = 1: of any choice)."""
    slot_S = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    id_S = tl.load(ids_ptr + slot_S, mask=slot_S < N, other=-1)
    named_S = (id_S >= 0) & (id_S < E)
    id_S = tl.where(named_S, id_S, 0).to(tl.int32)
    for j in range(J):
        counts_ptrs = counts_ptr + (j * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * E
        for e0 in range(0, E, BLOCK_E):
            e_E = e0 + tl.arange(0, BLOCK_E)
            here_S = named_S & (slot_S % J == j) & (id_S >= e0) & (id_S < e0 + BLOCK_E)
            count_E = tl.histogram(tl.where(here_S, id_S - e0, 0), BLOCK_E, mask=here_S)
            tl.store(counts_ptrs + e_E, count_E, mask=e_E < E)


@triton.jit
def _key(ids_ptr, slot_S, N, E, J):
    """A number for the expert of a slot and, with J > 1, its choice; -1 where there is none."""
    id_S = tl.load(ids_ptr + slot_S, mask=slot_S < N, other=-1)
    named_S = (id_S >= 0) & (id_S < E)
    return tl.where(named_S, tl.where(named_S, id_S, 0).to(tl.int32) * J + (slot_S % J).to(tl.int32), -1)


@triton.jit
def _rank(ids_ptr, slot0, N, E, J, SLOTS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Of the SLOTS slots from slot0: their keys, how many earlier ones have the same, whether no later one has it."""
    place_S = tl.arange(0, SLOTS)
    key_S = _key(ids_ptr, slot0 + place_S, N, E, J)
    earlier_S = tl.zeros((SLOTS,), tl.int32)
    later_S = tl.zeros((SLOTS,), tl.int32)
    for g0 in range(0, SLOTS, BLOCK_G):
        place_G = g0 + tl.arange(0, BLOCK_G)
        same_SG = key_S[:, None] == _key(ids_ptr, slot0 + place_G, N, E, J)[None, :]
        earlier_S += tl.sum((same_SG & (place_G[None, :] < place_S[:, None])).to(tl.int32), 1)
        later_S += tl.sum((same_SG & (place_G[None, :] > place_S[:, None])).to(tl.int32), 1)
    return key_S, earlier_S, (later_S == 0) & (key_S >= 0)


@triton.jit
def _place_kernel(
    ids_ptr,
    counts_ptr,
    quota_ptr,
    next_ptr,
    offsets_ptr,
    src_row_ptr,
    dst_row_ptr,
    N,
    E,
    J,
    capacity,
    CAPPED: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One chunk. From all counts: the row that each expert's next slot here goes to and, with a capacity, how many of
    each choice it may still keep. Then SLOTS slots at a time: which are kept, where they go.
    """
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    quota_ptr += chunk.to(tl.int64) * E * J
    next_ptr += chunk.to(tl.int64) * E
    e_E = tl.arange(0, BLOCK_E)
    used = tl.sum(tl.zeros((BLOCK_E,), tl.int32), 0)
    for e0 in range(0, E, BLOCK_E):
        kept_E = tl.zeros((BLOCK_E,), tl.int32)
        before_E = tl.zeros((BLOCK_E,), tl.int32)  # kept in earlier chunks
        seen_E = tl.zeros((BLOCK_E,), tl.int32)  # of earlier choices
        for j in range(J):
            total_E = tl.zeros((BLOCK_E,), tl.int32)
            earlier_E = tl.zeros((BLOCK_E,), tl.int32)
            for c0 in range(0, chunks, BLOCK_C):
                c_C = c0 + tl.arange(0, BLOCK_C)
                count_CE = tl.load(
                    counts_ptr + (j * chunks + c_C).to(tl.int64)[:, None] * E + (e0 + e_E)[None, :],
                    mask=(c_C < chunks)[:, None] & (e0 + e_E < E)[None, :],
                    other=0,
                )
                total_E += tl.sum(count_CE, 0)
                earlier_E += tl.sum(tl.where((c_C < chunk)[:, None], count_CE, 0), 0)
            if CAPPED:
                room_E = tl.maximum(capacity - seen_E, 0)
                seen_E += total_E
                quota_E = tl.maximum(room_E - earlier_E, 0)
                tl.store(quota_ptr + (e0 + e_E) * J + j, quota_E, mask=e0 + e_E < E)
                total_E = tl.minimum(total_E, room_E)
                earlier_E = tl.minimum(earlier_E, room_E)
            kept_E += total_E
            before_E += earlier_E
        first_E = used + tl.cumsum(kept_E, 0) - kept_E
        tl.store(next_ptr + e0 + e_E, first_E + before_E, mask=e0 + e_E < E)
        tl.store(offsets_ptr + e0 + e_E, first_E, mask=e0 + e_E < tl.where(chunk == 0, E, 0))
        used += tl.sum(kept_E, 0)
    tl.store(offsets_ptr + E, used, mask=chunk == 0)
    tl.debug_barrier()
    place_S = tl.arange(0, SLOTS)
    if CAPPED:  # dst_row holds the experts of the kept slots for now
        for s0 in range(0, CHUNK, SLOTS):
            slot0 = chunk.to(tl.int64) * CHUNK + s0
            key_S, earlier_S, last_S = _rank(ids_ptr, slot0, N, E, J, SLOTS, BLOCK_G)
            quota_S = tl.load(quota_ptr + key_S, mask=key_S >= 0, other=0)
            kept_S = tl.where(earlier_S < quota_S, key_S // J, -1)
            tl.store(dst_row_ptr + slot0 + place_S, kept_S, mask=slot0 + place_S < N)
            tl.debug_barrier()
            tl.store(quota_ptr + key_S, quota_S - earlier_S - 1, mask=last_S)
            tl.debug_barrier()
    for s0 in range(0, CHUNK, SLOTS):
        slot0 = chunk.to(tl.int64) * CHUNK + s0
        slot_S = slot0 + place_S
        expert_S, earlier_S, last_S = _rank(dst_row_ptr if CAPPED else ids_ptr, slot0, N, E, 1, SLOTS, BLOCK_G)
        row_S = tl.load(next_ptr + expert_S, mask=expert_S >= 0, other=-1) + earlier_S
        row_S = tl.where(expert_S >= 0, row_S, -1)
        tl.debug_barrier()
        tl.store(next_ptr + expert_S, row_S + 1, mask=last_S)
        tl.store(dst_row_ptr + slot_S, row_S, mask=slot_S < N)
        tl.store(src_row_ptr + row_S, slot_S.to(tl.int32), mask=expert_S >= 0)
        tl.store(src_row_ptr + slot_S, -1, mask=(slot_S >= used) & (slot_S < N))
        tl.debug_barrier()


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
    J, block_E = K if capped else 1, triton.next_power_of_2(E)
    chunk = min(16 * SLOTS, max(SLOTS, triton.next_power_of_2(triton.cdiv(N, CHUNKS))))
    chunks = triton.cdiv(N, chunk)
    ids_TK = topk_ids_TK.contiguous()
    counts, next_CE, offsets, src_row_R, dst_row_TK = (
        make(J, chunks, E),
        make(chunks, E),
        make(E + 1),
        make(N),
        make(T, K),
    )
    with torch.cuda.device_of(ids_TK):
        _count_kernel[(chunks,)](ids_TK, counts, N, E, J, CHUNK=chunk, BLOCK_E=min(4096, max(32, block_E)))
        _place_kernel[(chunks,)](
            ids_TK,
            counts,
            make(chunks, E, J) if capped else counts,
            next_CE,
            offsets,
            src_row_R,
            dst_row_TK,
            N,
            E,
            J,
            capacity,
            CAPPED=capped,
            CHUNK=chunk,
            SLOTS=SLOTS,
            BLOCK_G=32,
            BLOCK_C=min(triton.next_power_of_2(chunks), 16),
            BLOCK_E=min(256, block_E),
            num_warps=8,
            num_stages=1,  # what is stored in a step is loaded in the next
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
