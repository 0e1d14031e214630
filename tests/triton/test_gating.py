from __future__ import annotations

import pytest
import torch

from fastmoe import testing
from fastmoe.ops import topk_gate
from fastmoe.ops.registry import OPS, select
from tests.ops.test_gating import by_lists
from tests.triton.common import SHAPES, check


def test_the_backend_is_triton():
    assert [select(op, "cpu")[0] for op in OPS.values() if op.family in ("gating", "permutation", "experts")] == [
        "triton"
    ] * 9


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_accurate(name, dtype):
    T, _, _, E, K, _ = SHAPES[name]
    logits_TE = testing.draw(T, E, dtype=dtype, scale=3.0)
    for score in ("softmax", "sigmoid"):
        for renormalize in (True, False):
            check(lambda x: topk_gate(x["logits"], K, score, renormalize), {"logits": logits_TE})  # noqa: B023


def test_equal_logits_go_to_the_lower_expert():
    logits_TE = torch.tensor([[0.0, -0.0, 0.0], [1.0, 2.0, 2.0], [-1.0, float("-inf"), float("-inf")]])
    _, ids_TK, _, _ = topk_gate(logits_TE, 3)
    assert ids_TK.tolist() == [[0, 1, 2], [1, 2, 0], [0, 1, 2]]


def test_bad_logits_are_flagged_and_spare_the_other_tokens():
    logits_TE = testing.draw(5, 4)
    want = topk_gate(logits_TE, 2)
    for token, value in ((0, float("nan")), (2, float("inf"))):
        logits_TE[token, 1] = value
    logits_TE[4] = float("-inf")
    weights_TK, ids_TK, probs_TE, load_E = topk_gate(logits_TE, 2)
    assert torch.equal(load_E, torch.bincount(ids_TK[[1, 3]].view(-1), minlength=4))
    for token in (0, 2, 4):
        assert ids_TK[token].tolist() == [-1, -1]
        assert weights_TK[token].isnan().all()
        assert probs_TE[token].isnan().all()
    for got, expected in zip((weights_TK, ids_TK, probs_TE), want):
        testing.assert_bit_equal(got[[1, 3]], expected[[1, 3]])


def test_many_experts():
    check(lambda x: topk_gate(x["logits"], 6), {"logits": testing.draw(3, 3000)})


@pytest.mark.parametrize(
    ("E", "K", "groups"),
    [
        (64, 8, {"score": "sigmoid", "num_groups": 8, "top_groups": 4, "group_score": "top2", "scale": 2.5}),
        (60, 6, {"renormalize": False, "num_groups": 6, "top_groups": 3, "scale": 16.0}),
        (9, 4, {"num_groups": 3, "top_groups": 2, "group_score": "top2"}),
    ],
)
@pytest.mark.parametrize("biased", [False, True])
def test_bias_groups_and_scale(E, K, groups, biased):
    inputs = {"logits": testing.draw(21, E, scale=3.0)} | ({"bias": testing.draw(E, seed=1) - 0.5} if biased else {})
    check(lambda x: topk_gate(x["logits"], K, bias_E=x.get("bias"), **groups), inputs, ("bias",))


@pytest.mark.parametrize("group_score", ["max", "top2"])
@pytest.mark.parametrize(("E", "num_groups", "top_groups", "K"), [(8, 4, 2, 3), (48, 3, 2, 7), (160, 8, 3, 6)])
def test_equal_groups_and_experts_go_to_the_lower_id(group_score, E, num_groups, top_groups, K):
    """Scores of exactly 1/2 and biases of few bits, most of the sums negative and many of them equal."""
    groups = {"num_groups": num_groups, "top_groups": top_groups, "group_score": group_score}
    for seed in range(4):
        bias_E = torch.randint(-4, 2, (E,), generator=testing.generator(seed)) / 4
        got = topk_gate(torch.zeros(2, E), K, "sigmoid", bias_E=bias_E, **groups)
        assert got[1].tolist() == by_lists([(bias_E + 0.5).tolist()] * 2, [(bias_E + 0.5).tolist()] * 2, K, **groups)
        assert torch.equal(got[3], torch.bincount(got[1].view(-1), minlength=E))


def test_a_group_is_shut_even_where_a_kept_one_has_masked_experts():
    logits_TE = torch.tensor([[5, -torch.inf, 4, 3], [1, 2, 3, -torch.inf]])
    weights_TK, ids_TK, _, _ = topk_gate(logits_TE, 2, num_groups=2)
    assert ids_TK.tolist() == [[0, 1], [2, 3]] and weights_TK.tolist() == [[1, 0], [1, 0]]


def test_a_bias_of_nan_names_no_expert_that_is_not_there():
    bias_E = torch.full((5,), -1, dtype=torch.int32).view(torch.float32)  # every bit set
    bias_E[3] = 0
    _, ids_TK, _, load_E = topk_gate(testing.draw(4, 5), 3, bias_E=bias_E)
    assert ids_TK.tolist() == [[3, 0, 1]] * 4 and load_E.tolist() == [4, 4, 0, 4, 0]
