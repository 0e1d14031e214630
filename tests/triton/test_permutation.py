from __future__ import annotations

import pytest
import torch

from fastmoe import testing
from fastmoe.ops import build_routing, build_routing_from_experts, permute, unpermute
from fastmoe.ops.permutation import kernels
from tests.triton.common import SHAPES, check


def same_routing(call) -> None:
    with testing.backend("reference"):
        want = call()
    with testing.poison():
        for got in (call(), call()):
            for name, tensor in want._asdict().items():
                testing.assert_bit_equal(getattr(got, name), tensor, name)


@pytest.mark.parametrize("capacity", [None, 0, 7])
@pytest.mark.parametrize("name", SHAPES)
def test_build_routing(name, capacity):
    for routing, dtype in zip(testing.ROUTINGS, (torch.int64, torch.int32, torch.int64, torch.int32)):
        ids_TK = testing.draw_ids(SHAPES[name], routing).to(dtype)
        same_routing(lambda: build_routing(ids_TK, SHAPES[name].E, capacity))  # noqa: B023


@pytest.mark.parametrize("capacity", [None, 40])
@pytest.mark.parametrize("E, K", [(9, 3), (600, 2)])
def test_build_routing_with_long_chunks(E, K, capacity, monkeypatch):
    monkeypatch.setattr(kernels, "CHUNKS", 2)  # each of 512 slots: two steps
    for routing in testing.ROUTINGS:
        ids_TK = testing.draw_ids(testing.Shape(700 // K, 1, 1, E, K, 1), routing)
        same_routing(lambda: build_routing(ids_TK, E, capacity))  # noqa: B023


def test_build_routing_drops_ids_outside():
    ids_TK = torch.tensor([[3, 0], [-7, 1], [2**32 + 1, 2], [1, -1]])
    got = build_routing(ids_TK, 3)
    want = build_routing(ids_TK.masked_fill((ids_TK < 0) | (ids_TK > 2), -1), 3)
    for name, tensor in want._asdict().items():
        testing.assert_bit_equal(getattr(got, name), tensor, name)


def test_build_routing_with_more_choices_than_a_chunk_holds():
    ids_TK = testing.draw_ids(testing.Shape(3, 1, 1, 260, 260, 1)) % 5
    same_routing(lambda: build_routing(ids_TK, 5))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    "lists, T", [([[0, 2], [1, 2]], 3), ([[], [0, 1, 4], [], [2, 4], []], 6), ([[]], 0), ([[0]], 1), ([[], []], 2)]
)
def test_build_routing_from_experts(lists, T, dtype):
    token_R = torch.tensor([token for tokens in lists for token in tokens], dtype=dtype)
    offsets = torch.tensor([0, *(len(tokens) for tokens in lists)], dtype=dtype).cumsum(0, dtype=dtype)
    same_routing(lambda: build_routing_from_experts(token_R, offsets, T))


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_permute(name, dtype):
    T, D, _, E, _, _ = SHAPES[name]
    x_TD = testing.draw(T, D, dtype=dtype)
    for draw in ("random", "dropped"):
        routing = build_routing(testing.draw_ids(SHAPES[name], draw), E)
        with testing.poison():
            got = permute(x_TD, routing)
        with testing.backend("reference"):
            testing.assert_bit_equal(got, permute(x_TD, routing))
        check(lambda x: permute(x["x"], routing), {"x": x_TD})  # noqa: B023


@pytest.mark.parametrize("weights_dtype", [None, "same", torch.float32])
@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_unpermute(name, dtype, weights_dtype):
    T, D, _, E, K, _ = SHAPES[name]
    routing = build_routing(testing.draw_ids(SHAPES[name], "dropped"), E, 9)
    inputs = {"y": testing.draw(T * K, D, dtype=dtype)}
    if weights_dtype:
        inputs["weights"] = testing.draw(T, K, dtype=dtype if weights_dtype == "same" else weights_dtype, seed=1)
    check(lambda x: unpermute(x["y"], routing, x.get("weights")), inputs)


def test_movement_of_rows_past_the_first_block_of_columns():
    routing = build_routing(testing.draw_ids(testing.Shape(9, 1, 1, 3, 2, 1), "dropped"), 3)
    inputs = {"y": testing.draw(18, 1030), "weights": testing.draw(9, 2, seed=1)}
    check(lambda x: unpermute(x["y"], routing, x["weights"]), inputs)
    check(lambda x: permute(x["x"], routing), {"x": testing.draw(9, 1030)})


def test_routing_from_experts_moves_rows():
    routing = build_routing_from_experts(torch.tensor([0, 2, 1, 2]), torch.tensor([0, 2, 4]), 3)
    inputs = {"y": testing.draw(4, 5), "weights": testing.draw(3, 2, seed=1)}
    check(lambda x: unpermute(x["y"], routing, x["weights"]), inputs)
    check(lambda x: permute(x["x"], routing), {"x": testing.draw(3, 5)})
