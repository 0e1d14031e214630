import math
import re

import pytest
import torch

from fastmoe import ops, testing
from fastmoe.testing import SHAPES, draw, draw_ids
from tests.ops.battery import Battery, Case


def gate_case(size, score="softmax", renormalize=True, thorough=False, parallel=False):
    T, _, _, E, K, _ = SHAPES[size]
    return Case(
        f"{size}-{score}-{renormalize}",
        lambda x: ops.topk_gate(x["logits_TE"], K, score, renormalize),
        lambda dtype: {"logits_TE": draw(T, E, dtype=dtype, scale=3)},
        thorough=thorough,
        parallel=parallel,
    )


class TestGating(Battery):
    family = "gating"
    cases = [gate_case(size, thorough=size == "odd", parallel=size == "tiny") for size in SHAPES] + [
        gate_case("odd", "sigmoid", True),
        gate_case("odd", "softmax", False),
        gate_case("fine", "sigmoid", False, thorough=True),
    ]

    def test_matches_softmax_then_topk(self, backend):
        logits_TE = draw(50, 16).requires_grad_()
        with self.on(backend):
            weights_TK, ids_TK, probs_TE = ops.topk_gate(logits_TE, 4)
        probs = torch.softmax(logits_TE.double(), 1)
        top = probs.topk(4, 1)
        assert torch.equal(ids_TK, top.indices) and ids_TK.dtype == torch.int64
        torch.testing.assert_close(probs_TE.double(), probs, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            weights_TK.double(), top.values / top.values.sum(1, keepdim=True), rtol=1e-6, atol=1e-7
        )

    def test_worked_example(self, backend):
        with self.on(backend):
            weights_TK, ids_TK, probs_TE = ops.topk_gate(torch.tensor([[0.0, 1.0, 1.0]]), 2)
        assert ids_TK.tolist() == [[1, 2]] and weights_TK.tolist() == [[0.5, 0.5]]
        torch.testing.assert_close(probs_TE, torch.tensor([[0.155, 0.422, 0.422]]), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("E", [3, 16, 33, 100])
    def test_equal_logits_go_to_the_lower_id(self, backend, E):
        logits_TE = draw(20, E).round()
        logits_TE[0], logits_TE[1, ::2], logits_TE[1, 1::2] = 0, 0.0, -0.0
        K = min(E, 9)
        with self.on(backend):
            ids_TK = ops.topk_gate(logits_TE, K)[1]
        want = [sorted(range(E), key=lambda e: (-row[e], e))[:K] for row in logits_TE.tolist()]
        assert ids_TK.tolist() == want

    @pytest.mark.parametrize("score", ["softmax", "sigmoid"])
    def test_minus_infinity_masks_an_expert(self, backend, score):
        logits_TE = draw(9, 6)
        logits_TE[:, 2] = -math.inf
        logits_TE.requires_grad_()
        with self.on(backend):
            weights_TK, ids_TK, probs_TE = ops.topk_gate(logits_TE, 5, score)
            weights_TK.square().sum().backward()
        assert not (ids_TK == 2).any() and bool((probs_TE[:, 2] == 0).all())
        assert logits_TE.grad.isfinite().all() and bool((logits_TE.grad[:, 2] == 0).all())

    def test_large_logits_do_not_overflow(self, backend):
        with self.on(backend):
            weights_TK, _, probs_TE = ops.topk_gate(torch.tensor([[3e38, -3e38, 1e30], [88.0, 89.0, 90.0]]), 2)
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


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "k must be in 1..5", (draw(4, 5), 0)),
        (ValueError, "k must be in 1..5", (draw(4, 5), 6)),
        (ValueError, "num_experts must be at least 1", (draw(4, 0), 1)),
        (ValueError, "logits_TE must be of shape", (draw(4), 1)),
        (TypeError, "logits_TE must be float32", (torch.zeros(4, 5, dtype=torch.int64), 1)),
        (TypeError, "logits_TE must be a torch.Tensor", ([[1.0]], 1)),
        (ValueError, "score must be 'softmax' or 'sigmoid', got 'relu'", (draw(4, 5), 1, "relu")),
    ],
)
def test_bad_input(error, message, arguments):
    with pytest.raises(error, match=re.escape("fastmoe.topk_gate: " + message)):
        ops.topk_gate(*arguments)


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
