"""Everything moe_mlp can be asked for, on few programs, so that each walks several tiles."""

from __future__ import annotations

import pytest
import torch

from fastmoe import jit, testing
from fastmoe.ops import moe_mlp
from fastmoe.ops.experts import ACTIVATIONS, GATED, Z8_BLOCK, reference
from tests.triton.common import check

SHAPE = testing.Shape(29, 19, 70, 4, 2, 1)  # F: two blocks of scales, the second short
LAYERS = [(name, pairs) for name in ACTIVATIONS for pairs in ((False, True) if name in GATED else (False,))]


@pytest.fixture(autouse=True)
def two_programs(monkeypatch):
    monkeypatch.setattr(jit, "device", lambda tensor: jit.Device(227 << 10, 1))


def draw(dtype, activation, transposed=False, biases=True, shape=SHAPE):
    T, D, F, E, K, _ = shape
    Z = 2 * F if activation in GATED else F
    inputs = {
        "x": testing.draw(T, D, dtype=dtype),
        "weights": testing.draw(T, K, scale=0.5, seed=1),
        "gate_up": testing.draw(E, Z, D, dtype=dtype, scale=2 * D**-0.5, seed=2),
        "down": testing.draw(E, D, F, dtype=dtype, scale=F**-0.5, seed=3),
    }
    if transposed:
        inputs |= {name: inputs[name].transpose(1, 2).contiguous() for name in ("gate_up", "down")}
    if biases:
        inputs |= {
            "gate_up_bias": testing.draw(E, Z, dtype=dtype, seed=4),
            "down_bias": testing.draw(E, D, dtype=dtype),
        }
    return inputs


def layer(activation, routing="empty_expert", shape=SHAPE, **options):
    ids_TK = testing.draw_ids(shape, routing)

    def call(x):
        biases = {name: x[name] for name in ("gate_up_bias", "down_bias") if name in x}
        return moe_mlp(x["x"], ids_TK, x["weights"], x["gate_up"], x["down"], activation, **biases, **options)

    return call


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation, pairs", LAYERS)
def test_layers(activation, pairs, dtype):
    limit = 1.0 if dtype == torch.float32 else 50.0
    for transposed, save in ((False, "z"), (True, "x")):
        options = {"interleaved": pairs, "transposed": transposed, "save": save, "limit": limit}
        check(layer(activation, **options), draw(dtype, activation, transposed))


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("activation, pairs", [("swiglu", False), ("geglu", True), ("relu", False)])
def test_saved_in_8_bits(activation, pairs, dtype):
    """The bits are those that quantize makes of z, the result is the same, gradients are those of the saved z."""
    inputs, options = draw(dtype, activation), {"interleaved": pairs}
    saved = {}
    for save in ("z", "z8"):
        call = layer(activation, "dropped", save=save, **options)
        with testing.poison(), testing.Recorder() as recorder:
            results = testing.forward_backward(call, inputs)
        (outputs,) = [out for name, _, out in recorder.calls if name == "moe_mlp"]
        (grads,) = [(args, out) for name, args, out in recorder.calls if name == "moe_mlp_backward"]
        saved[save] = results, outputs, grads
    testing.assert_bit_equal(saved["z8"][0]["0"], saved["z"][0]["0"])
    q_RZ, scale = reference.quantize(saved["z"][1][1], activation, pairs)
    testing.assert_bit_equal(saved["z8"][1][1], q_RZ)
    testing.assert_bit_equal(saved["z8"][1][2], scale)
    assert scale.shape[1] == (2 if activation in GATED else 1) * -(-SHAPE.F // Z8_BLOCK)
    args, grads = saved["z8"][2]
    z_RZ = reference.dequantize(q_RZ, scale, activation, pairs, dtype)
    plain = [*args[:10], z_RZ, scale, *args[12:17], "z", *args[18:]]
    exact = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in plain]
    for got, want, near in zip(grads, reference.moe_mlp_backward(*exact), reference.moe_mlp_backward(*plain)):
        testing.assert_accurate(got, want, near)


@pytest.mark.parametrize("transposed", [False, True])
def test_sparse_gradients(transposed):
    inputs = draw(torch.float32, "swiglu", transposed, biases=False)
    for routing in ("empty_expert", "all_to_one"):
        dense, sparse = (
            testing.forward_backward(layer("swiglu", routing, transposed=transposed, sparse_grads=flag), inputs)
            for flag in (False, True)
        )
        for name in ("dgate_up", "ddown"):
            assert sparse[name].is_sparse and sparse[name]._nnz() == (dense[name] != 0).flatten(1).any(1).sum()
            testing.assert_bit_equal(sparse[name].to_dense(), dense[name])
    none = testing.forward_backward(
        lambda x: moe_mlp(
            x["x"], torch.full((SHAPE.T, 2), -1), x["weights"], x["gate_up"], x["down"], transposed=transposed,
            sparse_grads=True,
        ),
        inputs,
    )  # fmt: skip
    assert none["dgate_up"]._nnz() == 0 and none["ddown"]._nnz() == 0


@pytest.mark.parametrize("live", ["x", "weights", "gate_up", "down", "gate_up_bias", "down_bias"])
def test_frozen_inputs_do_not_change_the_gradients_of_others(live):
    inputs, call = draw(torch.float32, "geglu_tanh"), layer("geglu_tanh", interleaved=True)
    full = testing.forward_backward(call, inputs)
    with testing.poison():
        part = testing.forward_backward(call, inputs, tuple(name for name in inputs if name != live))
    assert part.keys() == {"0", f"d{live}"}
    testing.assert_bit_equal(part[f"d{live}"], full[f"d{live}"])


def test_a_bias_alone_over_many_tiles():
    shape = testing.Shape(1100, 3, 5, 2, 1, 1)  # 18 tiles of one expert: two steps of their sum
    check(layer("relu2", "all_to_one", shape), draw(torch.float32, "relu2", shape=shape), ("x", "gate_up", "down"))


def test_more_experts_than_a_block_of_the_tile_table():
    """64 tiles, two programs' share, are those of the first block of 512 experts; the next ones begin the second."""
    shape = testing.Shape(200, 4, 3, 1300, 1, 1)
    inputs = draw(torch.float32, "gelu", shape=shape)
    ids_TK = torch.cat([torch.arange(64), torch.full((100,), 512), torch.full((36,), 1299)])[:, None]
    call = lambda x: moe_mlp(x["x"], ids_TK, x["weights"], x["gate_up"], x["down"], "gelu")
    with torch.no_grad(), testing.poison():
        got = call(inputs)
        with testing.backend("reference"):
            testing.assert_accurate(got, call(testing.to_float64(inputs)), call(inputs))
