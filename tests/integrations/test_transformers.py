"""Experts modules one by one: which are served, with what result, and how the others are refused."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import activations
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from fastmoe import testing
from fastmoe.integrations import disable, enable
from fastmoe.integrations.transformers import experts_forward, register
from tests.integrations.models import build, close, experts_of, step, tokens

T, D, E, K, WIDTH = 23, 16, 4, 3, 12  # WIDTH: F, which is torch.nn.functional here


class Settings:
    """Stands for the configuration of any model: a setting's value goes by its name."""

    def __init__(self, act="silu", experts=E):
        self._experts_implementation, self.values = "fastmoe", {"latent": None, "intermediate": WIDTH, "hidden_size": D}
        self.values |= {"expert": experts, "hidden_act": act, "activation": act, "limit": 1.5, "alpha": 1.702}

    _experts_implementation = property(lambda self: self.implementation)

    @_experts_implementation.setter
    def _experts_implementation(self, wanted):
        self.implementation = wanted[""] if isinstance(wanted, dict) else wanted

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return next((value for part, value in self.values.items() if part in name), 1.0)


def make(cls, **settings):
    torch.manual_seed(0)
    experts = cls(Settings(**settings))
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.5)
    return experts


def inputs(seed=0):
    return {
        "x": testing.draw(T, D, seed=seed),
        "ids": torch.randint(0, E, (T, K), generator=testing.generator(seed)),
        "weights": testing.draw(T, K, seed=seed + 1).abs(),
    }


def step_of(experts, given, implementation):
    """The output and the gradients of inputs and weights."""
    experts.config._experts_implementation = implementation
    experts.zero_grad()
    out = testing.forward_backward(lambda i: experts(i["x"], i["ids"], i["weights"]), given)
    return out | {name: weight.grad.clone() for name, weight in experts.named_parameters()}


def equals_eager(experts):
    close(step_of(experts, inputs(), "fastmoe"), step_of(experts, inputs(), "eager"))


every_kind = pytest.mark.parametrize(
    "cls, act", [(MixtralExperts, "silu"), (GptOssExperts, None), (NemotronHExperts, "relu2")]
)


@pytest.fixture(autouse=True)
def registered():
    register()


class Plain(nn.Module):
    """Experts as a user would write them, in every layout that the decorator's flags can tell."""

    def __init__(self, config):
        super().__init__()
        rows = WIDTH * (2 if self.gated else 1)
        up, down = ((E, D, rows), (E, WIDTH, D)) if self.across else ((E, rows, D), (E, D, WIDTH))
        self.up_name = "gate_up_proj" if self.gated else "up_proj"
        self.num_experts, self.act_fn = E, config.hidden_act
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(up)))
        self.down_proj = nn.Parameter(torch.empty(down))
        if self.biased:
            self.register_parameter(self.up_name + "_bias", nn.Parameter(torch.empty(E, rows)))
            self.down_proj_bias = nn.Parameter(torch.empty(E, D))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y_TD = torch.zeros_like(hidden_states)
        for e in range(E):
            token, slot = torch.where(top_k_index == e)
            h = hidden_states[token]
            for name in (self.up_name, "down_proj"):
                weight = getattr(self, name)[e]
                h = h @ (weight if self.across else weight.T)
                h = h + getattr(self, name + "_bias")[e] if self.biased else h
                if name != "down_proj":
                    h = self._apply_gate(h) if self.gated else self.act_fn(h)
            y_TD = y_TD.index_add(0, token, h * top_k_weights[token, slot, None])
        return y_TD


def plain(gated=True, across=False, biased=False, **flags):
    cls = type("Experts", (Plain,), {"gated": gated, "across": across, "biased": biased})
    return use_experts_implementation(is_transposed=across, has_bias=biased, has_gate=gated, **flags)(cls)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_every_layout_equals_eager(gated, across, biased):
    experts = make(plain(gated, across, biased), act=nn.SiLU() if gated else nn.ReLU())
    equals_eager(experts)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "act",
    [
        nn.SiLU(),
        F.silu,
        nn.ReLU(),
        F.relu,
        nn.GELU(),
        F.gelu,
        nn.GELU("tanh"),
        nn.Tanh(),
        torch.sigmoid,
        *(name for name in activations.ACT2CLS if name not in ("prelu", "xielu")),
    ],
    ids=str,
)
def test_every_activation_equals_eager_or_is_refused(act, gated):
    act = activations.ACT2FN[act] if isinstance(act, str) else act
    experts = make(plain(gated), act=act)
    name = getattr(act, "__name__", type(act).__name__)
    served = ("silu", "gelu") if gated else ("relu", "gelu")
    others = ("leaky", "relu6", "quick", "clipped")
    if any(part in name.lower() for part in served) and not any(part in name.lower() for part in others):
        equals_eager(experts)
    else:
        wanted = "SiLU or GELU with a gate" if gated else "GELU, ReLU or ReLU squared without a gate"
        with pytest.raises(NotImplementedError, match=f"experts: Experts: act_fn must be {wanted}, got {name}$"):
            experts(*inputs().values())


REFUSED = {  # experts classes of the installed transformers that are not computed, and the flag that says why
    "BeamExperts": "_apply_gate",
    "DeepseekV4Experts": "_apply_gate",
    "Glm5NextTextExperts": "_apply_gate",
    "HYV4Experts": "_apply_gate",
    "Inkling2Experts": "_apply_gate",
    "MuseSparkExperts": "has_post_expert_norm",
    "OpenAIPrivacyFilterExperts": "_apply_gate",
}


def test_every_experts_class_of_transformers_equals_eager_or_is_refused():
    """By its own forward: a class that computes otherwise than its flags tell would show here."""
    served, refused = [], {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in re.findall(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.MULTILINE):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            experts = make(getattr(module, name), act="relu2" if name == "NemotronHExperts" else "silu")
            try:
                equals_eager(experts)
                served.append(name)
            except NotImplementedError as error:
                refused[name] = re.search(rf"fastmoe.experts: {name}: (\w+) must be", str(error))[1]
    assert refused == REFUSED
    assert len(served) >= 58 and {"GptOssExperts", "MiniMaxM3VLExperts", "AriaExperts", "NemotronHExperts"} <= set(
        served
    )


@every_kind
def test_slots_of_other_ranks_add_nothing(cls, act):
    """Expert id == num_experts with weight 0, beside an expert of NaN that a product with 0 would let through.

    Eager's part is taken by experts with one more whose weights are 0: not every class knows such slots.
    """
    experts, wider = make(cls, act=act), make(cls, act=act, experts=E + 1)
    for name, weight in experts.named_parameters():
        weight.data[E - 1] = float("nan")
        getattr(wider, name).data = torch.cat([weight.data, torch.zeros_like(weight.data[:1])])
    experts._is_expert_parallel = True
    given = inputs()
    given["ids"] = torch.tensor([[0, 4, 2], [4, 1, 1], [4, 4, 4], [2, 0, 4]]).repeat(6, 1)[:T]
    given["weights"] = given["weights"].masked_fill(given["ids"] == E, 0)
    got, want = step_of(experts, given, "fastmoe"), step_of(wider, given, "eager")
    close(got, {name: value[:E] if name in dict(wider.named_parameters()) else value for name, value in want.items()})
    off_TK = given["ids"] == E
    assert not got["0"][off_TK.all(1)].any() and not got["dx"][off_TK.all(1)].any()
    assert not got["dweights"][off_TK].any() and not got["down_proj"][E - 1].any()


def test_3d_input_keeps_its_shape_and_frozen_weights_get_no_gradient():
    experts = make(MixtralExperts).requires_grad_(False)
    x_BSD = testing.draw(2, 3, D).requires_grad_()
    ids_BSK, weights_BSK = inputs()["ids"][:6].view(2, 3, K), inputs()["weights"][:6].view(2, 3, K)
    y_BSD = experts(x_BSD, ids_BSK, weights_BSK)
    flat = experts(x_BSD.flatten(0, 1), ids_BSK.flatten(0, 1), weights_BSK.flatten(0, 1))
    assert torch.equal(y_BSD.flatten(0, 1), flat) and y_BSD.shape == x_BSD.shape
    y_BSD.sum().backward()
    assert x_BSD.grad.any() and experts.gate_up_proj.grad is None
    assert experts(x_BSD[:0], ids_BSK[:0], weights_BSK[:0]).shape == (0, 3, D)


@every_kind
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_routing_weights_of_another_dtype(cls, act, dtypes):
    """bfloat16 experts with the float32 weights of a router, and the other way round."""
    experts = make(cls, act=act).to(dtypes[0])
    given = inputs()
    given |= {"x": given["x"].to(dtypes[0]), "weights": given["weights"].to(dtypes[1])}
    got, eager = step_of(experts, given, "fastmoe"), step_of(experts, given, "eager")
    assert (got["0"].dtype, got["dweights"].dtype) == dtypes
    exact = step_of(experts.double(), testing.to_float64(given), "eager")
    for key in exact:
        testing.assert_accurate(got[key], exact[key], eager[key], key)


def test_what_is_saved():
    """enable(save=) reaches the op; the result does not depend on it; disable forgets it."""
    model, ids_BS = build("qwen3_moe"), tokens(2, 9)
    outs, saved = {}, {}
    for save in ("z", "z8", "x"):
        enable(model, save)
        with testing.Recorder() as recorder:
            outs[save] = step(model, ids_BS)
        z_RZ = [out[1] for call, _, out in recorder.calls if call == "moe_mlp"][0]
        saved[save] = z_RZ.numel() * z_RZ.element_size()
        assert torch.equal(outs[save]["logits"], outs["z"]["logits"])
    assert saved == {"z": saved["z"], "z8": saved["z"] // 4, "x": 0}
    close(outs["x"], outs["z"], 1e-6)
    disable(model)
    enable(model)
    assert all(torch.equal(value, outs["z"][key]) for key, value in step(model, ids_BS).items())
    with pytest.raises(ValueError, match="fastmoe.enable: save must be 'z' or 'z8' or 'x', got 'y'"):
        enable(model, "y")


def test_the_report_names_every_layer():
    model = build("deepseek_v3")
    report = enable(model)  # its first layer is dense
    assert [layer.name for layer in report.layers] == ["model.layers.1.mlp.experts"] == list(experts_of(model))
    assert all(layer.backend in str(report) and layer.reason in str(report) for layer in report.layers)
    with testing.backend("experts=reference"):
        assert enable(model).layers[0].backend == "reference"


def test_enable_twice_and_disable_restores_the_first_choice():
    model = build("mixtral", "grouped_mm")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    enable(model)
    assert enable(model).layers and model.config._experts_implementation == "fastmoe"
    disable(model)
    assert model.config._experts_implementation == "grouped_mm"
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    with pytest.raises(ValueError, match="fastmoe.disable: model must have been enabled"):
        disable(model)


def test_a_bare_block_is_switched_too():
    block = nn.Sequential(make(plain(), act=nn.SiLU()))
    block[0].config._experts_implementation = "eager"
    enable(block)
    with testing.Recorder() as recorder:
        block[0](*inputs().values())
    assert recorder.count("moe_mlp") == 1
    disable(block)
    assert block[0].config._experts_implementation == "eager"


def test_flags_that_are_not_honoured_are_refused():
    for flag, value, message in (
        ("is_concatenated", False, "is_concatenated must be True with the default _apply_gate, got False"),
        ("has_post_expert_norm", True, "has_post_expert_norm must be False, got True"),
    ):
        experts = make(MixtralExperts)
        setattr(experts, flag, value)
        with pytest.raises(NotImplementedError, match=rf"enable: experts \(MixtralExperts\): {message}"):
            enable(nn.ModuleDict({"experts": experts}))
    for flag, value, message in (
        ("is_concatenated", True, "is_concatenated must be False, got True"),
        ("alpha", None, "alpha must be a positive number, got None"),
        ("limit", None, "limit must be a positive number, got None"),
        ("limit", 0.0, "limit must be a positive number, got 0.0"),
    ):
        experts = make(GptOssExperts)
        setattr(experts, flag, value)
        with pytest.raises(NotImplementedError, match=f"experts: GptOssExperts: {message}"):
            experts(*inputs().values())
    with pytest.raises(NotImplementedError, match="experts: MixtralExperts: process_group must be None, got 1"):
        experts_forward(make(MixtralExperts), *inputs().values(), process_group=1)


def test_a_gate_of_ones_own_is_refused_and_nothing_is_switched():
    model = build("mixtral")
    last = model.model.layers[1].mlp.experts
    last.__class__ = type("Mine", (type(last),), {"_apply_gate": lambda self, z: z.chunk(2, -1)[0].clamp(max=1)})
    with pytest.raises(NotImplementedError, match=r"enable: model.layers.1.mlp.experts \(Mine\): _apply_gate must be"):
        enable(model)
    assert model.config._experts_implementation == "eager" and not hasattr(model, "_fastmoe_former_experts")
    clamped = make(type("Other", (GptOssExperts,), {"_apply_gate": lambda self, z: z[..., ::2]}))
    with pytest.raises(NotImplementedError, match="experts: Other: _apply_gate must be .* got tests.integrations"):
        clamped(*inputs().values())


@pytest.mark.parametrize("cls, weight", [(MixtralExperts, "gate_up_proj"), (GptOssExperts, "down_proj_bias")])
def test_quantised_weights_are_refused(cls, weight):
    experts = make(cls)
    lower = getattr(experts, weight).detach().to(torch.float8_e4m3fn)
    setattr(experts, weight, nn.Parameter(lower, requires_grad=False))
    message = rf"{weight} must be a float32, bfloat16, float16 or float64 tensor, got torch.float8_e4m3fn"
    with pytest.raises(NotImplementedError, match=message):
        enable(nn.ModuleDict({"experts": experts}))


class TestForwardsThatDoNotAsk:
    """Another library's forward wins over experts_implementation: enable says so instead of reporting a layer."""

    class LigerExperts(nn.Module):  # as liger_kernel.transformers.swiglu.LigerExperts: it takes the class's place
        def __init__(self):
            super().__init__()
            self.gate_up_proj, self.down_proj = nn.Parameter(torch.empty(1)), nn.Parameter(torch.empty(1))

        def forward(self, hidden_states, top_k_index, top_k_weights):
            return hidden_states

    LigerExperts.forward.__module__ = "liger_kernel.transformers.swiglu"
    message = r"enable: model.layers.0.mlp.experts \(.*\): forward must be the one that asks .*"

    def test_liger_in_place_of_the_class(self):
        model = build("mixtral")
        model.model.layers[0].mlp.experts = self.LigerExperts()
        with pytest.raises(NotImplementedError, match=self.message + "Liger computes this layer; apply it with swiglu"):
            enable(model)

    def test_liger_in_place_of_the_method(self):
        model = build("mixtral")
        experts = model.model.layers[0].mlp.experts
        experts.forward = self.LigerExperts.forward.__get__(experts)
        with pytest.raises(NotImplementedError, match=self.message + "Liger computes this layer"):
            enable(model)
        del experts.forward
        assert enable(model).layers

    def test_a_subclass_and_a_module_without_the_decorator(self):
        model = build("mixtral")
        experts = model.model.layers[0].mlp.experts
        experts.__class__ = type("Mine", (type(experts),), {"forward": lambda self, *args: args[0]})
        with pytest.raises(NotImplementedError, match=self.message + "got tests.integrations.test_transformers"):
            enable(model)

    def test_a_hook_around_the_method_is_no_obstacle(self):
        """As expert parallelism and accelerate put around a forward: the registry is still asked inside."""
        model, ids_BS = build("mixtral"), tokens(1, 5)
        want = model(ids_BS).logits
        experts = model.model.layers[0].mlp.experts
        inner = experts.forward
        experts.forward = lambda *args: inner(*args)
        enable(model)
        with testing.Recorder() as recorder:
            close({"logits": model(ids_BS).logits}, {"logits": want})
        assert recorder.count("moe_mlp") == 2

    def test_a_model_without_experts(self):
        with pytest.raises(ValueError, match="fastmoe.enable: model must hold experts modules .* a Linear with none"):
            enable(nn.Linear(2, 2))


def test_experts_without_a_gate_compile_in_one_graph():
    experts = make(NemotronHExperts, act="relu2")
    want = step_of(experts, inputs(), "fastmoe")
    experts.compile(fullgraph=True, backend="aot_eager")
    close(step_of(experts, inputs(), "fastmoe"), want, 1e-6)
    torch._dynamo.reset()


def test_importing_the_door_leaves_transformers_alone():
    code = "import sys, fastmoe.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
