"""The expert layer in Triton: grouped GEMMs over ragged row tiles, the gather fused in front and SwiGLU behind.

A row tile is BLOCK_M rows of one expert. How many there are is known on the device only, so the launch covers the upper
bound R / BLOCK_M + min(E, R) and spare programs leave at once. Rows past offsets[E] are not read; those of z are zero.
"""

import torch
import triton
import triton.language as tl

from fastmoe import jit
from fastmoe.ops.permutation.kernels import INTERPRETED, to_storage, unpermute


@triton.jit
def _dot(a_MK, b_KN, sum_MN):
    if INTERPRETED:  # its product of bfloat16 is garbage
        a_MK, b_KN = a_MK.to(tl.float32), b_KN.to(tl.float32)
    return tl.dot(a_MK, b_KN, sum_MN, input_precision="ieee")


@triton.jit
def _tile_kernel(
    offsets_ptr, tiles_ptr, E, num_tiles, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """tiles[i] = (expert, first row, end of the expert's rows); expert -1 for spare tiles."""
    tile_I = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert_I = tl.zeros((BLOCK,), tl.int32)
    first_I = tl.zeros((BLOCK,), tl.int32)
    passed = tl.sum(tl.zeros((BLOCK_E,), tl.int32), 0)
    for e0 in range(0, E, BLOCK_E):
        e_E = e0 + tl.arange(0, BLOCK_E)
        rows_E = tl.load(offsets_ptr + e_E + 1, mask=e_E < E, other=0) - tl.load(
            offsets_ptr + e_E, mask=e_E < E, other=0
        )
        tiles_E = (rows_E + BLOCK_M - 1) // BLOCK_M
        end_E = passed + tl.cumsum(tiles_E, 0)
        before_IE = (end_E[None, :] <= tile_I[:, None]) & (e_E < E)[None, :]
        expert_I += tl.sum(before_IE.to(tl.int32), 1)
        first_I = tl.maximum(first_I, tl.max(tl.where(before_IE, end_E[None, :], 0), 1))
        passed += tl.sum(tiles_E, 0)
    used_I = expert_I < E
    row_I = tl.load(offsets_ptr + expert_I, mask=used_I, other=0) + (tile_I - first_I) * BLOCK_M
    end_I = tl.load(offsets_ptr + expert_I + 1, mask=used_I, other=0)
    tl.store(tiles_ptr + tile_I * 3, tl.where(used_I, expert_I, -1), mask=tile_I < num_tiles)
    tl.store(tiles_ptr + tile_I * 3 + 1, row_I, mask=tile_I < num_tiles)
    tl.store(tiles_ptr + tile_I * 3 + 2, end_I, mask=tile_I < num_tiles)


@triton.jit
def _tile_and_column(num_tiles, columns, GROUP: tl.constexpr):
    """Programs go down GROUP row tiles before the next column, so that tiles of an expert share its weights in L2."""
    group = tl.program_id(0) // (GROUP * columns)
    place = tl.program_id(0) % (GROUP * columns)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    return group * GROUP + place % size, place // size


@triton.jit
def _gate_up_kernel(
    x_ptr,
    src_row_ptr,
    tiles_ptr,
    weight_ptr,
    z_ptr,
    act_ptr,
    num_tiles,
    columns,
    K,
    D,
    F,
    SAVE_Z: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """z = x[token] @ gate_up[e].T and act = silu(gate) * up for one row tile and BLOCK_N columns of F."""
    tile, column = _tile_and_column(num_tiles, columns, GROUP)
    expert = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    if expert < 0:
        return
    row_M = tl.load(tiles_ptr + tile * 3 + 1) + tl.arange(0, BLOCK_M)
    used_M = row_M < tl.load(tiles_ptr + tile * 3 + 2)
    token_M = (tl.load(src_row_ptr + row_M, mask=used_M, other=0) // K).to(tl.int64)
    f_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
    d_K = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + token_M[:, None] * D + d_K[None, :]
    gate_ptrs = weight_ptr + (expert * 2 * F + f_N)[None, :] * D + d_K[:, None]
    up_ptrs = weight_ptr + (expert * 2 * F + F + f_N)[None, :] * D + d_K[:, None]
    gate_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for d0 in range(0, D, BLOCK_K):
        x_MK = tl.load(x_ptrs + d0, mask=used_M[:, None] & (d0 + d_K < D)[None, :], other=0.0)
        mask_KN = (d0 + d_K < D)[:, None] & (f_N < F)[None, :]
        gate_MN = _dot(x_MK, tl.load(gate_ptrs + d0, mask=mask_KN, other=0.0), gate_MN)
        up_MN = _dot(x_MK, tl.load(up_ptrs + d0, mask=mask_KN, other=0.0), up_MN)
    mask_MN = used_M[:, None] & (f_N < F)[None, :]
    row_M = row_M.to(tl.int64)
    dtype: tl.constexpr = act_ptr.dtype.element_ty
    if SAVE_Z:
        z_ptrs = z_ptr + row_M[:, None] * 2 * F + f_N[None, :]
        tl.store(z_ptrs, to_storage(gate_MN, dtype), mask=mask_MN)
        tl.store(z_ptrs + F, to_storage(up_MN, dtype), mask=mask_MN)
    act_MN = gate_MN / (1.0 + tl.exp(-gate_MN)) * up_MN
    tl.store(act_ptr + row_M[:, None] * F + f_N[None, :], to_storage(act_MN, dtype), mask=mask_MN)


@triton.jit
def _clear_padding_kernel(out_ptr, offsets_ptr, E, R, N, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """Zeroes the rows past offsets[E]; programs without such a row leave at once."""
    used = tl.load(offsets_ptr + E)
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if (tl.program_id(0) + 1) * BLOCK_R <= used:
        return
    mask_R = (row_R >= used) & (row_R < R)
    for n0 in range(0, N, BLOCK_N):
        n_N = n0 + tl.arange(0, BLOCK_N)
        zero_RN = tl.zeros((BLOCK_R, BLOCK_N), out_ptr.dtype.element_ty)
        tl.store(
            out_ptr + row_R.to(tl.int64)[:, None] * N + n_N[None, :], zero_RN, mask=mask_R[:, None] & (n_N < N)[None, :]
        )


@triton.jit
def _rows_kernel(
    a_ptr,
    tiles_ptr,
    weight_ptr,
    out_ptr,
    num_tiles,
    columns,
    N,
    J,
    stride_n,
    stride_j,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[r, n] = sum_j a[r, j] * weight[e][n, j] for one row tile; the strides of weight serve both of its orders."""
    tile, column = _tile_and_column(num_tiles, columns, GROUP)
    expert = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    if expert < 0:
        return
    row_M = (tl.load(tiles_ptr + tile * 3 + 1) + tl.arange(0, BLOCK_M)).to(tl.int64)
    used_M = row_M < tl.load(tiles_ptr + tile * 3 + 2)
    n_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
    j_K = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + row_M[:, None] * J + j_K[None, :]
    weight_ptrs = weight_ptr + expert * N * J + n_N.to(tl.int64)[None, :] * stride_n
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for j0 in range(0, J, BLOCK_K):
        a_MK = tl.load(a_ptrs + j0, mask=used_M[:, None] & (j0 + j_K < J)[None, :], other=0.0)
        weight_KN = tl.load(
            weight_ptrs + (j0 + j_K).to(tl.int64)[:, None] * stride_j,
            mask=(j0 + j_K < J)[:, None] & (n_N < N)[None, :],
            other=0.0,
        )
        sum_MN = _dot(a_MK, weight_KN, sum_MN)
    tl.store(
        out_ptr + row_M[:, None] * N + n_N[None, :],
        to_storage(sum_MN, out_ptr.dtype.element_ty),
        mask=used_M[:, None] & (n_N < N)[None, :],
    )


@triton.jit
def _down_backward_kernel(
    dy_ptr,
    src_row_ptr,
    tiles_ptr,
    weight_ptr,
    z_ptr,
    weights_ptr,
    dz_ptr,
    scaled_ptr,
    partial_ptr,
    num_tiles,
    columns,
    R,
    K,
    D,
    F,
    WANT_DZ: tl.constexpr,
    WANT_SCALED: tl.constexpr,
    WANT_DWEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """dact = dy[token] @ down[e], then from z: dz, weight * act, and this column's part of dweight = <dact, act>."""
    tile, column = _tile_and_column(num_tiles, columns, GROUP)
    expert = tl.load(tiles_ptr + tile * 3).to(tl.int64)
    if expert < 0:
        return
    row_M = (tl.load(tiles_ptr + tile * 3 + 1) + tl.arange(0, BLOCK_M)).to(tl.int64)
    used_M = row_M < tl.load(tiles_ptr + tile * 3 + 2)
    slot_M = tl.load(src_row_ptr + row_M, mask=used_M, other=0)
    f_N = column * BLOCK_N + tl.arange(0, BLOCK_N)
    dact_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if WANT_DZ or WANT_DWEIGHT:
        d_K = tl.arange(0, BLOCK_K)
        dy_ptrs = dy_ptr + (slot_M // K).to(tl.int64)[:, None] * D + d_K[None, :]
        weight_ptrs = weight_ptr + (expert * D + d_K)[:, None] * F + f_N[None, :]
        for d0 in range(0, D, BLOCK_K):
            dy_MK = tl.load(dy_ptrs + d0, mask=used_M[:, None] & (d0 + d_K < D)[None, :], other=0.0)
            weight_KN = tl.load(weight_ptrs, mask=(d0 + d_K < D)[:, None] & (f_N < F)[None, :], other=0.0)
            dact_MN = _dot(dy_MK, weight_KN, dact_MN)
            weight_ptrs += BLOCK_K * F
    mask_MN = used_M[:, None] & (f_N < F)[None, :]
    at_z_MN = row_M[:, None] * 2 * F + f_N[None, :]
    gate_MN = tl.load(z_ptr + at_z_MN, mask=mask_MN, other=0.0).to(tl.float32)
    up_MN = tl.load(z_ptr + at_z_MN + F, mask=mask_MN, other=0.0).to(tl.float32)
    sigmoid_MN = 1.0 / (1.0 + tl.exp(-gate_MN))
    silu_MN = gate_MN * sigmoid_MN
    if WANT_DWEIGHT:
        part_M = tl.sum(dact_MN * silu_MN * up_MN, 1)
        tl.store(partial_ptr + column.to(tl.int64) * R + row_M, part_M, mask=used_M)
    weight_M = tl.load(weights_ptr + slot_M, mask=used_M, other=0.0).to(tl.float32)
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    if WANT_SCALED:
        scaled_MN = silu_MN * up_MN * weight_M[:, None]
        tl.store(scaled_ptr + row_M[:, None] * F + f_N[None, :], to_storage(scaled_MN, dtype), mask=mask_MN)
    if WANT_DZ:
        dact_MN = dact_MN * weight_M[:, None]
        dgate_MN = dact_MN * up_MN * sigmoid_MN * (1.0 + gate_MN * (1.0 - sigmoid_MN))
        tl.store(dz_ptr + at_z_MN, to_storage(dgate_MN, dtype), mask=mask_MN)
        tl.store(dz_ptr + at_z_MN + F, to_storage(dact_MN * silu_MN, dtype), mask=mask_MN)


@triton.jit
def _dweight_kernel(partial_ptr, src_row_ptr, dweights_ptr, R, columns, BLOCK: tl.constexpr):
    row_R = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    slot_R = tl.load(src_row_ptr + row_R, mask=row_R < R, other=-1)
    sum_R = tl.zeros((BLOCK,), tl.float32)
    for _ in range(columns):
        sum_R += tl.load(partial_ptr + row_R, mask=slot_R >= 0, other=0.0)
        partial_ptr += R
    tl.store(dweights_ptr + slot_R, to_storage(sum_R, dweights_ptr.dtype.element_ty), mask=slot_R >= 0)


@triton.jit
def _wgrad_kernel(
    a_ptr,
    b_ptr,
    src_row_ptr,
    offsets_ptr,
    out_ptr,
    tiles_m,
    tiles_n,
    K,
    M,
    N,
    GATHER_A: tl.constexpr,
    GATHER_B: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[e] = a_rows.T @ b_rows over the rows of expert e, a or b gathered by token; zero where it has none."""
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    place = tl.program_id(0) % (tiles_m * tiles_n)
    m_M = place // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n_N = place % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offsets_ptr + expert + 1)
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(tl.load(offsets_ptr + expert), end, BLOCK_K):
        row_K = row + tl.arange(0, BLOCK_K)
        used_K = row_K < end
        token_K = row_K
        if GATHER_A or GATHER_B:
            token_K = tl.load(src_row_ptr + row_K, mask=used_K, other=0) // K
        a_row_K = (token_K if GATHER_A else row_K).to(tl.int64)
        b_row_K = (token_K if GATHER_B else row_K).to(tl.int64)
        a_MK = tl.load(
            a_ptr + a_row_K[None, :] * M + m_M[:, None], mask=used_K[None, :] & (m_M < M)[:, None], other=0.0
        )
        b_KN = tl.load(
            b_ptr + b_row_K[:, None] * N + n_N[None, :], mask=used_K[:, None] & (n_N < N)[None, :], other=0.0
        )
        sum_MN = _dot(a_MK, b_KN, sum_MN)
    out_ptrs = out_ptr + (expert.to(tl.int64) * M + m_M)[:, None] * N + n_N[None, :]
    tl.store(out_ptrs, to_storage(sum_MN, out_ptr.dtype.element_ty), mask=(m_M < M)[:, None] & (n_N < N)[None, :])


def _fit(size: int, most: int) -> int:
    """The block for a dimension: a power of two from 16 (the least of a matrix product) to `most`."""
    return min(most, max(16, triton.next_power_of_2(size)))


def _blocks(like: torch.Tensor, m: int, n: int, k: int, products: int = 1, most_n: int = 128) -> dict[str, int]:
    """Blocks, warps and pipeline stages for sizes M, N and K and `products` right-hand sides; m alone sets BLOCK_M."""
    half = like.element_size() == 2
    blocks = {
        "BLOCK_M": _fit(m, 128 if half else 64),
        "BLOCK_N": _fit(n, most_n if half else 64 // products),
        "BLOCK_K": _fit(k, 64 if half else 32),
    }
    M, N, K = blocks.values()
    stage = (M * K + products * K * N) * like.element_size()
    stages = max(1, min(4, (jit.shared_memory(like) - 1024) // stage))
    return {**blocks, "num_warps": 8 if M * N * products >= 128 * 64 else 4, "num_stages": stages}


def _row_tiles(offsets: torch.Tensor, R: int, block_M: int) -> tuple[torch.Tensor, int]:
    E = offsets.shape[0] - 1
    num_tiles = triton.cdiv(R, block_M) + min(E, R)
    tiles = offsets.new_empty((num_tiles, 3))
    _tile_kernel[(triton.cdiv(num_tiles, 64),)](
        offsets, tiles, E, num_tiles, BLOCK_M=block_M, BLOCK=64, BLOCK_E=min(128, triton.next_power_of_2(E))
    )
    return tiles, num_tiles


def _rows(a, tiles, num_tiles, weight, n, j, strides, average):
    blocks = _blocks(a, average, n, j)
    columns = triton.cdiv(n, blocks["BLOCK_N"])
    out = a.new_empty((a.shape[0], n))
    _rows_kernel[(num_tiles * columns,)](a, tiles, weight, out, num_tiles, columns, n, j, *strides, **blocks, GROUP=8)
    return out


def _wgrad(a, b, src_row_R, offsets, K, like, gather_a):
    E, M, N = like.shape
    blocks = _blocks(a, M, N, triton.cdiv(src_row_R.shape[0], E))
    tiles_m, tiles_n = triton.cdiv(M, blocks["BLOCK_M"]), triton.cdiv(N, blocks["BLOCK_N"])
    out = like.new_empty(like.shape)
    _wgrad_kernel[(E * tiles_m * tiles_n,)](
        a, b, src_row_R, offsets, out, tiles_m, tiles_n, K, M, N, GATHER_A=gather_a, GATHER_B=not gather_a, **blocks
    )
    return out


def _only(activation, save, *plain):
    if activation != "swiglu" or save not in ("z", "none") or any(plain):
        raise NotImplementedError("fastmoe.moe_mlp: Triton serves swiglu in the plain layout so far")


def moe_mlp(
    x_TD,
    weights_TK,
    src_row_R,
    dst_row_TK,
    offsets,
    gate_up_proj,
    down_proj,
    gate_up_bias,
    down_bias,
    activation,
    interleaved,
    transposed,
    alpha,
    limit,
    save,
    sparse_grads,
):
    _only(activation, save, interleaved, transposed, gate_up_bias is not None, down_bias is not None)
    (E, D, F), R, K = down_proj.shape, src_row_R.shape[0], dst_row_TK.shape[1]
    save_z = save == "z"
    z_R2F = x_TD.new_empty((R if save_z else 0, 2 * F))
    z_scale = x_TD.new_empty((0, 2 * -(-F // 64)), dtype=torch.bfloat16)
    if R == 0 or x_TD.shape[0] == 0:
        return x_TD.new_zeros(x_TD.shape), z_R2F, z_scale
    x_TD, src_row_R, offsets, gate_up_proj, down_proj = (
        tensor.contiguous() for tensor in (x_TD, src_row_R, offsets, gate_up_proj, down_proj)
    )
    average = triton.cdiv(R, E)
    act_RF = x_TD.new_empty((R, F))
    with torch.cuda.device_of(x_TD):
        if save_z:
            _clear_padding_kernel[(triton.cdiv(R, 16),)](z_R2F, offsets, E, R, 2 * F, BLOCK_R=16, BLOCK_N=256)
        blocks = _blocks(x_TD, average, F, D, products=2)
        tiles, num_tiles = _row_tiles(offsets, R, blocks["BLOCK_M"])
        columns = triton.cdiv(F, blocks["BLOCK_N"])
        _gate_up_kernel[(num_tiles * columns,)](
            x_TD,
            src_row_R,
            tiles,
            gate_up_proj,
            z_R2F,
            act_RF,
            num_tiles,
            columns,
            K,
            D,
            F,
            SAVE_Z=save_z,
            **blocks,
            GROUP=8,
        )
        y_RD = _rows(act_RF, tiles, num_tiles, down_proj, D, F, (F, 1), average)
    return unpermute(y_RD, src_row_R, dst_row_TK, weights_TK), z_R2F, z_scale


def moe_mlp_backward(
    dy_TD,
    x_TD,
    weights_TK,
    src_row_R,
    dst_row_TK,
    offsets,
    gate_up_proj,
    down_proj,
    gate_up_bias,
    down_bias,
    z_RZ,
    z_scale,
    activation,
    interleaved,
    transposed,
    alpha,
    limit,
    save,
    need_x,
    need_weights,
    need_gate_up,
    need_down,
    need_gate_up_bias,
    need_down_bias,
    sparse_grads,
):
    _only(activation, save, interleaved, transposed, need_gate_up_bias, need_down_bias, sparse_grads)
    z_R2F, none = z_RZ, x_TD.new_empty(0)
    (E, D, F), R, K = down_proj.shape, src_row_R.shape[0], dst_row_TK.shape[1]
    outputs = ((x_TD, need_x), (weights_TK, need_weights), (gate_up_proj, need_gate_up), (down_proj, need_down))
    if R == 0 or x_TD.shape[0] == 0:
        grads = (like.new_zeros(like.shape) if need else like.new_empty(0) for like, need in outputs)
        return *grads, none, none.clone()
    dx_TD, dweights_TK, dgate_up, ddown = (like.new_empty(0) for like, _ in outputs)
    dy_TD, x_TD, weights_TK, src_row_R, offsets, gate_up_proj, down_proj, z_R2F = (
        tensor.contiguous() for tensor in (dy_TD, x_TD, weights_TK, src_row_R, offsets, gate_up_proj, down_proj, z_R2F)
    )
    average = triton.cdiv(R, E)
    want_dz = need_x or need_gate_up
    with torch.cuda.device_of(x_TD):
        blocks = _blocks(x_TD, average, F, D, most_n=64)  # 128 spills registers
        tiles, num_tiles = _row_tiles(offsets, R, blocks["BLOCK_M"])
        columns = triton.cdiv(F, blocks["BLOCK_N"])
        dz_R2F = torch.empty_like(z_R2F) if want_dz else None
        scaled_RF = x_TD.new_empty((R, F)) if need_down else None
        partial = x_TD.new_empty((columns, R), dtype=torch.float32) if need_weights else None
        if any((want_dz, need_weights, need_down)):
            _down_backward_kernel[(num_tiles * columns,)](
                dy_TD,
                src_row_R,
                tiles,
                down_proj,
                z_R2F,
                weights_TK,
                dz_R2F,
                scaled_RF,
                partial,
                num_tiles,
                columns,
                R,
                K,
                D,
                F,
                WANT_DZ=want_dz,
                WANT_SCALED=need_down,
                WANT_DWEIGHT=need_weights,
                **blocks,
                GROUP=8,
            )
        if need_weights:
            dweights_TK = torch.zeros_like(weights_TK)
            _dweight_kernel[(triton.cdiv(R, 256),)](partial, src_row_R, dweights_TK, R, columns, BLOCK=256)
        if need_down:
            ddown = _wgrad(dy_TD, scaled_RF, src_row_R, offsets, K, down_proj, gather_a=True)
        if need_gate_up:
            dgate_up = _wgrad(dz_R2F, x_TD, src_row_R, offsets, K, gate_up_proj, gather_a=False)
        if need_x:
            dx_RD = _rows(dz_R2F, tiles, num_tiles, gate_up_proj, D, 2 * F, (1, D), average)
            dx_TD = unpermute(dx_RD, src_row_R, dst_row_TK, None)
    return dx_TD, dweights_TK, dgate_up, ddown, none, none.clone()
