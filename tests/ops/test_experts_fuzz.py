"""moe_mlp at drawn sizes, routings, layers and dtypes, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmoe import ops, testing
from fastmoe.ops.experts import ACTIVATIONS, GATED, SAVES
from fastmoe.testing import DTYPES, Shape, assert_accurate, assert_bit_equal, forward_backward, generator
from tests.ops.test_experts import BACKENDS, FLOATS, draw_inputs, with_routing


@st.composite
def calls(draw):
    """What draws the inputs of a call from a seed, the options of moe_mlp, a capacity, the number of tokens."""
    size = lambda most: draw(st.integers(1, 8) | st.integers(1, most))
    flag = lambda: draw(st.booleans())
    T = draw(st.just(0) | st.integers(1, 8) | st.integers(1, 70))
    E, K, D, F = size(70), draw(st.integers(1, 4)), size(130), size(200)
    activation, dtype = draw(st.sampled_from(ACTIVATIONS)), draw(st.sampled_from(DTYPES))
    biases, transposed = flag(), flag()
    if activation == "clamped_swiglu" and dtype != torch.float32:
        biases = "wide"  # or a rounding of 16 bits decides what is beyond the limit
    skew = draw(st.sampled_from((0.0, 1.0, 3.0, 30.0)))  # 30: all to one
    dropped = draw(st.sampled_from((0.0, 0.3, 1.0)))
    weights, index = draw(st.sampled_from(("float32", "same"))), draw(st.sampled_from((torch.int32, torch.int64)))

    def make(seed):
        shape = Shape(T, D, F, E, 1, 1)
        inputs = draw_inputs(
            shape, dtype, "random", weights, seed=seed, activation=activation, biases=biases, transposed=transposed
        )
        shares_E = torch.arange(1, E + 1).double() ** -skew
        ids = torch.multinomial(shares_E, max(1, T * K), replacement=True, generator=generator(seed))[: T * K]
        ids = torch.where(torch.rand(T * K, generator=generator(seed)) < dropped, -1, ids)
        return inputs | {
            "topk_ids_TK": ids.view(T, K).to(index),
            "topk_weights_TK": testing.draw(T, K, dtype=inputs["topk_weights_TK"].dtype, seed=seed + 1),
        }

    options = {
        "activation": activation,
        "interleaved": activation in GATED and flag(),
        "transposed": transposed,
        "save": draw(st.sampled_from(SAVES)),
        "sparse_grads": flag(),
    }
    return make, options, draw(st.none() | st.integers(0, 20)), T


def run(inputs, options, capacity):
    """Outputs and gradients of a call, the sparse ones made dense."""
    floats = {name: tensor for name, tensor in inputs.items() if name in FLOATS}
    routing = ops.build_routing(inputs["topk_ids_TK"], inputs["gate_up_proj"].shape[0], capacity)
    results = forward_backward(lambda x: with_routing(x, routing, options), floats)
    return {name: tensor.to_dense() if tensor.is_sparse else tensor for name, tensor in results.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=40, deadline=None, derandomize=True, print_blob=False)
@given(calls())
def test_accurate(backend, call):
    """The 2x rule over as many draws as give tiny calls, where plain torch may be right by luck, a fair sample."""
    make, options, capacity, T = call
    got, exact, plain = [], [], []
    for seed in range(1 + 12 // max(T, 1)):
        inputs = make(10 * seed)
        with testing.backend("reference"):
            exact.append(run(testing.to_float64(inputs), options | {"save": "z", "sparse_grads": False}, capacity))
            plain.append(run(inputs, options | {"sparse_grads": False}, capacity))
        with testing.backend(f"experts={backend}"), testing.poison():
            got.append(run(inputs, options, capacity))
            with testing.threads(3):
                again = run(inputs, options, capacity)
        for name, tensor in got[-1].items():
            assert_bit_equal(again[name], tensor, f"second run of {name}")
    for name in plain[0]:
        assert_accurate(*(torch.stack([results[name] for results in runs]) for runs in (got, exact, plain)), name)
