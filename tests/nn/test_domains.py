import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmoe import nn, optim
from fastmoe.config import ModelConfig
from fastmoe.testing import draw


class Chains(torch.nn.Module):
    """A model whose next token depends on the last and the domain alone: log_DVV, up to a constant a row."""

    def __init__(self, log_DVV):
        super().__init__()
        self.register_buffer("log_DVV", log_DVV)

    def forward(self, ids_BS, inputs):
        (domain,) = set(inputs.domains_T.tolist())
        assert inputs.domains_T.shape == (ids_BS.numel(),)
        return SimpleNamespace(logits_BSV=self.log_DVV[domain][ids_BS])


def chains(D=3, V=7, scale=1.5):
    return draw(D, V, V, scale=scale).log_softmax(-1)


def by_hand(log_DVV, ids_BS, prior_D):
    """(p(next | x_<=t) [B, S, V], p(d | x_<=t) [B, S, D]) with float64 products of probabilities."""
    p_DVV, (B, S) = log_DVV.double().softmax(-1), ids_BS.shape
    posterior_BSD = torch.empty(B, S, len(prior_D), dtype=torch.float64)
    for b in range(B):
        joint_D = prior_D.double().clone()
        for t in range(S):
            if t:
                joint_D = joint_D * p_DVV[:, ids_BS[b, t - 1], ids_BS[b, t]]
            posterior_BSD[b, t] = joint_D / joint_D.sum()
            joint_D = posterior_BSD[b, t]
    return torch.einsum("bsd,dbsv->bsv", posterior_BSD, p_DVV[:, ids_BS]), posterior_BSD


def walk(log_DVV, d, length, seed=0):
    """[1, length], a sequence of domain d."""
    random, ids = torch.Generator().manual_seed(seed), [0]
    while len(ids) < length:
        ids.append(int(torch.multinomial(log_DVV[d, ids[-1]].exp(), 1, generator=random)))
    return torch.tensor([ids])


def uniform(D):
    return torch.full((D,), 1 / D)


@pytest.mark.parametrize("length", [1, 2, 40, 3000])
def test_the_mixture_is_bayes_rule(length):
    log_DVV = chains()
    ids_BS = torch.cat([walk(log_DVV, d, length, seed=d) for d in (0, 2)])
    mixture = nn.DomainMixture(Chains(log_DVV + 5), num_domains=3)
    for _ in range(2):  # a uniform prior stays
        log_probs_BSV, posterior_BSD = mixture(ids_BS)
        assert log_probs_BSV.dtype == posterior_BSD.dtype == torch.float32
        p_BSV, wanted_BSD = by_hand(log_DVV, ids_BS, uniform(3))
        torch.testing.assert_close(log_probs_BSV.double(), p_BSV.log(), rtol=0, atol=3e-6)
        torch.testing.assert_close(posterior_BSD.double(), wanted_BSD, rtol=2e-5, atol=1e-7)
    if length > 2:
        assert posterior_BSD[0, -1].argmax() == 0 and posterior_BSD[1, -1].argmax() == 2
    assert torch.equal(posterior_BSD[:, 0], uniform(3).expand(2, 3))


def test_millions_of_nats_below_zero():
    """All tokens are 1s, of log-probability -1000 - d / 1024 in domain d: the evidence has no room in float32."""
    log_DVV = torch.zeros(3, 2, 2)
    log_DVV[:, :, 1] = -1000 - torch.arange(3)[:, None] / 1024
    out = nn.DomainMixture(Chains(log_DVV), num_domains=3)(torch.ones(1, 4001, dtype=torch.int64))
    wanted_SD = torch.softmax(-torch.arange(4001)[:, None] * torch.arange(3) / 1024, 1)
    torch.testing.assert_close(out.posterior_BSD[0], wanted_SD, rtol=1e-5, atol=1e-7)
    assert (out.log_probs_BSV[..., 0].abs() < 1e-5).all()
    wanted_S = -1000 + (wanted_SD * torch.exp(-torch.arange(3) / 1024)).sum(1).log()
    torch.testing.assert_close(out.log_probs_BSV[0, :, 1], wanted_S, rtol=0, atol=2e-4)


def test_a_domain_that_cannot_write_a_token_is_ruled_out():
    log_DVV = chains()
    log_DVV[0, :, 1] = -torch.inf
    ids_BS = torch.tensor([[2, 3, 1, 4, 5]])
    p_BSV, posterior_BSD = by_hand(log_DVV, ids_BS, uniform(3))
    out = nn.DomainMixture(Chains(log_DVV), num_domains=3)(ids_BS)
    torch.testing.assert_close(out.log_probs_BSV.double(), p_BSV.log(), rtol=0, atol=3e-6)
    assert (out.posterior_BSD[0, 2:, 0] == 0).all() and (posterior_BSD[0, 2:, 0] == 0).all()


def test_an_updating_prior_is_a_decayed_average_of_posteriors():
    log_DVV, prior_D = chains(), uniform(3).double()
    mixture = nn.DomainMixture(Chains(log_DVV), "updating", num_domains=3, rate=0.2)
    for block in range(4):
        ids_BS = torch.cat([walk(log_DVV, (0, 0, 1, 2)[block], 6, seed=10 * block + b) for b in range(2)])
        p_BSV, posterior_BSD = by_hand(log_DVV, ids_BS, prior_D)
        out = mixture(ids_BS)
        torch.testing.assert_close(out.log_probs_BSV.double(), p_BSV.log(), rtol=0, atol=3e-6)
        torch.testing.assert_close(out.posterior_BSD.double(), posterior_BSD, rtol=1e-5, atol=1e-7)
        prior_D = 0.8 * prior_D + 0.2 * posterior_BSD.mean((0, 1))
        torch.testing.assert_close(mixture.log_prior_D.exp(), prior_D, rtol=1e-6, atol=0)
    other = nn.DomainMixture(Chains(log_DVV), "updating", num_domains=3)
    other.load_state_dict(mixture.state_dict())
    assert torch.equal(other.log_prior_D, mixture.log_prior_D)


def test_an_updating_prior_rules_no_domain_out_for_good():
    log_DVV = chains(D=2, scale=4.0)
    mixture = nn.DomainMixture(Chains(log_DVV), "updating", num_domains=2, rate=0.9)
    block = walk(log_DVV, 0, 30)
    for _ in range(500):
        mixture(block)
    assert -math.inf < mixture.log_prior_D[1] < -1000  # 0 as a float64 probability
    assert mixture(walk(log_DVV, 1, 4000)).posterior_BSD[0, -1, 1] > 0.99


def test_a_cached_prior_is_estimated_once():
    log_DVV = chains()
    mixture = nn.DomainMixture(Chains(log_DVV), "cached", num_domains=3)
    with pytest.raises(ValueError, match="the cached prior must be estimated before use"):
        mixture(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="blocks must be at least one, got 0"):
        mixture.estimate([])
    updating = nn.DomainMixture(Chains(log_DVV), "updating", num_domains=3)
    blocks = [walk(log_DVV, d, 9, seed=d) for d in (1, 1, 0)]
    for _ in range(2):  # each time anew
        mixture.estimate(iter(blocks))
    for block in blocks:
        updating(block)
    assert torch.equal(mixture.log_prior_D, updating.log_prior_D)
    prior_D, ids_BS = mixture.log_prior_D.exp(), walk(log_DVV, 2, 12)
    for _ in range(2):
        p_BSV, posterior_BSD = by_hand(log_DVV, ids_BS, prior_D)
        out = mixture(ids_BS)
        torch.testing.assert_close(out.log_probs_BSV.double(), p_BSV.log(), rtol=0, atol=3e-6)
    assert torch.equal(mixture.log_prior_D.exp(), prior_D)
    with pytest.raises(ValueError, match="prior must be 'cached' for an estimate, got 'updating'"):
        updating.estimate(blocks)


def test_no_tensor_holds_all_domains_distributions():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf))])
            return out

    log_DVV = chains(D=5, V=11)
    with Largest() as largest:
        nn.DomainMixture(Chains(log_DVV), num_domains=5)(torch.zeros(4, 50, dtype=torch.int64))
    assert largest.numel == 4 * 50 * 11


def test_bad_mixtures():
    for options, message in [
        ({"prior": "none"}, "prior must be 'uniform' or 'updating' or 'cached', got 'none'"),
        ({}, "num_domains must be given for a model without router 'domain'"),
        ({"num_domains": 0}, "num_domains must be at least 1"),
        ({"num_domains": 3, "rate": 1.0}, r"rate must be in \(0, 1\), got 1.0"),
    ]:
        with pytest.raises(ValueError, match=f"fastmoe.DomainMixture: {message}"):
            nn.DomainMixture(Chains(chains()), **options)
    with pytest.raises(ValueError, match=r"ids_BS must be of shape \[B, S\]"):
        nn.DomainMixture(Chains(chains()), num_domains=3)(torch.zeros(3, dtype=torch.int64))


CONFIG = ModelConfig(
    vocab_size=17, d_model=16, num_layers=2, num_heads=2, d_ff=12, num_experts=3, router="domain", bias=True
)


def transformer(config=CONFIG, **changes):
    torch.manual_seed(0)
    model = nn.Transformer(ModelConfig(**{**vars(config), **changes})).eval()
    for i, param in enumerate(model.parameters()):
        if param.ndim == 2 and param.shape[0] == 3:  # biases are 0 at first
            param.data.copy_(draw(*param.shape, seed=i))
    return model


def test_the_mixture_of_a_transformer():
    model, ids_BS = transformer(), torch.randint(17, (2, 9))
    logs = [
        model(ids_BS, inputs=nn.RouterInputs(domains_T=torch.full((18,), d))).logits_BSV.double().log_softmax(-1)
        for d in range(3)
    ]
    joint_BSD = torch.stack(
        [torch.nn.functional.pad(p[:, :-1].gather(2, ids_BS[:, 1:, None])[..., 0].cumsum(1), (1, 0)) for p in logs], -1
    )
    wanted_BSV = (torch.stack(logs, -1).exp() * joint_BSD.softmax(-1)[:, :, None]).sum(-1).log()
    out = nn.DomainMixture(model)(ids_BS)
    torch.testing.assert_close(out.log_probs_BSV.double(), wanted_BSV, rtol=0, atol=3e-6)
    torch.testing.assert_close(out.posterior_BSD.double(), joint_BSD.softmax(-1), rtol=1e-5, atol=0)
    assert not out.log_probs_BSV.requires_grad


def outputs(model, ids_BS):
    domains_T = torch.arange(ids_BS.numel()) % 3
    return model(ids_BS, inputs=nn.RouterInputs(domains_T=domains_T)).logits_BSV


def equal_states(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("copy_of", [None, 1, "mean"])
def test_adding_an_expert_leaves_the_others_and_removing_it_is_the_identity(copy_of):
    model, ids_BS = transformer(), torch.randint(17, (2, 9))
    before, kept = outputs(model, ids_BS), copy.deepcopy(model)
    nn.add_expert(model, copy_of)
    assert torch.equal(outputs(model, ids_BS), before) and model.config.num_experts == 4
    new = nn.Transformer(model.config).eval()
    new.load_state_dict(model.state_dict())
    with torch.no_grad():
        fourth = nn.RouterInputs(domains_T=torch.full((18,), 3))
        out = model(ids_BS, inputs=fourth)
        assert torch.equal(new(ids_BS, inputs=fourth).logits_BSV, out.logits_BSV)
        assert out.load_LE.tolist() == [[0, 0, 0, 18]] * 2
        if copy_of == 1:
            copied = nn.RouterInputs(domains_T=torch.full((18,), 1))
            assert torch.equal(kept(ids_BS, inputs=copied).logits_BSV, out.logits_BSV)
    for block, old in zip(model.layers, kept.layers):
        for name, param in block.feed_forward.experts.named_parameters():
            was = dict(old.feed_forward.experts.named_parameters())[name]
            assert param.requires_grad and param.shape[0] == 4 and torch.equal(param[:3], was)
            if copy_of is None and "proj" in name:
                std = 0.02 if name == "gate_up_proj" else 0.02 / 2
                assert 0.7 * std < param[3].std() < 1.3 * std
            elif copy_of is None:
                assert (param[3] == 0).all()
            elif copy_of == "mean":
                torch.testing.assert_close(param[3], was.double().mean(0).float())
    assert list(map(id, model.parameters())) != list(map(id, kept.parameters()))
    nn.remove_expert(model, 3)
    assert equal_states(model, kept) and torch.equal(outputs(model, ids_BS), before) and model.config == kept.config


def test_removing_an_expert_moves_the_next_ones_down():
    model, ids_BS = transformer(), torch.randint(17, (2, 9))
    second = model(ids_BS, inputs=nn.RouterInputs(domains_T=torch.full((18,), 2))).logits_BSV
    nn.remove_expert(model, 1)
    now = model(ids_BS, inputs=nn.RouterInputs(domains_T=torch.full((18,), 1))).logits_BSV
    assert torch.equal(now, second) and model.config.num_experts == 2
    with pytest.raises(ValueError, match=r"domains_T must be in 0\.\.1, got 2"):
        outputs(model, ids_BS)


def test_frozen_trains_the_new_expert_alone():
    model = transformer()
    nn.add_expert(model, 0, frozen=True)
    before = copy.deepcopy(model.state_dict())
    optimizer = optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    for step in range(3):
        ids_BS = torch.randint(17, (2, 10), generator=torch.Generator().manual_seed(step))
        inputs = nn.RouterInputs(domains_T=torch.arange(18) % 4)
        optimizer.zero_grad()
        model(ids_BS[:, :-1], ids_BS[:, 1:], inputs=inputs).loss.backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        if ".experts." in name:
            assert torch.equal(value[:3], before[name][:3]) and not torch.equal(value[3], before[name][3])
        else:
            assert torch.equal(value, before[name])


LEARNED = [
    ("topk", {"bias_rate": 0.1}),
    ("mixtral", {}),
    ("noisy-topk", {}),
    ("switch", {}),
    ("gshard", {}),
    ("swipe", {}),
    ("base", {}),
    ("expert-choice", {}),
    ("token-rounding", {}),
    ("cosine", {"projection": 6}),
]


@pytest.mark.parametrize(("router", "options"), LEARNED)
@pytest.mark.parametrize("copy_of", [None, 1, "mean"])
def test_learned_routers_grow_and_shrink_by_rows(router, options, copy_of):
    torch.manual_seed(0)
    moe = nn.MoE(8, 6, 5, router=router, router_options=options).eval()
    if options.get("bias_rate"):
        moe.router.update(torch.arange(5))
    kept, x_TD = copy.deepcopy(moe), draw(20, 8)
    nn.add_expert(moe, copy_of)
    rows = [name for name, value in kept.router.state_dict().items() if value.shape[:1] == (5,)]
    assert rows
    for name, value in moe.router.state_dict().items():
        was = kept.router.state_dict()[name]
        assert torch.equal(value[:5] if name in rows else value, was)
        if name in rows and copy_of is not None:
            torch.testing.assert_close(value[5], was[1] if copy_of == 1 else was.mean(0))
    new = nn.MoE(8, 6, 6, router=router, router_options=options).eval()
    new.load_state_dict(moe.state_dict())
    for once in (moe, new):
        assert torch.equal(once(x_TD).y, moe(x_TD).y) and once(x_TD).load_E.shape == (6,)
    nn.remove_expert(moe, 5)
    assert equal_states(moe, kept) and torch.equal(moe(x_TD).y, kept(x_TD).y)
    nn.remove_expert(moe, 1)
    for name in rows:
        assert torch.equal(moe.router.state_dict()[name], kept.router.state_dict()[name][[0, 2, 3, 4]])


def test_experts_that_are_modules():
    moe = nn.MoE(8, 6, 2, router="domain", experts=lambda D, F: torch.nn.Linear(D, D))
    nn.add_expert(moe, 1, frozen=True)
    x_TD, trained = draw(6, 8), [p.requires_grad for p in moe.parameters()]
    two, three = (moe(x_TD, nn.RouterInputs(domains_T=torch.full((6,), d))).y for d in (1, 2))
    assert torch.equal(two, three) and trained == [False] * 4 + [True] * 2
    nn.remove_expert(moe, 0)
    assert len(moe.experts) == moe.num_experts == 2
    with pytest.raises(ValueError, match="copy_of must be a number where experts are modules, got 'mean'"):
        nn.add_expert(moe, "mean")


@pytest.mark.parametrize(
    ("router", "options"),
    [
        ("hash", {"vocab_size": 9}),
        ("prototype", {}),
        ("topology", {}),
        ("deepseek-v3", {}),
        ("topk", {"num_groups": 2}),
    ],
)
def test_routers_of_fixed_size_are_refused(router, options):
    moe = nn.MoE(8, 6, 4, router=router, router_options=options)
    kept = copy.deepcopy(moe)
    for change in (lambda: nn.add_expert(moe, 0), lambda: nn.remove_expert(moe, 0)):
        with pytest.raises(
            ValueError, match=r"_expert: model must be of routers that are resizable, without groups, got"
        ):
            change()
    assert equal_states(moe, kept)


def test_bad_changes():
    moe = nn.MoE(8, 6, 3, router="domain")
    for copy_of in (3, -1, "median", True):
        with pytest.raises(ValueError, match=r"add_expert: copy_of must be in 0\.\.2, 'mean' or None, got"):
            nn.add_expert(moe, copy_of)
    with pytest.raises(ValueError, match=r"remove_expert: index must be in 0\.\.2, got 3"):
        nn.remove_expert(moe, 3)
    with pytest.raises(ValueError, match="model must be an MoE layer or a model with some, got Linear"):
        nn.add_expert(torch.nn.Linear(2, 2))
    nn.remove_expert(moe, 0)
    nn.remove_expert(moe, 0)
    with pytest.raises(ValueError, match=r"must be of more than 1 experts \(top_k\), got 1"):
        nn.remove_expert(moe, 0)
