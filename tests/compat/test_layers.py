import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import fastmoe.compat.fmoe as fmoe
from fastmoe.compat.fmoe.gates import GShardGate, NaiveGate, NoisyGate, SwitchGate, ZeroGate
from fastmoe.compat.fmoe.layers import mark_module_parallel_comm
from fastmoe.compat.fmoe.linear import grouped_linear


class Fixed(nn.Module):
    """A gate that sends every token where it is told, with weights that learn."""

    def __init__(self, idx, score=None):
        super().__init__()
        self.idx = idx
        self.score = nn.Parameter(torch.rand(idx.shape) if score is None else score)

    def __call__(self, *args):  # the factory call of FMoE, then the forward
        return self if not isinstance(args[0], torch.Tensor) else (self.idx, self.score)


class Frozen(nn.Module):
    """What `gate` gives, drawn once, so that layer and oracle see the same draws."""

    def __init__(self, gate):
        super().__init__()
        self.gate, self.state = gate, torch.get_rng_state()

    def forward(self, x_TD):
        torch.set_rng_state(self.state)
        return self.gate(x_TD)


def mlp(E=4, K=2, D=16, F=32, gate=NaiveGate, **options):
    torch.manual_seed(0)
    layer = fmoe.FMoETransformerMLP(E, D, F, nn.GELU(), top_k=K, gate=gate, **options)
    for name, parameter in layer.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return layer


def oracle(layer, x_TD):
    """One token and one slot at a time."""
    idx_TK, score_TK = layer.gate(x_TD)
    rows = []
    for t in range(x_TD.shape[0]):
        y_D = torch.zeros(x_TD.shape[1], dtype=x_TD.dtype) * x_TD[t].sum()
        for e, w in zip(idx_TK[t].tolist(), score_TK[t]):
            if e >= 0:
                up, down = layer.experts[e].htoh4, layer.experts[e].h4toh
                hidden_F = layer.experts[e].activation(linear(x_TD[t], up.weight[0], up.bias[0]))
                y_D = y_D + w * linear(hidden_F, down.weight[0], down.bias[0])
        rows.append(y_D)
    return torch.stack(rows)


def results(layer, forward, x_TD, dy_TD):
    layer.zero_grad()
    x_TD = x_TD.clone().requires_grad_()
    y_TD = forward(x_TD)
    y_TD.backward(dy_TD)
    zero = torch.zeros(())
    return {
        "y": y_TD.detach(),
        "dx": x_TD.grad if x_TD.grad is not None else zero,
        **{name: zero if p.grad is None else p.grad.clone() for name, p in layer.named_parameters()},
    }


def same(layer, T=13, tolerance=1e-5, forward=oracle):
    layer.gate = Frozen(layer.gate)
    dtype = next(layer.parameters()).dtype
    D = layer.d_model
    x_TD, dy_TD = torch.randn(T, D, dtype=dtype), torch.randn(T, D, dtype=dtype)
    got = results(layer, layer, x_TD, dy_TD)
    want = results(layer, lambda x_TD: forward(layer, x_TD), x_TD, dy_TD)
    for name in want:
        assert (got[name] - want[name]).abs().max() <= tolerance * max(1, want[name].abs().max()), name
    return got


@pytest.mark.parametrize("E, K", [(1, 1), (4, 1), (4, 2), (8, 3), (3, 3)])
@pytest.mark.parametrize("D, F", [(16, 32), (5, 7)])
def test_y_dx_dw_dgate_equal_the_loop(E, K, D, F):
    got = same(mlp(E, K, D, F))
    assert (got["gate.gate.gate.weight"].abs().max() > 1e-6) == (K > 1)  # softmax over one choice is constant


@pytest.mark.parametrize("gate, K", [(NoisyGate, 3), (ZeroGate, 2), (GShardGate, 2), (SwitchGate, 1)])
def test_every_gate_equals_the_loop(gate, K):
    same(mlp(8, K, gate=gate))


@pytest.mark.parametrize("D, F", [(16, 32), (5, 7)])
@pytest.mark.parametrize(
    "idx",
    [
        torch.full((6, 2), 3),
        torch.tensor([[0, 3]] * 6),
        torch.full((6, 2), -1),
        torch.tensor([[0, -1], [-1, 2], [3, 3], [-1, -1], [2, 0], [1, 1]]),
    ],
    ids=["one", "empty", "dropped", "mixed"],
)
def test_skewed_and_dropped_routes(idx, D, F):
    got = same(mlp(4, D=D, F=F, gate=Fixed(idx)), T=6)
    for e in range(4):
        if not (idx == e).any():
            assert (got[f"experts.{e}.htoh4.weight"] == 0).all() and (got[f"experts.{e}.h4toh.bias"] == 0).all()
    assert all(torch.isfinite(value).all() for value in got.values())


def test_float64_and_runs_repeat_bit_for_bit():
    same(mlp().double(), tolerance=1e-12)
    layer = mlp(8, 3)
    x_TD, dy_TD = torch.randn(40, 16), torch.randn(40, 16)
    runs = [results(layer, layer, x_TD, dy_TD) for _ in range(3)]
    assert all(torch.equal(run[name], runs[0][name]) for run in runs for name in run)


def test_grouped_linear_gradients():
    ends_E = torch.tensor([2, 2, 5], dtype=torch.int32)
    shapes = (7, 4), (3, 2, 4), (3, 2)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *args: grouped_linear(*args, ends_E), inputs)
    y_RF = grouped_linear(*inputs, ends_E)
    assert (y_RF[5:] == 0).all()
    with pytest.raises(TypeError, match="inp must be torch.float64 like the weight, got torch.float32"):
        grouped_linear(inputs[0].float(), *inputs[1:], ends_E)


@pytest.mark.parametrize("D, F", [(8, 16), (3, 5)])
def test_fmoe_linear(D, F):
    module = fmoe.FMoELinear(3, D, F)
    nn.init.normal_(module.bias)
    x_RD = torch.randn(6, D)
    y_RF = module(x_RD, torch.tensor([4, 0, 2]))
    for rows, e in ((slice(0, 4), 0), (slice(4, 6), 2)):
        torch.testing.assert_close(y_RF[rows], linear(x_RD[rows], module.weight[e], module.bias[e]))
    assert fmoe.FMoELinear(2, D, F, bias=False).bias is None
    assert fmoe.FMoELinear(2, D, F, bias=False)(x_RD, torch.tensor([3, 3])).shape == (6, F)


def test_initial_weights_have_the_right_bound():
    weight = fmoe.FMoELinear(4, 64, 256).weight
    assert 0.9 / 8 < weight.abs().max() <= 1 / 8
    old = type("Old", (fmoe.FMoELinear,), {"upstream_init": True})(4, 64, 256).weight
    assert 0.9 / 128 < old.abs().max() <= 1 / 128


def test_no_tokens_and_other_shapes():
    layer = mlp()
    y = layer(torch.zeros(0, 16, requires_grad=True))
    y.sum().backward()
    assert y.shape == (0, 16) and all((expert.htoh4.weight.grad == 0).all() for expert in layer.experts)
    x_BSD = torch.randn(2, 3, 16)
    assert torch.equal(layer(x_BSD), layer(x_BSD.view(6, 16)).view(2, 3, 16))


def test_autocast_and_half_precision():
    layer, x_TD = mlp(), torch.randn(9, 16)
    want_TD = layer(x_TD)
    with torch.autocast("cpu", torch.bfloat16):
        got_TD = layer(x_TD)
    assert got_TD.dtype == torch.bfloat16
    torch.testing.assert_close(got_TD.float(), want_TD, atol=0.05, rtol=0.05)
    half = copy.deepcopy(mlp()).bfloat16()
    half.gate = Fixed(torch.tensor([[0, 1]] * 9), torch.full((9, 2), 0.5))
    assert half(x_TD.bfloat16()).dtype == torch.bfloat16


def test_state_dict_keys_and_communication_tags():
    layer = mlp(2, D=8, F=12, expert_dp_comm="dp")
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {
        "gate.gate.weight": (2, 8),
        "gate.gate.bias": (2,),
        **{f"experts.{e}.htoh4.weight": (1, 12, 8) for e in range(2)},
        **{f"experts.{e}.htoh4.bias": (1, 12) for e in range(2)},
        **{f"experts.{e}.h4toh.weight": (1, 8, 12) for e in range(2)},
        **{f"experts.{e}.h4toh.bias": (1, 8) for e in range(2)},
    }
    assert {p.dp_comm for p in layer.experts.parameters()} == {"dp"} and layer.gate.gate.weight.dp_comm == "gate"
    other = mlp(2, D=8, F=12)
    other.load_state_dict(layer.state_dict())
    x_TD = torch.randn(3, 8)
    assert torch.equal(other(x_TD), layer(x_TD))
    bare = fmoe.FMoE(2, 8, top_k=1)
    bare.mark_parallel_comm()
    mark_module_parallel_comm(other, "world")
    assert other.gate.gate.bias.dp_comm == "world"


class Custom(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.linear, self.seen = nn.Linear(d_model, d_model), []

    def forward(self, inp, fwd_expert_count):
        self.seen.append((fwd_expert_count.tolist(), inp.shape[0], fwd_expert_count.device.type))
        return self.linear(inp).tanh()


def custom_oracle(layer, x_TD):
    idx_TK, score_TK = layer.gate(x_TD)
    rows = [
        sum([w * layer.experts[e].linear(x_D).tanh() for e, w in zip(ids, ws) if e >= 0], 0 * x_D)
        for x_D, ids, ws in zip(x_TD, idx_TK.tolist(), score_TK)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("expert", [Custom, [Custom, Custom, Custom], [lambda D: Custom(D)] * 3, None])
def test_custom_experts(expert):
    torch.manual_seed(0)
    expert = [Custom(16) for _ in range(3)] if expert is None else expert
    idx = torch.tensor([[0, -1], [2, 0], [-1, -1], [0, 2], [0, 0]])
    layer = fmoe.FMoE(3, 16, gate=Fixed(idx), expert=expert)
    same(layer, T=5, forward=custom_oracle)
    assert [module.seen[0] for module in layer.experts] == [([5], 5, "cpu"), ([0], 0, "cpu"), ([2], 2, "cpu")]


def test_expert_fn_overridden_sees_only_routed_rows():
    class Doubling(fmoe.FMoE):
        def expert_fn(self, inp, fwd_expert_count):
            assert inp.shape[0] == int(fwd_expert_count.sum()) == 3
            return inp * 2

    idx, score = torch.tensor([[0, -1], [1, 0]]), torch.tensor([[0.5, 9.0], [0.25, 1.0]])
    x_TD = torch.randn(2, 4)
    y_TD = Doubling(2, 4, gate=Fixed(idx, score))(x_TD)
    torch.testing.assert_close(y_TD, x_TD * 2 * torch.tensor([[0.5], [1.25]]))
    with pytest.raises(NotImplementedError, match="expert must be given, experts set or expert_fn overridden"):
        fmoe.FMoE(2, 4)(x_TD)


def test_fused_experts_set_by_a_subclass():
    class Fused(fmoe.FMoE):
        def __init__(self):
            super().__init__(4, 16, top_k=2)
            self.experts = fmoe.transformer._Expert(4, 16, 32, nn.functional.relu)

    def loop(layer, x_TD):
        up, down = layer.experts.htoh4, layer.experts.h4toh
        idx_TK, score_TK = layer.gate(x_TD)
        one = lambda x, e: linear(linear(x, up.weight[e], up.bias[e]).relu(), down.weight[e], down.bias[e])
        return torch.stack([sum(w * one(x, e) for e, w in zip(*pair)) for x, pair in zip(x_TD, zip(idx_TK, score_TK))])

    torch.manual_seed(0)
    same(Fused(), forward=loop)


def test_experts_run_together(monkeypatch):
    monkeypatch.setattr(fmoe.transformer._Expert, "forward", None)
    assert mlp(8, 3)(torch.randn(5, 16)).shape == (5, 16)


def test_a_replaced_expert_is_honoured():
    layer = mlp(gate=Fixed(torch.tensor([[1, 0], [-1, 2], [1, 3]])))
    layer.experts[2] = Custom(16)
    x_TD = torch.randn(3, 16)
    want = layer.gate.score[1, 1] * layer.experts[2].linear(x_TD[1]).tanh()
    torch.testing.assert_close(layer(x_TD)[1], want)
    zero = type("Zero", (fmoe.FMoETransformerMLP,), {"expert_fn_single": lambda self, inp, cnt, idx: inp * 0})
    assert (zero(4, 16, 8, gate=layer.gate)(x_TD) == 0).all()


def test_a_nest_of_tensors():
    class Pair(fmoe.FMoE):
        def expert_fn_single(self, inp, fwd_expert_count, idx):
            return {"sum": inp["a"] + inp["b"][:, :2] * idx, "b": inp["b"]}

    idx, score = torch.tensor([[1], [0], [2]]), torch.tensor([[2.0], [1.0], [3.0]])
    gate = Fixed(idx, score)
    layer = Pair(3, 2, top_k=1, gate=lambda *args: lambda nest: gate(nest["a"]), expert=nn.Identity)
    a_T2, b_T5 = torch.randn(3, 2), torch.randn(3, 5)
    out = layer({"a": a_T2, "b": b_T5})
    torch.testing.assert_close(out["sum"], score * (a_T2 + b_T5[:, :2] * idx))
    torch.testing.assert_close(out["b"], score * b_T5)
    with pytest.raises(ValueError, match=r"tensors of one number of rows, got \[2, 3\]"):
        layer({"a": a_T2, "b": b_T5[:2]})


@pytest.mark.parametrize("fill", [7.0, torch.tensor([1.0, 2.0, 3.0, 4.0])])
def test_masked_rows_take_their_fill(fill):
    mask = torch.tensor([[0, 1], [2, 0]])
    gate = Fixed(torch.tensor([[0, 1], [2, 3], [1, 0], [3, 3]]))  # its weights do not sum to 1
    layer = mlp(D=4, F=8, gate=gate, mask=mask, mask_dict={1: fill})
    x_TD = torch.randn(4, 4)
    y_TD = layer(x_TD)
    torch.testing.assert_close(y_TD[1], gate.score[1].sum() * fill * torch.ones(4))
    assert (y_TD[2] == 0).all()
    layer.mask = None
    torch.testing.assert_close(y_TD[[0, 3]], layer(x_TD)[[0, 3]])
    layer.mask, layer.mask_dict = mask, None
    with pytest.raises(ValueError, match="mask must have 4 entries and come with mask_dict, got 4 and None"):
        layer(x_TD)


def test_gate_hook():
    seen = []
    layer = mlp(gate_hook=lambda *args: seen.append(args))
    x_TD = torch.randn(3, 16)
    layer(x_TD)
    idx_TK, score_TK = layer.gate(x_TD)
    ((seen_idx_TK, seen_score_TK, none),) = seen
    assert torch.equal(seen_idx_TK, idx_TK) and torch.equal(seen_score_TK, score_TK) and none is None


def test_ids_and_weights_in_older_shapes():
    idx_TK, score_TK = torch.tensor([[0, 1], [2, 3], [1, 1]]), torch.rand(3, 2)
    x_TD = torch.randn(3, 16)

    def run(idx, score):
        return mlp(gate=lambda *sizes: lambda x_TD: (idx, score))(x_TD)

    want_TD = run(idx_TK, score_TK)
    assert torch.equal(run(idx_TK.view(-1), score_TK[:, None]), want_TD)  # [T*K] and [T, 1, K]
    assert torch.equal(run(idx_TK[:, 0], score_TK[:, :1]), run(idx_TK[:, :1], score_TK[:, :1]))  # [T]: one expert each
    with pytest.raises(ValueError, match=r"ids and weights of shape \[T, K\] with T = 3, got \[3\] and \[3, 2\]"):
        run(idx_TK[:, 0], score_TK)


def test_several_processes_are_refused():
    with pytest.raises(NotImplementedError, match=r"world_size must be 1 \(more is not served yet\), got 2"):
        fmoe.FMoE(2, 4, world_size=2)
    group = type("Group", (), {"size": lambda self: 3})()
    with pytest.raises(NotImplementedError, match=r"slice_group.size\(\) must be 1 .* got 3"):
        fmoe.FMoE(2, 4, slice_group=group)
    with pytest.warns(UserWarning, match="mp_group is deprecated"), pytest.raises(NotImplementedError):
        fmoe.FMoE(2, 4, mp_group=group)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fmoe.FMoE(2, 4, moe_group=group)
    with pytest.raises(NotImplementedError, match="fastmoe.compat.fmoe: megatron is not served yet"):
        _ = fmoe.megatron
