import re

import pytest
import torch
from torch.nn.functional import silu

from fastmoe import ops, testing
from fastmoe.testing import ROUTINGS, SHAPES, draw, draw_ids
from tests.ops.battery import Battery, Case

NAMES = ("x_TD", "topk_ids_TK", "topk_weights_TK", "gate_up_proj", "down_proj")
FLOATS = ("x_TD", "topk_weights_TK", "gate_up_proj", "down_proj")


def draw_inputs(shape, dtype=torch.float32, routing="random", weights="float32", index=torch.int64):
    T, D, F, E, K, _ = shape
    weight_dtype = torch.float32 if weights == "float32" and dtype != torch.float64 else dtype
    return {
        "x_TD": draw(T, D, dtype=dtype),
        "topk_ids_TK": draw_ids(shape, routing).to(index),
        "topk_weights_TK": torch.softmax(draw(T, K, seed=1), 1).to(weight_dtype),
        "gate_up_proj": draw(E, 2 * F, D, dtype=dtype, scale=D**-0.5, seed=2),
        "down_proj": draw(E, D, F, dtype=dtype, scale=F**-0.5, seed=3),
    }


def moe_case(size, routing="random", weights="float32", index=torch.int64, thorough=False, parallel=False):
    return Case(
        f"{size}-{routing}-{weights}-{str(index)[6:]}",
        lambda x: ops.moe_mlp(*(x[name] for name in NAMES)),
        lambda dtype: draw_inputs(SHAPES[size], dtype, routing, weights, index),
        thorough=thorough,
        parallel=parallel,
    )


def with_given_routing(size, capacity, thorough=False):
    def make(dtype):
        inputs = draw_inputs(SHAPES[size], dtype)
        with testing.backend("reference"):
            routing = ops.build_routing(inputs.pop("topk_ids_TK"), SHAPES[size].E, capacity)
        return inputs | dict(zip(routing._fields, routing))

    def call(x):
        routing = ops.Routing(*(x[name] for name in ops.Routing._fields))
        return ops.moe_mlp(x["x_TD"], None, x["topk_weights_TK"], x["gate_up_proj"], x["down_proj"], routing=routing)

    return Case(f"{size}-capacity_{capacity}", call, make, thorough=thorough)


def from_experts_case(size):
    """Expert choice: weights are [T, E] and each expert owns a list of tokens."""
    T, _, _, E, _, _ = SHAPES[size]

    def make(dtype):
        chosen_ET = torch.rand(E, T, generator=testing.generator()) < 0.4
        inputs = draw_inputs(SHAPES[size]._replace(K=E), dtype)
        return inputs | {
            "token_R": chosen_ET.nonzero()[:, 1],
            "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), chosen_ET.sum(1).cumsum(0)]),
        }

    def call(x):
        routing = ops.build_routing_from_experts(x["token_R"], x["offsets"], T)
        return ops.moe_mlp(x["x_TD"], None, x["topk_weights_TK"], x["gate_up_proj"], x["down_proj"], routing=routing)

    return Case(f"{size}-from_experts", call, make)


def loop(x_TD, topk_ids_TK, topk_weights_TK, gate_up_proj, down_proj):
    """The expert layer one (token, expert) pair at a time."""
    rows = []
    for t in range(x_TD.shape[0]):
        y_D = torch.zeros_like(x_TD[t])
        for k in range(topk_ids_TK.shape[1]):
            e = int(topk_ids_TK[t, k])
            if e >= 0:
                gate_F, up_F = (gate_up_proj[e] @ x_TD[t]).chunk(2)
                y_D = y_D + topk_weights_TK[t, k] * (down_proj[e] @ (silu(gate_F) * up_F))
        rows.append(y_D)
    return torch.stack(rows)


class TestExperts(Battery):
    family = "experts"
    cases = [
        *(moe_case(size) for size in SHAPES),
        *(moe_case("odd", routing, thorough=routing == "dropped") for routing in ROUTINGS[1:]),
        moe_case("tiny", "all_to_one"),
        moe_case("tiny", "dropped", "same", parallel=True),
        moe_case("fine", "empty_expert", index=torch.int32, parallel=True),
        moe_case("every_expert", weights="same", index=torch.int32, thorough=True),
        with_given_routing("odd", 0),
        with_given_routing("odd", 4, thorough=True),
        with_given_routing("fine", None),
        from_experts_case("odd"),
        from_experts_case("tiny"),
    ]

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_matches_a_loop_over_tokens(self, backend, routing):
        inputs = draw_inputs(SHAPES["odd"], routing=routing)
        exact = {
            name: tensor.double().requires_grad_() if name in FLOATS else tensor for name, tensor in inputs.items()
        }
        dy_TD = draw(*inputs["x_TD"].shape, seed=9)
        for name in FLOATS:
            inputs[name].requires_grad_()
        with self.on(backend):
            y_TD = ops.moe_mlp(*inputs.values())
            y_TD.backward(dy_TD)
        want = loop(*exact.values())
        want.backward(dy_TD.double())
        torch.testing.assert_close(y_TD.double(), want, rtol=1e-4, atol=1e-5)
        for name in FLOATS:
            torch.testing.assert_close(inputs[name].grad.double(), exact[name].grad, rtol=1e-4, atol=1e-5)

    def test_an_expert_without_tokens_gets_zero_gradient(self, backend, dtype):
        inputs = draw_inputs(SHAPES["odd"], dtype, "empty_expert")
        gate_up_proj, down_proj = inputs["gate_up_proj"].requires_grad_(), inputs["down_proj"].requires_grad_()
        with self.on(backend), testing.poison():
            ops.moe_mlp(*inputs.values()).sum().backward()
        empty = SHAPES["odd"].E // 2
        assert bool((gate_up_proj.grad[empty] == 0).all()) and bool((down_proj.grad[empty] == 0).all())
        assert bool((gate_up_proj.grad[0] != 0).any())

    def test_a_dropped_token_gets_zero_and_gives_zero(self, backend):
        inputs = draw_inputs(SHAPES["odd"], routing="dropped")
        x_TD = inputs["x_TD"].requires_grad_()
        with self.on(backend), testing.poison():
            y_TD = ops.moe_mlp(*inputs.values())
            y_TD.sum().backward()
        assert bool((y_TD[0] == 0).all()) and bool((x_TD.grad[0] == 0).all())

    @pytest.mark.parametrize("frozen", [*[(name,) for name in FLOATS], ("gate_up_proj", "down_proj"), FLOATS[:3]])
    def test_frozen_inputs_cost_no_gradient(self, backend, frozen):
        inputs = draw_inputs(SHAPES["odd"])
        for name in FLOATS:
            inputs[name].requires_grad_(name not in frozen)
        with self.on(backend), testing.Recorder() as recorder:
            ops.moe_mlp(*inputs.values()).sum().backward()
        (grads,) = (out for name, _, out in recorder.calls if name == "moe_mlp_backward")
        for name, grad in zip(FLOATS, grads):
            assert grad.numel() == (0 if name in frozen else inputs[name].numel()), name
            assert (inputs[name].grad is None) == (name in frozen), name

    @pytest.mark.parametrize("how", ["no_grad", "inference_mode", "all frozen"])
    def test_without_gradients_nothing_is_saved(self, backend, how):
        inputs = draw_inputs(SHAPES["odd"])
        inputs["x_TD"].requires_grad_(how != "all frozen")
        context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "all frozen": torch.enable_grad}[
            how
        ]
        with self.on(backend), testing.Recorder() as recorder, context():
            y_TD = ops.moe_mlp(*inputs.values())
        ((_, z_R2F),) = [out for name, _, out in recorder.calls if name == "moe_mlp"]
        assert z_R2F.numel() == 0 and y_TD.grad_fn is None

    def test_autocast_lowers_rows_and_projections(self, backend):
        inputs = draw_inputs(SHAPES["odd"])
        lowered = inputs | {name: inputs[name].bfloat16() for name in ("x_TD", "gate_up_proj", "down_proj")}
        for name in FLOATS:
            inputs[name].requires_grad_()
        with self.on(backend):
            want = ops.moe_mlp(*lowered.values())
            with torch.autocast("cpu", torch.bfloat16):
                got = ops.moe_mlp(*inputs.values())
                mixed = ops.moe_mlp(lowered["x_TD"], *list(inputs.values())[1:])
            got.sum().backward()
        assert got.dtype == torch.bfloat16 and torch.equal(got, want) and torch.equal(mixed, want)
        assert all(inputs[name].grad.dtype == torch.float32 for name in FLOATS)

    def test_a_given_routing_equals_ids(self, backend):
        inputs = draw_inputs(SHAPES["odd"], routing="dropped")
        with self.on(backend):
            routing = ops.build_routing(inputs["topk_ids_TK"], SHAPES["odd"].E)
            given = ops.moe_mlp(inputs["x_TD"], None, *list(inputs.values())[2:], routing=routing)
            assert torch.equal(given, ops.moe_mlp(*inputs.values()))

    def test_gradients_accumulate(self, backend):
        inputs = draw_inputs(SHAPES["odd"])
        weight = inputs["gate_up_proj"].requires_grad_()
        with self.on(backend):
            ops.moe_mlp(*inputs.values()).sum().backward()
            once = weight.grad.clone()
            ops.moe_mlp(*inputs.values()).sum().backward()
        assert torch.equal(weight.grad, once + once)


META = {"device": "meta"}


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "x_TD must be of shape [T, D] = [any, any], got [8]", {"x_TD": draw(8)}),
        (
            ValueError,
            "topk_ids_TK must be of shape [T, K] = [6, 2], got [6, 3]",
            {"topk_ids_TK": torch.zeros(6, 3, dtype=torch.int64)},
        ),
        (ValueError, "topk_weights_TK must be of shape [T, K] = [6, any], got [5, 2]", {"topk_weights_TK": draw(5, 2)}),
        (ValueError, "gate_up_proj must be of shape [E, 2F, D] = [3, 10, 4]", {"gate_up_proj": draw(3, 5, 4)}),
        (ValueError, "gate_up_proj must be of shape [E, 2F, D] = [3, 10, 4]", {"gate_up_proj": draw(2, 10, 4)}),
        (ValueError, "down_proj must be of shape [E, D, F] = [any, 4, any]", {"down_proj": draw(3, 5, 4)}),
        (TypeError, "x_TD must be float32", {"x_TD": torch.ones(6, 4, dtype=torch.int64)}),
        (TypeError, "down_proj must be float32, got torch.bfloat16", {"down_proj": draw(3, 4, 5).bfloat16()}),
        (TypeError, "gate_up_proj must be float32, got torch.float64", {"gate_up_proj": draw(3, 10, 4).double()}),
        (TypeError, "topk_weights_TK must be float32", {"topk_weights_TK": draw(6, 2).half()}),
        (TypeError, "topk_ids_TK must be int32 or int64, got torch.float32", {"topk_ids_TK": draw(6, 2)}),
        (TypeError, "topk_ids_TK must be a torch.Tensor, got NoneType", {"topk_ids_TK": None}),
        (ValueError, "gate_up_proj must be on cpu, got meta", {"gate_up_proj": torch.zeros(3, 10, 4, **META)}),
        (
            ValueError,
            "topk_ids_TK must be on cpu, got meta",
            {"topk_ids_TK": torch.zeros(6, 2, dtype=torch.int64, **META)},
        ),
        (ValueError, "num_experts must be at least 1", {"gate_up_proj": draw(0, 10, 4), "down_proj": draw(0, 4, 5)}),
        (ValueError, "F must be at least 1", {"gate_up_proj": draw(3, 0, 4), "down_proj": draw(3, 4, 0)}),
        (
            ValueError,
            "D must be at least 1",
            {"x_TD": draw(6, 0), "gate_up_proj": draw(3, 10, 0), "down_proj": draw(3, 0, 5)},
        ),
        (
            ValueError,
            "K must be at least 1",
            {"topk_ids_TK": torch.zeros(6, 0, dtype=torch.int64), "topk_weights_TK": draw(6, 0)},
        ),
        (ValueError, "topk_ids_TK must be in -1..2, got 3", {"topk_ids_TK": torch.full((6, 2), 3)}),
        (ValueError, "activation must be 'swiglu', got 'relu'", {"activation": "relu"}),
        (NotImplementedError, "gate_up_bias must be None", {"gate_up_bias": draw(3, 10)}),
        (NotImplementedError, "down_bias must be None", {"down_bias": draw(3, 4)}),
        (NotImplementedError, "interleaved must be False", {"interleaved": True}),
        (NotImplementedError, "transposed must be False", {"transposed": True}),
        (NotImplementedError, "save must be 'z'", {"save": "nothing"}),
        (
            ValueError,
            "routing.offsets must be of shape [E+1] = [4], got [3]",
            {"routing": ops.build_routing(torch.zeros(6, 2, dtype=torch.int64), 2)},
        ),
        (
            ValueError,
            "routing.dst_row_TK must be of shape [T, K] = [6, 2], got [5, 2]",
            {"routing": ops.build_routing(torch.zeros(5, 2, dtype=torch.int64), 3)},
        ),
        (
            TypeError,
            "routing.src_row_R must be int32, got torch.int64",
            {
                "routing": ops.Routing(
                    torch.zeros(12, dtype=torch.int64),
                    torch.zeros(6, 2, dtype=torch.int32),
                    torch.zeros(4, dtype=torch.int32),
                )
            },
        ),
    ],
)
def test_bad_input(error, message, changes):
    arguments = (
        dict(
            x_TD=draw(6, 4),
            topk_ids_TK=torch.zeros(6, 2, dtype=torch.int64),
            topk_weights_TK=draw(6, 2),
            gate_up_proj=draw(3, 10, 4),
            down_proj=draw(3, 4, 5),
        )
        | changes
    )
    pattern = re.escape(message)
    with pytest.raises(error, match=rf"fastmoe\.(moe_mlp|build_routing): {pattern}"):
        ops.moe_mlp(**arguments)


def test_gradients_twice_are_refused():
    inputs = draw_inputs(SHAPES["odd"])
    x_TD = inputs["x_TD"].requires_grad_()
    with pytest.raises(NotImplementedError, match="fastmoe.moe_mlp: gradients of gradients"):
        torch.autograd.grad(ops.moe_mlp(*inputs.values()).square().sum(), x_TD, create_graph=True)
