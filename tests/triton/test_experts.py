from __future__ import annotations

import pytest
import torch

from fastmoe import testing
from fastmoe.ops import build_routing, build_routing_from_experts, moe_mlp
from tests.triton.common import SHAPES, check


def draw(shape: testing.Shape, dtype: torch.dtype, weights_dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    T, D, F, E, K, _ = shape
    return {
        "x": testing.draw(T, D, dtype=dtype),
        "weights": testing.draw(T, K, dtype=weights_dtype or dtype, scale=0.5, seed=1),
        "gate_up": testing.draw(E, 2 * F, D, dtype=dtype, scale=D**-0.5, seed=2),
        "down": testing.draw(E, D, F, dtype=dtype, scale=F**-0.5, seed=3),
    }


def layer(ids_TK=None, routing=None):
    return lambda x: moe_mlp(x["x"], ids_TK, x["weights"], x["gate_up"], x["down"], routing=routing)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_accurate(name, dtype):
    check(layer(testing.draw_ids(SHAPES[name])), draw(SHAPES[name], dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", testing.ROUTINGS[1:])
def test_accurate_for_uneven_routings(routing, dtype):
    shape = SHAPES["odd"]
    check(layer(testing.draw_ids(shape, routing).int()), draw(shape, dtype, torch.float32))


def test_more_columns_than_a_block():
    shape = testing.Shape(40, 70, 150, 2, 1, 1)
    check(layer(testing.draw_ids(shape)), draw(shape, torch.bfloat16))


def test_capacity_and_experts_own_lists():
    shape = SHAPES["odd"]
    check(layer(routing=build_routing(testing.draw_ids(shape), shape.E, 11)), draw(shape, torch.float32))
    routing = build_routing_from_experts(torch.tensor([0, 2, 1, 2, 3]), torch.tensor([0, 2, 2, 5]), 4)
    check(layer(routing=routing), draw(testing.Shape(4, 9, 5, 3, 3, 1), torch.float32))


@pytest.mark.parametrize("dtype", testing.DTYPES)
def test_an_expert_without_tokens_gets_gradients_of_zero(dtype):
    shape = SHAPES["odd"]
    with testing.poison():
        grads = testing.forward_backward(layer(testing.draw_ids(shape, "empty_expert")), draw(shape, dtype))
    for name in ("dgate_up", "ddown"):
        assert (grads[name][shape.E // 2] == 0).all()
        assert (grads[name][0] != 0).any()


def test_all_slots_dropped_gives_zero():
    shape = SHAPES["odd"]
    with testing.poison():
        results = testing.forward_backward(layer(torch.full((shape.T, shape.K), -1)), draw(shape, torch.float32))
    assert len(results) == 5
    assert all((tensor == 0).all() for tensor in results.values())


@pytest.mark.parametrize("live", ["x", "weights", "gate_up", "down"])
def test_frozen_inputs_do_not_change_the_gradients_of_others(live):
    shape = SHAPES["odd"]
    inputs, call = draw(shape, torch.float32), layer(testing.draw_ids(shape))
    full = testing.forward_backward(call, inputs)
    with testing.poison(), testing.Recorder() as recorder:
        part = testing.forward_backward(call, inputs, tuple(name for name in inputs if name != live))
    assert part.keys() == {"0", f"d{live}"}
    testing.assert_bit_equal(part[f"d{live}"], full[f"d{live}"])
    (gradients,) = [out for name, _, out in recorder.calls if name == "moe_mlp_backward"]
    assert sum(gradient.numel() > 0 for gradient in gradients) == 1


def test_without_gradients_nothing_is_saved_and_nothing_changes():
    shape = SHAPES["odd"]
    inputs, call = draw(shape, torch.bfloat16), layer(testing.draw_ids(shape))
    with torch.no_grad(), testing.poison(), testing.Recorder() as recorder:
        y_TD = call(inputs)
    (outputs,) = [out for name, _, out in recorder.calls if name == "moe_mlp"]
    assert outputs[1].numel() == 0
    testing.assert_bit_equal(y_TD, testing.forward_backward(call, inputs)["0"])


def test_takes_any_layout():
    shape = SHAPES["odd"]
    inputs, call = draw(shape, torch.float32), layer(testing.draw_ids(shape))
    want = testing.forward_backward(call, inputs)
    strided = {name: tensor.transpose(0, -1).contiguous().transpose(0, -1) for name, tensor in inputs.items()}
    for name, got in testing.forward_backward(call, strided).items():
        testing.assert_bit_equal(got, want[name], name)
