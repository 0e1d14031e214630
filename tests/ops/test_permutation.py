import math
import re
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmoe import ops, testing
from fastmoe.testing import ROUTINGS, SHAPES, draw, draw_ids
from tests.ops.battery import Battery, Case

BACKENDS = [name for name in testing.backends("permutation") if name in ("native", "reference")]


def brute_force(ids_TK, E, capacity=None):
    """Routing by appending slots to lists."""
    T, K = ids_TK.shape
    kept = {(t, k) for t in range(T) for k in range(K) if ids_TK[t, k] >= 0}
    if capacity is not None:
        room = [capacity] * E
        for k in range(K):
            for t in range(T):
                e = int(ids_TK[t, k])
                if e >= 0:
                    kept -= {(t, k)} if room[e] <= 0 else set()
                    room[e] -= 1
    rows = [[t * K + k for t in range(T) for k in range(K) if (t, k) in kept and ids_TK[t, k] == e] for e in range(E)]
    src = sum(rows, [])
    dst = torch.full((T * K,), -1, dtype=torch.int32)
    dst[src] = torch.arange(len(src), dtype=torch.int32)
    offsets = torch.tensor([0] + [len(row) for row in rows]).cumsum(0).int()
    return torch.tensor(src + [-1] * (T * K - len(src)), dtype=torch.int32), dst.view(T, K), offsets


def from_experts(shape):
    """token_R, offsets of experts that each chose some tokens; expert 0 none."""
    chosen_ET = torch.rand(shape.E, shape.T, generator=testing.generator()) < 0.4
    chosen_ET[0] = False
    counts_E = chosen_ET.sum(1)
    return chosen_ET.nonzero()[:, 1], torch.cat([counts_E.new_zeros(1), counts_E.cumsum(0)])


def routing_case(size, routing, index=torch.int64, capacity=None, thorough=False):
    s = SHAPES[size]
    return Case(
        f"build-{size}-{routing}-{str(index)[6:]}-{capacity}",
        lambda x: ops.build_routing(x["topk_ids_TK"], s.E, capacity),
        lambda dtype: {"topk_ids_TK": draw_ids(s, routing).to(index)},
        moves_data=True,
        thorough=thorough,
    )


def from_experts_case(size, thorough=False):
    s = SHAPES[size]
    return Case(
        f"from_experts-{size}",
        lambda x: ops.build_routing_from_experts(x["token_R"], x["offsets"], s.T),
        lambda dtype: dict(zip(("token_R", "offsets"), from_experts(s))),
        moves_data=True,
        thorough=thorough,
    )


def with_routing(shape, routing, capacity=None):
    with testing.backend("reference"):
        return dict(zip(ops.Routing._fields, ops.build_routing(draw_ids(shape, routing), shape.E, capacity)))


def as_routing(x):
    return ops.Routing(*(x[name] for name in ops.Routing._fields))


def permute_case(size, routing, thorough=False, parallel=False):
    s = SHAPES[size]
    return Case(
        f"permute-{size}-{routing}",
        lambda x: ops.permute(x["x_TD"], as_routing(x)),
        lambda dtype: {"x_TD": draw(s.T, s.D, dtype=dtype), **with_routing(s, routing)},
        thorough=thorough,
        parallel=parallel,
    )


def unpermute_case(size, routing, weights="same", capacity=None, thorough=False, parallel=False):
    s = SHAPES[size]

    def make(dtype):
        inputs = {"y_RD": draw(s.T * s.K, s.D, dtype=dtype), **with_routing(s, routing, capacity)}
        if weights:
            wide = torch.float32 if weights == "float32" and dtype != torch.float64 else dtype
            inputs["topk_weights_TK"] = draw(s.T, s.K, dtype=wide, seed=1)
        return inputs

    return Case(
        f"unpermute-{size}-{routing}-{weights}-{capacity}",
        lambda x: ops.unpermute(x["y_RD"], as_routing(x), x.get("topk_weights_TK")),
        make,
        thorough=thorough,
        parallel=parallel,
    )


class TestPermutation(Battery):
    family = "permutation"
    cases = [
        *(routing_case(size, "random", thorough=size == "odd") for size in SHAPES),
        *(
            routing_case("odd", routing, index, capacity)
            for routing in ROUTINGS
            for index in (torch.int32, torch.int64)
            for capacity in (None, 0, 5)
        ),
        routing_case("tiny", "dropped", capacity=20, thorough=True),
        *(from_experts_case(size, thorough=size == "odd") for size in SHAPES),
        *(permute_case(size, "random") for size in SHAPES),
        *(permute_case("odd", routing, thorough=routing == "dropped") for routing in ROUTINGS),
        *(unpermute_case(size, "random", "float32") for size in SHAPES),
        *(
            unpermute_case("odd", routing, weights, thorough=routing == "dropped")
            for routing in ROUTINGS
            for weights in ("same", "float32", None)
        ),
        unpermute_case("tiny", "all_to_one", capacity=7, parallel=True),
        permute_case("tiny", "dropped", parallel=True),
    ]

    @pytest.mark.parametrize("routing", ROUTINGS)
    @pytest.mark.parametrize("capacity", [None, 0, 1, 6])
    def test_build_routing_by_brute_force(self, backend, routing, capacity):
        shape = SHAPES["odd"]
        ids_TK = draw_ids(shape, routing)
        with self.on(backend):
            got = ops.build_routing(ids_TK, shape.E, capacity)
        assert all(torch.equal(a, b) for a, b in zip(got, brute_force(ids_TK, shape.E, capacity)))

    def test_worked_examples(self, backend):
        with self.on(backend):
            src_row_R, dst_row_TK, offsets = ops.build_routing(torch.tensor([[1, 0], [0, -1], [1, 1]]), 2)
            assert (src_row_R.tolist(), dst_row_TK.tolist(), offsets.tolist()) == (
                [1, 2, 0, 4, 5, -1],
                [[2, 0], [1, -1], [3, 4]],
                [0, 2, 5],
            )
            src_row_R, dst_row_TK, _ = ops.build_routing_from_experts(
                torch.tensor([0, 2, 1, 2]), torch.tensor([0, 2, 4]), 3
            )
            assert (src_row_R.tolist(), dst_row_TK.tolist()) == ([0, 4, 3, 5], [[0, -1], [-1, 2], [1, 3]])

    def test_capacity_prefers_first_choices_then_token_order(self, backend):
        with self.on(backend):
            routing = ops.build_routing(torch.tensor([[1, 0], [2, 0], [0, 1], [0, 1]]), 3, 3)
        assert routing.dst_row_TK.tolist() == [[3, 0], [6, -1], [1, 4], [2, 5]]

    def test_permute_copies_and_unpermute_brings_home(self, backend, dtype):
        shape = SHAPES["every_expert"]
        x_TD = draw(shape.T, shape.D, dtype=dtype)
        with self.on(backend):
            routing = ops.build_routing(draw_ids(shape, "dropped"), shape.E)
            y_RD = ops.permute(x_TD, routing)
            used = int(routing.offsets[-1])
            assert torch.equal(y_RD[:used], x_TD[routing.src_row_R[:used].long() // shape.K])
            assert bool((y_RD[used:] == 0).all()) and used < y_RD.shape[0]
            home = ops.unpermute(y_RD, routing)
        want = x_TD.double() * (routing.dst_row_TK >= 0).sum(1, keepdim=True)
        testing.assert_accurate(home, want, want.to(dtype))

    def test_matches_autograd_of_plain_indexing(self, backend):
        shape = SHAPES["odd"]
        y_RD, weights_TK = (
            draw(shape.T * shape.K, shape.D).requires_grad_(),
            draw(shape.T, shape.K, seed=1).requires_grad_(),
        )
        y64, weights64 = (t.detach().double().requires_grad_() for t in (y_RD, weights_TK))
        dout_TD = draw(shape.T, shape.D, seed=2)
        with self.on(backend):
            routing = ops.build_routing(draw_ids(shape, "dropped"), shape.E)
            out_TD = ops.unpermute(y_RD, routing, weights_TK)
            out_TD.backward(dout_TD)
        kept_TK1 = (routing.dst_row_TK >= 0)[..., None]
        want = (y64[routing.dst_row_TK.clamp(min=0).long()] * weights64[..., None] * kept_TK1).sum(1)
        want.backward(dout_TD.double())
        for got, exact in ((out_TD, want), (y_RD.grad, y64.grad), (weights_TK.grad, weights64.grad)):
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)

    def test_rows_of_dropped_slots_do_not_leak(self, backend):
        """NaN in padding rows of y must reach neither the sum nor a gradient."""
        with self.on(backend):
            routing = ops.build_routing(torch.tensor([[1, -1], [0, 1]]), 2)
            y_RD = draw(4, 8)
            y_RD[3] = float("nan")
            weights_TK = torch.ones(2, 2)
            weights_TK[0, 1] = float("nan")
            y_RD.requires_grad_(), weights_TK.requires_grad_()
            out_TD = ops.unpermute(y_RD, routing, weights_TK)
            out_TD.sum().backward()
        assert out_TD.isfinite().all() and y_RD.grad.isfinite().all() and weights_TK.grad.isfinite().all()
        assert bool((y_RD.grad[3] == 0).all()) and weights_TK.grad[0, 1] == 0

    @pytest.mark.parametrize(("T", "K", "E"), [(20001, 3, 5), (6000, 7, 300)])
    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_many_slots_shared_by_threads(self, backend, T, K, E, routing):
        """Enough for a chunk a thread; the last bad id of several chunks is not the one that is named."""
        ids_TK = draw_ids(testing.Shape(T, 1, 1, E, K, 1), routing)
        with testing.backend("reference"):
            want = ops.build_routing(ids_TK, E)
        bad_TK = ids_TK.clone()
        bad_TK[T // 2, 1], bad_TK[T - 1, K - 1] = E + 2, E + 3
        for count in (1, 2, 3, 5, 20):
            with self.on(backend), testing.threads(count), testing.poison():
                got = ops.build_routing(ids_TK, E)
                with pytest.raises(ValueError, match=f"got {E + 2}$"):
                    ops.build_routing(bad_TK, E)
            assert all(torch.equal(a, b) for a, b in zip(got, want))

    @pytest.mark.parametrize("bad", [5, -2, 2**31 + 3, -(2**40)])
    def test_refuses_ids_out_of_range(self, backend, bad):
        ids_TK = torch.zeros(40, 2, dtype=torch.int64)
        ids_TK[30, 1] = bad
        for capacity in (None, 3):
            with (
                self.on(backend),
                pytest.raises(ValueError, match=rf"fastmoe\.build_routing: topk_ids_TK must be in -1\.\.4, got {bad}$"),
            ):
                ops.build_routing(ids_TK, 5, capacity)

    @pytest.mark.parametrize(
        ("token_R", "offsets", "argument"),
        [
            ([0, 3], [0, 2], "token_R"),
            ([-1, 0], [0, 2], "token_R"),
            ([1, 0], [0, 2], "token_R"),
            ([1, 1], [0, 2], "token_R"),
            ([0, 1], [0, 3, 2], "offsets"),
            ([0, 1], [1, 2], "offsets"),
            ([0, 1], [0, 1], "offsets"),
            ([0, 1], [0, 3], "offsets"),
        ],
    )
    def test_refuses_lists_of_tokens_that_do_not_fit(self, backend, token_R, offsets, argument):
        with self.on(backend), pytest.raises(ValueError, match=rf"fastmoe\.build_routing_from_experts: .*{argument}"):
            ops.build_routing_from_experts(torch.tensor(token_R), torch.tensor(offsets), 3)

    def test_autocast_lowers_rows(self, backend):
        routing = ops.build_routing(torch.tensor([[1, 0], [0, 1]]), 2)
        x_TD, y_RD, weights_TK = (draw(*shape).requires_grad_() for shape in ((2, 8), (4, 8), (2, 2)))
        with self.on(backend):
            want = ops.permute(x_TD.bfloat16(), routing), ops.unpermute(y_RD.bfloat16(), routing, weights_TK)
            with torch.autocast("cpu", torch.bfloat16):
                got = ops.permute(x_TD, routing), ops.unpermute(y_RD, routing, weights_TK)
            (got[0].sum() + got[1].sum()).backward()
        assert all(a.dtype == torch.bfloat16 and torch.equal(a, b) for a, b in zip(got, want))
        assert x_TD.grad.dtype == y_RD.grad.dtype == weights_TK.grad.dtype == torch.float32

    def test_frozen_weights_cost_no_gradient(self, backend):
        routing = ops.build_routing(torch.tensor([[1, 0]]), 2)
        with self.on(backend):
            y_RD, weights_TK = draw(2, 4).requires_grad_(), torch.rand(1, 2)
            ops.unpermute(y_RD, routing, weights_TK).sum().backward()
        assert y_RD.grad is not None and weights_TK.grad is None


@st.composite
def slots(drawn):
    T, K, E = drawn(st.integers(0, 12)), drawn(st.integers(1, 4)), drawn(st.integers(1, 6))
    ids = drawn(st.lists(st.integers(-1, E - 1), min_size=T * K, max_size=T * K))
    return torch.tensor(ids, dtype=drawn(st.sampled_from([torch.int32, torch.int64]))).view(T, K), E


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(slots(), st.none() | st.integers(0, 5))
def test_routing_properties(backend, drawn, capacity):
    ids_TK, E = drawn
    T, K = ids_TK.shape
    with testing.backend(f"permutation={backend}"):
        src_row_R, dst_row_TK, offsets = ops.build_routing(ids_TK, E, capacity)
    used, flat = int(offsets[-1]), ids_TK.flatten()
    src, dst = src_row_R[:used].long(), dst_row_TK.flatten().long()
    assert offsets[0] == 0 and bool((offsets.diff() >= 0).all())
    assert bool((src_row_R[used:] == -1).all())
    assert torch.equal(dst[src], torch.arange(used)), "src_row_R and dst_row_TK are inverses"
    assert int((dst >= 0).sum()) == used, "every slot that is kept has a row"
    for e in range(E):
        rows = src[offsets[e] : offsets[e + 1]]
        assert bool((flat[rows] == e).all()) and bool((rows.diff() > 0).all()), "each expert's slots, in order"
        wanted = int((flat == e).sum())
        assert rows.numel() == (wanted if capacity is None else min(wanted, capacity))
    if capacity is not None:
        want = brute_force(ids_TK, E, capacity)
        assert all(torch.equal(a, b) for a, b in zip((src_row_R, dst_row_TK, offsets), want))


def test_from_experts_equals_build_routing_of_the_same_choice():
    """Tokens that choose every expert in order: both routers give the same rows."""
    T, E = 5, 3
    got = ops.build_routing_from_experts(torch.arange(T).repeat(E), torch.arange(0, T * E + 1, T), T)
    want = ops.build_routing(torch.arange(E).repeat(T, 1), E)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def rounded_by_lists(weights_TK, ids_TK, probs_TE, tile, rounding):
    """token_R, offsets, weights [T, E] by sorting lists; Python's round() is half to even."""
    (T, E), rows, offsets = probs_TE.shape, [], [0]
    weights_TE = torch.zeros_like(probs_TE)
    for e in range(E):
        weight = {t: float(weights_TK[t, k]) for t, k in (ids_TK == e).nonzero().tolist()}
        whole = {"nearest": round, "up": math.ceil, "down": math.floor}[rounding](Fraction(len(weight), tile))
        first = sorted(weight, key=lambda t: (-weight[t], t))
        rest = sorted(set(range(T)) - set(weight), key=lambda t: (-float(probs_TE[t, e]), t))
        taken = sorted((first + rest)[: whole * tile])
        for t in taken:
            weights_TE[t, e] = weight.get(t, float(probs_TE[t, e]))
        rows += taken
        offsets.append(len(rows))
    return torch.tensor(rows, dtype=torch.int64), torch.tensor(offsets), weights_TE


@st.composite
def gated(drawn):
    """Gates of few different values, so that many are equal; some slots are -1."""
    T, E = drawn(st.integers(0, 12)), drawn(st.integers(1, 5))
    K = drawn(st.integers(1, E))
    draw = testing.generator(drawn(st.integers(0, 10**6)))
    logits_TE = torch.randint(3, (T, E), generator=draw).float()
    with testing.backend("reference"):
        weights_TK, ids_TK, probs_TE, _ = ops.topk_gate(logits_TE, K)
    return (
        weights_TK,
        ids_TK.masked_fill(torch.rand(T, K, generator=draw) < drawn(st.sampled_from([0, 0.3])), -1),
        probs_TE,
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(gated(), st.integers(1, 6), st.sampled_from(["nearest", "up", "down"]))
def test_round_routing_properties(gate, tile, rounding):
    weights_TK, ids_TK, probs_TE = gate
    T, E = probs_TE.shape
    routing, weights_TE = ops.round_routing(*gate, tile, rounding)
    token_R, offsets, want_TE = rounded_by_lists(*gate, tile, rounding)
    want = ops.build_routing_from_experts(token_R, offsets, T)
    used = int(routing.offsets[-1])
    assert torch.equal(routing.offsets, want.offsets) and torch.equal(routing.dst_row_TK, want.dst_row_TK)
    assert torch.equal(routing.src_row_R[:used], want.src_row_R) and bool((routing.src_row_R[used:] == -1).all())
    assert torch.equal(weights_TE, want_TE)
    chosen_E, got_E = torch.bincount(ids_TK[ids_TK >= 0], minlength=E), routing.offsets.diff()
    assert bool(((got_E % tile == 0) | (got_E == T)).all()), "whole tiles, or every token there is"
    step = (got_E - chosen_E).tolist()
    low, high = {"nearest": (-tile / 2, tile / 2), "up": (0, tile - 1), "down": (1 - tile, 0)}[rounding]
    assert all(low <= change <= high for change in step)


@pytest.mark.parametrize(
    ("rounding", "want"), [("nearest", [4, 8, 8, 4]), ("up", [8, 8, 12, 4]), ("down", [4, 4, 8, 0])]
)
def test_round_routing_worked_example(rounding, want):
    counts_E = torch.tensor([5, 6, 10, 3])
    ids_TK = torch.repeat_interleave(torch.arange(4), counts_E)[:, None]
    probs_TE = draw(24, 4).softmax(1)
    routing, _ = ops.round_routing(torch.ones(24, 1), ids_TK, probs_TE, 4, rounding)
    assert routing.offsets.diff().tolist() == want
    routing, weights_TE = ops.round_routing(torch.ones(3, 1), torch.tensor([[1], [1], [0]]), probs_TE[:3, :2], 4, "up")
    assert routing.offsets.diff().tolist() == [3, 3], "clamped to T"
    assert weights_TE.tolist() == [[probs_TE[0, 0], 1], [probs_TE[1, 0], 1], [1, probs_TE[2, 1]]]


def test_round_routing_drives_the_expert_layer():
    """The layer's result and gradients are those of the weighted sum over the rounded tokens, for the gate too."""
    shape = SHAPES["odd"]
    x_TD, logits_TE = draw(shape.T, shape.D), draw(shape.T, shape.E, seed=1)
    up_EZD, down_EDF = draw(shape.E, 2 * shape.F, shape.D, seed=2), draw(shape.E, shape.D, shape.F, seed=3)
    results = []
    for fused in (True, False):
        x, logits = x_TD.double().requires_grad_(), logits_TE.double().requires_grad_()
        weights_TK, ids_TK, probs_TE, _ = ops.topk_gate(logits, shape.K)
        routing, weights_TE = ops.round_routing(weights_TK, ids_TK, probs_TE, 8)
        assert bool((routing.offsets.diff() % 8 == 0).all()) and int(routing.offsets[-1]) != shape.T * shape.K
        if fused:
            y_TD = ops.moe_mlp(x, None, weights_TE, up_EZD.double(), down_EDF.double(), routing=routing)
        else:
            chosen_TE = torch.zeros_like(probs_TE).scatter(1, ids_TK, 1.0)
            renormed_TE = probs_TE * chosen_TE / (probs_TE * chosen_TE).sum(1, keepdim=True)
            weights_TE = torch.where(chosen_TE > 0, renormed_TE, probs_TE) * (routing.dst_row_TK >= 0)
            gate_TEF, up_TEF = torch.einsum("td,ezd->tez", x, up_EZD.double()).chunk(2, -1)
            act_TEF = torch.nn.functional.silu(gate_TEF) * up_TEF * weights_TE[..., None]
            y_TD = torch.einsum("tef,edf->td", act_TEF, down_EDF.double())
        y_TD.backward(draw(shape.T, shape.D, seed=4).double())
        results.append((y_TD.detach(), x.grad, logits.grad))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


def test_round_routing_compiles():
    torch._dynamo.reset()
    gate = ops.topk_gate(draw(37, 5), 2)[:3]
    call = lambda *gate: (lambda routing, weights_TE: (*routing, weights_TE))(*ops.round_routing(*gate, 8))  # noqa: E731
    for got, want in zip(torch.compile(call, fullgraph=True, backend="aot_eager")(*gate), call(*gate)):
        assert torch.equal(got, want)


ROUTING = ops.build_routing(torch.tensor([[1, 0], [0, 1], [1, 1]]), 2)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (
            ValueError,
            "build_routing: topk_ids_TK must be of shape [T, K]",
            lambda: ops.build_routing(torch.zeros(4, dtype=torch.int64), 2),
        ),
        (
            TypeError,
            "build_routing: topk_ids_TK must be int32 or int64, got torch.float32",
            lambda: ops.build_routing(draw(4, 2), 2),
        ),
        (
            ValueError,
            "build_routing: num_experts must be at least 1",
            lambda: ops.build_routing(torch.zeros(4, 2, dtype=torch.int64), 0),
        ),
        (
            ValueError,
            "build_routing: K must be at least 1",
            lambda: ops.build_routing(torch.zeros(4, 0, dtype=torch.int64), 2),
        ),
        (
            ValueError,
            "build_routing: capacity must be None or at least 0, got -1",
            lambda: ops.build_routing(torch.zeros(4, 2, dtype=torch.int64), 2, -1),
        ),
        (
            ValueError,
            "build_routing: the number of slots must be below 2**31",
            lambda: ops.build_routing(torch.zeros(1, 1, dtype=torch.int32).expand(2**30, 2), 2),
        ),
        (
            TypeError,
            "build_routing_from_experts: token_R must be int32",
            lambda: ops.build_routing_from_experts(draw(3), torch.tensor([0, 3]), 3),
        ),
        (
            ValueError,
            "build_routing_from_experts: num_experts must be at least 1",
            lambda: ops.build_routing_from_experts(torch.tensor([0]), torch.tensor([0]), 3),
        ),
        (
            ValueError,
            "build_routing_from_experts: num_tokens must be at least 0",
            lambda: ops.build_routing_from_experts(torch.tensor([0]), torch.tensor([0, 1]), -1),
        ),
        (
            ValueError,
            "round_routing: topk_ids_TK must be in -1..3, got 4",
            lambda: ops.round_routing(draw(1, 2), torch.tensor([[0, 4]]), draw(1, 4)),
        ),
        (
            ValueError,
            "round_routing: tile must be at least 1, got 0",
            lambda: ops.round_routing(draw(1, 1), torch.tensor([[0]]), draw(1, 4), 0),
        ),
        (
            ValueError,
            "round_routing: rounding must be 'nearest' or 'up' or 'down', got 'half'",
            lambda: ops.round_routing(draw(1, 1), torch.tensor([[0]]), draw(1, 4), 4, "half"),
        ),
        (
            ValueError,
            "round_routing: probs_TE must be of shape [T, E] = [1, any], got [2, 4]",
            lambda: ops.round_routing(draw(1, 1), torch.tensor([[0]]), draw(2, 4)),
        ),
        (
            ValueError,
            "permute: x_TD must be of shape [T, D] = [3, any], got [4, 8]",
            lambda: ops.permute(draw(4, 8), ROUTING),
        ),
        (TypeError, "permute: x_TD must be float32", lambda: ops.permute(torch.ones(3, 8, dtype=torch.int32), ROUTING)),
        (
            ValueError,
            "permute: routing.src_row_R must be on meta, got cpu",
            lambda: ops.permute(draw(3, 8).to("meta"), ROUTING),
        ),
        (
            TypeError,
            "permute: routing.dst_row_TK must be int32, got torch.int64",
            lambda: ops.permute(draw(3, 8), ROUTING._replace(dst_row_TK=ROUTING.dst_row_TK.long())),
        ),
        (
            ValueError,
            "unpermute: y_RD must be of shape [R, D] = [6, any], got [5, 8]",
            lambda: ops.unpermute(draw(5, 8), ROUTING),
        ),
        (
            ValueError,
            "unpermute: topk_weights_TK must be of shape [T, K] = [3, 2], got [3, 3]",
            lambda: ops.unpermute(draw(6, 8), ROUTING, draw(3, 3)),
        ),
        (
            TypeError,
            "unpermute: topk_weights_TK must be",
            lambda: ops.unpermute(draw(6, 8), ROUTING, draw(3, 2).half()),
        ),
        (
            ValueError,
            "unpermute: topk_weights_TK must be on cpu, got meta",
            lambda: ops.unpermute(draw(6, 8), ROUTING, draw(3, 2).to("meta")),
        ),
        (
            ValueError,
            "permute: routing.src_row_R must be of shape",
            lambda: ops.permute(draw(3, 8), ROUTING._replace(src_row_R=torch.zeros(2, 3, dtype=torch.int32))),
        ),
    ],
)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=re.escape("fastmoe." + message)):
        call()


def test_gradients_twice_are_refused():
    x_TD, y_RD, weights_TK = draw(3, 8).requires_grad_(), draw(6, 8).requires_grad_(), draw(3, 2).requires_grad_()
    with pytest.raises(NotImplementedError, match="fastmoe.permute: gradients of gradients"):
        torch.autograd.grad(ops.permute(x_TD, ROUTING).square().sum(), x_TD, create_graph=True)
    with pytest.raises(NotImplementedError, match="fastmoe.unpermute: gradients of gradients"):
        torch.autograd.grad(ops.unpermute(y_RD, ROUTING, weights_TK).square().sum(), y_RD, create_graph=True)
