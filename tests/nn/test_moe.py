import math
import re

import pytest
import torch

from fastmoe import nn, ops, testing
from fastmoe.nn.router import make_router
from fastmoe.ops.experts import ACTIVATIONS, GATED, SAVES
from fastmoe.testing import draw


def activated(z, kind):
    """The activation of a pre-activation [..., 2F] (gate first) or [..., F], by its formula."""
    gate, up = z.chunk(2, -1) if kind in GATED else (z, 1)
    if kind == "swiglu":
        return gate / (1 + torch.exp(-gate)) * up
    if kind == "clamped_swiglu":
        gate, up = torch.where(gate > 7, 7, gate), torch.where(up.abs() > 7, 7 * up.sign(), up)
        return gate / (1 + torch.exp(-1.702 * gate)) * (up + 1)
    if kind in ("geglu", "gelu"):
        return gate * (1 + torch.erf(gate / 2**0.5)) / 2 * up
    if kind in ("geglu_tanh", "gelu_tanh"):
        return gate * (1 + torch.tanh((2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3))) / 2 * up
    return torch.where(gate > 0, gate, 0) ** (2 if kind == "relu2" else 1)


def feed_forward(module, x_D, e=None):
    """A FeedForward, or expert e of Experts, on one row."""
    pick = lambda weight: 0 if weight is None else weight if e is None else weight[e]
    z = pick(module.gate_up_proj) @ x_D + pick(module.gate_up_bias)
    return pick(module.down_proj) @ activated(z, module.activation) + pick(module.down_bias)


def shake_biases(module):
    """Biases start at 0: draws others."""
    for i, (name, param) in enumerate(module.named_parameters()):
        if name.endswith("_bias"):
            param.data.copy_(draw(*param.shape, scale=0.3, seed=i))


def oracle(moe, x_TD, capacity=None):
    """(y, aux loss, load, dropped) one token and expert at a time, in the dtype of the module."""
    E, K, options = moe.router.weight.shape[0], moe.router.top_k, moe.router.gate_options
    logits_TE = x_TD @ moe.router.weight.t()
    probs_TE = torch.softmax(logits_TE, 1) if options["score"] == "softmax" else torch.sigmoid(logits_TE)
    ids_TK = logits_TE.topk(K, 1).indices
    room, load, kept = [capacity] * E, [0] * E, set()
    for k in range(K):
        for t in range(x_TD.shape[0]):
            e = int(ids_TK[t, k])
            load[e] += 1
            if capacity is None or room[e] > 0:
                kept.add((t, k))
                room[e] = None if capacity is None else room[e] - 1
    rows = []
    for t in range(x_TD.shape[0]):
        weights_K = probs_TE[t, ids_TK[t]]
        if options["renormalize"]:
            weights_K = weights_K / weights_K.sum()
        y_D = torch.zeros_like(x_TD[t])
        for k in range(K):
            if (t, k) in kept:
                e = int(ids_TK[t, k])
                y_D = y_D + weights_K[k] * feed_forward(moe.experts, x_TD[t], e)
        if moe.shared is not None:
            y_D = y_D + feed_forward(moe.shared, x_TD[t])
        rows.append(y_D)
    T = x_TD.shape[0]
    balance = E * sum(load[e] / (T * K) * probs_TE[:, e].mean() for e in range(E))
    z = torch.logsumexp(logits_TE, 1).square().mean()
    return torch.stack(rows), 0.01 * balance + 1e-3 * z, load, T * K - len(kept)


OPTIONS = [
    {},
    {"num_shared_experts": 2},
    {"capacity_factor": 0.7},
    {"capacity_factor": 4.0},
    {"capacity_factor": 0.0},
    {"router_options": {"score": "sigmoid"}},
    {"router_options": {"renormalize": False}},
    {"capacity_factor": 0.5, "num_shared_experts": 1, "router_options": {"score": "sigmoid", "renormalize": False}},
    *({"activation": kind, "num_shared_experts": 1} for kind in ACTIVATIONS[1:]),
    {"bias": True, "num_shared_experts": 1, "capacity_factor": 0.7},
    {
        "bias": True,
        "num_shared_experts": 1,
        "activation": "clamped_swiglu",
        "init_std": 1.0,
        "out_std": 0.1,
    },  # reaches the limit
    {"bias": True, "num_shared_experts": 1, "activation": "relu2", "save": "x"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("T", [1, 23])
def test_moe_by_brute_force(options, T):
    torch.manual_seed(0)
    moe = nn.MoE(12, 7, 5, 2, **{"init_std": 0.3} | options)
    shake_biases(moe)
    twin = nn.MoE(12, 7, 5, 2, **options).double()
    twin.load_state_dict(moe.state_dict())
    x_TD, dy_TD = draw(T, 12).requires_grad_(), draw(T, 12, seed=1)
    x64 = x_TD.detach().double().requires_grad_()
    factor = options.get("capacity_factor")
    out = moe(x_TD)
    y, aux, load, dropped = oracle(twin, x64, -int(-(factor * T * 2) // 5) if factor else None)
    torch.testing.assert_close(out.y.double(), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.aux_loss.double(), aux, rtol=1e-5, atol=1e-7)
    assert (out.load_E.tolist(), int(out.dropped), int(out.nan_tokens)) == (load, dropped, 0)
    ((out.y * dy_TD).sum() + 3 * out.aux_loss).backward()
    ((y * dy_TD.double()).sum() + 3 * aux).backward()
    torch.testing.assert_close(x_TD.grad.double(), x64.grad, rtol=1e-4, atol=1e-5)
    for (name, param), param64 in zip(moe.named_parameters(), twin.parameters()):
        torch.testing.assert_close(
            param.grad.double(), param64.grad, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_what_is_saved_changes_no_result():
    x_TD, results, kept = draw(40, 12), {}, {}
    for save in SAVES:
        torch.manual_seed(0)
        moe = nn.MoE(12, 70, 5, 2, init_std=0.3, save=save)
        with testing.Recorder() as recorder:
            out = moe(x_TD)
        out.y.square().sum().backward()
        (kept[save],) = (out[1] for name, _, out in recorder.calls if name == "moe_mlp")
        results[save] = [out.y.detach(), *(param.grad for param in moe.parameters())]
    assert [kept[save].dtype for save in ("z", "z8")] == [torch.float32, torch.int8] and kept["x"].numel() == 0
    for save in ("z8", "x"):
        testing.assert_bit_equal(results[save][0], results["z"][0], save)
        for got, want in zip(results[save][1:], results["z"][1:]):
            assert (got - want).norm() <= (2e-2 if save == "z8" else 1e-6) * want.norm()


def test_weights_have_the_layout_of_the_op():
    experts = nn.Experts(12, 7, 5, activation="relu2", bias=True)
    assert {name: list(p.shape) for name, p in experts.named_parameters()} == {
        "gate_up_proj": [5, 7, 12],
        "down_proj": [5, 12, 7],
        "gate_up_bias": [5, 7],
        "down_bias": [5, 12],
    }
    assert bool((experts.gate_up_bias == 0).all() and (experts.down_bias == 0).all())
    assert list(nn.FeedForward(12, 7, bias=True).gate_up_bias.shape) == [14]
    assert [name for name, _ in nn.Experts(12, 7, 5).named_parameters()] == ["gate_up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("Experts: activation must be 'swiglu' or", lambda: nn.MoE(8, 8, 4, 2, activation="silu")),
        ("Experts: save must be 'z' or 'z8' or 'x', got 'y'", lambda: nn.MoE(8, 8, 4, 2, save="y")),
        ("FeedForward: activation must be 'swiglu' or", lambda: nn.FeedForward(8, 8, activation="silu")),
    ],
)
def test_bad_options(message, make):
    with pytest.raises(ValueError, match=re.escape("fastmoe." + message)):
        make()


def test_any_leading_shape():
    moe = nn.MoE(12, 7, 5, 2)
    x = draw(2, 3, 4, 12)
    assert torch.equal(moe(x).y.view(24, 12), moe(x.view(24, 12)).y)


def test_no_tokens():
    moe = nn.MoE(12, 7, 5, 2, num_shared_experts=1, capacity_factor=1.0)
    x = torch.zeros(0, 12, requires_grad=True)
    out = moe(x)
    (out.y.sum() + out.aux_loss).backward()
    assert out.y.shape == (0, 12) and out.aux_loss == 0 and out.load_E.tolist() == [0] * 5
    assert all(bool((p.grad == 0).all()) for p in moe.parameters())


def test_a_uniform_router_has_balancing_loss_one():
    moe = nn.MoE(12, 7, 5, 5, aux_loss_weight=1.0, z_loss_weight=0.0)
    torch.nn.init.zeros_(moe.router.weight)
    torch.testing.assert_close(moe(draw(9, 12)).aux_loss, torch.tensor(1.0))


def test_nothing_is_stored_between_calls():
    moe = nn.MoE(12, 7, 5, 2)
    before = set(vars(moe)) | {name for m in moe.modules() for name in vars(m)}
    moe(draw(9, 12))
    assert set(vars(moe)) | {name for m in moe.modules() for name in vars(m)} == before


def test_autocast_keeps_the_router_in_float32():
    moe, x_TD = nn.MoE(12, 7, 5, 2), draw(40, 12)
    with testing.Recorder() as recorder, torch.autocast("cpu", torch.bfloat16):
        out = moe(x_TD)
    (logits_TE,) = (args[0] for name, args, _ in recorder.calls if name == "topk_gate")
    assert logits_TE.dtype == torch.float32 and torch.equal(logits_TE, ops.linear(x_TD, moe.router.weight))
    assert out.y.dtype == torch.bfloat16 and out.aux_loss.dtype == torch.float32


def test_bfloat16_module():
    moe = nn.MoE(12, 7, 5, 2, num_shared_experts=1).bfloat16()
    x_TD = draw(20, 12, dtype=torch.bfloat16).requires_grad_()
    out = moe(x_TD)
    (out.y.sum() + out.aux_loss).backward()
    assert out.y.dtype == x_TD.grad.dtype == torch.bfloat16 and all(
        p.grad.dtype == torch.bfloat16 for p in moe.parameters()
    )


def test_frozen_experts_still_train_the_router():
    moe = nn.MoE(12, 7, 5, 2)
    moe.experts.requires_grad_(False)
    with testing.Recorder() as recorder:
        moe(draw(9, 12)).y.square().sum().backward()
    (grads,) = (out for name, _, out in recorder.calls if name == "moe_mlp_backward")
    assert [grad.numel() for grad in grads] == [0, 18, 0, 0, 0, 0] and bool((moe.router.weight.grad != 0).any())


def test_experts_sort_for_themselves():
    experts = nn.Experts(12, 7, 5)
    x_TD, ids_TK, weights_TK = draw(9, 12), testing.draw_ids(testing.Shape(9, 12, 7, 5, 2, 1)), torch.rand(9, 2)
    assert torch.equal(
        experts(x_TD, ids_TK, weights_TK), experts(x_TD, ids_TK, weights_TK, ops.build_routing(ids_TK, 5))
    )


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("MoE: d_model must be at least 1, got 0", {"d_model": 0}),
        ("MoE: d_ff must be at least 1", {"d_ff": 0}),
        ("MoE: num_experts must be at least 1", {"num_experts": 0}),
        ("TopKRouter: top_k must be in 1..4 (num_experts), got 0", {"top_k": 0}),
        ("TopKRouter: top_k must be in 1..4 (num_experts), got 5", {"top_k": 5}),
        ("MoE: capacity_factor must be None, 0 or positive, got -1", {"capacity_factor": -1}),
        ("MoE: eval_capacity_factor must be None, 0 or positive, got -0.5", {"eval_capacity_factor": -0.5}),
        (
            "MoE: capacity_factor must be None or 0 with ExpertChoiceRouter, got (None, 1.0)",
            {"router": "expert-choice", "eval_capacity_factor": 1.0},
        ),
        ("MoE: num_shared_experts must be at least 0, got -1", {"num_shared_experts": -1}),
        ("topk_gate: score must be 'softmax' or 'sigmoid', got 'relu'", {"router_options": {"score": "relu"}}),
        ("make_router: name must be one of topk, mixtral", {"router": "best"}),
        (
            "MoE: router must be for d_model, num_experts and top_k (8, 4, 2), got (8, 4, 1)",
            {"router": make_router("switch", 8, 4)},
        ),
        (
            "MoE: router must be for d_model, num_experts and top_k (8, 4, 2), got (7, 4, 2)",
            {"router": make_router("topk", 7, 4)},
        ),
        (
            "MoE: router_options must be None beside a Router, got {'scale': 2.0}",
            {"router": make_router("topk", 8, 4), "router_options": {"scale": 2.0}},
        ),
        ("MoE: experts must be 4 modules (num_experts), got 3", {"experts": [torch.nn.Identity()] * 3}),
        (
            "MoE: experts must be None, a class, a function or a list of modules, got Identity",
            {"experts": torch.nn.Identity()},
        ),
        ("MoE: experts must be None, a class, a function or a list of modules, got int", {"experts": 3}),
    ],
)
def test_bad_settings(message, changes):
    settings = dict(d_model=8, d_ff=8, num_experts=4, top_k=2) | changes
    with pytest.raises(ValueError, match=re.escape("fastmoe." + message)):
        nn.MoE(**settings)


def test_a_wrong_width_names_the_argument():
    with pytest.raises(ValueError, match=r"fastmoe\.MoE: x must be of shape \[\.\.\., 8\], got \[3, 9\]"):
        nn.MoE(8, 8, 4, 2)(draw(3, 9))


def test_nan_input_names_the_op():
    with pytest.raises(ValueError, match=r"fastmoe\.topk_gate: logits_TE .*NaN.* token 1"):
        nn.MoE(8, 8, 4, 2)(torch.tensor([[0.0] * 8, [float("nan")] * 8]))


def test_factors_in_training_and_evaluation():
    factors = lambda router="topk", **options: nn.MoE(8, 8, 4, router=router, **options).capacity_factors
    assert factors() == (None, None) and factors("switch") == factors("gshard") == (1.25, 2.0)
    assert factors(capacity_factor=1.5) == (1.5, 1.5) and factors("switch", capacity_factor=0.0) == (0.0, 0.0)
    assert factors("switch", eval_capacity_factor=0.0) == (1.25, 0.0)
    assert factors(capacity_factor=1.0, eval_capacity_factor=3.0) == (1.0, 3.0)
    moe, x_TD = nn.MoE(12, 7, 5, 2, capacity_factor=0.2, eval_capacity_factor=0.0), draw(40, 12)
    assert int(moe(x_TD).routing.offsets.diff().max()) == 4 and int(moe(x_TD).dropped) >= 80 - 5 * 4
    assert int(moe.eval()(x_TD).dropped) == 0


def test_weights_of_losses():
    x_TD = draw(9, 12)

    def aux(router="topk", **options):
        torch.manual_seed(0)
        moe = nn.MoE(12, 7, 6, router=router, **options)
        out = moe.eval()(x_TD)
        return float(out.aux_loss), {name: float(loss) for name, loss in out.losses.items()}

    total, found = aux()
    assert total == pytest.approx(0.01 * found["balance"] + 1e-3 * found["z"])
    total, found = aux(aux_loss_weight=2.0)
    assert total == pytest.approx(2 * found["balance"] + 1e-3 * found["z"])
    total, found = aux(z_loss_weight=3.0, router_options={"loss_weights": {"balance": 0.5}})
    assert total == pytest.approx(0.5 * found["balance"] + 3 * found["z"])
    total, found = aux("prototype", aux_loss_weight=1.0)
    assert total == pytest.approx(found["balance"]) and aux("prototype")[0] == 0


def test_logit_norm_is_the_root_mean_square():
    moe, x_TD = nn.MoE(12, 7, 5, 2), draw(9, 12)
    torch.testing.assert_close(moe(x_TD).logit_norm, (x_TD @ moe.router.weight.t()).square().mean().sqrt().detach())


# Experts that are modules.


class Scale(torch.nn.Module):
    def __init__(self, d_model, d_ff):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.randn(d_model))

    def forward(self, x):
        return x * self.factor


def unlike(D=12):
    torch.manual_seed(3)
    return [
        torch.nn.Sequential(torch.nn.Linear(D, 5), torch.nn.Tanh(), torch.nn.Linear(5, D)),
        torch.nn.Identity(),
        nn.FeedForward(D, 9, init_std=0.3),
        Scale(D, 0),
        torch.nn.Linear(D, D),
    ]


def plain_loop(moe, out, weights_TK, x_TD):
    rows = []
    for t, (ids, weights, places) in enumerate(zip(out.topk_ids_TK.tolist(), weights_TK, out.routing.dst_row_TK)):
        y_D = torch.zeros_like(x_TD[t])
        for e, weight, place in zip(ids, weights, places):
            if place >= 0:
                y_D = y_D + weight * moe.experts[e](x_TD[t : t + 1])[0]
        if moe.shared is not None:
            y_D = y_D + moe.shared(x_TD[t])
        rows.append(y_D)
    return torch.stack(rows)


@pytest.mark.parametrize("router", ["topk", "switch", "hash"])
@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("kind", ["list", "module list", "class", "function"])
def test_module_experts_equal_a_loop(kind, shared, router):
    D, E = 12, 5
    torch.manual_seed(0)
    experts = {
        "list": unlike(),
        "module list": torch.nn.ModuleList(unlike()),
        "class": Scale,
        "function": lambda d_model, d_ff: torch.nn.Sequential(
            torch.nn.Linear(d_model, d_ff), torch.nn.Linear(d_ff, d_model)
        ),
    }[kind]
    options = {"vocab_size": 9} if router == "hash" else {}
    moe = nn.MoE(
        D, 7, E, router=router, router_options=options, experts=experts, num_shared_experts=shared, capacity_factor=0.9
    )
    moe.double()
    inputs = nn.RouterInputs(token_ids_T=torch.arange(20) % 9, key=torch.tensor([1, 2, 3]))
    x_TD, dy_TD = draw(20, D).double().requires_grad_(), draw(20, D, seed=1).double()

    def grads(y):
        moe.zero_grad()
        x_TD.grad = None
        (y * dy_TD).sum().backward()
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in (x_TD, *moe.parameters())]

    out = moe(x_TD, inputs)
    got = grads(out.y)
    y = plain_loop(moe, out, moe.router(x_TD, inputs).topk_weights_TK, x_TD)
    torch.testing.assert_close(out.y, y)
    for a, b in zip(got, grads(y)):
        torch.testing.assert_close(a, b)
    assert int(out.dropped) > 0 or router == "hash"


def test_module_experts_without_tokens():
    moe, x_TD = nn.MoE(12, 7, 5, 1, experts=unlike()), draw(6, 12).requires_grad_()
    replay = nn.RouterInputs(replay_ids_TK=torch.full((6, 1), 3))  # all to one
    moe(x_TD, replay).y.sum().backward()
    assert moe.experts[3].factor.grad.abs().sum() > 0
    assert all((p.grad == 0).all() for e in (0, 2, 4) for p in moe.experts[e].parameters())
    nobody = nn.RouterInputs(replay_ids_TK=torch.full((6, 1), -1))
    assert (moe(x_TD, nobody).y == 0).all() and moe(torch.zeros(0, 12)).y.shape == (0, 12)


def test_module_experts_where_experts_choose():
    moe, x_TD = nn.MoE(12, 7, 5, 2, router="expert-choice", experts=unlike()), draw(20, 12)
    out, probs_TE = moe(x_TD), moe.router(x_TD).topk_weights_TK
    kept_TE = out.routing.dst_row_TK >= 0
    y_TED = torch.stack([expert(x_TD) for expert in moe.experts], 1)
    torch.testing.assert_close(out.y, ((probs_TE * kept_TE)[:, :, None] * y_TED).sum(1))


def test_module_experts_round_trip_by_state_dict():
    one, two, x_TD = nn.MoE(12, 7, 5, 2, experts=unlike()), nn.MoE(12, 7, 5, 2, experts=unlike()), draw(9, 12)
    for p in two.parameters():
        torch.nn.init.ones_(p)
    assert {"router.weight", "experts.0.0.weight", "experts.3.factor"} <= one.state_dict().keys()
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(x_TD).y, two(x_TD).y)


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (torch.nn.Linear(12, 11), r"what expert 4 returns must be of shape \[n, D\] = \[\d+, 12\], got \[\d+, 11\]"),
        (torch.nn.Flatten(0), r"what expert 4 returns must be of shape \[n, D\] = \[\d+, 12\], got \[\d+\]"),
        (torch.nn.LSTM(12, 12), r"what expert 4 returns must be a torch.Tensor, got tuple"),
    ],
)
def test_module_experts_that_return_something_else(expert, message):
    moe = nn.MoE(12, 7, 5, 2, experts=[*unlike()[:4], expert])
    with pytest.raises((ValueError, TypeError), match=r"fastmoe\.ModuleExperts: " + message):
        moe(draw(30, 12))
