from __future__ import annotations

import pytest
import torch

from fastmoe import ops, testing
from fastmoe.ops import autotune
from fastmoe.ops.experts import ACTIVATIONS, GATED, SAVES, kernels, reference
from fastmoe.ops.registry import OPS
from tests.gpu.common import SHAPES, check, draw, forward_backward, layer

LAYERS = [(name, pairs) for name in ACTIVATIONS for pairs in ((False, True) if name in GATED else (False,))]


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, dtype):
    check(layer(SHAPES[name]), draw(SHAPES[name], dtype))


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("routing", testing.ROUTINGS[1:])
def test_routings(routing, dtype):
    check(layer(SHAPES["tile"], routing=routing), draw(SHAPES["tile"], dtype))


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("save", ["z", "x"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation, pairs", LAYERS)
def test_layers(activation, pairs, transposed, save, dtype):
    shape, limit = SHAPES["tile"], 1.0 if dtype == torch.float32 else 50.0
    call = layer(shape, activation, interleaved=pairs, transposed=transposed, save=save, limit=limit)
    check(call, draw(shape, dtype, activation, transposed, biases=True))


@pytest.mark.parametrize("transposed", [False, True])
def test_sparse_gradients(transposed):
    shape = SHAPES["tile"]
    for routing in ("empty_expert", "all_to_one"):
        call = layer(shape, routing=routing, transposed=transposed, sparse_grads=True)
        check(call, draw(shape, torch.bfloat16, transposed=transposed))


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("activation, pairs", [("swiglu", False), ("clamped_swiglu", True), ("gelu", False)])
@pytest.mark.parametrize("name", ["odd", "tile"])
def test_the_result_does_not_depend_on_what_is_saved(name, activation, pairs, dtype):
    shape, results, outputs = SHAPES[name], {}, {}
    inputs = draw(shape, dtype, activation, biases=True)
    for save in SAVES:
        with testing.poison(), testing.Recorder() as recorder:
            results[save] = forward_backward(layer(shape, activation, "dropped", interleaved=pairs, save=save), inputs)
        (outputs[save],) = [out for name, _, out in recorder.calls if name == "moe_mlp"]
    for save in SAVES[1:]:
        testing.assert_bit_equal(results[save]["0"], results["z"]["0"], save)
    q_RZ, scale = reference.quantize(outputs["z"][1], activation, pairs)
    testing.assert_bit_equal(outputs["z8"][1], q_RZ)
    testing.assert_bit_equal(outputs["z8"][2], scale)
    for gradient, value in results["z8"].items():
        error = (value.double() - results["z"][gradient].double()).norm() / results["z"][gradient].double().norm()
        assert error <= 1.5e-2, f"{gradient}: {error}"


def test_every_candidate_of_every_kernel(monkeypatch):
    """What a tuner may choose between is right to begin with."""
    seen, shape = {}, SHAPES["aligned"]
    choose = lambda kernel, key, candidates, run, agrees, *rest: (
        seen.setdefault(kernel, []).append((candidates, agrees)) or candidates[0]
    )
    with monkeypatch.context() as patched:
        patched.setattr(autotune, "choose", choose)
        for pairs in (False, True):
            for dtype in testing.DTYPES:
                inputs = draw(shape, dtype, transposed=pairs)
                forward_backward(layer(shape, interleaved=pairs, transposed=pairs), inputs)
    assert seen.keys() == {"gate_up", "rows", "down_backward", "wgrad"}
    wrong = [
        (kernel, config)
        for kernel, calls in seen.items()
        for candidates, agrees in calls
        for config in candidates
        if not agrees(config)
    ]
    assert not wrong


def test_tuned_choices_are_written():
    forward_backward(layer(SHAPES["aligned"]), draw(SHAPES["aligned"], torch.bfloat16))
    choices = autotune._choices(torch.cuda.current_device(), kernels.SOURCES)
    assert {word.split()[0] for word in choices.known} == {"gate_up", "rows", "down_backward", "wgrad"}


def test_opcheck():
    T, D, F, E, K, _ = testing.Shape(6, 8, 4, 3, 2, 1)
    inputs = draw(testing.Shape(T, D, F, E, K, 1), torch.float32, biases=True)
    logits_TE = testing.draw(T, E, seed=1).cuda().requires_grad_()
    with testing.Recorder() as recorder:
        weights_TK, ids_TK, probs_TE, _ = ops.topk_gate(logits_TE, K)
        capped = ops.build_routing(ids_TK, E, capacity=3)
        leaves = [tensor.requires_grad_() for name, tensor in inputs.items() if name != "weights"]
        x_TD, gate_up, down, gate_up_bias, down_bias = leaves
        biases = {"gate_up_bias": gate_up_bias, "down_bias": down_bias}
        y_TD = ops.moe_mlp(x_TD, None, weights_TK, gate_up, down, routing=capped, save="z8", **biases)
        z_TD = ops.unpermute(ops.permute(x_TD, capped), ops.build_routing(ids_TK, E), weights_TK)
        (y_TD.square().sum() + z_TD.square().sum() + probs_TE.square().sum()).backward()
    for name, args, _ in recorder.calls:
        args = [arg.detach() if name.endswith("_backward") and isinstance(arg, torch.Tensor) else arg for arg in args]
        torch.library.opcheck(OPS[name].overload, args)
    assert {"moe_mlp", "moe_mlp_backward", "build_routing", "topk_gate_backward"} <= {
        call[0] for call in recorder.calls
    }


def needs(gib):
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    return pytest.mark.skipif(free < gib << 30, reason=f"wants {gib} GiB of device memory")


@needs(40)
@pytest.mark.parametrize("size", ["weights", "rows"])
def test_more_than_2_to_the_31_elements(size):
    """The last expert of a projection of 2^31 elements, the last rows of z of as many; against the same by itself."""
    if size == "weights":
        T, D, F, E = 64, 2048, 4096, 140
        inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.02 for s in ((E, 2 * F, D), (E, D, F))]
        assert inputs[0].numel() > 2**31
    else:
        T, D, F, E = 1 << 18, 64, 4200, 2
        inputs = [torch.randn(s, device="cuda", dtype=torch.bfloat16) * 0.02 for s in ((E, 2 * F, D), (E, D, F))]
        assert T * 2 * F > 2**31
    gate_up, down = (tensor.requires_grad_() for tensor in inputs)
    x_TD = torch.randn(T, D, device="cuda", dtype=torch.bfloat16)
    ids_T1 = torch.zeros(T, 1, device="cuda", dtype=torch.int64)
    ids_T1[-40:] = E - 1
    weights_T1 = torch.ones(T, 1, device="cuda")
    y_TD = ops.moe_mlp(x_TD, ids_T1, weights_T1, gate_up, down)
    y_TD.sum().backward()
    last = [tensor.detach()[-1:].clone().requires_grad_() for tensor in (gate_up, down)]
    want_TD = ops.moe_mlp(x_TD[-40:], torch.zeros_like(ids_T1[-40:]), weights_T1[-40:], *last)
    want_TD.sum().backward()
    torch.testing.assert_close(y_TD[-40:], want_TD, rtol=2e-2, atol=1e-3)
    for tensor, alone in zip((gate_up, down), last):
        torch.testing.assert_close(tensor.grad[-1:], alone.grad, rtol=2e-2, atol=2e-2 * alone.grad.abs().max().item())
