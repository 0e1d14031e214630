"""What the tests of this folder share: the inputs and the call of one expert layer on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastmoe import testing
from fastmoe.ops import moe_mlp
from fastmoe.ops.experts import GATED

Tensors = dict[str, torch.Tensor]
SHAPES = {
    **{name: testing.SHAPES[name] for name in ("empty", "one", "odd", "one_expert", "every_expert", "fine")},
    "tile": testing.Shape(255, 192, 136, 4, 2, 1),  # row tiles and columns of blocks that are not full
    "aligned": testing.Shape(4096, 512, 256, 8, 4, 1),  # enough work to be tuned for
}


def on_device(inputs: Tensors) -> Tensors:
    return {name: tensor.cuda() for name, tensor in inputs.items()}


def draw(
    shape: testing.Shape, dtype: torch.dtype, activation: str = "swiglu", transposed: bool = False, biases: bool = False
) -> Tensors:
    T, D, F, E, K, _ = shape
    Z = 2 * F if activation in GATED else F
    inputs = {
        "x": testing.draw(T, D, dtype=dtype),
        "weights": testing.draw(T, K, scale=0.5, seed=1),
        "gate_up": testing.draw(E, Z, D, dtype=dtype, scale=D**-0.5, seed=2),
        "down": testing.draw(E, D, F, dtype=dtype, scale=F**-0.5, seed=3),
    }
    if transposed:
        inputs |= {name: inputs[name].transpose(1, 2).contiguous() for name in ("gate_up", "down")}
    if biases:
        inputs["gate_up_bias"] = testing.draw(E, Z, dtype=dtype, scale=0.5, seed=4)
        inputs["down_bias"] = testing.draw(E, D, dtype=dtype, seed=5)
    return on_device(inputs)


def layer(shape: testing.Shape, activation: str = "swiglu", routing: str = "random", **options) -> Callable:
    ids_TK = testing.draw_ids(shape, routing).cuda()

    def call(x: Tensors) -> torch.Tensor:
        biases = {name: x[name] for name in ("gate_up_bias", "down_bias") if name in x}
        return moe_mlp(x["x"], ids_TK, x["weights"], x["gate_up"], x["down"], activation, **biases, **options)

    return call


def forward_backward(call: Callable, inputs: Tensors, frozen: tuple[str, ...] = ()) -> Tensors:
    """testing.forward_backward on the device: outputs by number, gradients by name, from fixed gradients."""
    leaves = {
        name: tensor.detach().requires_grad_(tensor.is_floating_point() and name not in frozen)
        for name, tensor in inputs.items()
    }
    output = call(leaves)
    output.backward(testing.draw(*output.shape, dtype=torch.bfloat16).to(output))
    return {"0": output.detach()} | {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def check(call: Callable, inputs: Tensors, frozen: tuple[str, ...] = ()) -> None:
    """The 2x rule forward and backward, from poisoned memory, and a second run that is bit-equal."""
    with testing.backend("reference"):
        exact = forward_backward(call, testing.to_float64(inputs), frozen)
        plain = forward_backward(call, inputs, frozen)
    with testing.poison():
        got, again = forward_backward(call, inputs, frozen), forward_backward(call, inputs, frozen)
    assert got.keys() == plain.keys()
    for name in plain:
        tensors = [t.to_dense() if t.is_sparse else t for t in (got[name], exact[name], plain[name], again[name])]
        testing.assert_accurate(*tensors[:3], name)
        testing.assert_bit_equal(tensors[3], tensors[0], f"second run of {name}")
