import itertools
import re
import threading
from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu, relu, silu

from fastmoe import ops, testing
from fastmoe.ops.experts import ACTIVATIONS, GATED, PLAIN, SAVES, Z8_BLOCK, reference
from fastmoe.ops.registry import OPS
from fastmoe.testing import DTYPES, ROUTINGS, SHAPES, Shape, assert_bit_equal, draw, draw_ids, forward_backward
from tests.ops.battery import Battery, Case, flipped, names

BACKENDS = [name for name in testing.backends("experts") if name in ("native", "reference")]
FLOATS = ("x_TD", "topk_weights_TK", "gate_up_proj", "down_proj", "gate_up_bias", "down_bias")  # as gradients come
EDGES = (63, 64, 65, 127, 128, 129, 191, 192, 193)  # of D and F, around the blocks of kernels
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 191, 192, 194)  # rows of an expert, around the tiles of kernels
GPT_OSS = {"activation": "clamped_swiglu", "biases": "wide", "interleaved": True, "transposed": True}
LAYERS = [
    {"activation": activation, "biases": biases, "interleaved": interleaved, "transposed": transposed}
    for activation, biases, interleaved, transposed in itertools.product(ACTIVATIONS, *[(False, True)] * 3)
    if activation in GATED or not interleaved
]


def split(options):
    """Options of a layer, as those that the drawn inputs depend on and those of moe_mlp."""
    drawn = {name: options[name] for name in ("activation", "biases", "transposed") if name in options}
    return drawn, {name: value for name, value in options.items() if name != "biases"}


def label(options):
    return "-".join(name if value is True else f"{value}" for name, value in options.items() if value is not False)


def draw_inputs(
    shape,
    dtype=torch.float32,
    routing="random",
    weights="float32",
    index=torch.int64,
    seed=0,
    activation="swiglu",
    biases=False,
    transposed=False,
):
    """The tensors of a call of moe_mlp, by name. routing: one of ROUTINGS, or the rows of each expert, T * K in all.
    biases: "wide" puts z far to either side of clamped_swiglu's limit or far inside, as a value that one rounding puts
    within and another beyond has two right gradients.
    """
    T, D, F, E, K, _ = shape
    Z = 2 * F if activation in GATED else F
    if isinstance(routing, str):
        ids_TK = draw_ids(shape, routing, seed)
    else:
        ids = torch.arange(E).repeat_interleave(torch.tensor(routing))
        ids_TK = ids[torch.randperm(T * K, generator=testing.generator(seed))].view(T, K)
    weight_dtype = torch.float32 if weights == "float32" and dtype != torch.float64 else dtype
    inputs = {
        "x_TD": draw(T, D, dtype=dtype, seed=seed),
        "topk_ids_TK": ids_TK.to(index),
        "topk_weights_TK": torch.softmax(draw(T, K, seed=seed + 1), 1).to(weight_dtype),
        "gate_up_proj": draw(E, Z, D, dtype=dtype, scale=D**-0.5, seed=seed + 2),
        "down_proj": draw(E, D, F, dtype=dtype, scale=F**-0.5, seed=seed + 3),
    }
    if transposed:
        inputs |= {name: inputs[name].mT.contiguous() for name in ("gate_up_proj", "down_proj")}
    if biases:
        gate_up_bias = draw(E, Z, scale=0.5, seed=seed + 4)
        if biases == "wide":
            gate_up_bias += 14 * torch.randint(-1, 2, (E, Z), generator=testing.generator(seed + 5))
        inputs |= {"gate_up_bias": gate_up_bias.to(dtype), "down_bias": draw(E, D, dtype=dtype, seed=seed + 6)}
    return inputs


def moe_case(size, routing="random", weights="float32", index=torch.int64, thorough=False, parallel=False, **options):
    """size: a name of SHAPES or a Shape. options: of the layer, and biases."""
    shape = SHAPES.get(size, size)
    drawn, options = split(options)
    where = size if isinstance(size, str) else "x".join(map(str, shape[:5]))
    rows = routing if isinstance(routing, str) else "counted"
    return Case(
        "-".join(filter(None, (where, rows, weights, str(index)[6:], label(drawn | options)))),
        lambda x: ops.moe_mlp(**x, **options),
        lambda dtype: draw_inputs(shape, dtype, routing, weights, index, **drawn),
        thorough=thorough,
        parallel=parallel,
        exact=(lambda x: ops.moe_mlp(**x, **options | {"save": "z"})) if options.get("save") == "z8" else None,
    )


def with_routing(x, routing, options):
    given = {name: tensor for name, tensor in x.items() if name in FLOATS}
    return ops.moe_mlp(topk_ids_TK=None, routing=routing, **given, **options)


def with_given_routing(size, capacity, thorough=False, **options):
    drawn, options = split(options)

    def make(dtype):
        inputs = draw_inputs(SHAPES[size], dtype, **drawn)
        with testing.backend("reference"):
            routing = ops.build_routing(inputs.pop("topk_ids_TK"), SHAPES[size].E, capacity)
        return inputs | dict(zip(routing._fields, routing))

    def call(x):
        return with_routing(x, ops.Routing(*(x[name] for name in ops.Routing._fields)), options)

    return Case(
        "-".join(filter(None, (f"{size}-capacity_{capacity}", label(drawn | options)))), call, make, thorough=thorough
    )


def from_experts_case(size, **options):
    """Expert choice: weights are [T, E] and each expert owns a list of tokens."""
    T, _, _, E, _, _ = SHAPES[size]
    drawn, options = split(options)

    def make(dtype):
        chosen_ET = torch.rand(E, T, generator=testing.generator()) < 0.4
        inputs = draw_inputs(SHAPES[size]._replace(K=E), dtype, **drawn)
        return inputs | {
            "token_R": chosen_ET.nonzero()[:, 1],
            "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), chosen_ET.sum(1).cumsum(0)]),
        }

    def call(x):
        return with_routing(x, ops.build_routing_from_experts(x["token_R"], x["offsets"], T), options)

    return Case("-".join(filter(None, (f"{size}-from_experts", label(drawn | options)))), call, make)


def activate(z, activation, interleaved, alpha, limit):
    if activation in PLAIN:
        return {
            "gelu": gelu,
            "gelu_tanh": lambda z: gelu(z, approximate="tanh"),
            "relu": relu,
            "relu2": lambda z: relu(z).square(),
        }[activation](z)
    gate, up = z.view(-1, 2).unbind(1) if interleaved else z.view(2, -1).unbind(0)
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(gate * alpha) * (up + 1)
    if activation == "swiglu":
        return silu(gate) * up
    return gelu(gate, approximate="tanh" if activation == "geglu_tanh" else "none") * up


def loop(
    x_TD,
    topk_ids_TK,
    topk_weights_TK,
    gate_up_proj,
    down_proj,
    gate_up_bias=None,
    down_bias=None,
    activation="swiglu",
    interleaved=False,
    transposed=False,
    alpha=1.702,
    limit=7.0,
):
    """The expert layer one (token, expert) pair at a time, its gradients by autograd."""
    if transposed:
        gate_up_proj, down_proj = gate_up_proj.mT, down_proj.mT
    rows = []
    for t in range(x_TD.shape[0]):
        y_D = torch.zeros_like(x_TD[t])
        for k in range(topk_ids_TK.shape[1]):
            e = int(topk_ids_TK[t, k])
            if e >= 0:
                z = gate_up_proj[e] @ x_TD[t] + (0 if gate_up_bias is None else gate_up_bias[e])
                out_D = down_proj[e] @ activate(z, activation, interleaved, alpha, limit)
                y_D = y_D + topk_weights_TK[t, k] * (out_D + (0 if down_bias is None else down_bias[e]))
        rows.append(y_D)
    return torch.stack(rows)


def assert_matches_loop(backend, inputs, **options):
    leaves = {name: t.requires_grad_() if name in FLOATS else t for name, t in inputs.items()}
    exact = {name: t.detach().double().requires_grad_() if name in FLOATS else t for name, t in inputs.items()}
    dy_TD = draw(*inputs["x_TD"].shape, seed=9)
    with testing.backend(f"experts={backend}"):
        y_TD = ops.moe_mlp(**leaves, **options)
        y_TD.backward(dy_TD)
    want = loop(**exact, **options)
    want.backward(dy_TD.double())
    torch.testing.assert_close(y_TD.double(), want, rtol=1e-4, atol=1e-5)
    for name in FLOATS:
        if name in inputs:
            torch.testing.assert_close(leaves[name].grad.double(), exact[name].grad, rtol=1e-4, atol=1e-5)


def saved_of(backend, inputs, **options):
    """What the forward operator keeps: z and its scales."""
    leaves = {name: t.detach().requires_grad_(name in FLOATS) for name, t in inputs.items()}
    with testing.backend(f"experts={backend}"), testing.poison(), testing.Recorder() as recorder:
        ops.moe_mlp(**leaves, **options)
    ((_, z_RZ, z_scale),) = [out for name, _, out in recorder.calls if name == "moe_mlp"]
    return z_RZ, z_scale


class TestExperts(Battery):
    family = "experts"
    cases = [
        *(moe_case(size) for size in SHAPES),
        *(moe_case("odd", routing, thorough=routing == "dropped") for routing in ROUTINGS[1:]),
        moe_case("tiny", "all_to_one"),
        moe_case("tiny", "dropped", "same", parallel=True),
        moe_case("fine", "empty_expert", index=torch.int32, parallel=True),
        moe_case("every_expert", weights="same", index=torch.int32),
        moe_case(Shape(50, 24, 12, 509, 2, 1)),
        with_given_routing("odd", 0),
        with_given_routing("odd", 4),
        with_given_routing("odd", 4, thorough=True, **GPT_OSS),
        with_given_routing("fine", None),
        from_experts_case("odd"),
        from_experts_case("odd", activation="geglu", biases=True, interleaved=True),
        from_experts_case("tiny"),
        # activations and layouts
        *(moe_case("odd", "dropped", activation=activation, biases=True) for activation in ACTIVATIONS[1:]),
        moe_case("odd", biases=True, interleaved=True),
        moe_case("odd", transposed=True, weights="same"),
        moe_case(
            "odd", "empty_expert", activation="geglu_tanh", biases=True, interleaved=True, save="x", thorough=True
        ),
        moe_case("every_expert", activation="relu2", transposed=True, index=torch.int32, thorough=True),
        *(moe_case(size, **GPT_OSS) for size in ("empty", "one", "one_expert", "fine")),
        moe_case("tiny", "dropped", parallel=True, **GPT_OSS),
        moe_case("fine", "dropped", activation="gelu", biases=True, parallel=True),
        # edges of blocks and tiles
        *(
            moe_case(Shape(11, D, F, 2, 1, 1), activation=activation, biases=True, transposed=i % 2 == 1)
            for i, (D, F, activation) in enumerate(
                zip(EDGES, EDGES[4:] + EDGES[:4], ("swiglu", *ACTIVATIONS[:3], "clamped_swiglu", *PLAIN))
            )
        ),
        moe_case(Shape(311, 65, 129, 13, 2, 1), COUNTS),
        moe_case(Shape(311, 136, 130, 13, 2, 1), COUNTS),
        moe_case(
            Shape(311, 40, 65, 13, 2, 1), COUNTS, activation="geglu", biases=True, interleaved=True, transposed=True
        ),
        # what is saved
        *(moe_case("odd", "dropped", save=save) for save in ("z8", "x")),
        moe_case("tiny", save="z8", parallel=True),
        moe_case("odd", "empty_expert", save="z8", **GPT_OSS),
        moe_case("odd", activation="relu", biases=True, save="z8"),
        moe_case("fine", save="x", parallel=True, **GPT_OSS),
    ]

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_matches_a_loop_over_tokens(self, backend, routing):
        assert_matches_loop(backend, draw_inputs(SHAPES["odd"], routing=routing))

    @pytest.mark.parametrize("layer", LAYERS, ids=label)
    def test_every_layer_matches_a_loop(self, backend, layer):
        drawn, options = split(layer)
        if options["activation"] == "clamped_swiglu":
            options |= {"alpha": 1.3, "limit": 0.8}  # a fifth of the gates and two fifths of the ups lie beyond
        assert_matches_loop(backend, draw_inputs(Shape(13, 19, 13, 5, 3, 1), routing="dropped", **drawn), **options)

    @pytest.mark.parametrize(("D", "F"), [(1, 200), (200, 1), (3, 130), (130, 3)])
    @pytest.mark.parametrize(
        "layer", [{}, {"interleaved": True, "transposed": True}, {"activation": "gelu"}], ids=label
    )
    def test_narrow_layers_match_a_loop(self, backend, layer, D, F):
        drawn, options = split(layer)
        assert_matches_loop(backend, draw_inputs(Shape(13, D, F, 5, 3, 1), **drawn), **options)

    @pytest.mark.parametrize("biases", [True, "wide"])
    def test_gpt_oss_matches_a_loop(self, backend, biases):
        drawn, options = split(GPT_OSS | {"biases": biases})
        inputs = draw_inputs(Shape(13, 19, 13, 5, 3, 1), **drawn)
        inputs["gate_up_proj"] *= 4
        z_RZ, _ = saved_of(backend, inputs, **options)
        assert bool((z_RZ > 7).any()) and bool((z_RZ[:, 1::2] < -7).any()) and bool((z_RZ.abs() < 7).any())
        assert_matches_loop(backend, inputs, **options)

    @pytest.mark.parametrize("biases", [False, True])
    def test_an_expert_without_tokens_gets_zero_gradient(self, backend, dtype, biases):
        inputs = draw_inputs(SHAPES["odd"], dtype, "empty_expert", biases=biases)
        leaves = [inputs[name].requires_grad_() for name in FLOATS[2:] if name in inputs]
        with self.on(backend), testing.poison():
            ops.moe_mlp(**inputs).sum().backward()
        empty = SHAPES["odd"].E // 2
        for leaf in leaves:
            assert bool((leaf.grad[empty] == 0).all()) and bool((leaf.grad[0] != 0).any())

    @pytest.mark.parametrize("biases", [False, True])
    def test_a_dropped_token_gets_zero_and_gives_zero(self, backend, biases):
        inputs = draw_inputs(SHAPES["odd"], routing="dropped", biases=biases)
        x_TD = inputs["x_TD"].requires_grad_()
        with self.on(backend), testing.poison():
            y_TD = ops.moe_mlp(**inputs)
            y_TD.sum().backward()
        assert bool((y_TD[0] == 0).all()) and bool((x_TD.grad[0] == 0).all())

    @pytest.mark.parametrize("save", SAVES)
    def test_all_slots_dropped_gives_zero(self, backend, dtype, save):
        inputs = draw_inputs(SHAPES["odd"], dtype, biases=True)
        inputs["topk_ids_TK"].fill_(-1)
        with self.on(backend), testing.poison():
            results = forward_backward(lambda x: ops.moe_mlp(**x, save=save), inputs)
        assert len(results) == 7 and all(bool((tensor == 0).all()) for tensor in results.values())

    @pytest.mark.parametrize("save", SAVES)
    def test_what_is_not_finite_stays_where_it_is(self, backend, save):
        """A token's NaN reaches its own row and its own experts; what no slot uses reaches nothing."""
        inputs = draw_inputs(SHAPES["odd"], routing="empty_expert", biases=True)
        ids_TK = inputs["topk_ids_TK"]
        ids_TK[6] = -1
        bad = {name: tensor.clone() for name, tensor in inputs.items()}
        bad["x_TD"][3], bad["topk_weights_TK"][4, 1], bad["topk_weights_TK"][5, 0] = torch.nan, torch.inf, torch.nan
        ids_TK[3:6, 1:], bad["topk_ids_TK"][3:6, 1:] = ids_TK[3:6, :1], ids_TK[3:6, :1]
        for name in FLOATS[2:]:
            bad[name][SHAPES["odd"].E // 2] = torch.nan
        bad["topk_weights_TK"][6] = torch.nan
        with self.on(backend):
            got, want = (forward_backward(lambda x: ops.moe_mlp(**x, save=save), x) for x in (bad, inputs))
        token = torch.tensor([t in (3, 4, 5) for t in range(SHAPES["odd"].T)])
        expert = torch.tensor([e in ids_TK[3:6] for e in range(SHAPES["odd"].E)])
        assert int(expert.sum()) < SHAPES["odd"].E - 1
        for name, value in got.items():
            reached = expert if name[1:] in FLOATS[2:] else token
            assert_bit_equal(value[~reached], want[name][~reached], name)
        assert not bool(got["0"][token].isfinite().any())

    def test_a_weight_of_zero_has_a_gradient(self, backend):
        inputs = draw_inputs(SHAPES["odd"], biases=True)
        inputs["topk_weights_TK"][::2] = 0
        assert_matches_loop(backend, inputs)

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize(
        "frozen",
        [*[(name,) for name in FLOATS], FLOATS[2:4], FLOATS[2:], *[FLOATS[:i] + FLOATS[i + 1 :] for i in range(6)]],
    )
    def test_frozen_inputs_cost_no_gradient_and_change_no_other(self, backend, frozen, save):
        inputs = draw_inputs(SHAPES["odd"], biases=True)
        call = lambda x: ops.moe_mlp(**x, save=save)
        with self.on(backend), testing.poison():
            full = forward_backward(call, inputs)
            with testing.Recorder() as recorder:
                part = forward_backward(call, inputs, frozen)
        (grads,) = (out for name, _, out in recorder.calls if name == "moe_mlp_backward")
        for name, grad in zip(FLOATS, grads, strict=True):
            assert grad.numel() == (0 if name in frozen else inputs[name].numel()), name
        assert part.keys() == full.keys() - {f"d{name}" for name in frozen}
        for name, tensor in part.items():
            assert_bit_equal(tensor, full[name], name)

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize("how", ["no_grad", "inference_mode", "all frozen"])
    def test_without_gradients_nothing_is_saved(self, backend, how, save):
        inputs = draw_inputs(SHAPES["odd"])
        inputs["x_TD"].requires_grad_(how != "all frozen")
        context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "all frozen": torch.enable_grad}[
            how
        ]
        with self.on(backend), testing.Recorder() as recorder, context():
            y_TD = ops.moe_mlp(**inputs, save=save)
        ((_, z_RZ, z_scale),) = [out for name, _, out in recorder.calls if name == "moe_mlp"]
        assert z_RZ.numel() == 0 and z_scale.numel() == 0 and y_TD.grad_fn is None

    def test_autocast_lowers_rows_projections_and_biases(self, backend):
        inputs = draw_inputs(SHAPES["odd"], biases=True)
        lowered = inputs | {
            name: inputs[name].bfloat16() for name in FLOATS if name in inputs and "weights" not in name
        }
        for name in FLOATS:
            inputs[name].requires_grad_()
        with self.on(backend):
            want = ops.moe_mlp(**lowered)
            with torch.autocast("cpu", torch.bfloat16), testing.Recorder() as recorder:
                got = ops.moe_mlp(**inputs)
                mixed = ops.moe_mlp(**inputs | {"x_TD": lowered["x_TD"]})
            got.sum().backward()
        assert got.dtype == torch.bfloat16 and torch.equal(got, want) and torch.equal(mixed, want)
        for _, args, _ in (call for call in recorder.calls if call[0] == "moe_mlp"):
            assert {args[i].dtype for i in (0, 5, 6, 7, 8)} == {torch.bfloat16} and args[1].dtype == torch.float32
        assert all(inputs[name].grad.dtype == torch.float32 for name in FLOATS)

    def test_a_given_routing_equals_ids(self, backend):
        inputs = draw_inputs(SHAPES["odd"], routing="dropped")
        with self.on(backend):
            routing = ops.build_routing(inputs["topk_ids_TK"], SHAPES["odd"].E)
            assert torch.equal(with_routing(inputs, routing, {}), ops.moe_mlp(**inputs))

    def test_gradients_accumulate(self, backend):
        inputs = draw_inputs(SHAPES["odd"])
        weight = inputs["gate_up_proj"].requires_grad_()
        with self.on(backend):
            ops.moe_mlp(**inputs).sum().backward()
            once = weight.grad.clone()
            ops.moe_mlp(**inputs).sum().backward()
        assert torch.equal(weight.grad, once + once)

    @pytest.mark.parametrize("options", [{"save": "z8"}, {"save": "x"}, {"sparse_grads": True}], ids=label)
    def test_opcheck_of_options(self, backend, options):
        inputs = draw_inputs(SHAPES["odd"], routing="empty_expert", biases=True)
        with self.on(backend):
            with testing.Recorder() as recorder:
                forward_backward(lambda x: ops.moe_mlp(**x, **options), inputs)
            forward, backward = (call for call in recorder.calls if call[0].startswith("moe_mlp"))
            args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in backward[1]]
            torch.library.opcheck(OPS["moe_mlp_backward"].overload, args)
            if "sparse_grads" in options:  # not under torch.compile, so not traced with its backward
                args = [arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in forward[1]]
                torch.library.opcheck(OPS["moe_mlp"].overload, args)
            else:
                torch.library.opcheck(OPS["moe_mlp"].overload, forward[1])

    @pytest.mark.parametrize("save", ["z8", "x"])
    def test_compiles_whatever_is_saved(self, backend, save):
        torch._dynamo.reset()
        call, inputs = lambda x: ops.moe_mlp(**x, save=save), draw_inputs(SHAPES["odd"], routing="dropped", biases=True)
        with self.on(backend):
            got = forward_backward(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs)
            for name, tensor in forward_backward(call, inputs).items():
                assert_bit_equal(got[name], tensor, name)

    def test_takes_any_layout_with_z_in_8_bits(self, backend):
        inputs = draw_inputs(SHAPES["odd"], torch.bfloat16, routing="dropped", biases=True)
        q_RZ, scales = saved_of(backend, inputs, save="z8")
        views = {name: flipped(tensor) for name, tensor in inputs.items()}
        for got, want in zip(saved_of(backend, views, save="z8"), (q_RZ, scales)):
            assert_bit_equal(got, want)

    def test_calls_of_several_threads_do_not_meet(self, backend):
        many = [draw_inputs(SHAPES["odd"], seed=10 * seed, biases=True) for seed in range(4)]
        call = lambda x: ops.moe_mlp(**x)
        results = {}

        def work(i):
            results[i] = [forward_backward(call, many[i]) for _ in range(10)]

        with self.on(backend), testing.threads(1):
            workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            for i, inputs in enumerate(many):
                want = forward_backward(call, inputs)
                for got in results[i]:
                    for name in want:
                        assert_bit_equal(got[name], want[name], name)

    def test_leaks_nothing(self, backend):
        inputs = draw_inputs(Shape(256, 128, 32, 4, 2, 1), biases=True)  # y, z, the gradient of x: 128 KiB each
        pages = []
        with self.on(backend), testing.threads(1):
            for step in range(100):
                forward_backward(lambda x: ops.moe_mlp(**x), inputs)
                if step in (19, 99):
                    pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
        assert (pages[1] - pages[0]) * 4096 < 8e6


def on(backend):
    return testing.backend(f"experts={backend}")


def relative_error(got, exact):
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("backend", BACKENDS)
class TestSaved:
    """What is kept for backward: z, z in 8 bits, or nothing."""

    LAYERS = [{}, {"biases": True, "interleaved": True}, GPT_OSS, {"activation": "relu2", "transposed": True}]

    @pytest.mark.parametrize("dtype", DTYPES, ids=names)
    @pytest.mark.parametrize("layer", LAYERS, ids=label)
    def test_changes_no_bit_of_the_result(self, backend, layer, dtype):
        drawn, options = split(layer)
        inputs = draw_inputs(SHAPES["every_expert"], dtype, "dropped", **drawn)
        with on(backend):
            unsaved = ops.moe_mlp(**inputs, **options)
            inputs["x_TD"].requires_grad_()
            for save in SAVES:
                assert_bit_equal(ops.moe_mlp(**inputs, **options, save=save).detach(), unsaved, save)

    @pytest.mark.parametrize("layer", LAYERS, ids=label)
    def test_gradients_from_z_computed_again_are_bit_equal(self, backend, layer):
        drawn, options = split(layer)
        inputs = draw_inputs(SHAPES["every_expert"], routing="dropped", **drawn)
        with on(backend), testing.poison():
            got = forward_backward(lambda x: ops.moe_mlp(**x, **options, save="x"), inputs)
            want = forward_backward(lambda x: ops.moe_mlp(**x, **options), inputs)
        for name in want:
            assert_bit_equal(got[name], want[name], name)

    @pytest.mark.parametrize("dtype", DTYPES, ids=names)
    @pytest.mark.parametrize("layer", LAYERS, ids=label)
    def test_z8_is_the_quantised_z(self, backend, layer, dtype):
        drawn, options = split(layer)
        F = Z8_BLOCK + 36  # a block and part of one
        inputs = draw_inputs(Shape(40, 32, F, 4, 2, 1), dtype, "dropped", **drawn)
        inputs["x_TD"][7] = 0  # blocks of zeros where there is no bias
        (z_RZ, _), (q_RZ, scales) = (saved_of(backend, inputs, **options, save=save) for save in ("z", "z8"))
        want_q, want_scales = reference.quantize(z_RZ, options.get("activation", "swiglu"), "interleaved" in options)
        assert_bit_equal(q_RZ, want_q, "z")
        assert_bit_equal(scales, want_scales, "scales")
        used = int((inputs["topk_ids_TK"] >= 0).sum())
        assert used < z_RZ.shape[0] and not bool(q_RZ[used:].any()) and not bool(scales[used:].any())

    @pytest.mark.parametrize("layer", LAYERS, ids=label)
    def test_z8_is_within_half_a_step(self, backend, layer):
        drawn, options = split(layer)
        inputs = draw_inputs(Shape(40, 32, Z8_BLOCK + 36, 4, 2, 1), **drawn)
        (z_RZ, _), (q_RZ, scales) = (saved_of(backend, inputs, **options, save=save) for save in ("z", "z8"))
        halves = 1 if "activation" in options and options["activation"] in PLAIN else 2
        if "interleaved" in options:
            z_RZ, q_RZ = (torch.cat([tensor[:, 0::2], tensor[:, 1::2]], 1) for tensor in (z_RZ, q_RZ))
        blocks = [
            (z, q, scale[:, i, None].float())
            for zs, qs, scale in zip(z_RZ.chunk(halves, 1), q_RZ.chunk(halves, 1), scales.chunk(halves, 1))
            for i, (z, q) in enumerate(zip(zs.split(Z8_BLOCK, 1), qs.split(Z8_BLOCK, 1)))
        ]
        assert len(blocks) == scales.shape[1] == 2 * halves
        for z, q, step in blocks:
            assert bool(((q * step - z).abs() <= 0.5001 * step).all()) and int(q.min()) >= -127
            assert bool((q.abs().amax(1) >= 126).all())

    @pytest.mark.parametrize("dtype", DTYPES, ids=names)
    def test_z8_gradients_are_close_and_unbiased(self, backend, dtype):
        inputs = draw_inputs(Shape(512, 256, 512, 8, 2, 1), dtype)
        with testing.backend("reference"):
            exact = forward_backward(lambda x: ops.moe_mlp(**x), testing.to_float64(inputs))
        with on(backend):
            got = forward_backward(lambda x: ops.moe_mlp(**x, save="z8"), inputs)
        for name in ("dx_TD", "dtopk_weights_TK", "dgate_up_proj", "ddown_proj"):
            error = got[name].double() - exact[name]
            assert relative_error(got[name], exact[name]) <= 1.5e-2, name
            standard_error = float(error.std()) / error.numel() ** 0.5
            assert abs(float(error.mean())) <= 4 * standard_error, name
            # the error along the gradient: rounding toward zero makes it 1e-2
            gain = float((error * exact[name]).sum() / exact[name].square().sum())
            assert abs(gain) <= 5e-4 + 4 * relative_error(got[name], exact[name]) / error.numel() ** 0.5, name

    @pytest.mark.parametrize("dtype", DTYPES, ids=names)
    @pytest.mark.parametrize("layer", [{}, {"activation": "gelu", "biases": True}], ids=label)
    @pytest.mark.parametrize("save", SAVES)
    def test_bytes(self, backend, save, layer, dtype):
        T, D, F, E, K, _ = shape = Shape(64, 32, 100, 4, 2, 1)
        drawn, options = split(layer)
        inputs = draw_inputs(shape, dtype, **drawn)
        parameters = {inputs[name].data_ptr() for name in FLOATS[2:] if name in inputs}
        kept = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        leaves = {name: t.detach().requires_grad_(name in FLOATS) for name, t in inputs.items()}
        with on(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ops.moe_mlp(**leaves, **options, save=save)
        halves = 1 if "activation" in options else 2
        z = {"z": T * K * halves * F * dtype.itemsize, "z8": T * K * halves * (F + 2 * -(-F // Z8_BLOCK)), "x": 0}
        indices, weights = 4 * (2 * T * K + E + 1), 4 * T * K
        got = sum(size for address, size in kept.items() if address not in parameters)
        assert got == T * D * dtype.itemsize + z[save] + indices + weights


@pytest.mark.parametrize("backend", BACKENDS)
class TestSparseGrads:
    """Gradients of the projections that hold the experts with tokens."""

    PROJECTIONS = ("gate_up_proj", "down_proj")

    def gradients(self, backend, inputs, **options):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items() if name in FLOATS}
        with on(backend), testing.poison():
            y_TD = ops.moe_mlp(**inputs | leaves, **options)
            grads = torch.autograd.grad(y_TD, leaves.values(), draw(*y_TD.shape, dtype=y_TD.dtype, seed=9))
        return dict(zip(leaves, grads))

    @pytest.mark.parametrize("save", SAVES)
    @pytest.mark.parametrize(
        ("shape", "routing"),
        [
            (SHAPES["odd"], "empty_expert"),
            (SHAPES["odd"], "dropped"),
            (SHAPES["odd"], "all_to_one"),
            (SHAPES["one"], "random"),
            (SHAPES["empty"], "random"),
            (SHAPES["every_expert"], "random"),
            (Shape(9, 16, 8, 4096, 2, 1), "random"),
        ],
    )
    @pytest.mark.parametrize("layer", [{}, GPT_OSS], ids=label)
    def test_holds_the_experts_with_tokens(self, backend, shape, routing, layer, save):
        drawn, options = split(layer)
        inputs = draw_inputs(shape, routing=routing, **drawn)
        got, want = (self.gradients(backend, inputs, **options, save=save, sparse_grads=s) for s in (True, False))
        touched = torch.tensor(sorted(set(inputs["topk_ids_TK"].flatten().tolist()) - {-1}), dtype=torch.int64)
        for name in want:
            if name in self.PROJECTIONS:
                assert got[name].is_sparse and got[name].is_coalesced()
                assert (got[name].sparse_dim(), got[name].shape) == (1, want[name].shape)
                assert torch.equal(got[name].indices()[0], touched)
                assert_bit_equal(got[name].values(), want[name][touched], name)
            else:
                assert_bit_equal(got[name], want[name], name)

    @pytest.mark.parametrize("dtype", DTYPES[1:], ids=names)
    def test_in_16_bits(self, backend, dtype):
        inputs = draw_inputs(SHAPES["odd"], dtype, "empty_expert")
        got, want = (self.gradients(backend, inputs, sparse_grads=sparse) for sparse in (True, False))
        for name in self.PROJECTIONS:
            assert_bit_equal(got[name].to_dense(), want[name], name)

    @pytest.mark.parametrize("frozen", PROJECTIONS)
    def test_of_one_projection(self, backend, frozen):
        inputs = draw_inputs(SHAPES["odd"], routing="empty_expert")
        with on(backend), testing.Recorder() as recorder:
            got = forward_backward(lambda x: ops.moe_mlp(**x, sparse_grads=True), inputs, (frozen,))
        (grads,) = (out for name, _, out in recorder.calls if name == "moe_mlp_backward")
        assert f"d{frozen}" not in got and grads[FLOATS.index(frozen)].numel() == 0

    def test_accumulates_over_two_backwards(self, backend):
        first, second = (draw_inputs(SHAPES["odd"], routing=routing) for routing in ("empty_expert", "all_to_one"))
        grads = {}
        with on(backend):
            for sparse in (True, False):
                leaves = {name: first[name].detach().requires_grad_() for name in self.PROJECTIONS}
                for inputs in (first, second):
                    ops.moe_mlp(**inputs | leaves, sparse_grads=sparse).sum().backward()
                grads[sparse] = [leaf.grad for leaf in leaves.values()]
        for got, want in zip(grads[True], grads[False]):
            assert got.is_sparse
            assert_bit_equal(got.to_dense(), want)

    def test_sgd_steps_the_experts_with_tokens_alone(self, backend):
        inputs = draw_inputs(SHAPES["odd"], routing="empty_expert")
        stepped = {}
        with on(backend):
            for sparse in (True, False):
                leaves = {name: inputs[name].clone().requires_grad_() for name in self.PROJECTIONS}
                optimizer = torch.optim.SGD(leaves.values(), lr=0.5)
                for _ in range(3):
                    optimizer.zero_grad()
                    ops.moe_mlp(**inputs | leaves, sparse_grads=sparse).square().mean().backward()
                    optimizer.step()
                stepped[sparse] = leaves
        empty = SHAPES["odd"].E // 2
        for name in self.PROJECTIONS:
            got, want = stepped[True][name].detach(), stepped[False][name].detach()
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            assert_bit_equal(got[empty], inputs[name][empty], name)
            assert bool((got[0] != inputs[name][0]).any())


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])  # it reads every expert
def test_more_than_2_to_the_31_elements(backend):
    """The last expert of 13 GB of projections, whose other pages nobody touches."""
    E, D, F = 2**15 + 1, 256, 256
    inputs = draw_inputs(Shape(9, D, F, 1, 1, 1), torch.bfloat16)
    call = lambda x: ops.moe_mlp(**x)
    with testing.backend("reference"):
        exact, plain = forward_backward(call, testing.to_float64(inputs)), forward_backward(call, inputs)
    many = inputs | {"topk_ids_TK": inputs["topk_ids_TK"] + E - 1}
    for name in ("gate_up_proj", "down_proj"):
        many[name] = torch.empty(E, *inputs[name].shape[1:], dtype=torch.bfloat16)
        many[name][-1:] = inputs[name]
    with on(backend):
        got = forward_backward(lambda x: ops.moe_mlp(**x, sparse_grads=True), many)
    for name, tensor in got.items():
        if tensor.is_sparse:
            assert tensor._indices().tolist() == [[E - 1]]
        testing.assert_accurate(tensor._values() if tensor.is_sparse else tensor, exact[name], plain[name], name)


META = {"device": "meta"}
PLAIN_LAYER = {"activation": "relu", "gate_up_proj": draw(3, 5, 4)}


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "alpha must be above 0, got 0", {"alpha": 0}),
        (ValueError, "limit must be above 0, got nan", {"limit": float("nan")}),
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
        (ValueError, f"activation must be {' or '.join(map(repr, ACTIVATIONS))}, got 'silu'", {"activation": "silu"}),
        (ValueError, "save must be 'z' or 'z8' or 'x', got 'nothing'", {"save": "nothing"}),
        (ValueError, "save must be 'z' or 'z8' or 'x', got None", {"save": None}),
        (
            ValueError,
            "interleaved must be False for 'relu', which has no gate, got True",
            PLAIN_LAYER | {"interleaved": True},
        ),
        (ValueError, "gate_up_proj must be of shape [E, F, D] = [3, 5, 4], got [3, 10, 4]", {"activation": "relu"}),
        (
            ValueError,
            "gate_up_proj must be of shape [E, 2F, D] = [3, 10, 4], got [3, 5, 4]",
            PLAIN_LAYER | {"activation": "geglu"},
        ),
        (ValueError, "down_proj must be of shape [E, F, D] = [any, any, 4], got [3, 4, 5]", {"transposed": True}),
        (
            ValueError,
            "gate_up_proj must be of shape [E, D, 2F] = [3, 4, 10], got [3, 10, 4]",
            {"transposed": True, "down_proj": draw(3, 5, 4)},
        ),
        (
            ValueError,
            "gate_up_proj must be of shape [E, D, F] = [3, 4, 5], got [3, 4, 10]",
            {"activation": "gelu", "transposed": True, "down_proj": draw(3, 5, 4), "gate_up_proj": draw(3, 4, 10)},
        ),
        (ValueError, "gate_up_bias must be of shape [E, 2F] = [3, 10], got [3, 5]", {"gate_up_bias": draw(3, 5)}),
        (ValueError, "gate_up_bias must be of shape [E, 2F] = [3, 10], got [10]", {"gate_up_bias": draw(10)}),
        (
            ValueError,
            "gate_up_bias must be of shape [E, F] = [3, 5], got [3, 10]",
            PLAIN_LAYER | {"gate_up_bias": draw(3, 10)},
        ),
        (ValueError, "down_bias must be of shape [E, D] = [3, 4], got [3, 5]", {"down_bias": draw(3, 5)}),
        (TypeError, "gate_up_bias must be float32, got torch.bfloat16", {"gate_up_bias": draw(3, 10).bfloat16()}),
        (TypeError, "down_bias must be float32, got torch.float16", {"down_bias": draw(3, 4).half()}),
        (TypeError, "gate_up_bias must be a torch.Tensor, got bool", {"gate_up_bias": True}),
        (TypeError, "down_bias must be a torch.Tensor, got float", {"down_bias": 0.0}),
        (ValueError, "gate_up_bias must be on cpu, got meta", {"gate_up_bias": torch.zeros(3, 10, **META)}),
        (ValueError, "down_bias must be on cpu, got meta", {"down_bias": torch.zeros(3, 4, **META)}),
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
        torch.autograd.grad(ops.moe_mlp(**inputs).square().sum(), x_TD, create_graph=True)


def test_sparse_gradients_are_refused_under_compile():
    inputs = draw_inputs(SHAPES["odd"])
    compiled = torch.compile(lambda x: ops.moe_mlp(*x.values(), sparse_grads=True), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="sparse_grads must be False under torch.compile"):
        compiled(inputs)
