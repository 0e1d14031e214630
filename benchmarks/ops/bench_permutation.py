"""build_routing, and permute and unpermute forward and backward.

Bytes: ids read and the three index arrays written once; every row read and written once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.ops.harness import Case, topk_ids, with_grads
from fastmoe import ops


def sort_and_count(ids_TK, E):
    """src_row_R, dst_row_TK, offsets by torch's own stable sort, for ids without -1."""
    flat_R = ids_TK.view(-1)
    src_row_R = flat_R.argsort(stable=True)
    dst_row_R = torch.empty_like(src_row_R).scatter_(0, src_row_R, torch.arange(flat_R.numel()))
    offsets = torch.nn.functional.pad(torch.bincount(flat_R, minlength=E).cumsum(0), (1, 0))
    return src_row_R.int(), dst_row_R.view_as(ids_TK).int(), offsets.int()


def build_case(T: int, K: int, E: int) -> Case:
    ids_TK = topk_ids(T, K, E)
    sort = lambda: sort_and_count(ids_TK, E)
    arms = {"fastmoe": lambda: ops.build_routing(ids_TK, E), "torch argsort, bincount": sort}
    return Case(f"build_routing T{T} K{K} E{E}", arms, sort, work=16 * T * K + 4 * E, roof="triad", tolerance=0)


def permute_case(T: int, K: int, E: int, D: int) -> Case:
    routing = ops.build_routing(topk_ids(T, K, E), E)
    token_R = routing.src_row_R.long() // K
    x_TD, dy_RD = torch.randn(T, D), torch.randn(T * K, D)

    def step(permute, dtype=torch.float32):
        return with_grads(lambda x: [permute(x)], [x_TD.to(dtype)], [dy_RD.to(dtype)])

    select = lambda x: x.index_select(0, token_R)
    return Case(
        f"permute forward + backward T{T} K{K} E{E} D{D}",
        {"fastmoe": step(lambda x: ops.permute(x, routing)), "torch index_select": step(select)},
        exact=step(select, torch.float64),
        work=4 * 2 * (T + T * K) * D,
        roof="triad",
    )


def unpermute_case(T: int, K: int, E: int, D: int) -> Case:
    routing = ops.build_routing(topk_ids(T, K, E), E)
    slot_R = routing.src_row_R.long()
    y_RD, weights_TK, dy_TD = torch.randn(T * K, D), torch.rand(T, K), torch.randn(T, D)

    def step(unpermute, dtype=torch.float32):
        return with_grads(lambda *args: [unpermute(*args)], [y_RD.to(dtype), weights_TK.to(dtype)], [dy_TD.to(dtype)])

    def index_add(y_RD, weights_TK):
        return y_RD.new_zeros(T, D).index_add(0, slot_R // K, y_RD * weights_TK.view(-1)[slot_R, None])

    return Case(
        f"unpermute forward + backward T{T} K{K} E{E} D{D}",
        {"fastmoe": step(lambda y, weights: ops.unpermute(y, routing, weights)), "torch index_add": step(index_add)},
        exact=step(index_add, torch.float64),
        work=4 * (3 * T * K + 2 * T) * D,
        roof="triad",
    )


def cases(quick: bool) -> Iterator[Case]:
    for shape in [(128, 4, 16)] if quick else [(4096, 2, 32), (8192, 8, 64), (32768, 8, 128), (16384, 2, 32768)]:
        yield build_case(*shape)
    for shape in [(64, 2, 8, 32)] if quick else [(4096, 2, 32, 512), (8192, 8, 64, 512)]:
        yield permute_case(*shape)
        yield unpermute_case(*shape)
