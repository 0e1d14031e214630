"""Permutation in CUDA C++ (csrc/cuda/permutation.cu): the counting sort of build_routing in three launches."""

import torch

from fastmoe import jit

SOURCE = "permutation.cu"
SHARED_BYTES = 48 << 10  # what a block may have without asking


def build_routing(topk_ids_TK, num_experts, capacity):
    (T, K), R, E = topk_ids_TK.shape, topk_ids_TK.numel(), num_experts
    make = lambda *shape: topk_ids_TK.new_empty(shape, dtype=torch.int32)
    if R == 0:
        return make(0), make(T, K), make(E + 1).zero_()
    capped = 0 <= capacity < R
    J = K if capped else 1
    chunk = max(1, 512 // J) * J
    most = (SHARED_BYTES - chunk) // 4
    if most < E:
        raise ValueError(f"fastmoe.build_routing: num_experts must be at most {most} on the cuda backend, got {E}")
    chunks = -(-R // chunk)
    macros = {"FM_E": E, "FM_K": J, "FM_CHUNK": chunk, "FM_CAPPED": int(capped)}
    macros["FM_ID64"] = int(topk_ids_TK.dtype == torch.int64)
    count, scan, place = (jit.load(SOURCE, f"fm_routing_{step}", macros) for step in ("count", "scan", "place"))
    ids_TK = topk_ids_TK.contiguous()
    counts_EJC, totals_E = make(E, J, chunks), make(E)
    before_EC = make(E, chunks) if capped else counts_EJC
    src_row_R, dst_row_TK, offsets = make(R), make(T, K), make(E + 1)
    count(chunks, 128, ids_TK, counts_EJC, R, chunks)
    scan(E, 32, counts_EJC, before_EC, totals_E, chunks, capacity)
    place(chunks, 32, ids_TK, counts_EJC, before_EC, totals_E, offsets, src_row_R, dst_row_TK, R, chunks)
    return src_row_R, dst_row_TK, offsets
