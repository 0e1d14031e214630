from __future__ import annotations

import pytest
import torch

from fastmoe import testing
from fastmoe.ops import topk_gate
from fastmoe.ops.registry import OPS, select
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
    _, ids_TK, _ = topk_gate(logits_TE, 3)
    assert ids_TK.tolist() == [[0, 1, 2], [1, 2, 0], [0, 1, 2]]


def test_bad_logits_are_flagged_and_spare_the_other_tokens():
    logits_TE = testing.draw(5, 4)
    want = topk_gate(logits_TE, 2)
    for token, value in ((0, float("nan")), (2, float("inf"))):
        logits_TE[token, 1] = value
    logits_TE[4] = float("-inf")
    weights_TK, ids_TK, probs_TE = topk_gate(logits_TE, 2)
    for token in (0, 2, 4):
        assert ids_TK[token].tolist() == [-1, -1]
        assert weights_TK[token].isnan().all()
        assert probs_TE[token].isnan().all()
    for got, expected in zip((weights_TK, ids_TK, probs_TE), want):
        testing.assert_bit_equal(got[[1, 3]], expected[[1, 3]])


def test_many_experts():
    check(lambda x: topk_gate(x["logits"], 6), {"logits": testing.draw(3, 3000)})
