"""Permutation: who goes where. Builds the routing and moves rows into expert order and back."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import define


class Routing(NamedTuple):
    """The stable order of routed rows by expert. R = T*K rows; offsets[E] of them are used, the rest is padding.

    src_row_R: [R] int32, the flat slot t*K + k that a row comes from, -1 for padding.
    dst_row_TK: [T, K] int32, the row a slot goes to, -1 for a dropped slot; the inverse of src_row_R.
    offsets: [E+1] int32, expert e owns rows offsets[e] to offsets[e+1].

    Example, E=2, ids [[1, 0], [0, -1], [1, 1]]: offsets [0, 2, 5], src_row_R [1, 2, 0, 4, 5, -1],
    dst_row_TK [[2, 0], [1, -1], [3, 4]].
    """

    src_row_R: torch.Tensor
    dst_row_TK: torch.Tensor
    offsets: torch.Tensor


def build_routing(topk_ids_TK: torch.Tensor, num_experts: int, capacity: int | None = None) -> Routing:
    """Sorts the T*K slots by expert, stable in (t, k), by counting; no host sync.

    topk_ids_TK: [T, K] int32 or int64; -1 drops the slot. capacity: keep at most this many slots of an expert, first
    choices of all tokens before second ones, then in token order. Not differentiable.

    Errors: ValueError for ids outside -1..E-1 on the CPU (on a GPU such a slot is dropped) and T*K of 2^31 or more.
    Source: FastMoE's position sort (He et al., arXiv 2103.13262), capacity order of GShard (arXiv 2006.16668).
    """
    check.tensor("build_routing", "topk_ids_TK", topk_ids_TK, (None, None), check.INTS, legend="T, K")
    check.positive("build_routing", num_experts=num_experts, K=topk_ids_TK.shape[1])
    if capacity is not None and capacity < 0:
        check.fail("build_routing", "capacity", "None or at least 0", capacity)
    _check_rows("build_routing", topk_ids_TK.numel())
    return Routing(*_build_routing(topk_ids_TK, num_experts, -1 if capacity is None else capacity))


def build_routing_from_experts(token_R: torch.Tensor, offsets: torch.Tensor, num_tokens: int) -> Routing:
    """A routing from the experts' own lists of tokens, for routers without a fixed K (expert choice, token rounding).

    token_R: [R] int32 or int64, the token of each row, ascending inside an expert. offsets: [E+1] int32 or int64. A
    token's slot k is the expert id, so K = E: dst_row_TK is [T, E] and weights for it are [T, E]; a token's rows are
    combined in ascending expert id.

    Errors: ValueError for tokens outside 0..T-1, not ascending inside an expert, or offsets that do not run from 0 to R
    (CPU).

    Example, T=3: token_R [0, 2, 1, 2], offsets [0, 2, 4] -> src_row_R [0, 4, 3, 5], dst_row_TK [[0, -1], [-1, 2], [1,
    3]].
    """
    check.tensor("build_routing_from_experts", "token_R", token_R, (None,), check.INTS, legend="R")
    check.tensor("build_routing_from_experts", "offsets", offsets, (None,), check.INTS, like=token_R, legend="E+1")
    E = offsets.shape[0] - 1
    check.positive("build_routing_from_experts", num_experts=E)
    if num_tokens < 0:
        check.fail("build_routing_from_experts", "num_tokens", "at least 0", num_tokens)
    _check_rows("build_routing_from_experts", num_tokens * E)
    return Routing(*_build_routing_from_experts(token_R, offsets, num_tokens))


def round_routing(
    topk_weights_TK: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    probs_TE: torch.Tensor,
    tile: int = 128,
    rounding: str = "nearest",
) -> tuple[Routing, torch.Tensor]:
    """Rounds the number of tokens of every expert to a multiple of the tile, so that no tile is computed half empty.

    Takes what `topk_gate` returns. topk_weights_TK: [T, K] float. topk_ids_TK: [T, K] int32 or int64, different ones a
    token; -1 chooses nothing. probs_TE: [T, E] in the weights' dtype. An expert that n tokens chose gets n rounded,
    half to even ("nearest"; "up", "down"), and at most T: first the tokens that chose it by descending weight, then
    others by descending probability; of equal ones the lower token wins. With "nearest" it gains or loses tile / 2 at
    most.

    Returns a routing with K = E as `build_routing_from_experts` makes it, but padded: R = min(T*E, T*K + E * (tile //
    2, tile - 1 or 0)). And its weights [T, E]: the given weight where a token chose the expert, the probability where
    it was added, 0 elsewhere. Differentiable in weights and probs; no host sync.

    Errors: ValueError for ids outside -1..E-1 on the CPU (on a GPU they choose nothing), a tile below 1, 2^31 slots or
    more. Source: SonicMoE (Guo et al., arXiv 2512.14080).

    Example, tile 4: experts with 5, 6, 10 and 3 tokens get 4, 8, 8 and 4.
    """
    op = "round_routing"
    check.tensor(op, "topk_weights_TK", topk_weights_TK, (None, None), legend="T, K")
    T, K = topk_weights_TK.shape
    check.tensor(op, "topk_ids_TK", topk_ids_TK, (T, K), check.INTS, topk_weights_TK, "T, K")
    check.tensor(op, "probs_TE", probs_TE, (T, None), (topk_weights_TK.dtype,), topk_weights_TK, "T, E")
    E = probs_TE.shape[1]
    check.positive(op, num_experts=E, tile=tile)
    check.option(op, "rounding", rounding, ("nearest", "up", "down"))
    _check_rows(op, T * E)
    outside_TK = (topk_ids_TK < 0) | (topk_ids_TK >= E)
    if topk_ids_TK.is_cpu and not torch.compiler.is_compiling():
        bad = topk_ids_TK[outside_TK & (topk_ids_TK != -1)]
        if bad.numel():
            check.fail(op, "topk_ids_TK", f"in -1..{E - 1}", int(bad[0]))
    ids_TK = topk_ids_TK.long().masked_fill(outside_TK, E)
    chosen_TE = ids_TK.new_zeros((T, E + 1), dtype=torch.bool).scatter(1, ids_TK, True)[:, :E]
    weights_TE = probs_TE.new_zeros((T, E + 1)).scatter(1, ids_TK, topk_weights_TK)[:, :E]
    weights_TE = torch.where(chosen_TE, weights_TE, probs_TE)

    # by weight, then those that chose first: both sorts stable, so ties stay in token order
    chosen_ET, slot_ET = chosen_TE.t(), torch.arange(T * E, device=ids_TK.device).view(T, E).t()
    order_ET = weights_TE.detach().t().sort(dim=1, descending=True, stable=True).indices
    first_ET = chosen_ET.gather(1, order_ET).byte()
    order_ET = order_ET.gather(1, first_ET.sort(dim=1, descending=True, stable=True).indices)
    count_E, step_T = chosen_ET.sum(1), torch.arange(T, device=ids_TK.device)
    tiles_E, rest_E = count_E // tile, count_E % tile
    if rounding == "nearest":
        tiles_E = tiles_E + (2 * rest_E + tiles_E % 2 > tile)
    elif rounding == "up":
        tiles_E = tiles_E + (rest_E > 0)
    count_E = (tiles_E * tile).clamp(max=T)
    taken_ET = order_ET.new_zeros((E, T), dtype=torch.bool).scatter(1, order_ET, step_T < count_E[:, None])

    R = min(T * E, T * K + E * {"nearest": tile // 2, "up": tile - 1, "down": 0}[rounding])
    row_ET = torch.where(taken_ET, (taken_ET.view(-1).cumsum(0) - 1).view(E, T), R)  # those not taken go to row R
    src_row_R = slot_ET.new_full((R + 1,), -1).scatter(0, row_ET.reshape(-1), slot_ET.reshape(-1))[:R]
    offsets = torch.cat([count_E.new_zeros(1), count_E.cumsum(0)])
    routing = Routing(src_row_R.int(), row_ET.masked_fill(~taken_ET, -1).t().int().contiguous(), offsets.int())
    return routing, weights_TE.masked_fill(~taken_ET.t(), 0)


def permute(x_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Copies token rows into expert order: y_RD[r] = x_TD[src_row_R[r] // K]; padding rows are zero. Any float dtype.

    Errors: ValueError or TypeError for shapes, dtypes or devices that do not fit the routing.
    """
    check.tensor("permute", "x_TD", x_TD, (routing.dst_row_TK.shape[0], None), legend="T, D")
    check_routing("permute", routing, x_TD)
    return _permute(x_TD, routing.src_row_R, routing.dst_row_TK)


def unpermute(y_RD: torch.Tensor, routing: Routing, topk_weights_TK: torch.Tensor | None = None) -> torch.Tensor:
    """Gathers the rows of each token back and sums them: out[t] = sum_k weight[t, k] * y_RD[dst_row_TK[t, k]], in order
    of k.

    y_RD: [R, D]. topk_weights_TK: [T, K] in y's dtype or float32; None adds unweighted. Sums in float32. Returns [T, D]
    in y's dtype. Differentiable in y_RD and the weights; padding rows get gradient zero.
    """
    check.tensor("unpermute", "y_RD", y_RD, (routing.src_row_R.shape[0], None), legend="R, D")
    check_routing("unpermute", routing, y_RD)
    if topk_weights_TK is not None:
        check.tensor(
            "unpermute",
            "topk_weights_TK",
            topk_weights_TK,
            tuple(routing.dst_row_TK.shape),
            (y_RD.dtype, torch.float32),
            like=y_RD,
            legend="T, K",
        )
    return _unpermute(y_RD, routing.src_row_R, routing.dst_row_TK, topk_weights_TK)


def check_routing(op: str, routing: Routing, like: torch.Tensor) -> None:
    for name, tensor, shape in (
        ("src_row_R", routing.src_row_R, (None,)),
        ("dst_row_TK", routing.dst_row_TK, (None, None)),
        ("offsets", routing.offsets, (None,)),
    ):
        check.tensor(op, f"routing.{name}", tensor, shape, (torch.int32,), like=like)


def _check_rows(op: str, rows: int) -> None:
    if rows >= 2**31:
        check.fail(op, "the number of slots", "below 2**31", rows)


def _fake_build_routing(topk_ids_TK, num_experts, capacity):
    T, K = topk_ids_TK.shape
    make = lambda *shape: topk_ids_TK.new_empty(shape, dtype=torch.int32)  # noqa: E731
    return make(T * K), make(T, K), make(num_experts + 1)


def _fake_from_experts(token_R, offsets, num_tokens):
    R, E = token_R.shape[0], offsets.shape[0] - 1
    make = lambda *shape: token_R.new_empty(shape, dtype=torch.int32)  # noqa: E731
    return make(R), make(num_tokens, E), make(E + 1)


def _setup_permute(ctx, inputs, output):
    _, src_row_R, dst_row_TK = inputs
    ctx.save_for_backward(src_row_R, dst_row_TK)


def _backward_permute(ctx, dy_RD):
    return _unpermute(dy_RD, *ctx.saved_tensors, None), None, None


def _setup_unpermute(ctx, inputs, output):
    y_RD, src_row_R, dst_row_TK, weights_TK = inputs
    ctx.save_for_backward(None if weights_TK is None else y_RD, src_row_R, dst_row_TK, weights_TK)


def _backward_unpermute(ctx, dout_TD):
    y_RD, src_row_R, dst_row_TK, weights_TK = ctx.saved_tensors
    if weights_TK is None:
        return _permute(dout_TD, src_row_R, dst_row_TK), None, None, None
    dy_RD, dweights_TK = _unpermute_backward(dout_TD, y_RD, src_row_R, dst_row_TK, weights_TK)
    return dy_RD, None, None, dweights_TK


def _lower_rows(args, dtype):
    return args[0].to(dtype) if args[0].dtype != torch.float64 else args[0], *args[1:]


def _lower_rows_and_weights(args, dtype):
    rows, src, dst, weights = _lower_rows(args, dtype)
    return rows, src, dst, weights if weights is None or weights.dtype == rows.dtype else weights.float()


_build_routing = define(
    "permutation",
    "build_routing(Tensor topk_ids_TK, int num_experts, int capacity) -> (Tensor, Tensor, Tensor)",
    fake=_fake_build_routing,
)
_build_routing_from_experts = define(
    "permutation",
    "build_routing_from_experts(Tensor token_R, Tensor offsets, int num_tokens) -> (Tensor, Tensor, Tensor)",
    fake=_fake_from_experts,
)
_permute = define(
    "permutation",
    "permute(Tensor x_TD, Tensor src_row_R, Tensor dst_row_TK) -> Tensor",
    fake=lambda x_TD, src_row_R, dst_row_TK: x_TD.new_empty((src_row_R.shape[0], x_TD.shape[1])),
    setup_context=_setup_permute,
    backward=_backward_permute,
    autocast=_lower_rows,
)
_unpermute = define(
    "permutation",
    "unpermute(Tensor y_RD, Tensor src_row_R, Tensor dst_row_TK, Tensor? weights_TK) -> Tensor",
    fake=lambda y_RD, src_row_R, dst_row_TK, weights_TK: y_RD.new_empty((dst_row_TK.shape[0], y_RD.shape[1])),
    setup_context=_setup_unpermute,
    backward=_backward_unpermute,
    autocast=_lower_rows_and_weights,
)
_unpermute_backward = define(
    "permutation",
    "unpermute_backward(Tensor dout_TD, Tensor y_RD, Tensor src_row_R, Tensor dst_row_TK, Tensor weights_TK) "
    "-> (Tensor, Tensor)",
    fake=lambda dout_TD, y_RD, src_row_R, dst_row_TK, weights_TK: (
        y_RD.new_empty(y_RD.shape),
        weights_TK.new_empty(weights_TK.shape),
    ),
)
