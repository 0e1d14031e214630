"""Permutation in CUDA C++ (csrc/cuda/permutation.cu): the counting sort of build_routing in two launches."""

import torch

from fastmoe import jit

SOURCE = "permutation.cu"
CHUNKS = 128  # parts of the slots, each of 512 to 4096


def build_routing(topk_ids_TK, num_experts, capacity):
    (T, K), R, E = topk_ids_TK.shape, topk_ids_TK.numel(), num_experts
    make = lambda *shape: topk_ids_TK.new_empty(shape, dtype=torch.int32)
    if R == 0:
        return make(0), make(T, K), make(E + 1).zero_()
    capped = 0 <= capacity < R
    J = K if capped else 1
    slots = min(4096, max(512, 1 << (-(-R // CHUNKS) - 1).bit_length()))
    chunk = max(1, slots // J) * J
    chunks = -(-R // chunk)
    macros = {"FM_E": E, "FM_K": J, "FM_CHUNK": chunk, "FM_CAPPED": int(capped)}
    macros["FM_ID64"] = int(topk_ids_TK.dtype == torch.int64)
    count, place = (jit.load(SOURCE, f"fm_routing_{step}", macros) for step in ("count", "place"))
    ids_TK = topk_ids_TK.contiguous()
    counts, scratch = make(J, chunks, E), make(chunks, 3 + J if capped else 3, E)
    src_row_R, dst_row_TK, offsets = make(R), make(T, K), make(E + 1)
    count(chunks, 128, ids_TK, counts, R, chunks)
    place(chunks, 128, ids_TK, counts, scratch, offsets, src_row_R, dst_row_TK, R, chunks, capacity)
    return src_row_R, dst_row_TK, offsets
