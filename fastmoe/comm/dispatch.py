"""Expert parallelism: rows travel to the rank that holds their expert, and home again.

Experts are split evenly: global expert id = rank * L + local id, with L experts a rank. N: rows that a rank receives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastmoe import ops
from fastmoe.comm.group import Group


class Dispatch(NamedTuple):
    """Where the rows of one dispatch went; combine takes them back along it.

    expert_N1: [N, 1] int64, local expert of each received row, the topk_ids of a layer with K = 1. Rows come by source
    rank, then local expert, then (t, k).
    routing: how this rank's tokens were sorted by global expert. send_counts, recv_counts: rows to and from each rank.
    """

    expert_N1: torch.Tensor
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
    x_TD: torch.Tensor, topk_ids_TK: torch.Tensor, group: Group, num_experts: int
) -> tuple[torch.Tensor, Dispatch]:
    """Sends a copy of token t to the rank of each of its K experts: an exchange of counts, one host sync, one of rows.

    x_TD: [T, D] float; T may differ between ranks and be 0. topk_ids_TK: [T, K] int32 or int64 global expert ids, -1
    for a slot that is not sent. num_experts: over all ranks. Returns rows_ND and what combine needs. Differentiable
    in x. All ranks must call it, and x must need a gradient on all of them or on none.

    Errors: ValueError or TypeError naming the argument, before anything is sent.

    Example, 2 ranks of 1 expert, T = 1, ids [[1, 0]] on both: rank 0 receives its own token and that of rank 1,
    send_counts [1, 1], recv_counts [1, 1], expert_N1 [[0], [0]].
    """
    if num_experts < 1 or num_experts % group.size:
        raise ValueError(
            f"fastmoe.dispatch: num_experts must be a positive multiple of {group.size} (the ranks), got {num_experts}"
        )
    routing = ops.build_routing(topk_ids_TK, num_experts)
    rows_RD = ops.permute(x_TD, routing)
    L = num_experts // group.size
    sent_WL = routing.offsets.diff().long().view(group.size, L)
    came_WL = group.all_to_all(sent_WL.view(-1), [L] * group.size, [L] * group.size).view(group.size, L)
    send_counts, recv_counts = torch.stack([sent_WL.sum(1), came_WL.sum(1)]).tolist()
    rows_ND = _move(rows_RD[: sum(send_counts)], send_counts, recv_counts, group)
    expert_WL = torch.arange(L, device=x_TD.device).repeat(group.size)
    expert_N = torch.repeat_interleave(expert_WL, came_WL.view(-1), output_size=sum(recv_counts))
    return rows_ND, Dispatch(expert_N[:, None], routing, send_counts, recv_counts)


def combine(y_ND: torch.Tensor, sent: Dispatch, topk_weights_TK: torch.Tensor, group: Group) -> torch.Tensor:
    """Brings the experts' rows home and sums them: y_t = sum_k topk_weights_TK[t, k] * row of slot k, in order of k.

    y_ND: [N, D], a row for each row of dispatch, in its order. topk_weights_TK: [T, K] in y's dtype or float32; slots
    that were not sent add nothing. Returns y_TD in y's dtype, differentiable in y and the weights. All ranks must call
    it. Errors: ValueError or TypeError naming the argument.
    """
    if y_ND.dim() != 2 or y_ND.shape[0] != sum(sent.recv_counts):
        raise ValueError(
            f"fastmoe.combine: y_ND must be of shape [N, D] with N = {sum(sent.recv_counts)}, got {list(y_ND.shape)}"
        )
    y_RD = _move(y_ND, sent.recv_counts, sent.send_counts, group)
    not_sent = sent.routing.src_row_R.shape[0] - y_RD.shape[0]
    if not_sent:
        y_RD = torch.nn.functional.pad(y_RD, (0, 0, 0, not_sent))
    return ops.unpermute(y_RD, sent.routing, topk_weights_TK)


def expert_parallel_moe(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    local_gate_up: torch.Tensor,
    local_down: torch.Tensor,
    group: Group,
) -> torch.Tensor:
    """ops.moe_mlp with its experts split over the ranks of `group`; that op itself where there is one rank.

    x_TD, topk_ids_TK (global ids), topk_weights_TK: this rank's tokens, as for ops.moe_mlp. local_gate_up [L, 2F, D],
    local_down [L, D, F]: this rank's experts, as many on each rank. Returns y_TD. The gradient of a local expert is the
    sum over the tokens of all ranks. All ranks must call it, forward and backward, also with T = 0. Errors: as moe_mlp.
    """
    if group.size == 1:
        return ops.moe_mlp(x_TD, topk_ids_TK, topk_weights_TK, local_gate_up, local_down)
    rows_ND, sent = dispatch(x_TD, topk_ids_TK, group, local_down.shape[0] * group.size)
    ones_N1 = torch.ones_like(sent.expert_N1, dtype=rows_ND.dtype)
    y_ND = ops.moe_mlp(rows_ND, sent.expert_N1, ones_N1, local_gate_up, local_down)
    return combine(y_ND, sent, topk_weights_TK, group)
