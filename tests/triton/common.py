"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastmoe import testing
from fastmoe.testing import Shape

SHAPES = {name: testing.SHAPES[name] for name in ("empty", "one", "odd", "one_expert", "every_expert")}
SHAPES["many"] = Shape(300, 40, 24, 9, 2, 1)  # several chunks, row tiles and columns


def check(call: Callable, inputs: dict[str, torch.Tensor], frozen: tuple[str, ...] = ()) -> None:
    """The 2x rule forward and backward, from poisoned memory, and a second run that is bit-equal."""
    with testing.backend("reference"):
        exact = testing.forward_backward(call, testing.to_float64(inputs), frozen)
        plain = testing.forward_backward(call, inputs, frozen)
    with testing.poison():
        got = testing.forward_backward(call, inputs, frozen)
        again = testing.forward_backward(call, inputs, frozen)
    assert got.keys() == plain.keys()
    for name in plain:
        testing.assert_accurate(got[name], exact[name], plain[name], name)
        testing.assert_bit_equal(again[name], got[name], f"second run of {name}")
