import itertools
import re

import pytest
import torch

from fastmoe import ops, testing
from fastmoe.testing import draw, generator
from tests.ops.battery import Battery, Case

GAP = 2e-5  # of the scores' range, a token


def assignment_case(T, E, thorough=False, parallel=False):
    return Case(
        f"assignment-T{T}-E{E}",
        lambda x: ops.balanced_assignment(x["scores_TE"]),
        lambda dtype: {"scores_TE": draw(T, E, dtype=dtype, scale=3)},
        frozen=("scores_TE",),
        moves_data=True,
        thorough=thorough,
        parallel=parallel,
    )


def draw_choices(tokens_W, K, experts_per_rank, seed=0, dropped=0.0):
    """ids [T, K] of each rank and their counts [W, W, K]; some workers are liked better than others."""
    W, draws = len(tokens_W), generator(seed)
    like_E = torch.rand(W * experts_per_rank, generator=draws) ** 4
    ids = []
    for T in tokens_W:
        ids_TK = (torch.rand(T, W * experts_per_rank, generator=draws).log() / like_E).topk(K, dim=1).indices
        ids.append(ids_TK.masked_fill(torch.rand(T, 1, generator=draws) < dropped, -1))
    workers = [torch.where(ids_TK < 0, W, ids_TK // experts_per_rank) for ids_TK in ids]
    counts = [torch.stack([(worker_TK == w).sum(0) for w in range(W)]) for worker_TK in workers]
    return ids, torch.stack(counts)


def swipe_case(tokens_W, K, experts_per_rank, rank, dropped=0.0, index=torch.int64, thorough=False):
    def make(dtype):
        ids, counts_WWK = draw_choices(tokens_W, K, experts_per_rank, dropped=dropped)
        return {"topk_ids_TK": ids[rank].to(index), "counts_WWK": counts_WWK}

    return Case(
        f"swipe-{tokens_W}-K{K}-{experts_per_rank}-rank{rank}-{dropped}-{str(index)[6:]}",
        lambda x: ops.swipe(x["topk_ids_TK"], x["counts_WWK"], rank, experts_per_rank),
        make,
        moves_data=True,
        thorough=thorough,
    )


def swipe_by_lists(ids, experts_per_rank):
    """All ranks in one place, slot by slot. ids: of each rank a list of lists of K choices."""
    W, K = len(ids), max((len(token) for tokens in ids for token in tokens), default=0)
    room = [sum(e >= 0 for token in tokens for e in token) for tokens in ids]
    chosen = [[list(token) for token in tokens] for tokens in ids]
    for j in range(K):
        moved = []
        asked = [[t for t, token in enumerate(tokens) if token[j] >= 0] for tokens in ids]
        for w in range(W):
            for s in range(W):
                for t in asked[s]:
                    if ids[s][t][j] // experts_per_rank == w:
                        if room[w]:
                            room[w] -= 1
                        else:
                            moved.append((s, t))
        for s, t in sorted(moved):
            w = next(w for w in range(W) if room[w])
            room[w] -= 1
            chosen[s][t][j] = w * experts_per_rank + j % experts_per_rank
    return chosen


def total(scores_TE, ids_T):
    return float(scores_TE.double().gather(1, ids_T[:, None]).sum())


def allowed_gap(scores_TE):
    return GAP * len(scores_TE) * float(scores_TE.double().max() - scores_TE.double().min())


def by_permutations(scores_TE):
    """The largest total, over all assignments of T / E tokens an expert."""
    T, E = scores_TE.shape
    experts = [e for e in range(E) for _ in range(T // E)]
    return max(total(scores_TE, torch.tensor(ids)) for ids in set(itertools.permutations(experts)))


def by_scipy(scores_TE):
    optimize = pytest.importorskip("scipy.optimize")
    T, E = scores_TE.shape
    wide_TT = scores_TE.double().repeat_interleave(T // E, dim=1).numpy()
    rows, columns = optimize.linear_sum_assignment(wide_TT, maximize=True)
    return float(wide_TT[rows, columns].sum())


def scores(name, T, E):
    if name == "normal":
        return draw(T, E)
    if name == "low_rank":
        return draw(T, 3) @ draw(3, E, seed=1)
    if name == "skewed":  # everyone likes the first experts best
        return draw(T, E, scale=0.1) - torch.arange(E)
    if name == "levels":  # many equal ones
        return draw(T, E).round()
    if name == "twins":
        return draw(T // 2, E).repeat(T - T // 2, 1)[:T]
    if name == "same_row":
        return draw(1, E).repeat(T, 1)
    if name == "one_likes":
        return torch.zeros(T, E).index_put((torch.tensor(0), torch.tensor(E - 1)), torch.tensor(1.0))
    raise ValueError(name)


KINDS = ("normal", "low_rank", "skewed", "levels", "twins", "same_row", "one_likes")


class TestAssignment(Battery):
    family = "assignment"
    cases = [
        *(assignment_case(T, E) for T, E in ((0, 4), (1, 1), (29, 1), (16, 16), (40, 5), (96, 48))),
        assignment_case(33, 11, thorough=True),
        assignment_case(1536, 12, parallel=True),
        swipe_case((0,), 2, 3, 0),
        swipe_case((9,), 2, 3, 0),
        swipe_case((20, 0, 7, 13), 3, 2, 1),
        *(swipe_case((20, 0, 7, 13), 3, 2, rank, dropped=0.2, thorough=True) for rank in (0, 3)),
        swipe_case((300, 200), 2, 1, 1, index=torch.int32, thorough=True),
    ]

    def assign(self, backend, scores_TE):
        with self.on(backend):
            ids_T = ops.balanced_assignment(scores_TE)
        T, E = scores_TE.shape
        assert torch.bincount(ids_T, minlength=E).tolist() == [T // E] * E
        return ids_T

    @pytest.mark.parametrize("kind", KINDS)
    def test_total_is_near_the_largest(self, backend, kind):
        for T, E in ((6, 3), (6, 2), (5, 5)):
            scores_TE = scores(kind, T, E)
            got = total(scores_TE, self.assign(backend, scores_TE))
            assert by_permutations(scores_TE) - got <= allowed_gap(scores_TE)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("T, E", [(256, 8), (128, 64), (90, 90)])
    def test_total_is_near_scipys(self, backend, kind, T, E):
        scores_TE = scores(kind, T, E)
        got = total(scores_TE, self.assign(backend, scores_TE))
        assert abs(by_scipy(scores_TE) - got) <= allowed_gap(scores_TE)

    @pytest.mark.parametrize("kind", KINDS)
    def test_same_ids_on_every_backend(self, backend, kind, dtype):
        for T, E in ((200, 8), (96, 48)):
            scores_TE = scores(kind, T, E).to(dtype)
            with testing.backend("reference"):
                want = ops.balanced_assignment(scores_TE)
            testing.assert_bit_equal(self.assign(backend, scores_TE), want)

    def test_equal_scores_fill_experts_in_order(self, backend):
        for value in (0.0, -7.5, 3e38):
            ids_T = self.assign(backend, torch.full((12, 4), value))
            assert ids_T.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3

    def test_scale_and_shift_change_nothing(self, backend):
        scores_TE = (draw(128, 8) * 2**10).round()  # so that sums are exact
        want = self.assign(backend, scores_TE)
        for other in (scores_TE * 2.0**13, scores_TE * 2.0**-30, scores_TE * 2.0**-140, scores_TE + 4096):
            assert torch.equal(self.assign(backend, other), want)

    def test_the_whole_range_of_float32(self, backend):
        largest = torch.finfo(torch.float32).max
        scores_TE = torch.where(torch.eye(4, dtype=torch.bool).flip(0), largest, -largest)
        assert self.assign(backend, scores_TE).tolist() == [3, 2, 1, 0]

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_refuses_scores_that_are_not_finite(self, backend, value):
        for T, E, row, column in ((8, 4, 5, 3), (3, 1, 2, 0), (80, 40, 7, 33)):
            scores_TE = draw(T, E)
            scores_TE[row, column] = scores_TE[T - 1, 0] = value
            message = rf"fastmoe\.balanced_assignment: scores_TE must be finite \(bad row\), got {row}$"
            with self.on(backend), pytest.raises(ValueError, match=message):
                ops.balanced_assignment(scores_TE)

    def test_worked_example(self, backend):
        with self.on(backend):
            assert ops.balanced_assignment(torch.tensor([[5.0, 4], [9, 1], [8, 2], [7, 6]])).tolist() == [1, 0, 0, 1]

    def swipe(self, backend, ids, counts_WWK, experts_per_rank):
        with self.on(backend):
            return [ops.swipe(ids_TK, counts_WWK, s, experts_per_rank) for s, ids_TK in enumerate(ids)]

    def test_swipe_worked_example(self, backend):
        ids = [torch.tensor([[0, 1], [0, 2], [1, 0]]), torch.tensor([[0, 1], [1, 3], [0, 2]])]
        counts_WWK = torch.tensor([[[3, 2], [0, 1]], [[3, 1], [0, 2]]])
        got = self.swipe(backend, ids, counts_WWK, 2)
        assert [ids_TK.tolist() for ids_TK in got] == [[[0, 3], [0, 2], [1, 3]], [[0, 3], [1, 3], [0, 2]]]

    @pytest.mark.parametrize("W", [1, 2, 4, 8])
    def test_swipe_by_lists(self, backend, W):
        """And every worker gets exactly as many slots as its own tokens choose."""
        draws = generator(W)
        for seed in range(2500 if backend == "native" else 250):
            K, each, most = (int(torch.randint(1, end, (), generator=draws)) for end in (4, 5, 9))
            each = max(each, -(-K // W))
            tokens_W = torch.randint(0, most + 1, (W,), generator=draws).tolist()
            ids, counts_WWK = draw_choices(tokens_W, K, each, seed, dropped=0.1 * (seed % 2))
            got = self.swipe(backend, ids, counts_WWK, each)
            assert [ids_TK.tolist() for ids_TK in got] == swipe_by_lists([i.tolist() for i in ids], each)
            worker_R = torch.cat([ids_TK.flatten() for ids_TK in got]) // each
            load_W = torch.bincount(worker_R[worker_R >= 0], minlength=W)
            assert torch.equal(load_W, counts_WWK.sum((1, 2)))

    def test_swipe_refuses_what_does_not_fit(self, backend):
        ids, counts_WWK = draw_choices((9, 5), 2, 2)
        with self.on(backend):
            for bad in (4, -2, 2**40):
                wrong_TK = ids[0].clone()
                wrong_TK[7, 1] = bad
                with pytest.raises(ValueError, match=rf"fastmoe\.swipe: topk_ids_TK must be in -1\.\.3.*, got {bad}$"):
                    ops.swipe(wrong_TK, counts_WWK, 0, 2)
            for at, by in (((0, 0, 1), 1), ((0, 1, 0), -1), ((1, 0, 0), -100)):
                wrong_WWK = counts_WWK.clone()
                wrong_WWK[at] += by
                with pytest.raises(ValueError, match=r"fastmoe\.swipe: .*counts_WWK (must be )?at least 0"):
                    ops.swipe(ids[0], wrong_WWK, 0, 2)


def test_float64_scores():
    """On the reference, with differences that float32 does not hold."""
    scores_TE = torch.zeros(4, 2, dtype=torch.float64)
    scores_TE[1, 1] = scores_TE[2, 1] = 1e-300
    assert ops.balanced_assignment(1 + scores_TE * 1e290).tolist() == [0, 1, 1, 0]
    assert ops.balanced_assignment(scores_TE).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "T must be a multiple of 4 (experts), got 6", (draw(6, 4),)),
        (ValueError, "num_experts must be at least 1, got 0", (draw(6, 0),)),
        (ValueError, "scores_TE must be of shape [T, E]", (draw(6),)),
        (TypeError, "scores_TE must be float32", (torch.ones(4, 2, dtype=torch.int64),)),
    ],
)
def test_bad_scores(error, message, arguments):
    with pytest.raises(error, match=re.escape("fastmoe.balanced_assignment: " + message)):
        ops.balanced_assignment(*arguments)


IDS, COUNTS = torch.tensor([[0, 1], [1, 0]]), torch.tensor([[[2, 2]]])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "topk_ids_TK must be of shape [T, K]", (IDS[0], COUNTS, 0, 2)),
        (TypeError, "topk_ids_TK must be int32 or int64", (IDS.float(), COUNTS, 0, 2)),
        (ValueError, "K must be at least 1, got 0", (IDS[:, :0], COUNTS[..., :0], 0, 2)),
        (TypeError, "counts_WWK must be int64, got torch.int32", (IDS, COUNTS.int(), 0, 2)),
        (
            ValueError,
            "counts_WWK must be of shape [W, W, K] = [1, 1, 2], got [1, 2, 2]",
            (IDS, COUNTS.repeat(1, 2, 1), 0, 2),
        ),
        (ValueError, "counts_WWK must be of shape [W, W, K] = [1, 1, 2], got [1, 1, 1]", (IDS, COUNTS[..., :1], 0, 2)),
        (ValueError, "counts_WWK must be on cpu, got meta", (IDS, COUNTS.to("meta"), 0, 2)),
        (ValueError, "rank must be in 0..0, got 1", (IDS, COUNTS, 1, 2)),
        (ValueError, "rank must be in 0..0, got -1", (IDS, COUNTS, -1, 2)),
        (ValueError, "experts_per_rank must be at least 1, got 0", (IDS, COUNTS, 0, 0)),
    ],
)
def test_bad_choices(error, message, arguments):
    with pytest.raises(error, match=re.escape("fastmoe.swipe: " + message)):
        ops.swipe(*arguments)
