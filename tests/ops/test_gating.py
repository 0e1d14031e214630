import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmoe import ops, testing
from fastmoe.testing import SHAPES, draw, draw_ids
from tests.ops.battery import Battery, Case

V2 = {"renormalize": False, "num_groups": 8, "top_groups": 3, "scale": 16.0}
V3 = {"score": "sigmoid", "num_groups": 8, "top_groups": 4, "group_score": "top2", "scale": 2.5}


def gate_case(T, E, K, biased=False, thorough=False, parallel=False, **options):
    def make(dtype):
        logits = {"logits_TE": draw(T, E, dtype=dtype, scale=3)}
        return logits | {"bias_E": draw(E, seed=1) - 0.5} if biased else logits

    words = [f"T{T} E{E} K{K}", *(["bias"] if biased else []), *(f"{name} {value}" for name, value in options.items())]
    return Case(
        ", ".join(words),
        lambda x: ops.topk_gate(x["logits_TE"], K, bias_E=x.get("bias_E"), **options),
        make,
        frozen=("bias_E",),
        thorough=thorough,
        parallel=parallel,
    )


def shape_case(size, **options):
    return gate_case(SHAPES[size].T, SHAPES[size].E, SHAPES[size].K, **options)


def by_lists(rank_TE, score_TE, k, num_groups=1, top_groups=1, group_score="max"):
    """ids [T, k] by sorting lists: the best groups by the sum of their one or two best of score_TE, then rank_TE."""
    ids_TK = []
    for rank_E, score_E in zip(rank_TE, score_TE):
        E, each = len(rank_E), len(rank_E) // num_groups
        score_G = [
            sum(sorted(score_E[g * each : (g + 1) * each])[-(1 + (group_score == "top2")) :]) for g in range(num_groups)
        ]
        kept = sorted(range(num_groups), key=lambda g: (-score_G[g], g))[:top_groups]
        ids_TK.append(sorted((e for e in range(E) if e // each in kept), key=lambda e: (-rank_E[e], e))[:k])
    return ids_TK


class TestGating(Battery):
    family = "gating"
    cases = [
        *(shape_case(size, thorough=size == "odd", parallel=size == "tiny") for size in SHAPES),
        shape_case("odd", score="sigmoid"),
        shape_case("odd", renormalize=False),
        shape_case("odd", biased=True, score="sigmoid", scale=2.5, thorough=True),
        shape_case("odd", biased=True, renormalize=False, scale=0.5),
        shape_case("fine", score="sigmoid", renormalize=False, thorough=True),
        shape_case("fine", biased=True, thorough=True, **V3),
        shape_case("fine", thorough=True, **V2),
        gate_case(70, 160, 6, **V2),
        gate_case(70, 256, 8, biased=True, **V3),
        gate_case(70, 24, 5, num_groups=3, top_groups=2, group_score="top2"),
        *(gate_case(9, E, K) for E in (1, 8, 64, 4096) for K in (1, 2, 3, 8) if K <= E),
        gate_case(9, 260, 40),
        gate_case(9, 260, 70, biased=True),
        gate_case(3, 300, 300),
        gate_case(1, 4096, 4096, score="sigmoid"),
        gate_case(2, 65536, 8),
    ]

    def test_matches_softmax_then_topk(self, backend):
        logits_TE = draw(50, 16).requires_grad_()
        with self.on(backend):
            weights_TK, ids_TK, probs_TE, _ = ops.topk_gate(logits_TE, 4)
        probs = torch.softmax(logits_TE.double(), 1)
        top = probs.topk(4, 1)
        assert torch.equal(ids_TK, top.indices) and ids_TK.dtype == torch.int64
        torch.testing.assert_close(probs_TE.double(), probs, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            weights_TK.double(), top.values / top.values.sum(1, keepdim=True), rtol=1e-6, atol=1e-7
        )

    def test_worked_example(self, backend):
        with self.on(backend):
            weights_TK, ids_TK, probs_TE, load_E = ops.topk_gate(torch.tensor([[0.0, 1.0, 1.0]]), 2)
        assert ids_TK.tolist() == [[1, 2]] and weights_TK.tolist() == [[0.5, 0.5]]
        assert load_E.tolist() == [0, 1, 1] and load_E.dtype == torch.int64
        torch.testing.assert_close(probs_TE, torch.tensor([[0.155, 0.422, 0.422]]), rtol=0, atol=1e-3)

    @pytest.mark.parametrize(
        ("E", "K"),
        [(3, 3), (8, 2), (16, 9), (33, 9), (100, 9), (200, 40), (300, 9), (300, 70), (4000, 300), (513, 513)],
    )
    def test_equal_logits_go_to_the_lower_id(self, backend, E, K):
        logits_TE = draw(20, E).round()
        logits_TE[0], logits_TE[1, ::2], logits_TE[1, 1::2], logits_TE[2, 1:] = 0, 0.0, -0.0, -math.inf
        with self.on(backend):
            ids_TK = ops.topk_gate(logits_TE, K)[1]
        assert ids_TK.tolist() == by_lists(logits_TE.tolist(), logits_TE.tolist(), K)

    @pytest.mark.parametrize("place", [0, 17, 31, 255, 256, 299])
    @pytest.mark.parametrize("K", [1, 20])
    def test_finds_the_best_wherever_it_stands(self, backend, place, K):
        logits_TE = -torch.arange(300.0).expand(2, -1) - 1
        logits_TE[:, place] = 0
        with self.on(backend):
            ids_TK = ops.topk_gate(logits_TE, K)[1]
        assert ids_TK[0].tolist() == [place, *(e for e in range(300) if e != place)][:K]

    def test_bias_chooses_and_does_not_weigh(self, backend):
        logits_TE, bias_E = draw(40, 12), draw(12, seed=1)
        with self.on(backend):
            weights_TK, ids_TK, probs_TE, _ = ops.topk_gate(
                logits_TE, 3, "sigmoid", renormalize=False, bias_E=bias_E, scale=2.0
            )
            plain = ops.topk_gate(logits_TE, 3, "sigmoid", renormalize=False)
            shifted = ops.topk_gate(logits_TE, 3, "sigmoid", renormalize=False, bias_E=torch.full((12,), -2.0))
        want_TE = torch.sigmoid(logits_TE.double()) + bias_E
        assert torch.equal(ids_TK, want_TE.topk(3).indices) and not torch.equal(ids_TK, plain[1])
        assert torch.equal(weights_TK, 2 * probs_TE.gather(1, ids_TK)) and torch.equal(probs_TE, plain[2])
        assert torch.equal(shifted[0], plain[0]) and torch.equal(shifted[1], plain[1])

    @pytest.mark.parametrize("group_score", ["max", "top2"])
    def test_a_group_is_shut_even_where_every_sum_is_negative(self, backend, group_score):
        """Scores of 1/2 and biases of -1 and -2: 0 in place of a shut group's sums would beat those of the open one."""
        bias_E = torch.tensor([-2.0, -2.0, -1.0, -1.0])
        options = {"num_groups": 2, "group_score": group_score, "bias_E": bias_E}
        with self.on(backend):
            weights_TK, ids_TK, _, load_E = ops.topk_gate(torch.zeros(3, 4), 2, "sigmoid", **options)
        assert ids_TK.tolist() == [[2, 3]] * 3 and weights_TK.tolist() == [[0.5, 0.5]] * 3
        assert load_E.tolist() == [0, 0, 3, 3]

    def test_a_group_is_shut_even_where_a_kept_one_has_masked_experts(self, backend):
        logits_TE = torch.tensor([[5, -math.inf, 4, 3], [1, 2, 3, -math.inf]])
        with self.on(backend):
            weights_TK, ids_TK, _, _ = ops.topk_gate(logits_TE, 2, num_groups=2)
        assert ids_TK.tolist() == [[0, 1], [2, 3]] and weights_TK.tolist() == [[1, 0], [1, 0]]

    def test_groups_by_hand(self, backend):
        """Group 0 has the best expert, group 1 the best two, group 2 neither."""
        probs_E = torch.tensor([0.9, 0.1, 0.6, 0.5, 0.55, 0.3])
        logits_TE = torch.logit(probs_E)[None]
        with self.on(backend):
            best = ops.topk_gate(logits_TE, 2, "sigmoid", num_groups=3)
            two = ops.topk_gate(logits_TE, 2, "sigmoid", num_groups=3, group_score="top2", scale=11.0)
            both = ops.topk_gate(logits_TE, 3, "sigmoid", False, num_groups=3, top_groups=2, group_score="top2")
        assert best[1].tolist() == [[0, 1]] and two[1].tolist() == [[2, 3]] and both[1].tolist() == [[0, 2, 3]]
        torch.testing.assert_close(two[0], torch.tensor([[6.0, 5.0]]))
        torch.testing.assert_close(both[0], torch.tensor([[0.9, 0.6, 0.5]]))

    @pytest.mark.parametrize("group_score", ["max", "top2"])
    @pytest.mark.parametrize(
        ("E", "num_groups", "top_groups", "K"), [(8, 4, 2, 3), (48, 3, 2, 7), (160, 8, 3, 6), (520, 130, 129, 20)]
    )
    def test_equal_groups_and_experts_go_to_the_lower_id(self, backend, group_score, E, num_groups, top_groups, K):
        """Scores of exactly 1/2 and biases of few bits: sums are exact, and many are equal."""
        groups = {"num_groups": num_groups, "top_groups": top_groups, "group_score": group_score}
        for seed in range(8):
            bias_E = torch.randint(-4, 3, (E,), generator=testing.generator(seed)) / 4
            with self.on(backend):
                ids_TK = ops.topk_gate(torch.zeros(2, E), K, "sigmoid", bias_E=bias_E, **groups)[1]
            rank_TE = (bias_E + 0.5).expand(2, -1).tolist()
            assert ids_TK.tolist() == by_lists(rank_TE, rank_TE, K, **groups)

    def test_weights_that_are_all_zero_stay_zero(self, backend):
        logits_TE = torch.full((2, 4), -200.0).requires_grad_()
        with self.on(backend):
            weights_TK = ops.topk_gate(logits_TE, 2, "sigmoid")[0]
            weights_TK.sum().backward()
        assert weights_TK.tolist() == [[0, 0]] * 2 and logits_TE.grad.tolist() == [[0] * 4] * 2

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_refuses_a_bias_that_is_not_finite(self, backend, value):
        bias_E = torch.zeros(5)
        bias_E[3] = value
        with self.on(backend), pytest.raises(ValueError, match=r"fastmoe\.topk_gate: bias_E must be finite"):
            ops.topk_gate(draw(4, 5), 2, bias_E=bias_E)

    @pytest.mark.parametrize("score", ["softmax", "sigmoid"])
    def test_minus_infinity_masks_an_expert(self, backend, score):
        logits_TE = draw(9, 6)
        logits_TE[:, 2] = -math.inf
        logits_TE.requires_grad_()
        with self.on(backend):
            weights_TK, ids_TK, probs_TE, _ = ops.topk_gate(logits_TE, 5, score)
            weights_TK.square().sum().backward()
        assert not (ids_TK == 2).any() and bool((probs_TE[:, 2] == 0).all())
        assert logits_TE.grad.isfinite().all() and bool((logits_TE.grad[:, 2] == 0).all())

    def test_large_logits_do_not_overflow(self, backend):
        with self.on(backend):
            weights_TK, _, probs_TE, _ = ops.topk_gate(torch.tensor([[3e38, -3e38, 1e30], [88.0, 89.0, 90.0]]), 2)
        assert weights_TK.isfinite().all() and probs_TE.isfinite().all()
        torch.testing.assert_close(probs_TE.sum(1), torch.ones(2))

    @pytest.mark.parametrize("output", [0, 2])
    def test_gradient_through_one_output_alone(self, backend, output):
        with self.on(backend):
            logits_TE, logits64 = draw(8, 5).requires_grad_(), draw(8, 5).double().requires_grad_()
            ops.topk_gate(logits_TE, 2)[output].square().sum().backward()
        ops.topk_gate(logits64, 2)[output].square().sum().backward()
        torch.testing.assert_close(logits_TE.grad.double(), logits64.grad, rtol=1e-5, atol=1e-6)

    def test_renormalized_single_choice_has_no_gradient(self, backend):
        logits_TE = draw(8, 5).requires_grad_()
        with self.on(backend):
            ops.topk_gate(logits_TE, 1)[0].sum().backward()
        assert logits_TE.grad.abs().max() < 1e-6

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("at", [(0, 0), (6, 4), (3, 2)])
    def test_refuses_nan_and_infinity(self, backend, value, at):
        logits_TE = draw(7, 5)
        logits_TE[at] = value
        with (
            self.on(backend),
            pytest.raises(ValueError, match=rf"fastmoe\.topk_gate: logits_TE .*NaN.* token {at[0]}$"),
        ):
            ops.topk_gate(logits_TE, 2)

    def test_refuses_a_token_with_every_expert_masked(self, backend):
        logits_TE = draw(3, 4)
        logits_TE[1] = -math.inf
        with self.on(backend), pytest.raises(ValueError, match=r"fastmoe\.topk_gate: logits_TE"):
            ops.topk_gate(logits_TE, 2)

    def test_autocast_scores_in_float32(self, backend, dtype):
        logits_TE = draw(7, 5, dtype=dtype)
        with self.on(backend):
            want = ops.topk_gate(logits_TE.float(), 2)
            with torch.autocast("cpu", torch.bfloat16):
                got = ops.topk_gate(logits_TE, 2)
        assert got[0].dtype == got[2].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("backend", testing.backends("gating"))
@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=st.data())
def test_properties(backend, data):
    num_groups, each, T = (data.draw(st.integers(*ends)) for ends in ((1, 9), (2, 40), (0, 5)))
    E, top_groups = num_groups * each, data.draw(st.integers(1, num_groups))
    K = data.draw(st.integers(1, top_groups * each))
    score, group_score = data.draw(st.sampled_from(ops.gating.SCORES)), data.draw(st.sampled_from(["max", "top2"]))
    scale, seed = data.draw(st.sampled_from([1.0, 2.5, 16.0])), data.draw(st.integers(0, 10**6))
    logits_TE = draw(T, E, dtype=data.draw(st.sampled_from(testing.DTYPES)), scale=3, seed=seed)
    bias_E = draw(E, seed=seed + 1) if data.draw(st.booleans()) else None
    groups = {"num_groups": num_groups, "top_groups": top_groups, "group_score": group_score}
    with testing.backend(f"gating={backend}"):
        weights_TK, ids_TK, probs_TE, load_E = ops.topk_gate(logits_TE, K, score, bias_E=bias_E, scale=scale, **groups)
    assert torch.equal(load_E, torch.bincount(ids_TK.view(-1), minlength=E))
    score_TE = probs_TE if bias_E is None else probs_TE + bias_E
    rank_TE = logits_TE.float() if bias_E is None else score_TE
    by_group_TE = score_TE if group_score == "top2" else rank_TE
    assert ids_TK.tolist() == by_lists(rank_TE.tolist(), by_group_TE.tolist(), K, **groups)
    torch.testing.assert_close(weights_TK.sum(1), torch.full((T,), scale))
    chosen_TK = probs_TE.gather(1, ids_TK)
    torch.testing.assert_close(weights_TK, scale * chosen_TK / chosen_TK.sum(1, keepdim=True))


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (ValueError, "k must be in 1..5", (draw(4, 5), 0), {}),
        (ValueError, "k must be in 1..5", (draw(4, 5), 6), {}),
        (ValueError, "num_experts must be at least 1", (draw(4, 0), 1), {}),
        (ValueError, "logits_TE must be of shape", (draw(4), 1), {}),
        (TypeError, "logits_TE must be float32", (torch.zeros(4, 5, dtype=torch.int64), 1), {}),
        (TypeError, "logits_TE must be a torch.Tensor", ([[1.0]], 1), {}),
        (ValueError, "score must be 'softmax' or 'sigmoid', got 'relu'", (draw(4, 5), 1, "relu"), {}),
        (ValueError, "num_groups must be a divisor of 6 (the number", (draw(4, 6), 1), {"num_groups": 4}),
        (ValueError, "num_groups must be at least 1, got 0", (draw(4, 6), 1), {"num_groups": 0}),
        (ValueError, "top_groups must be in 1..3", (draw(4, 6), 1), {"num_groups": 3, "top_groups": 4}),
        (ValueError, "top_groups must be in 1..3", (draw(4, 6), 1), {"num_groups": 3, "top_groups": 0}),
        (
            ValueError,
            "k must be in 1..4 (those of top_groups), got 5",
            (draw(4, 6), 5),
            {"num_groups": 3, "top_groups": 2},
        ),
        (
            ValueError,
            "num_groups must be at most 3 (two experts a group) with group_score 'top2', got 6",
            (draw(4, 6), 1),
            {"num_groups": 6, "group_score": "top2"},
        ),
        (ValueError, "group_score must be 'max' or 'top2', got 'sum'", (draw(4, 6), 1), {"group_score": "sum"}),
        (ValueError, "bias_E must be of shape [E] = [6], got [5]", (draw(4, 6), 1), {"bias_E": draw(5)}),
        (ValueError, "bias_E must be of shape [E] = [6], got [1, 6]", (draw(4, 6), 1), {"bias_E": draw(1, 6)}),
        (TypeError, "bias_E must be float32, got", (draw(4, 6).bfloat16(), 1), {"bias_E": draw(6).bfloat16()}),
        (TypeError, "bias_E must be float64, got", (draw(4, 6).double(), 1), {"bias_E": draw(6)}),
    ],
)
def test_bad_input(error, message, arguments, options):
    with pytest.raises(error, match=re.escape("fastmoe.topk_gate: " + message)):
        ops.topk_gate(*arguments, **options)


def test_gradients_twice_are_refused():
    logits_TE = draw(4, 5).requires_grad_()
    with pytest.raises(NotImplementedError, match="fastmoe.topk_gate: gradients of gradients"):
        torch.autograd.grad(ops.topk_gate(logits_TE, 2)[0].square().sum(), logits_TE, create_graph=True)


def test_no_gradient_work_without_gradients():
    with testing.Recorder() as recorder, torch.no_grad():
        ops.topk_gate(draw(4, 5).requires_grad_(), 2)
    assert [name for name, *_ in recorder.calls] == ["topk_gate"]


def test_ids_drawn_for_tests_are_what_they_say():
    shape = SHAPES["fine"]
    assert not (draw_ids(shape, "empty_expert") == shape.E // 2).any()
    assert bool((draw_ids(shape, "all_to_one") == shape.E - 1).all())
    assert bool((draw_ids(shape, "dropped")[0] == -1).all())
    assert draw_ids(shape).sort(1).values.diff(dim=1).min() > 0
