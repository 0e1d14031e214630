"""What the assignments mean, in plain torch."""

import torch

LEVELS = 1 << 20  # scores become whole numbers from 0 to this, so that prices are exact on every device
RAISES = (1 << 18, 1 << 14, 1 << 10, 1 << 7, 1 << 4)  # the least by which a bid exceeds a price, by phase


def balanced_assignment(scores_TE):
    T, E = scores_TE.shape
    bad_T = ~scores_TE.isfinite().all(1)
    if bad_T.any():
        raise ValueError(
            f"fastmoe.balanced_assignment: scores_TE must be finite (bad row), got {int(bad_T.nonzero()[0])}"
        )
    ids_T = torch.zeros(T, dtype=torch.int64, device=scores_TE.device)
    if T == 0 or E == 1:
        return ids_T
    low, high = (bound.double() / 2 for bound in scores_TE.aminmax())  # halves: the difference cannot overflow
    unit_TE = (scores_TE.double() / 2 - low) / (high - low).clamp(min=torch.finfo(torch.float64).tiny)
    level_TE = (unit_TE * LEVELS).round().int()
    price_E = level_TE.new_zeros(E)
    for least_raise in RAISES:
        ids_T, price_E = _auction(level_TE, price_E, least_raise)
    return ids_T


def _auction(level_TE, price_E, least_raise):
    """Every round, each waiting token bids for the expert of largest margin, level - price, as much as makes the second
    best as good, and the least raise more. An expert holds the T / E highest bids, of equal ones those of lower tokens;
    its price is the lowest it holds once it holds that many.
    """
    (T, E), token_T = level_TE.shape, torch.arange(level_TE.shape[0], device=level_TE.device)
    ids_T, bid_T = torch.full_like(token_T, E), torch.zeros_like(token_T)
    while len(waiting_R := (ids_T == E).nonzero()[:, 0]):
        margin_RE = level_TE[waiting_R] - price_E
        best_R, ids_R = margin_RE.max(1)
        second_R = margin_RE.scatter(1, ids_R[:, None], torch.iinfo(torch.int32).min).amax(1)
        ids_T[waiting_R] = ids_R
        bid_T[waiting_R] = (price_E[ids_R] + (best_R - second_R) + least_raise).long()
        order_T = ((ids_T << 32) - bid_T).sort(stable=True).indices
        count_E = torch.zeros_like(price_E, dtype=torch.int64).scatter_add(0, ids_T, torch.ones_like(ids_T))
        first_E = count_E.cumsum(0) - count_E
        place_T = torch.empty_like(order_T).scatter(0, order_T, token_T - first_E[ids_T[order_T]])
        lowest_E = bid_T[order_T[(first_E + T // E - 1).clamp(max=T - 1)]].int()
        price_E = torch.where(count_E < T // E, price_E, lowest_E)
        ids_T = torch.where(place_T < T // E, ids_T, E)
    return ids_T, price_E


def swipe(topk_ids_TK, counts_WWK, rank, experts_per_rank):
    T, K = topk_ids_TK.shape
    W = counts_WWK.shape[0]
    ids_TK = topk_ids_TK.long()
    if ids_TK.device.type == "cpu":
        _check_counts(ids_TK, counts_WWK, rank, experts_per_rank)
    room_W, chosen = counts_WWK.sum((1, 2)), []
    for j in range(K):
        count_WW = counts_WWK[:, :, j]  # by source, by worker
        before_WW = count_WW.cumsum(0) - count_WW
        granted_WW = torch.minimum((room_W - before_WW).clamp(min=0), count_WW)
        room_W = room_W - granted_WW.sum(0)

        # the overflow of sources 0, 1, ... on a line beside the room of workers 0, 1, ...
        over_W = (count_WW - granted_WW).sum(1)
        over_end_W, room_end_W = over_W.cumsum(0), room_W.cumsum(0)
        over_end, over_begin = over_end_W[rank], over_end_W[rank] - over_W[rank]
        moved_end_W = torch.minimum(room_end_W, over_end) - over_begin  # of this rank's, to workers up to w
        room_W = torch.minimum(room_W, (room_end_W - over_end_W[-1]).clamp(min=0))

        ids_T = ids_TK[:, j]
        worker_T = torch.where(ids_T < 0, W, ids_T // experts_per_rank)
        order_T = worker_T.sort(stable=True).indices
        first_W = torch.nn.functional.pad(count_WW[rank].cumsum(0), (1, 0))
        place_T = torch.arange(T, device=ids_T.device) - first_W[worker_T[order_T]]
        place_T = torch.empty_like(order_T).scatter(0, order_T, place_T)
        granted_W = torch.nn.functional.pad(granted_WW[rank], (0, 1), value=T)
        moved_T = place_T >= granted_W[worker_T]
        to_T = torch.searchsorted(moved_end_W, moved_T.cumsum(0) - 1, right=True).clamp(max=W - 1)
        chosen.append(torch.where(moved_T, to_T * experts_per_rank + j % experts_per_rank, ids_T))
    return torch.stack(chosen, 1)


def _check_counts(ids_TK, counts_WWK, rank, experts_per_rank):
    E = counts_WWK.shape[0] * experts_per_rank
    outside_TK = (ids_TK < -1) | (ids_TK >= E)
    if outside_TK.any():
        raise ValueError(f"fastmoe.swipe: topk_ids_TK must be in -1..{E - 1}, got {int(ids_TK[outside_TK][0])}")
    worker_TK = torch.where(ids_TK < 0, E, ids_TK) // experts_per_rank
    counted_WK = ids_TK.new_zeros(counts_WWK.shape[0] + 1, ids_TK.shape[1])
    counted_WK = counted_WK.scatter_add(0, worker_TK, torch.ones_like(ids_TK))[:-1]
    if (counts_WWK < 0).any() or not torch.equal(counted_WK, counts_WWK[rank]):
        raise ValueError(
            f"fastmoe.swipe: counts_WWK must be at least 0 and for this rank those of the ids, {counted_WK.tolist()}, "
            f"got {counts_WWK[rank].tolist()}"
        )
