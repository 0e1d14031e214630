"""Expert parallelism: rows travel to the rank that holds their expert, and home again.

Experts are split evenly: global expert id = rank * L + local id, with L experts a rank. N: rows that a rank receives,
one for each token with an expert there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastmoe import ops
from fastmoe.comm.group import Group
from fastmoe.ops import check


class Dispatch(NamedTuple):
    """What came with the rows of one dispatch, and the way back.

    topk_ids_NK: [N, K] int32, the local experts of each received row, -1 where a slot of its token is another rank's or
    dropped. topk_weights_NK: [N, K]. Rows come by source rank, then token.
    routing: where this rank's rows went, its "experts" being ranks. send_counts, recv_counts: rows to and from each.
    """

    topk_ids_NK: torch.Tensor
    topk_weights_NK: torch.Tensor
    routing: ops.Routing
    send_counts: list[int]
    recv_counts: list[int]


class _AllToAll(torch.autograd.Function):
    """Backward sends each row's gradient to where the row came from."""

    @staticmethod
    def forward(ctx, rows, send_counts, recv_counts, group):
        ctx.mirror = recv_counts, send_counts, group
        return group.all_to_all(rows, send_counts, recv_counts)

    @staticmethod
    def backward(ctx, drows):
        return _AllToAll.apply(drows, *ctx.mirror), None, None, None


def _move(rows, send_counts, recv_counts, group):
    return rows if group.size == 1 else _AllToAll.apply(rows, send_counts, recv_counts, group)


def dispatch(
    x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, topk_weights_TK: torch.Tensor, group: Group, num_experts: int
) -> tuple[torch.Tensor, Dispatch]:
    """Sends a token once to each rank that has an expert of it, with the ids and weights of its experts there: an
    exchange of counts, one host sync, one each of rows, ids and weights.

    x_TD: [T, D] float; T may differ between ranks and be 0. topk_ids_TK: [T, K] int32 or int64 global expert ids, -1
    for a slot that is not sent. topk_weights_TK: [T, K] in x's dtype or float32. num_experts: over all ranks. Returns
    rows_ND and what the experts and combine need. Differentiable in x and the weights. All ranks must call it, with the
    same K, and x and the weights must need gradients on all of them or on none.

    Errors: ValueError or TypeError naming the argument, before anything is sent.

    Example, 2 ranks of 2 experts, T = 1, ids [[1, 2, 0]] on both: a copy goes to each rank. Rank 0 receives its own
    token and that of rank 1, both with the ids [1, -1, 0].
    """
    if num_experts < 1 or num_experts % group.size:
        raise ValueError(
            f"fastmoe.dispatch: num_experts must be a positive multiple of {group.size} (the ranks), got {num_experts}"
        )
    check.tensor("dispatch", "topk_ids_TK", topk_ids_TK, (x_TD.shape[0], None), check.INTS, x_TD, "T, K")
    check.tensor("dispatch", "topk_weights_TK", topk_weights_TK, tuple(topk_ids_TK.shape), like=x_TD, legend="T, K")
    outside = topk_ids_TK[(topk_ids_TK < -1) | (topk_ids_TK >= num_experts)] if x_TD.is_cpu else topk_ids_TK[:0]
    if outside.numel():
        check.fail("dispatch", "topk_ids_TK", f"in -1..{num_experts - 1}", int(outside[0]))
    L = num_experts // group.size
    rank_TK = torch.where(topk_ids_TK < 0, -1, topk_ids_TK // L)
    again_TK = (rank_TK[:, :, None] == rank_TK[:, None, :]).tril(-1).any(2)  # an earlier slot goes there
    routing = ops.build_routing(rank_TK.masked_fill(again_TK, -1), group.size)
    sent_W = routing.offsets.diff().long()
    came_W = group.all_to_all(sent_W, [1] * group.size, [1] * group.size)
    send_counts, recv_counts = torch.stack([sent_W, came_W]).tolist()
    routing = routing._replace(src_row_R=routing.src_row_R[: sum(send_counts)])  # without padding
    token_R = routing.src_row_R // topk_ids_TK.shape[1]
    first_R = torch.repeat_interleave(L * torch.arange(group.size, device=x_TD.device), sent_W)[:, None]
    local_RK = topk_ids_TK[token_R] - first_R
    local_RK = torch.where((local_RK >= 0) & (local_RK < L), local_RK, -1).int()
    ids_NK = group.all_to_all(local_RK, send_counts, recv_counts)
    rows_ND, weights_NK = (
        _move(ops.permute(tensor, routing), send_counts, recv_counts, group) for tensor in (x_TD, topk_weights_TK)
    )
    return rows_ND, Dispatch(ids_NK, weights_NK, routing, send_counts, recv_counts)


def combine(y_ND: torch.Tensor, sent: Dispatch, group: Group) -> torch.Tensor:
    """Brings home what the experts of each rank made of a token, and sums it in order of the token's slots.

    y_ND: [N, D], for each row of dispatch the weighted sum over its experts there. Returns y_TD in y's dtype,
    differentiable; 0 for a token that was sent nowhere. All ranks must call it. Errors: ValueError or TypeError naming
    the argument.
    """
    if y_ND.dim() != 2 or y_ND.shape[0] != sum(sent.recv_counts):
        raise ValueError(
            f"fastmoe.combine: y_ND must be of shape [N, D] with N = {sum(sent.recv_counts)}, got {list(y_ND.shape)}"
        )
    y_RD = _move(y_ND, sent.recv_counts, sent.send_counts, group)
    return ops.unpermute(y_RD, sent.routing)


def expert_parallel_moe(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    local_gate_up: torch.Tensor,
    local_down: torch.Tensor,
    group: Group,
    **options: object,
) -> torch.Tensor:
    """ops.moe_mlp with its experts split over the ranks of `group`; that op itself where there is one rank.

    x_TD, topk_ids_TK (global ids), topk_weights_TK: this rank's tokens, as for ops.moe_mlp. local_gate_up [L, 2F, D],
    local_down [L, D, F]: this rank's experts, as many on each rank. options: of ops.moe_mlp, biases of this rank's.
    Returns y_TD. The gradient of a local expert is the sum over the tokens of all ranks. All ranks must call it,
    forward and backward, also with T = 0. Errors: as moe_mlp.
    """
    if group.size == 1:
        return ops.moe_mlp(x_TD, topk_ids_TK, topk_weights_TK, local_gate_up, local_down, **options)
    rows_ND, sent = dispatch(x_TD, topk_ids_TK, topk_weights_TK, group, local_down.shape[0] * group.size)
    y_ND = ops.moe_mlp(rows_ND, sent.topk_ids_NK, sent.topk_weights_NK, local_gate_up, local_down, **options)
    return combine(y_ND, sent, group)
