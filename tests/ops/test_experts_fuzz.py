"""moe_mlp at drawn sizes, routings, layers and dtypes, on every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmoe import ops, testing
from fastmoe.ops.experts import ACTIVATIONS, GATED, SAVES
from fastmoe.testing import DTYPES, Shape, assert_accurate, assert_bit_equal, forward_backward, generator
from tests.ops.test_experts import BACKENDS, FLOATS, draw_inputs, with_routing

TOKENS = (37, 1, 2, 3, 7, 8, 9, 16, 23, 48, 64, 65, 70, 0)  # first what hypothesis tries most
WIDTHS = (33, 1, 2, 3, 5, 8, 15, 16, 17, 31, 48, 63, 64, 65, 66, 95, 96, 97, 127, 128, 129, 130, 191, 192)


@st.composite
def calls(draw):
    """What draws the inputs of a call from a seed, the options of moe_mlp, a capacity, the number of tokens."""
    flag = lambda: draw(st.booleans())
    T, D, F = draw(st.sampled_from(TOKENS)), draw(st.sampled_from(WIDTHS)), draw(st.sampled_from(WIDTHS))
    if min(D, F) < 8:  # torch sums long products of few columns in an order of their own, twice as exact
        D, F = min(D, 17), min(F, 17)
    E, K = draw(st.sampled_from((5, 1, 2, 3, 8, 17, 67))), draw(st.integers(1, 4))
    activation, dtype = draw(st.sampled_from(ACTIVATIONS)), draw(st.sampled_from(DTYPES))
    biases, transposed = flag(), flag()
    if activation == "clamped_swiglu" and dtype != torch.float32:
        biases = "wide"  # or a rounding of 16 bits decides what is beyond the limit
    skew = draw(st.sampled_from((0.0, 1.0, 3.0, 30.0)))  # 30: all to one
    dropped = draw(st.sampled_from((0.0, 0.3, 0.9)))
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
    return make, options, draw(st.sampled_from((None, None, 0, 1, 5, 16))), T


def run(inputs, options, capacity):
    """Outputs and gradients of a call, the sparse ones made dense."""
    floats = {name: tensor for name, tensor in inputs.items() if name in FLOATS}
    routing = ops.build_routing(inputs["topk_ids_TK"], inputs["gate_up_proj"].shape[0], capacity)
    results = forward_backward(lambda x: with_routing(x, routing, options), floats)
    return {name: tensor.to_dense() if tensor.is_sparse else tensor for name, tensor in results.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True, print_blob=False)
@given(calls())
def test_accurate(backend, call):
    """The 2x rule over as many draws as give tiny calls, where plain torch may be right by luck, a fair sample."""
    make, options, capacity, T = call
    got, exact, plain = [], [], []
    for seed in range(1 + 12 // T if T else 1):
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
