import math
import re

import pytest
import torch

from fastmoe import nn, ops, testing
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
    E, K = moe.router.weight.shape[0], moe.router.top_k
    logits_TE = x_TD @ moe.router.weight.t()
    probs_TE = torch.softmax(logits_TE, 1) if moe.router.score == "softmax" else torch.sigmoid(logits_TE)
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
        if moe.router.renormalize:
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
    return torch.stack(rows), moe.aux_loss_weight * balance + moe.z_loss_weight * z, load, T * K - len(kept)


OPTIONS = [
    {},
    {"num_shared_experts": 2},
    {"capacity_factor": 0.7},
    {"capacity_factor": 4.0},
    {"score": "sigmoid"},
    {"renormalize": False},
    {"capacity_factor": 0.5, "num_shared_experts": 1, "score": "sigmoid", "renormalize": False},
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
    y, aux, load, dropped = oracle(twin, x64, None if factor is None else -int(-(factor * T * 2) // 5))
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
        ("d_model must be at least 1, got 0", {"d_model": 0}),
        ("d_ff must be at least 1", {"d_ff": 0}),
        ("num_experts must be at least 1", {"num_experts": 0}),
        ("top_k must be at least 1", {"top_k": 0}),
        ("top_k must be in 1..4 (num_experts), got 5", {"top_k": 5}),
        ("capacity_factor must be None or positive, got 0", {"capacity_factor": 0}),
        ("num_shared_experts must be at least 0, got -1", {"num_shared_experts": -1}),
        ("score must be 'softmax' or 'sigmoid', got 'relu'", {"score": "relu"}),
    ],
)
def test_bad_settings(message, changes):
    settings = dict(d_model=8, d_ff=8, num_experts=4, top_k=2) | changes
    with pytest.raises(ValueError, match=re.escape("fastmoe.MoE: " + message)):
        nn.MoE(**settings)


def test_a_wrong_width_names_the_argument():
    with pytest.raises(ValueError, match=r"fastmoe\.MoE: x must be of shape \[\.\.\., 8\], got \[3, 9\]"):
        nn.MoE(8, 8, 4, 2)(draw(3, 9))


def test_nan_input_names_the_op():
    with pytest.raises(ValueError, match=r"fastmoe\.topk_gate: logits_TE .*NaN.* token 1"):
        nn.MoE(8, 8, 4, 2)(torch.tensor([[0.0] * 8, [float("nan")] * 8]))
