import math

import pytest
import torch

from fastmoe.compat.fmoe import gates
from fastmoe.compat.fmoe.gates import BaseGate, GShardGate, NaiveGate, NoisyGate, SwitchGate, ZeroGate


def make(kind, D=8, E=4, **options):
    torch.manual_seed(0)
    return kind(D, E, 1, **options)


def one_hot(ids, scale=4.0, E=4):
    """Rows that hold `scale` at the id."""
    return torch.nn.functional.one_hot(torch.tensor(ids), E).float() * scale


def identity(gate, E=4):
    """The logits are the input."""
    with torch.no_grad():
        gate.gate.weight.copy_(torch.eye(E))
        gate.gate.bias.zero_()
    return gate


def test_base_gate_keeps_a_loss_until_it_is_taken():
    gate = BaseGate(4, 2)
    assert (gate.tot_expert, gate.has_loss, gate.get_loss()) == (8, False, None)
    gate.set_loss(torch.tensor(3.0))
    assert gate.has_loss and gate.get_loss(clear=False) == 3 and gate.get_loss() == 3 and not gate.has_loss
    with pytest.raises(NotImplementedError, match="BaseGate must define forward"):
        gate(torch.zeros(1, 1))


def test_naive_gate():
    gate, x_TD = make(NaiveGate, top_k=3), torch.randn(5, 8)
    idx_TK, score_TK, logits_TE = gate(x_TD, return_all_scores=True)
    top = logits_TE.topk(3)
    assert torch.equal(idx_TK, top.indices)
    torch.testing.assert_close(score_TK, top.values.softmax(-1))
    torch.testing.assert_close(logits_TE, gate.gate(x_TD))
    assert gate.has_loss and torch.equal(gate.get_loss(), torch.zeros(1))
    assert make(NaiveGate, gate_bias=False).gate.bias is None


def test_zero_gate():
    gate = make(ZeroGate, top_k=3)
    idx_TK, score_TK = gate(torch.randn(5, 8))
    assert (idx_TK == 0).all() and idx_TK.dtype == torch.int64 and torch.equal(score_TK, torch.full((5, 3), 1 / 3))
    assert not gate.has_loss


@pytest.mark.parametrize("training", [True, False])
def test_gshard_capacity_takes_first_choices_first(training):
    gate = identity(make(GShardGate, D=4, random_routing=False, capacity=(1.0, 2.0))).train(training)
    x_TD = 4 * one_hot([0, 0, 0, 0]) + one_hot([1, 1, 2, 2])
    idx_TK, score_TK = gate(x_TD)
    limit = 4 * 2 // 4 if training else 8 * 2 // 4  # ceil(c*T)*K//E
    assert idx_TK[:, 0].tolist() == [0] * limit + [-1] * (4 - limit)
    assert idx_TK[:, 1].tolist() == [1, 1, 2, 2]
    torch.testing.assert_close(score_TK, x_TD.topk(2).values.softmax(-1))


def test_gshard_second_choice_goes_out_in_proportion_to_its_weight():
    gate = identity(make(GShardGate, D=4, capacity=(4.0, 4.0)))
    x_TD = torch.tensor([[2.0, 1.0, -9.0, -9.0]]).repeat(20000, 1)
    idx_TK, score_TK = gate(x_TD)
    share = (idx_TK[:, 1] == 1).float().mean()
    assert abs(share - 2 * score_TK[0, 1]) < 0.015  # 0.538 +- 4 sigma
    assert (idx_TK[:, 0] == 0).all()
    equal = identity(make(GShardGate, D=4, capacity=(4.0, 4.0)))(torch.zeros(100, 4))[0]
    assert (equal[:, 1] == 1).all()


def test_gshard_loss():
    gate = identity(make(GShardGate, D=4))
    gate(one_hot([0, 1, 2, 3], 1e-4))
    torch.testing.assert_close(gate.get_loss(), torch.tensor(1.0), atol=1e-4, rtol=0)  # uniform
    x_TD = torch.randn(9, 4, requires_grad=True)
    gate(x_TD)
    probs_TE, first_T = x_TD.softmax(1), x_TD.argmax(1)
    want = sum((first_T == e).float().mean() * probs_TE[:, e].mean() for e in range(4)) / 4 * 16
    torch.testing.assert_close(gate.get_loss(clear=False), want)
    gate.get_loss().backward()
    assert x_TD.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="fastmoe.compat.GShardGate: topk must be 2, got 3"):
        make(GShardGate, topk=3)


def test_switch_gate():
    gate = identity(make(SwitchGate, D=4, capacity=(1.0, 2.0))).eval()
    x_TD = torch.randn(8, 4)
    idx_T1, score_T1 = gate(x_TD)
    torch.testing.assert_close(score_T1, x_TD.softmax(1).amax(1, keepdim=True))
    assert torch.equal(idx_T1[:, 0], x_TD.argmax(1))  # capacity ceil(2*8/4) = 4 holds them
    crowded = one_hot([2] * 8)
    assert gate(crowded)[0][:, 0].tolist() == [2] * 4 + [-1] * 4
    assert gate.train()(crowded)[0][:, 0].tolist() == [2] * 2 + [-1] * 6
    with pytest.raises(ValueError, match="fastmoe.compat.SwitchGate: topk must be 1, got 2"):
        make(SwitchGate, topk=2)


def test_switch_noise_is_additive_and_bounded():
    gate = identity(make(SwitchGate, D=4, switch_eps=0.5, capacity=(9.0, 9.0))).train()
    x_TD = torch.tensor([[1.0, 0.6, 0.0, 0.0]]).repeat(4000, 1)
    idx_T1, score_T1 = gate(x_TD)
    assert set(idx_T1[:, 0].tolist()) == {0, 1}  # 0.6 + 0.5 beats 1 - 0.5, 0 + 0.5 does not
    low, high = torch.tensor([0.5, 1.1, 0.5, 0.5]).softmax(0)[0], torch.tensor([1.5, 0.1, -0.5, -0.5]).softmax(0)[0]
    assert low <= score_T1[idx_T1 == 0].min() and score_T1[idx_T1 == 0].max() <= high
    assert score_T1.std() > 0.01


def test_switch_loss():
    gate = identity(make(SwitchGate, D=4)).eval()
    gate(one_hot([0, 1, 2, 3], 1e-4))
    torch.testing.assert_close(gate.get_loss(), torch.tensor(1.0), atol=1e-4, rtol=0)  # uniform
    gate.capacity = (0.0, 0.0)  # nothing kept: finite all the same
    gate(torch.randn(5, 4))
    assert gate.get_loss() == 0


def test_noisy_gate_in_evaluation_is_plain_top_k():
    gate, x_TD = make(NoisyGate, top_k=2).eval(), torch.randn(6, 8)
    idx_TK, score_TK = gate(x_TD)
    top = (x_TD @ gate.w_gate).topk(2)
    assert torch.equal(idx_TK, top.indices)
    torch.testing.assert_close(score_TK, top.values.softmax(-1))
    importance_E = torch.zeros(6, 4).scatter(1, idx_TK, score_TK).sum(0)
    torch.testing.assert_close(gate.get_loss(), importance_E.var() / (importance_E.mean() ** 2 + 1e-10))


@pytest.mark.parametrize("K", [1, 2, 4])
def test_noisy_gate_loss_in_training(K):
    gate, x_TD = make(NoisyGate, top_k=K), torch.randn(6, 8)
    state = torch.get_rng_state()
    idx_TK, score_TK = gate(x_TD)
    torch.set_rng_state(state)
    clean_TE = x_TD @ gate.w_gate
    std_TE = torch.nn.functional.softplus(x_TD @ gate.w_noise) + 1e-2
    noisy_TE = clean_TE + torch.randn(6, 4) * std_TE
    assert torch.equal(idx_TK, noisy_TE.topk(K).indices)
    importance_E, load_E = torch.zeros(4), torch.zeros(4)
    for t in range(6):
        order = noisy_TE[t].sort(descending=True).values
        for e in range(4):
            chosen = e in idx_TK[t]
            if chosen:
                importance_E[e] += score_TK[t, idx_TK[t].tolist().index(e)].detach()
            if K == 4:
                load_E[e] += 1
                continue
            above = (clean_TE[t, e] - order[K if chosen else K - 1]) / std_TE[t, e]
            load_E[e] += 0.5 * (1 + math.erf(float(above.detach()) / 2**0.5))
    cv2 = lambda value_E: value_E.var() / (value_E.mean() ** 2 + 1e-10)
    torch.testing.assert_close(gate.get_loss(clear=False), cv2(importance_E) + cv2(load_E))
    if K < 4:
        gate.get_loss().backward()
        assert gate.w_noise.grad.abs().sum() > 0 and torch.isfinite(gate.w_gate.grad).all()


def test_noisy_gate_of_one_expert_and_its_initial_weights():
    gate = make(NoisyGate, E=1, top_k=1)
    gate(torch.randn(3, 8))
    assert gate.get_loss() == 0
    assert set(gate.state_dict()) == {"w_gate", "w_noise"} and gate.w_gate.shape == (8, 1)
    assert 0.9 / 16 < make(NoisyGate, D=256).w_gate.abs().max() <= 1 / 16
    old = make(type("Old", (NoisyGate,), {"upstream_init": True}), D=256)
    assert 0.45 < old.w_gate.abs().max() <= 0.5


@pytest.mark.parametrize("kind", [NaiveGate, GShardGate, SwitchGate, NoisyGate, ZeroGate])
def test_no_tokens(kind):
    gate = make(kind)
    idx_TK, score_TK = gate(torch.zeros(0, 8))
    assert idx_TK.shape == score_TK.shape == (0, 1 if kind is SwitchGate else 2)


def test_gates_to_come_are_named():
    with pytest.raises(NotImplementedError, match="gates: SwipeGate is not served yet"):
        from fastmoe.compat.fmoe.gates import SwipeGate  # noqa: F401
    assert not hasattr(gates, "NoSuchGate")
