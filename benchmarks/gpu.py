"""What is measured on a GPU: `experts` at the shapes S1 to S7 in bfloat16, `metadata` from logits to row tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from benchmarks.ops import bench_experts
from benchmarks.ops.harness import Case, Outputs
from fastmoe import ops

BLOCK_M = 128


def experts(quick: bool) -> Iterator[Case]:
    """moe_mlp forward and backward beside the peers that are installed."""
    for name, shape in (bench_experts.TINY if quick else bench_experts.GPU_SHAPES).items():
        for routed in bench_experts.ROUTINGS:
            yield bench_experts.case(name, shape, routed, torch.bfloat16, "cuda")


def fused(logits_TE: torch.Tensor, K: int) -> Outputs:
    """Weights, ids, rows, offsets, the tiles and how many there are by topk_gate, build_routing and the tile kernel."""
    from fastmoe.ops.experts import kernels

    weights_TK, ids_TK, _, _ = ops.topk_gate(logits_TE, K)
    routing = ops.build_routing(ids_TK, logits_TE.shape[1])
    tiles, first, _ = kernels._Tiles(routing.offsets, ids_TK.numel())(BLOCK_M)
    return [weights_TK, ids_TK, *routing, tiles, first]


def composite(logits_TE: torch.Tensor, K: int) -> Outputs:
    """The same in torch alone, without waiting for the device but in bincount."""
    T, E = logits_TE.shape
    weights_TK, ids_TK = logits_TE.softmax(1).topk(K, dim=1)
    weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
    flat_R = ids_TK.view(-1)
    src_row_R = flat_R.argsort(stable=True)
    dst_row_R = torch.empty_like(src_row_R).scatter_(0, src_row_R, torch.arange(T * K, device=flat_R.device))
    counts_E = torch.bincount(flat_R, minlength=E)
    offsets = pad(counts_E.cumsum(0), (1, 0))
    ends_E = ((counts_E + BLOCK_M - 1) // BLOCK_M).cumsum(0)
    tile_I = torch.arange(-(-T * K // BLOCK_M) + min(E, T * K), device=flat_R.device)
    expert_I = torch.searchsorted(ends_E, tile_I, right=True)
    expert_I = expert_I.clamp(max=E - 1)
    first = pad(ends_E, (1, 0))
    row_I = offsets[expert_I] + (tile_I - first[expert_I]) * BLOCK_M
    tiles = torch.stack([expert_I, row_I, offsets[expert_I + 1]], 1)
    first = torch.cat([first[-1:], first[:-1]])
    rows = src_row_R.int(), dst_row_R.view_as(ids_TK).int(), offsets.int()
    return [weights_TK, ids_TK, *rows, tiles.int(), first.int()]


def without_waiting(call) -> Outputs:
    """The call, which must not wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return call()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def used_tiles(outputs: Outputs) -> Outputs:
    """Spare tiles may hold anything."""
    *rest, tiles, first = outputs
    return [*rest, tiles[: int(first[0])], first]


def metadata(quick: bool) -> Iterator[Case]:
    """From router logits to the table of row tiles. Bytes: logits read once, all outputs written once."""
    for T, K, E in [(128, 4, 16)] if quick else [(32768, 8, 128), (8192, 10, 512), (4096, 8, 32), (8192, 2, 8)]:
        logits_TE = torch.randn(T, E, device="cuda")
        arms = {
            "fastmoe": lambda logits=logits_TE, K=K: without_waiting(lambda: fused(logits, K)),
            "torch composite": lambda logits=logits_TE, K=K: composite(logits, K),
        }
        yield Case(
            f"logits to row tiles T{T} K{K} E{E}",
            arms,
            exact=lambda logits=logits_TE, K=K: used_tiles(composite(logits.double(), K)),
            work=4 * T * E + 16 * T * K + 4 * E,
            roof="triad",
            compared=used_tiles,
        )
