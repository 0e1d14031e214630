import itertools
import math
import re
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from fastmoe import nn, ops, testing
from fastmoe.config import ModelConfig
from fastmoe.nn import ROUTERS, RouterInputs
from fastmoe.nn.router import make_router, own_top_k, parse_options
from fastmoe.testing import draw

OPTIONS = {
    "hash": {"vocab_size": 50},
    "token-rounding": {"tile": 4},
    "cosine": {"projection": 6, "noise": 0.7},
    "topology": {"node": 1, "fraction": 0.3},
    "prototype": {"loss_weights": {"balance": 1.0, "z": 1.0}},
}
FIXED = {"switch": 1, "gshard": 2, "base": 1, "domain": 1, "topology": 2}
NOISY = ("noisy-topk", "switch", "gshard", "cosine")
KEY = torch.tensor([7, 3, 100])


def make(name, E=8, K=None, D=6, **options):
    torch.manual_seed(0)
    return make_router(name, D, E, K or FIXED.get(name), **{**OPTIONS.get(name, {}), **options})


def given_inputs(T, E, sequences=1, key=KEY, **others):
    ids_T = torch.randint(0, 50, (T,), generator=testing.generator(5))
    domains_T = torch.randint(0, E, (T,), generator=testing.generator(6))
    return RouterInputs(token_ids_T=ids_T, domains_T=domains_T, key=key, layer=2, num_sequences=sequences, **others)


def on_grid(*shape, step, seed):
    """Multiples of step in [-1, 1]: products and sums of a few are exact, so that ties are ties in every precision."""
    n = round(1 / step)
    return torch.randint(-n, n + 1, shape, generator=testing.generator(seed)) * step


# What systems say, one token at a time, in float64. Each returns ids (-1: nothing), weights and losses.


def best(values, k, among=None):
    """The k largest, the lower index first among equals."""
    values = values.tolist()
    return sorted(range(len(values)) if among is None else among, key=lambda i: (-values[i], i))[:k]


def softmax(z):
    return (z - z.max()).exp() / (z - z.max()).exp().sum()


def counted(ids, E):
    found = Counter(e for row in ids for e in row)
    return [found[e] for e in range(E)]


def balanced(P_TE, slots, whole):
    E = P_TE.shape[1]
    return E * sum(slots[e] / whole * P_TE[:, e].mean() for e in range(E) if slots[e])


def z_of(logits_TE):
    return sum(z.exp().sum().log() ** 2 for z in logits_TE) / len(logits_TE)


def normal(u_TN):
    half = u_TN.shape[1] // 2
    return (-2 * (1 - u_TN[:, :half]).log()).sqrt() * (2 * math.pi * u_TN[:, half:]).cos()


def draws(inputs, T, N):
    return ops.random_uniform(inputs.key, inputs.layer, T, N).double()


def cv2(v):
    return 0 * v.sum() if len(v) == 1 else ((v - v.mean()) ** 2).sum() / (len(v) - 1) / (v.mean() ** 2 + 1e-10)


def phi(x):
    return (1 + torch.erf(x / math.sqrt(2))) / 2


def by_topk(r, p, x, inputs, score=softmax, renorm=True, scale=1.0, groups=None, balance="assignment"):
    Z, E, K, ids, weights, P = x @ p["weight"].t(), r.num_experts, r.top_k, [], [], []
    for z in Z:
        s = score(z)
        rank, among = (z if r.bias_E is None else s + r.bias_E.double()).detach(), range(E)
        if groups:
            kind, num, kept = groups
            runs = [range(g * E // num, (g + 1) * E // num) for g in range(num)]
            worth = [sum(sorted((rank[e] for e in run), reverse=True)[: 2 if kind == "top2" else 1]) for run in runs]
            among = [e for g in best(torch.tensor(worth), kept) for e in runs[g]]
        ids.append(best(rank, K, among))
        chosen = s[ids[-1]]
        weights.append(scale * (chosen / chosen.sum() if renorm else chosen))
        P.append(s)
    P, T, load = torch.stack(P), len(x), counted(ids, E)
    if balance == "sequence":
        S, rows = T // inputs.num_sequences, (P / P.sum(1, keepdim=True)).split(T // inputs.num_sequences)
        parts = [balanced(rows[b], counted(ids[b * S : (b + 1) * S], E), S * K) for b in range(len(rows))]
        found = sum(parts) / len(parts)
    else:
        found = balanced(P, load, T if balance == "token" else T * K)
    return ids, torch.stack(weights), {"balance": found, "z": z_of(Z)}


def by_deepseek(r, p, x, inputs, kind, **options):
    got = r.gate_options
    groups = kind, got["num_groups"], got["top_groups"]
    return by_topk(r, p, x, inputs, groups=groups if groups[2] < groups[1] else None, **options)


def by_noisy(r, p, x, inputs):
    (T, _), E, K = x.shape, r.num_experts, r.top_k
    H = Z = x @ p["weight"].t()
    if r.training:
        std = (1 + (x @ p["noise_weight"].t()).exp()).log() + 1e-2
        H = Z + normal(draws(inputs, T, 2 * E)) * std
    ids = [best(h, K) for h in H]
    weights = torch.stack([softmax(h[i]) for h, i in zip(H, ids)])
    gates = [torch.zeros(E, dtype=x.dtype).index_add(0, torch.tensor(i), w) for i, w in zip(ids, weights)]
    losses = {"importance": cv2(sum(gates))}
    if r.training:
        load = torch.full((E,), float(T), dtype=x.dtype)
        if K < E:
            order = [best(h, K + 1) for h in H]
            chosen = [torch.zeros(E, dtype=torch.bool).index_fill(0, torch.tensor(i), True) for i in ids]
            load = sum(
                phi((Z[t] - torch.where(chosen[t], H[t, order[t][K]], H[t, order[t][K - 1]])) / std[t])
                for t in range(T)
            )
        losses["load"] = cv2(load)
    return ids, weights, losses


def by_switch(r, p, x, inputs):
    if r.training:
        x = x * (0.99 + 0.02 * draws(inputs, *x.shape))
    return by_topk(FakeTopK(r), p, x, inputs, renorm=False)


class FakeTopK:
    """A router without a bias, for by_topk."""

    bias_E = None

    def __init__(self, r, top_k=None):
        self.num_experts, self.top_k = r.num_experts, top_k or r.top_k


def by_gshard(r, p, x, inputs):
    T, E = len(x), r.num_experts
    ids, weights, losses = by_topk(FakeTopK(r), p, x, inputs)
    P = torch.stack([softmax(z) for z in x @ p["weight"].t()])
    losses["balance"] = E**2 * sum(sum(i[0] == e for i in ids) / T * P[:, e].mean() for e in range(E)) / E
    if r.training:
        u = draws(inputs, T, 1)[:, 0]
        g = [P[t, ids[t]] for t in range(T)]
        ids = [[i[0], i[1] if 2 * g[t][1] / (g[t][0] + g[t][1]) > u[t] else -1] for t, i in enumerate(ids)]
    return ids, weights, losses


def by_prototype(r, p, x, inputs):
    E, Z = r.num_experts, r.top_k
    n, parts = E // Z, []
    for i in range(Z):
        own = {"weight": p["weight"][i * n : (i + 1) * n]}
        one = FakeTopK(r, 1)
        one.num_experts = n
        ids, weights, losses = by_topk(one, own, x, inputs, renorm=False)
        parts.append(([row[0] + i * n for row in ids], weights[:, 0], losses))
    mean = {name: sum(part[2][name] for part in parts) / Z for name in ("balance", "z")}
    return [list(row) for row in zip(*(part[0] for part in parts))], torch.stack([part[1] for part in parts], 1), mean


def by_plain(r, p, x, inputs):
    ids, weights, _ = by_topk(FakeTopK(r), p, x, inputs)
    return ids, weights, {}


def by_argmax(r, p, x, inputs):
    Z = x @ p["weight"].t()
    ids = [best(z, 1) for z in Z]
    return ids, torch.stack([1 / (1 + (-z[i]).exp()) for z, i in zip(Z, ids)]), {}


def by_table(r, p, x, inputs):
    return [r.table_VK[i].tolist() for i in inputs.token_ids_T], x.new_ones(len(x), r.top_k), {}


def by_domain(r, p, x, inputs):
    return [[int(d)] for d in inputs.domains_T], x.new_ones(len(x), 1), {}


def by_expert_choice(r, p, x, inputs):
    (T, _), E = x.shape, r.num_experts
    S = torch.stack([softmax(z) for z in x @ p["weight"].t()])
    C = min(T, max(1, r.top_k * T // E))
    took = [best(S[:, e], C) for e in range(E)]
    return [[e if t in took[e] else -1 for e in range(E)] for t in range(T)], S, {}


def by_rounding(r, p, x, inputs):
    (T, _), E, M = x.shape, r.num_experts, r.tile
    ids, weights, losses = by_topk(FakeTopK(r), p, x, inputs)
    if not r.training:
        return ids, weights, losses
    W = torch.stack([softmax(z) for z in x @ p["weight"].t()])
    rows, chosen = [], {e: [t for t in range(T) if e in ids[t]] for e in range(E)}
    for t in range(T):
        row = W[t].clone()
        row[ids[t]] = weights[t]
        rows.append(row)
    W, taken = torch.stack(rows), {}
    for e in range(E):
        others = [t for t in range(T) if t not in chosen[e]]
        order = best(W[:, e], T, chosen[e]) + best(W[:, e], T, others)
        taken[e] = set(order[: min(T, M * round(len(chosen[e]) / M))])  # Python rounds half to even
    return [[e if t in taken[e] else -1 for e in range(E)] for t in range(T)], W, losses


def by_cosine(r, p, x, inputs):
    (T, _), E, K = x.shape, r.num_experts, r.top_k
    at, to = x @ p["projection_weight"].t(), p["weight"]
    cosine = (at / at.norm(dim=1, keepdim=True)) @ (to / to.norm(dim=1, keepdim=True)).t()
    Z = cosine * p["temperature"].exp()
    H = Z + normal(draws(inputs, T, 2 * E)) * (r.noise / E) if r.training else Z
    ids = [best(h, K) for h in H]
    P = torch.stack([softmax(z) for z in Z])
    weights = torch.stack([P[t, i] / (P[t, i].sum() if K > 1 else 1) for t, i in enumerate(ids)])
    balance = balanced(P, counted(ids, E), T * K)
    if r.cv and r.training:
        load = sum(phi((Z[t] - H[t, ids[t][-1]]) / (r.noise / E)) for t in range(T))
        balance = (cv2(P.sum(0)) + cv2(load)) / 2
    return ids, weights, {"balance": balance, "z": z_of(Z)}


def by_topology(r, p, x, inputs):
    (T, _), E = x.shape, r.num_experts
    each = E // r.num_nodes
    own = range(r.node * each, (r.node + 1) * each)
    Z = x @ p["weight"].t()
    ids = [best(z, 2) for z in Z]
    off, limit = [t for t in range(T) if ids[t][0] not in own], int(r.fraction * T)
    if len(off) >= limit:
        sent = best(Z.detach().amax(1), limit, off)
        ids = [[best(Z[t], 1, own)[0], ids[t][0]] if t in sent else best(Z[t], 2, own) for t in range(T)]
    elif r.limit_all_slots:
        away = [t for t in range(T) if ids[t][1] not in own]
        kept = best(torch.tensor([float(Z[t, ids[t][1]]) for t in range(T)]), limit - len(off), away)
        for t in set(away) - set(kept):
            ids[t][1] = best(Z[t], 1, [e for e in own if e != ids[t][0]])[0]
    P = torch.stack([softmax(z) for z in Z])
    first = [sum(i[0] == e for i in ids) for e in range(E)]
    weights = torch.stack([softmax(Z[t, i]) for t, i in enumerate(ids)])
    return ids, weights, {"balance": balanced(P, first, T), "z": z_of(Z)}


ORACLES = {
    "topk": by_topk,
    "mixtral": partial(by_topk, balance="token"),
    "olmoe": partial(by_topk, renorm=False, balance="token"),
    "qwen3": partial(by_topk, balance="token"),
    "deepseek-v2": partial(by_deepseek, kind="max", renorm=False, scale=16.0),
    "deepseek-v3": partial(by_deepseek, kind="top2", score=torch.sigmoid, scale=2.5, balance="sequence"),
    "noisy-topk": by_noisy,
    "switch": by_switch,
    "gshard": by_gshard,
    "prototype": by_prototype,
    "swipe": by_plain,
    "base": by_argmax,
    "hash": by_table,
    "domain": by_domain,
    "expert-choice": by_expert_choice,
    "token-rounding": by_rounding,
    "cosine": by_cosine,
    "topology": by_topology,
}


def sizes(name):
    for E, K in itertools.product((1, 8, 12, 64, 4096), (1, 2, 3, 8)):
        fits = K <= E and FIXED.get(name, K) == K and (name != "topology" or E > 2)
        if fits and (E % K == 0 if name == "prototype" else E != 12):
            yield E, K


CASES = [
    pytest.param(name, E, K, training, id=f"{name}-{E}-{K}-{'training' if training else 'evaluation'}")
    for name in ROUTERS
    for E, K in sizes(name)
    for training in ((False,) if name == "base" else (True, False))  # an assignment has tests of its own
]


def inside(out):
    """[T, K] bool, or [T, E] where experts choose: slots that choose an expert."""
    return out.topk_ids_TK >= 0 if out.routing is None else out.routing.dst_row_TK >= 0


def check_against_oracle(router, oracle, x_TD, inputs, dtype):
    tolerance = {"rtol": 1e-4, "atol": 2e-5} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-11}
    router.to(dtype)
    x = x_TD.clone().to(dtype).requires_grad_()
    x64 = x_TD.double().requires_grad_()
    p64 = {name: p.detach().double().requires_grad_() for name, p in router.named_parameters()}
    out = router(x, inputs)
    ids, weights, losses = oracle(router, p64, x64, inputs)

    T, E = x.shape[0], router.num_experts
    if out.routing is None:
        assert out.topk_ids_TK.tolist() == ids and out.topk_ids_TK.dtype == torch.int64
    else:
        assert [[e if kept else -1 for e, kept in enumerate(row)] for row in inside(out).tolist()] == ids
    assert out.load_E.tolist() == counted(ids, E) and out.load_E.dtype == torch.int64
    assert out.topk_weights_TK.dtype == dtype
    kept = torch.tensor(ids) >= 0
    torch.testing.assert_close(out.topk_weights_TK.double() * kept, weights * kept, **tolerance)
    assert set(out.losses) == set(losses)
    for name, want in losses.items():
        torch.testing.assert_close(out.losses[name].double(), want, **tolerance, msg=lambda m, n=name: f"{n}: {m}")

    if not (x.requires_grad and out.topk_weights_TK.requires_grad):
        assert not p64, "a router with parameters has gradients"
        return
    pull = draw(T, weights.shape[1], seed=9).double() * kept
    scales = {name: i + 2.0 for i, name in enumerate(sorted(losses))}
    got = (out.topk_weights_TK * pull.to(dtype)).sum() + sum(scales[n] * out.losses[n] for n in scales)
    want = (weights * pull).sum() + sum(scales[n] * losses[n] for n in scales)
    got.backward()
    want.backward()
    for name, leaf, leaf64 in [("x", x, x64), *((n, p, p64[n]) for n, p in router.named_parameters())]:
        zero = torch.zeros_like(leaf64)
        grad, grad64 = ((zero if g is None else g.double()) for g in (leaf.grad, leaf64.grad))
        scale = grad64.abs().max().clamp(min=1)
        torch.testing.assert_close(grad / scale, grad64 / scale, **tolerance, msg=lambda m, n=name: f"d{n}: {m}")


def prepare(name, E, K, T, **options):
    """A router and rows: on a grid, where ties are many, but for scores that round."""
    router = make(name, E, K, **options)
    if name in ("cosine", "deepseek-v3"):
        if name == "deepseek-v3":
            router.bias_E.copy_(draw(E, seed=3) * 0.2)
        return router, draw(T, 6, seed=2)
    for i, parameter in enumerate(router.parameters()):
        parameter.data.copy_(on_grid(*parameter.shape, step=1 / 8, seed=10 + i))
    return router, on_grid(T, 6, step=1 / 4, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "E", "K", "training"), CASES)
def test_by_definition(name, E, K, training, dtype):
    T = 6 if E == 4096 else 12
    router, x_TD = prepare(name, E, K, T)
    check_against_oracle(router.train(training), ORACLES[name], x_TD, given_inputs(T, E, sequences=3), dtype)


VARIANTS = [
    ("cosine", 8, 2, {"cv": True}),
    ("cosine", 8, 1, {"cv": True, "noise": 3.0}),
    ("cosine", 8, 3, {"noise": 5.0}),
    ("topology", 8, 2, {"node": 0, "fraction": 0.9}),
    ("topology", 8, 2, {"node": 0, "fraction": 0.9, "limit_all_slots": True}),
    ("topology", 64, 2, {"node": 3, "fraction": 1.0, "num_nodes": 4, "limit_all_slots": True}),
    ("topology", 8, 2, {"node": 0, "fraction": 0.0}),
    ("token-rounding", 8, 2, {"tile": 1}),
    ("token-rounding", 8, 3, {"tile": 100}),
    ("expert-choice", 8, 8, {}),
]


@pytest.mark.parametrize(("name", "E", "K", "options"), VARIANTS, ids=str)
def test_options_by_definition(name, E, K, options):
    router, x_TD = prepare(name, E, K, 16, **options)
    check_against_oracle(router, ORACLES[name], x_TD, given_inputs(16, E), torch.float64)


def test_every_router_has_an_oracle():
    assert list(ORACLES) == list(ROUTERS)
    assert all(own_top_k(name) == make(name, 8).top_k for name in ROUTERS)


# Closed forms and traps.


def with_logits(router, logits):
    """The rows that make these the logits: weights become the identity. D = E."""
    router.weight.data = torch.eye(router.num_experts)
    return torch.as_tensor(logits, dtype=torch.float32)


def square(name, E, K=None, **options):
    return make(name, E, K, D=E, **options)


def test_ties_go_to_the_lower_expert():
    for name in ("topk", "deepseek-v3", "deepseek-v2", "noisy-topk", "switch", "gshard", "swipe", "cosine", "topology"):
        router = make(name, 8, None if name in FIXED else 3).eval()
        node = range(4, 8) if name == "topology" else range(8)
        ids_TK = router(torch.zeros(2, 6)).topk_ids_TK
        assert ids_TK.tolist() == [list(node[: router.top_k])] * 2, name


@pytest.mark.parametrize(
    ("name", "E", "K", "groups"), [("deepseek-v2", 160, 6, (8, 3)), ("deepseek-v3", 256, 8, (8, 4))]
)
def test_deepseek_groups_as_published(name, E, K, groups):
    options = make(name, E, K).gate_options
    assert (options["num_groups"], options["top_groups"]) == groups
    assert make(name, 1, 1).gate_options["num_groups"] == 1
    assert make(name, 8, 8).gate_options["top_groups"] == 4  # what K needs
    assert make(name, 16, 2, num_groups=2).gate_options["top_groups"] == 1


def test_deepseek_shuts_groups_out_where_all_scores_are_negative():
    router = square("deepseek-v3", 8, 4, num_groups=4, top_groups=2)
    x_TD = with_logits(router, [[3.0, 2.0, 1.0, 1.0, 0.0, 0.0, 2.5, 2.0]])
    router.bias_E.fill_(-5.0)  # a fill of 0 in place of -inf would let the shut groups win
    assert router(x_TD).topk_ids_TK.tolist() == [[0, 6, 1, 7]]


def test_deepseek_v3_bias_chooses_and_does_not_weigh():
    router = square("deepseek-v3", 4, 2, num_groups=1, top_groups=1)
    x_TD = with_logits(router, [[2.0, 1.0, 0.0, -1.0]])
    router.bias_E.copy_(torch.tensor([0.0, 0.0, 0.0, 0.7]))
    out = router(x_TD)
    s = torch.sigmoid(x_TD[0])
    assert out.topk_ids_TK.tolist() == [[3, 0]]  # ordered by score + bias
    torch.testing.assert_close(out.topk_weights_TK[0], 2.5 * s[[3, 0]] / (s[3] + s[0]))


def test_deepseek_v3_groups_by_their_two_best():
    router = square("deepseek-v3", 4, 2, num_groups=2, top_groups=1)
    assert router(with_logits(router, [[3.0, -3.0, 2.0, 2.0]])).topk_ids_TK.tolist() == [[2, 3]]
    router = square("deepseek-v2", 4, 2, num_groups=2, top_groups=1)
    assert router(with_logits(router, [[3.0, -3.0, 2.0, 2.0]])).topk_ids_TK.tolist() == [[0, 1]]


def test_update_moves_biases_towards_the_mean():
    router = make("deepseek-v3", 4, 2)
    router.update(torch.tensor([5, 1, 3, 3]))  # the mean is 3
    torch.testing.assert_close(router.bias_E, torch.tensor([-1e-3, 1e-3, 0.0, 0.0]))
    centered = make("deepseek-v3", 4, 2, center_bias=True)
    centered.update(torch.tensor([6.0, 1.0, 1.0, 0.0], dtype=torch.float64))  # as the trainer sums it
    torch.testing.assert_close(centered.bias_E, torch.tensor([-1.5e-3, 0.5e-3, 0.5e-3, 0.5e-3]))
    make("topk").update(torch.ones(8))  # has none


def test_bias_stays_float32():
    router = make("deepseek-v3", 8, 2)
    router.bias_E.copy_(draw(8))
    want, x_TD = router.bias_E.clone(), draw(5, 6)
    for dtype in (torch.bfloat16, torch.float64):
        assert torch.equal(router.to(dtype).bias_E, want) and router.weight.dtype == dtype
        assert router(x_TD.to(dtype)).topk_ids_TK.shape == (5, 2)
    assert router.state_dict()["bias_E"].dtype == torch.float32
    assert "bias_E" not in make("topk").state_dict()


def test_deepseek_v3_bias_evens_a_skewed_stream():
    E, K, T, updates = 16, 4, 4096, 700
    router = make("deepseek-v3", E, K, D=8, num_groups=1, top_groups=1)
    pull_D = draw(8, seed=4) * 0.5  # all rows lean the same way

    def loads(step):
        out = router(draw(T, 8, seed=step) + pull_D)
        ids_TK, s_TE = out.topk_ids_TK, out.logits_TE.sigmoid()
        chosen_TK = s_TE.gather(1, ids_TK)
        torch.testing.assert_close(out.topk_weights_TK, 2.5 * chosen_TK / chosen_TK.sum(1, keepdim=True))
        return out.load_E

    peak = lambda load_E: float(load_E.max() / load_E.float().mean())
    assert peak(loads(0)) > 1.5
    with torch.no_grad():
        for step in range(updates):
            router.update(loads(step))
        assert peak(sum(loads(updates + i) for i in range(10))) < 1.1


def test_noisy_topk_in_evaluation_draws_nothing_and_has_no_load():
    router, x_TD = make("noisy-topk", 4, 4).eval(), torch.zeros(3, 6)  # ties everywhere: load would be 0 / 0
    with testing.Recorder() as recorder:
        out = router(x_TD)
    assert recorder.count("random_uniform") == 0 and set(out.losses) == {"importance"}
    assert out.losses["importance"] == 0
    torch.testing.assert_close(out.topk_weights_TK, torch.full((3, 4), 0.25))


def test_noisy_topk_of_every_expert_has_even_load():
    out = make("noisy-topk", 4, 4)(draw(5, 6), RouterInputs(key=KEY))
    assert out.losses["load"] == 0 and out.load_E.tolist() == [5] * 4


def test_switch_jitters_its_input_not_its_logits():
    router = square("switch", 4, jitter=0.5)
    x_TD = with_logits(router, [[0.0, 0.0, 0.0, 0.0], [1.0, 0.9, 0.0, 0.0]]).repeat(200, 1)
    out = router(x_TD, RouterInputs(key=KEY))
    assert out.logits_TE[0].tolist() == [0.0] * 4  # noise that is added would show here
    some_T = out.logits_TE[1::2, 0]
    assert 0.5 <= float(some_T.min()) < 0.6 and 1.4 < float(some_T.max()) <= 1.5
    assert set(out.topk_ids_TK[1::2, 0].tolist()) == {0, 1}
    assert torch.equal(router.eval()(x_TD).logits_TE, x_TD)
    silent = square("switch", 4, jitter=0.0)
    assert torch.equal(silent(with_logits(silent, [[1.0, 2, 3, 4]])).logits_TE, torch.tensor([[1.0, 2, 3, 4]]))


@pytest.mark.parametrize(
    ("second", "probabilities", "want"),
    [
        ("random", [0.6, 0.2, 0.1, 0.1], 2 * 0.2 / 0.8),
        ("probability", [0.6, 0.2, 0.1, 0.1], 2 * 0.2),
        ("all", [0.9, 0.1, 0, 0], 1),
    ],
)
def test_gshard_sends_the_second_in_proportion_to_its_weight(second, probabilities, want):
    T, router = 20000, square("gshard", 4, second=second)
    x_TD = with_logits(router, torch.tensor(probabilities).clamp(min=1e-9).log().repeat(T, 1))
    out = router(x_TD, RouterInputs(key=KEY))
    sent = int((out.topk_ids_TK[:, 1] == 1).sum())
    assert abs(sent / T - want) < 0.015  # 4 sigma
    assert (out.topk_ids_TK[:, 0] == 0).all() and out.load_E.tolist() == [T, sent, 0, 0]
    assert (router.eval()(x_TD).topk_ids_TK[:, 1] == 1).all()


def test_gshard_always_sends_an_equal_second():
    router = square("gshard", 4)
    assert (router(with_logits(router, torch.zeros(500, 4))).topk_ids_TK[:, 1] == 1).all()


def kept_by_loop(ids, capacity):
    """First choices of all tokens come before second ones, then tokens in order."""
    room, kept = Counter(), [[False] * len(row) for row in ids]
    for k in range(len(ids[0])):
        for t, row in enumerate(ids):
            if row[k] >= 0 and room[row[k]] < capacity:
                room[row[k]] += 1
                kept[t][k] = True
    return kept


@pytest.mark.parametrize(
    ("name", "factor", "want"),
    [
        ("gshard", None, 10),
        ("gshard", 0.5, 4),
        ("switch", None, 5),
        ("prototype", 1.0, 8),
        ("topk", 0.25, 2),
        ("base", 1, 4),
    ],
)
def test_capacity(name, factor, want):
    T, E = 16, 4
    torch.manual_seed(0)
    moe = nn.MoE(6, 4, E, router=name, capacity_factor=factor)
    if name == "base":
        moe.eval()
    out = moe(draw(T, 6), RouterInputs(key=KEY))
    kept = (out.routing.dst_row_TK >= 0).tolist()
    assert kept == kept_by_loop(out.topk_ids_TK.tolist(), want)
    assert int(out.dropped) == int(out.load_E.sum()) - sum(map(sum, kept))


def test_a_skipped_second_choice_takes_no_slot():
    """Two tokens share expert 1 as second choice and there is one slot: it goes to the one that was sent."""
    moe = nn.MoE(4, 4, 4, router="gshard", capacity_factor=0.5)
    x_TD = with_logits(moe.router, [[2.0, 1.0, -9, -9], [2.0, 1.0, -9, -9], [-9, -9, 2.0, 1.0], [-9, -9, 2.0, 1.0]])
    sent, kept = Counter(), Counter()
    for step in range(60):
        out = moe(x_TD, RouterInputs(key=torch.tensor([0, step, 0])))
        second = tuple((out.topk_ids_TK[:2, 1] >= 0).tolist())
        sent[second] += 1
        kept[second, tuple((out.routing.dst_row_TK[:2, 1] >= 0).tolist())] += 1
    assert set(kept) == {
        ((False, False), (False, False)),
        ((True, False), (True, False)),
        ((False, True), (False, True)),
        ((True, True), (True, False)),
    }


@pytest.mark.parametrize(
    ("name", "options", "T", "factor", "want"),
    [
        ("topk", {}, 50, 1.1, 55),  # 1.1 * 50 is above 55 in floating point
        ("topk", {}, 7, 1.0, 7),
        ("gshard", {"slot_multiple": 4}, 10, 1.0, 8),
        ("gshard", {"slot_multiple": 4}, 1, 1.0, 4),
        ("prototype", {}, 10, 1.25, 7),
        ("prototype", {"slots": "1x"}, 10, 1.25, 4),
        ("cosine", {}, 10, 1.25, 6),
        ("cosine", {}, 3, 0.5, 2),
    ],
)
def test_slots_of_an_expert(name, options, T, factor, want):
    E = 2 if name == "topk" else 4
    assert make(name, E, 2, **options).capacity(T, factor) == want


def test_weights_are_divided_by_what_is_kept():
    """FastNN: after drops; a token that lost its first choice gives the second all."""
    moe = nn.MoE(
        4, 4, 4, router="gshard", router_options={"renormalize_kept": True, "second": "all"}, capacity_factor=0.5
    )
    x_TD = with_logits(moe.router, [[2.0, 1.0, -9, -9], [2.0, -9, 1.0, -9], [-9, -9, -9, 1.0], [-9, -9, -9, 1.0]])
    with testing.Recorder() as recorder:
        out = moe(x_TD)
    ((_, args, _),) = (call for call in recorder.calls if call[0] == "moe_mlp")
    kept_TK = out.routing.dst_row_TK >= 0
    assert kept_TK.tolist()[:2] == [[True, True], [False, True]]
    p_TK = x_TD.softmax(1).gather(1, out.topk_ids_TK)
    want_TK = p_TK * kept_TK / (p_TK * kept_TK).sum(1, keepdim=True).clamp(min=1e-20)
    torch.testing.assert_close(args[1], want_TK)


def test_one_prototype_is_switch():
    prototype, switch = make("prototype", 8, 1), make("switch", 8, jitter=0.0)
    switch.load_state_dict(prototype.state_dict())
    x_TD = draw(20, 6)
    got, want = prototype(x_TD), switch(x_TD)
    assert torch.equal(got.topk_ids_TK, want.topk_ids_TK) and torch.equal(got.topk_weights_TK, want.topk_weights_TK)
    assert all(torch.equal(got.losses[name], want.losses[name]) for name in ("balance", "z"))


def test_expert_choice_takes_exactly_c():
    T, E, K = 30, 8, 2
    moe = nn.MoE(6, 4, E, K, router="expert-choice")
    out = moe(draw(T, 6))
    assert out.load_E.tolist() == [T * K // E] * E and int(out.dropped) == 0 and out.topk_ids_TK is None
    assert out.routing.offsets.diff().tolist() == [7] * E


def balances(scores_TE):
    """The best total over all assignments of T / E tokens to each expert."""
    T, E = scores_TE.shape
    return max(
        sum(scores_TE[t, e].item() for t, e in enumerate(ids))
        for ids in set(itertools.permutations(list(range(E)) * (T // E)))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_base_assigns_in_training(dtype):
    T, E = 6, 3
    router, x_TD = make("base", E).to(dtype), draw(T, 6, dtype=dtype)
    out = router(x_TD)
    assert out.load_E.tolist() == [2, 2, 2] and out.losses == {}
    scores_TE = x_TD @ router.weight.t()
    got = scores_TE.gather(1, out.topk_ids_TK)
    assert abs(float(got.sum()) - balances(scores_TE)) < 1e-5
    torch.testing.assert_close(out.topk_weights_TK, got.sigmoid())
    (out.topk_weights_TK.sum()).backward()
    picked = torch.nn.functional.one_hot(out.topk_ids_TK[:, 0], E).to(dtype)
    torch.testing.assert_close(
        router.weight.grad, (picked * (got * 0 + got.sigmoid() * (1 - got.sigmoid()))).t() @ x_TD
    )


def test_base_goes_by_training_not_by_gradients():
    router, x_TD = make("base", 4), draw(1, 6).repeat(8, 1)
    router.requires_grad_(False)
    assert router(x_TD).load_E.tolist() == [2] * 4
    router.requires_grad_(True).eval()
    assert sorted(router(x_TD).load_E.tolist()) == [0, 0, 0, 8]


def test_base_starts_orthogonal():
    weight = make("base", 4).weight
    torch.testing.assert_close(weight @ weight.t(), 0.01 * torch.eye(4))


def test_base_pads_and_says_so_once(recwarn):
    router = make("base", 4)
    loads = [router(draw(T, 6)).load_E for T in (7, 8, 5)]
    assert [int(load.sum()) for load in loads] == [7, 8, 5] and [int(load.max()) for load in loads] == [2, 2, 2]
    assert [str(w.message) for w in recwarn] == ["fastmoe.BaseRouter: 7 tokens are padded to a multiple of 4 experts"]


def test_base_takes_scores_that_are_not_finite_as_the_lowest():
    router = square("base", 2)
    x_TD = with_logits(router, [[torch.nan, 1.0], [3.0, 2.0]])
    out = router(torch.where(x_TD.isnan(), torch.nan, x_TD))
    assert out.load_E.tolist() == [1, 1]


def test_hash_tables():
    router = make("hash", 4, 2, vocab_size=40)
    assert router.table_VK.shape == (40, 2) and torch.equal(router.table_VK, make("hash", 4, 2, vocab_size=40).table_VK)
    assert not torch.equal(router.table_VK, make("hash", 4, 2, vocab_size=40, seed=1).table_VK)
    assert not torch.equal(router.table_VK[:, 0], router.table_VK[:, 1])
    assert list(router.parameters()) == [] and router(draw(3, 6), given_inputs(3, 4)._replace(key=None)).losses == {}


def make_hash(V, E, K, counts_V):
    router = make_router("hash", 6, E, K, vocab_size=V)
    router.balance_tables(counts_V)
    return router.table_VK


def test_balanced_tables_even_a_zipf_vocabulary_out():
    V, E = 2000, 16
    counts_V = (1e6 / (20 + torch.randperm(V, generator=testing.generator()))).long()
    counts_V[:300] = 0
    table_VK, loads = make_hash(V, E, 2, counts_V), [0] * E
    for token in sorted(range(V), key=lambda v: (-max(int(counts_V[v]), 1), v)):  # the frequent ones first
        e = loads.index(min(loads))
        assert int(table_VK[token, 0]) == e
        loads[e] += max(int(counts_V[token]), 1)
    for k in range(2):
        load_E = torch.zeros(E).scatter_add(0, table_VK[:, k], counts_V.float())
        assert load_E.max() / load_E.mean() < 1.01
    unseen_E = torch.bincount(table_VK[:300, 0], minlength=E)
    assert unseen_E.max() < 40  # of 300: not all of them in one
    assert not torch.equal(table_VK[:, 0], table_VK[:, 1])


def test_topology_bounds_what_leaves_the_node():
    T, E, q = 50, 8, 0.2
    x_TD = on_grid(T, E, step=1 / 8, seed=3)
    away = lambda ids: (ids // 4 != 1).sum(0).tolist()
    plain = square("topology", E, node=1, fraction=q)
    with_logits(plain, x_TD)
    tame_TD = x_TD + torch.tensor([0.0] * 4 + [0.75] * 4)  # few prefer the other node
    out = plain(tame_TD)
    assert away(out.topk_ids_TK)[0] < int(q * T) and torch.equal(out.topk_ids_TK, ops.topk_gate(tame_TD, 2)[1])
    out = plain(x_TD)
    assert away(out.topk_ids_TK) == [0, int(q * T)]
    tame = int((tame_TD.argmax(1) < 4).sum())
    assert tame > 0
    for limit, want in ((tame + 1, tame), (tame, 0)):  # as many as the limit are already too many
        at = square("topology", E, node=1, fraction=limit / T + 1e-6)
        with_logits(at, x_TD)
        assert away(at(tame_TD).topk_ids_TK)[0] == want
    limited = square("topology", E, node=1, fraction=q, limit_all_slots=True)
    with_logits(limited, x_TD)
    assert sum(away(plain(tame_TD).topk_ids_TK)) > int(q * T) >= sum(away(limited(tame_TD).topk_ids_TK))


class Ranks:
    """A group whose ranks take turns: what the others would send is known."""

    def __init__(self, rank, all_counts=None, others=None):
        self.rank, self.size, self.all_counts, self.others = (
            rank,
            2 if all_counts is None else len(all_counts),
            all_counts,
            others,
        )

    def all_gather(self, counts):
        assert torch.equal(counts, self.all_counts[self.rank])
        return self.all_counts

    def all_reduce(self, tensor):
        return tensor + self.others


def test_topology_takes_its_node_from_the_group():
    router = make("topology", 8, num_nodes=2, node=None, fraction=0.0)
    node_of = lambda group: set((router(draw(9, 6), RouterInputs(group=group)).topk_ids_TK // 4).flatten().tolist())
    assert [node_of(g) for g in (None, Ranks(0), Ranks(1), Ranks(2, [0] * 4), Ranks(1, [0] * 4))] == [
        {0},
        {0},
        {1},
        {1},
        {0},
    ]


def swiped(choices, W, L):
    """BaGuaLu's gate, as published: choices[r] [T, K] of every rank become ids[r]."""
    K = len(choices[0][0])
    cap = [len(c) * K for c in choices]
    ids = [[list(row) for row in c] for c in choices]
    for j in range(K):
        asked = [[sum(row[j] // L == w for row in c) for w in range(W)] for c in choices]
        granted = [[0] * W for _ in range(W)]
        for w in range(W):
            for s in range(W):
                granted[s][w] = min(asked[s][w], cap[w])
                cap[w] -= granted[s][w]
        spill = [[0] * W for _ in range(W)]
        for s in range(W):
            left = sum(asked[s]) - sum(granted[s])
            for w in range(W):
                take = min(left, cap[w])
                spill[s][w], cap[w], left = take, cap[w] - take, left - take
        for s in range(W):
            seen, queue = [0] * W, [w for w in range(W) for _ in range(spill[s][w])]
            for t, row in enumerate(choices[s]):
                w = row[j] // L
                seen[w] += 1
                if seen[w] > granted[s][w]:
                    ids[s][t][j] = queue.pop(0) * L + j % L
    return ids


def run_swipe(logits, L, K):
    """Every rank's RouterOutput, for logits[r] [T, W * L]."""
    W = len(logits)
    router = square("swipe", W * L, K)
    choices = [[best(z, K) for z in x] for x in logits]
    counts = torch.tensor([[[sum(row[j] // L == w for row in c) for j in range(K)] for w in range(W)] for c in choices])
    outs = [router(with_logits(router, x), RouterInputs(group=Ranks(r, counts))) for r, x in enumerate(logits)]
    return router, choices, outs


def test_swipe_golden():
    order = [[[0, 1], [0, 2], [1, 0]], [[0, 1], [1, 3], [0, 2]]]
    logits = [torch.zeros(3, 4) for _ in order]
    for x, rows in zip(logits, order):
        for t, (first, second) in enumerate(rows):
            x[t, first], x[t, second] = 2.0, 1.0
    _, _, outs = run_swipe(logits, 2, 2)
    assert [out.topk_ids_TK.tolist() for out in outs] == [[[0, 3], [0, 2], [1, 3]], [[0, 3], [1, 3], [0, 2]]]
    for x, out in zip(logits, outs):
        torch.testing.assert_close(out.topk_weights_TK, x.gather(1, out.topk_ids_TK).softmax(1))
        assert out.losses == {}


@pytest.mark.parametrize("seed", range(20))
def test_swipe_by_definition(seed):
    pick = testing.generator(seed)
    W, L, K = (int(torch.randint(1, 4, (), generator=pick)) for _ in range(3))
    W, K = W + 1, min(K, L * (W + 1))
    sizes = torch.randint(1, 12, (W,), generator=pick).tolist()
    logits = [on_grid(T, W * L, step=1 / 8, seed=seed * 7 + r) + torch.eye(W * L)[0] for r, T in enumerate(sizes)]
    router, choices, outs = run_swipe(logits, L, K)
    want = swiped(choices, W, L)
    assert [out.topk_ids_TK.tolist() for out in outs] == want
    rows = [sum(e // L == w for ids in want for row in ids for e in row) for w in range(W)]
    assert rows == [T * K for T in sizes]
    for x, out, ids in zip(logits, outs, want):
        assert out.load_E.tolist() == counted(ids, W * L)
        torch.testing.assert_close(out.topk_weights_TK, x.gather(1, torch.tensor(ids)).softmax(1))
    router.eval()
    assert router(logits[0], RouterInputs(group=Ranks(0, [0] * W))).topk_ids_TK.tolist() == choices[0]


def test_swipe_weighs_the_unlikely_experts_it_gives():
    """Far below the others the probability is 0 in float32, the weight among the K is not."""
    logits = [torch.tensor([[300.0, 200, 0, 0]]), torch.tensor([[300.0, 200, 0, 0]] * 3)]
    _, _, outs = run_swipe(logits, 2, 2)
    assert outs[1].topk_ids_TK.tolist() == [[0, 3], [2, 3], [2, 3]]
    assert outs[1].topk_weights_TK.tolist() == [[1, 0], [0.5, 0.5], [0.5, 0.5]]


def test_cosine_temperature_is_bounded():
    router = make("cosine", 4, 2, noise=0.0)
    router.temperature.data.fill_(9.0)
    x_TD = draw(5, 6)
    assert router(x_TD).logits_TE.abs().max() <= 100
    at, to = x_TD @ router.projection_weight.t(), router.weight
    torch.testing.assert_close(router(x_TD).logits_TE, 100 * torch.cosine_similarity(at[:, None], to[None], dim=2))
    assert float(make("cosine").temperature) == pytest.approx(math.log(2))
    assert float(make("cosine", D=64, E=256).weight.std()) == pytest.approx(0.01, rel=0.1)


def test_token_rounding_golden():
    """Experts with 5, 6, 10 and 3 tokens get 4, 8, 8 and 4."""
    router = square("token-rounding", 4, 1, tile=4)
    ids = [0] * 5 + [1] * 6 + [2] * 10 + [3] * 3
    out = router(with_logits(router, torch.eye(4)[ids] * 3 + on_grid(24, 4, step=1 / 64, seed=1) / 2))
    assert out.load_E.tolist() == [4, 8, 8, 4]
    assert router.eval()(torch.eye(4)[ids]).load_E.tolist() == [5, 6, 10, 3]


@pytest.mark.parametrize(
    "name", [name for name in ROUTERS if "balance" in make(name, 8).loss_weights or name == "prototype"]
)
@pytest.mark.parametrize("E, K", [(8, 2), (64, 4)])
def test_balancing_loss_of_a_uniform_router(name, E, K):
    """1 with f over assignments, first choices and sequences; K with f over tokens (Mixtral)."""
    router = make(name, E, FIXED.get(name, K), **({"noise": 0.0} if name == "cosine" else {})).eval()
    if name == "cosine":
        x_TD = torch.zeros(24, 6)  # all cosines are 0
    else:
        torch.nn.init.zeros_(router.weight)
        x_TD = draw(24, 6)
    found = router(x_TD, given_inputs(24, E, sequences=3)).losses["balance"]
    want = router.top_k if name in ("mixtral", "olmoe", "qwen3") else 1.0
    torch.testing.assert_close(found, torch.tensor(float(want)))


def test_global_balance_is_that_of_the_joined_batch():
    x_TD = draw(20, 6) + 0.3
    for name, options in (
        ("qwen3", {}),
        ("topk", {"global_balance": True}),
        ("gshard", {"global_balance": True, "second": "all"}),
    ):
        router = make(name, 8, **options)
        halves, whole, found = x_TD.split([14, 6]), router(x_TD), []
        seen = [router(half) for half in halves]
        counts = [out.topk_ids_TK[:, : 1 if name == "gshard" else 2].tolist() for out in seen]
        sums = [torch.tensor([*counted(ids, 8), len(ids)], dtype=torch.float32) for ids in counts]
        for r, half in enumerate(halves):
            found.append(router(half, RouterInputs(group=Ranks(r, others=sums[1 - r]))).losses["balance"])
        torch.testing.assert_close((14 * found[0] + 6 * found[1]) / 20, whole.losses["balance"])
        local = (14 * seen[0].losses["balance"] + 6 * seen[1].losses["balance"]) / 20
        assert abs(float(local - whole.losses["balance"])) > 1e-4


# Properties.


@st.composite
def cases(draw_):
    name = draw_(st.sampled_from([name for name in ROUTERS if name != "base"]))
    K = FIXED.get(name, draw_(st.integers(1, 4)))
    E = K * draw_(st.integers(1, 6)) if name == "prototype" else draw_(st.integers(K, 24))
    if name == "topology":
        E = 2 * max(2, E // 2)
    return (
        name,
        E,
        K,
        draw_(st.integers(0, 40)),
        draw_(st.floats(0, 8)),
        draw_(st.integers(0, 99)),
        draw_(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(cases())
def test_properties(case):
    name, E, K, T, skew, seed, training = case
    torch.manual_seed(seed)
    factor = None if name in ("expert-choice", "token-rounding") else 0.8
    moe = nn.MoE(6, 4, E, K, router=name, router_options=OPTIONS.get(name, {}), capacity_factor=factor).train(training)
    if name == "deepseek-v3":
        moe.router.bias_E.copy_(draw(E, seed=seed))
    x_TD, inputs = draw(T, 6, seed=seed) + skew, given_inputs(T, E)
    routed, out = moe.router(x_TD, inputs), moe(x_TD, inputs)
    kept_TK = inside(routed)
    counts_E = out.routing.offsets.diff()
    assert int(routed.load_E.sum()) == int(kept_TK.sum()) and torch.equal(routed.load_E, out.load_E)
    assert int(out.dropped) == int(out.load_E.sum() - counts_E.sum()) and int(out.nan_tokens) == 0
    if routed.routing is None:
        ids_TK = routed.topk_ids_TK
        assert ids_TK.shape == (T, K) and bool(((ids_TK >= -1) & (ids_TK < E)).all())
        assert routed.load_E.tolist() == counted(ids_TK.tolist(), E)
        if name != "hash":
            assert all(len(set(row)) == K for row in ids_TK.tolist())
        if name not in ("gshard",) or not training:
            assert bool((ids_TK >= 0).all())
        assert factor is None or int(counts_E.max()) <= moe.router.capacity(T, factor)
    weights = routed.topk_weights_TK[kept_TK]
    scale = {"deepseek-v2": 16.0, "deepseek-v3": 2.5}.get(name, 1.0)
    assert bool(((weights >= 0) & (weights <= scale * (1 + 1e-6))).all())
    if name in ("topk", "mixtral", "qwen3", "deepseek-v3", "noisy-topk", "gshard", "swipe", "topology"):
        torch.testing.assert_close(routed.topk_weights_TK.sum(1), torch.full((T,), scale), rtol=1e-5, atol=1e-5)
    assert all(bool(loss.isfinite()) and loss.shape == () for loss in routed.losses.values())
    assert bool(out.y.isfinite().all()) and bool(out.aux_loss.isfinite())


def results(router, x_TD, inputs):
    """Everything a router says, and its gradients, as a flat list."""
    router.zero_grad()
    x_TD = x_TD.detach().requires_grad_()
    out = router(x_TD, inputs)
    if out.topk_weights_TK.requires_grad:
        (out.topk_weights_TK.square().sum() + sum(out.losses.values())).backward()
    tensors = [out.topk_weights_TK, out.topk_ids_TK, out.load_E, out.logits_TE, *out.losses.values(), x_TD.grad]
    return [t.detach() for t in [*tensors, *(p.grad for p in router.parameters())] if t is not None]


@pytest.mark.parametrize("name", ROUTERS)
def test_ten_runs_are_bit_equal(name):
    router, x_TD = make(name, 8), draw(200, 6)
    want = results(router, x_TD, given_inputs(200, 8))
    for _ in range(9):
        for got, first in zip(results(router, x_TD, given_inputs(200, 8)), want, strict=True):
            testing.assert_bit_equal(got, first)


@pytest.mark.parametrize("name", NOISY)
def test_other_keys_draw_other_noise(name):
    router, x_TD = make(name, 8), draw(40, 6)
    run = lambda key, layer=2: results(router, x_TD, RouterInputs(key=key, layer=layer))
    differ = lambda a, b: any(not torch.equal(i, j) for i, j in zip(a, b))
    others = [run(KEY + torch.tensor(step)) for step in ([1, 0, 0], [0, 1, 0], [0, 0, 1])] + [run(KEY, layer=3)]
    assert all(differ(run(KEY), other) for other in others) and not differ(run(KEY), run(KEY))
    torch.manual_seed(0)
    assert differ(run(None), run(None))
    torch.manual_seed(0)
    again = run(None)
    torch.manual_seed(0)
    assert not differ(again, run(None))
    router.eval()
    assert not differ(run(KEY), run(KEY + 1))


@pytest.mark.parametrize("name", NOISY)
def test_noise_is_that_of_the_token_wherever_it_is(name):
    """Two halves with the index of their first token choose as one batch does."""
    router, x_TD = make(name, 8), draw(30, 6)
    whole = router(x_TD, RouterInputs(key=KEY))
    halves = [router(x_TD[s:e], RouterInputs(key=KEY + torch.tensor([0, 0, s]))) for s, e in ((0, 13), (13, 30))]
    assert torch.equal(torch.cat([half.topk_ids_TK for half in halves]), whole.topk_ids_TK)


# Checkpointing and accumulation.


def gradients(module, call):
    module.zero_grad()
    out = call()
    y = out.y if hasattr(out, "y") else out.loss
    (y.square().sum() + out.aux_loss).backward()
    return out, [p.grad for p in module.parameters() if p.grad is not None]


@pytest.mark.parametrize("key", [KEY, None], ids=["key", "no key"])
@pytest.mark.parametrize("name", ROUTERS)
def test_recomputing_the_layer_routes_the_same(name, key):
    torch.manual_seed(0)
    moe = nn.MoE(6, 4, 8, router=name, router_options=OPTIONS.get(name, {}))
    x_TD, inputs = draw(40, 6).requires_grad_(), given_inputs(40, 8, key=key)
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    torch.manual_seed(1)
    want_out, want = gradients(moe, lambda: moe(x_TD, inputs))
    state = torch.get_rng_state()
    torch.manual_seed(1)
    out, got = gradients(moe, lambda: checkpoint(moe, x_TD, inputs, use_reentrant=False))
    assert torch.equal(torch.get_rng_state(), state), "noise is drawn once"
    testing.assert_bit_equal(out.y.detach(), want_out.y.detach(), "y")
    for a, b in zip(got, want, strict=True):
        testing.assert_bit_equal(a, b, "gradient")
    assert torch.equal(out.load_E, want_out.load_E)
    assert all(torch.equal(value, before[name]) for name, value in moe.state_dict().items()), "counters are stored"


def small(name, **changes):
    text = ", ".join(
        f"{key}={value!r}" for key, value in {**OPTIONS, "expert-choice": {"in_decoder": True}}.get(name, {}).items()
    )
    return ModelConfig(
        **{
            **dict(vocab_size=50, d_model=16, num_layers=2, num_heads=2, max_seq_len=64, num_experts=8, d_ff=8),
            **dict(router=name, router_options=text, init_std=0.3),
            **changes,
        }
    )


@pytest.mark.parametrize("key", [KEY, None], ids=["key", "no key"])
@pytest.mark.parametrize("name", ROUTERS)
def test_recomputing_the_model_routes_the_same(name, key):
    torch.manual_seed(0)
    model = nn.Transformer(small(name))
    ids_BS = torch.randint(0, 50, (2, 17), generator=testing.generator())
    inputs = RouterInputs(key=key, domains_T=torch.arange(32) % 8)
    runs = []
    for model.checkpointed in (False, True):
        torch.manual_seed(1)
        with testing.Recorder() as recorder:
            call = lambda: model(ids_BS[:, :-1], ids_BS[:, 1:], inputs=inputs)
            out, grads = gradients(model, call)
        runs.append((out, grads, recorder, torch.get_rng_state()))
    (want_out, want, calls, state), (out, got, again, state_after) = runs
    testing.assert_bit_equal(out.loss.detach(), want_out.loss.detach(), "loss")
    assert torch.equal(out.load_LE, want_out.load_LE) and torch.equal(state, state_after)
    for a, b in zip(got, want, strict=True):
        testing.assert_bit_equal(a, b, "gradient")
    for op in ("topk_gate", "build_routing", "build_routing_from_experts"):
        assert calls.count(op) == again.count(op), f"{op} runs once a layer"


@pytest.mark.parametrize("name", ["topk", "deepseek-v3", "gshard"])
def test_accumulated_losses(name):
    """Halves of whole sequences: means over tokens and sequences are those of the batch, its balance is not."""
    router, x_TD = make(name, 8, **({"second": "all"} if name == "gshard" else {})), draw(24, 6) + 0.4
    whole = router(x_TD, RouterInputs(num_sequences=4)).losses
    halves = [router(half, RouterInputs(num_sequences=2)).losses for half in x_TD.chunk(2)]
    mean = {loss: (halves[0][loss] + halves[1][loss]) / 2 for loss in whole}
    torch.testing.assert_close(mean["z"], whole["z"])
    if name == "deepseek-v3":
        torch.testing.assert_close(mean["balance"], whole["balance"])
    else:
        assert abs(float(mean["balance"] - whole["balance"])) > 1e-4


# What comes in.


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("T", [0, 1])
@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.filterwarnings("ignore:fastmoe.BaseRouter")
def test_few_tokens(name, T, training):
    torch.manual_seed(0)
    moe = nn.MoE(6, 4, 8, router=name, router_options=OPTIONS.get(name, {})).train(training)
    x_TD = draw(T, 6).requires_grad_()
    out = moe(x_TD, given_inputs(T, 8))
    (out.y.sum() + out.aux_loss).backward()
    assert out.y.shape == (T, 6) and bool(out.aux_loss.isfinite()) and bool(out.logit_norm.isfinite())
    assert T or (out.aux_loss == 0 and out.load_E.tolist() == [0] * 8 and out.logit_norm == 0)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in moe.parameters())


@pytest.mark.parametrize("name", [name for name in ROUTERS if name not in ("hash", "domain", "base")])
def test_nan_logits_are_an_error(name):
    for training in (True, False):
        with pytest.raises(ValueError, match=r"fastmoe\.topk_gate: logits_TE must be free of NaN and \+inf.* token 1"):
            one = 1 if name == "prototype" else None  # it gates a row a prototype
            make(name, 8, one).train(training)(torch.tensor([[0.0] * 6, [torch.nan] * 6]))


def test_nan_logits_that_pass_are_counted():
    moe = nn.MoE(6, 4, 2, router="base")
    x_TD = torch.tensor([[0.0] * 6, [torch.nan] * 6])
    assert int(moe(x_TD).nan_tokens) == 1


REPLAYED = [name for name in ROUTERS if name != "expert-choice"]


@pytest.mark.parametrize("name", REPLAYED)
def test_replay(name):
    """Of ids that it chose itself a router says what it said; -1 chooses nothing, and all of them give 0."""
    torch.manual_seed(0)
    moe = nn.MoE(6, 4, 8, router=name, router_options=OPTIONS.get(name, {}), capacity_factor=0.0).eval()
    x_TD, inputs = draw(16, 6), given_inputs(16, 8)
    want = moe(x_TD, inputs)
    got = moe(x_TD, inputs._replace(replay_ids_TK=want.topk_ids_TK))
    assert torch.equal(got.topk_ids_TK, want.topk_ids_TK) and torch.equal(got.load_E, want.load_E)
    torch.testing.assert_close(got.y, want.y)
    torch.testing.assert_close(got.aux_loss, want.aux_loss)
    for training in (True, False):
        ids_TK = want.topk_ids_TK.clone()
        ids_TK[::2] = -1
        ids_TK[1, 0] = -1
        out = moe.train(training)(x_TD.requires_grad_(), inputs._replace(replay_ids_TK=ids_TK))
        (out.y.sum() + out.aux_loss).backward()
        assert (
            torch.equal(out.topk_ids_TK, ids_TK) and bool((out.y[::2] == 0).all()) and bool(x_TD.grad.isfinite().all())
        )
        assert out.load_E.tolist() == counted(ids_TK.tolist(), 8) and int(out.nan_tokens) == 0
        assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in moe.parameters())


def route(name, E=8, K=None, T=3, inputs=None, **options):
    router = make(name, E, K, **options)
    return router(draw(T, router.d_model), inputs or given_inputs(T, E))


BAD = [
    ("TopKRouter: top_k must be in 1..8 (num_experts), got 9", lambda: make("topk", 8, 9)),
    ("TopKRouter: top_k must be in 1..8 (num_experts), got 0", lambda: make_router("topk", 6, 8, 0)),
    ("TopKRouter: top_k must be in 1..1 (num_experts), got 2", lambda: make("topk", 1)),
    ("SwitchRouter: top_k must be 1, got 2", lambda: make("switch", 8, 2)),
    ("GShardRouter: top_k must be 2, got 1", lambda: make("gshard", 8, 1)),
    ("TopKRouter: balance must be 'assignment', 'token', 'sequence' or 'none'", lambda: make("topk", balance="x")),
    ("topk_gate: score must be 'softmax' or 'sigmoid', got 'relu'", lambda: make("topk", score="relu")),
    ("topk_gate: num_groups must be a divisor of 8 (the number of experts), got 3", lambda: make("topk", num_groups=3)),
    ("topk_gate: num_groups must be at least 1, got 0", lambda: make("deepseek-v3", num_groups=0)),
    ("topk_gate: top_groups must be in 1..4 (num_groups), got 5", lambda: make("topk", num_groups=4, top_groups=5)),
    ("topk_gate: group_score must be 'max' or 'top2', got 'sum'", lambda: make("topk", group_score="sum")),
    ("topk_gate: k must be in 1..2 (those of top_groups), got 3", lambda: make("topk", 8, 3, num_groups=4)),
    ("SwitchRouter: jitter must be in [0, 1), got 1", lambda: make("switch", jitter=1)),
    ("GShardRouter: second must be 'random' or 'probability' or 'all', got 'no'", lambda: make("gshard", second="no")),
    ("GShardRouter: slot_multiple must be at least 1, got 0", lambda: make("gshard", slot_multiple=0)),
    ("PrototypeRouter: top_k must be a divisor of 8 (num_experts), got 3", lambda: make("prototype", 8, 3)),
    ("PrototypeRouter: slots must be 'kx' or '1x', got '2x'", lambda: make("prototype", slots="2x")),
    ("HashRouter: vocab_size must be given, the number of token ids, got None", lambda: make("hash", vocab_size=None)),
    ("HashRouter: vocab_size must be at least 1, got 0", lambda: make("hash", vocab_size=0)),
    ("HashRouter: counts_V must be of shape [V] = [4]", lambda: make_hash(4, 2, 1, torch.ones(5, dtype=torch.int64))),
    ("HashRouter: inputs.token_ids_T must be given, got None", lambda: route("hash", inputs=RouterInputs())),
    ("HashRouter: inputs.token_ids_T must be in 0..9, got ", lambda: route("hash", T=30, vocab_size=10)),
    (
        "HashRouter: inputs.token_ids_T must be in 0..49, got -1",
        lambda: route("hash", T=1, inputs=RouterInputs(token_ids_T=torch.tensor([-1]))),
    ),
    (
        "HashRouter: inputs.token_ids_T must be of shape [T] = [3], got [2]",
        lambda: route("hash", inputs=RouterInputs(token_ids_T=torch.tensor([1, 2]))),
    ),
    ("DomainRouter: inputs.domains_T must be given, got None", lambda: route("domain", inputs=RouterInputs())),
    (
        "DomainRouter: inputs.domains_T must be in 0..7, got 8",
        lambda: route("domain", T=2, inputs=RouterInputs(domains_T=torch.tensor([0, 8]))),
    ),
    ("TokenRoundingRouter: tile must be at least 1, got 0", lambda: make("token-rounding", tile=0)),
    ("TokenRoundingRouter: rounding must be 'nearest' or 'up' or 'down'", lambda: make("token-rounding", rounding="x")),
    ("CosineRouter: projection must be at least 1, got 0", lambda: make("cosine", projection=0)),
    ("CosineRouter: noise must be at least 0, got -1", lambda: make("cosine", noise=-1)),
    ("CosineRouter: noise must be positive with cv, got 0", lambda: make("cosine", noise=0, cv=True)),
    ("TopologyRouter: num_nodes must be a divisor of 8 (num_experts), 2 or more experts each, got 3",
     lambda: make("topology", num_nodes=3)),
    ("TopologyRouter: num_nodes must be a divisor", lambda: make("topology", num_nodes=8)),
    ("TopologyRouter: node must be None or in 0..1, got 2", lambda: make("topology", node=2)),
    ("TopologyRouter: fraction must be in [0, 1], got 2", lambda: make("topology", fraction=2)),
    (
        "SwipeRouter: num_experts must be a multiple of 3 (ranks), got 8",
        lambda: route("swipe", inputs=RouterInputs(group=Ranks(0, [0] * 3))),
    ),
    (
        "ExpertChoiceRouter: inputs.replay_ids_TK must be None, as experts choose, got [3, 2]",
        lambda: route("expert-choice", inputs=RouterInputs(replay_ids_TK=torch.zeros(3, 2, dtype=torch.int64))),
    ),
    (
        "TopKRouter: inputs.replay_ids_TK must be of shape [T, K] = [3, 2], got [3, 1]",
        lambda: route("topk", inputs=RouterInputs(replay_ids_TK=torch.zeros(3, 1, dtype=torch.int64))),
    ),
    ("TopKRouter: x_TD must be of shape [T, D] = [any, 6], got [3, 7]", lambda: make("topk")(draw(3, 7))),
    (
        "sequence_balance_loss: num_sequences must be a divisor of 3 (tokens), got 2",
        lambda: route("deepseek-v3", inputs=RouterInputs(num_sequences=2)),
    ),
    ("make_router: name must be one of topk, mixtral", lambda: make_router("best", 6, 8)),
    (
        "make_router: router 'switch': got an unexpected keyword argument 'noise'",
        lambda: make_router("switch", 6, 8, noise=1),
    ),
    ("router_options: must be like", lambda: parse_options("noise")),
    ("router_options: must be like", lambda: parse_options("noise=0.5) or f(b=2")),
    ("Transformer: router must choose without seeing later tokens, got 'expert-choice'",
     lambda: nn.Transformer(small("expert-choice", router_options=""))),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), BAD, ids=[message for message, _ in BAD])
def test_bad_input(message, call):
    with pytest.raises(ValueError, match=re.escape("fastmoe." + message)):
        call()


def test_a_hash_table_shorter_than_the_vocabulary():
    model = nn.Transformer(small("hash", router_options="vocab_size=10"))
    with pytest.raises(ValueError, match=r"fastmoe\.HashRouter: inputs\.token_ids_T must be in 0\.\.9, got 12"):
        model(torch.tensor([[3, 12]]))
    assert nn.Transformer(small("hash")).layers[0].feed_forward.router.table_VK.shape == (50, 1)


def test_options_from_text():
    assert parse_options("noise=0.5, cv=True, second='all'") == {"noise": 0.5, "cv": True, "second": "all"}
    assert parse_options("") == {}
    model = nn.Transformer(small("cosine", router_options="projection=3, noise=0.5"))
    assert model.layers[1].feed_forward.router.projection_weight.shape == (3, 16)


@pytest.mark.parametrize("name", ROUTERS)
def test_compiles_whole(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    moe = nn.MoE(6, 4, 8, router=name, router_options=OPTIONS.get(name, {}))
    x_TD, inputs = draw(16, 6), given_inputs(16, 8)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    (want_out, want), (out, got) = (gradients(moe, lambda call=call: call(x_TD, inputs)) for call in (moe, compiled))
    assert torch.equal(out.load_E, want_out.load_E)
    for a, b in zip([out.y, *got], [want_out.y, *want], strict=True):
        torch.testing.assert_close(a, b)
