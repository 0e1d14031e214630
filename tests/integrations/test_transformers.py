import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.integrations.moe import use_experts_implementation

from fastmoe.integrations import disable, enable
from fastmoe.integrations.transformers import experts_forward, refusal, register

SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
CONFIGS = {
    "mixtral": lambda: MixtralConfig(
        **SIZES, intermediate_size=48, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
    ),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES,
        intermediate_size=64,
        moe_intermediate_size=24,
        num_experts=8,
        num_experts_per_tok=3,
        head_dim=8,
        output_router_logits=True,
    ),
    "olmoe": lambda: OlmoeConfig(
        **SIZES, intermediate_size=24, num_experts=8, num_experts_per_tok=3, eos_token_id=1, output_router_logits=True
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4},
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
}


def build(name, implementation="eager"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), experts_implementation=implementation)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model


def step(model, ids_BS):
    """Logits, loss and the gradient of every parameter."""
    model.zero_grad()
    out = model(ids_BS, labels=ids_BS)
    out.loss.backward()
    return {
        "logits": out.logits.detach(),
        "loss": out.loss.detach(),
        **{name: parameter.grad.clone() for name, parameter in model.named_parameters()},
    }


def close(ours, theirs, tolerance=1e-5):
    for name, want in theirs.items():
        assert (ours[name] - want).abs().max() <= tolerance * want.abs().max(), name


def config_of(implementation="fastmoe"):
    config = Qwen3MoeConfig(hidden_size=16, moe_intermediate_size=8, num_experts=4)
    config._experts_implementation = implementation
    return config


@use_experts_implementation
class Plain(nn.Module):
    """Experts in the default layout, as a user would write them."""

    act = nn.SiLU

    def __init__(self, config):
        super().__init__()
        E, F, D = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.num_experts, self.act_fn = E, self.act()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * F, D))
        self.down_proj = nn.Parameter(torch.randn(E, D, F))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        y_TD = torch.zeros_like(hidden_states)
        for e in range(self.num_experts):
            token, slot = torch.where(top_k_index == e)
            z = self._apply_gate(hidden_states[token] @ self.gate_up_proj[e].T) @ self.down_proj[e].T
            y_TD = y_TD.index_add(0, token, z * top_k_weights[token, slot, None])
        return y_TD


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shape", [(2, 17), (1, 1)])
def test_logits_loss_and_every_gradient_equal_eager(name, shape):
    model = build(name)
    ids_BS = torch.randint(0, 64, shape)
    if shape == (1, 1):  # no next token to learn from
        want = model(ids_BS).logits
        enable(model)
        close({"logits": model(ids_BS).logits}, {"logits": want})
        return
    want = step(model, ids_BS)
    report = enable(model)
    first = 1 if name == "deepseek_v3" else 0  # its first layer is dense
    assert [layer.name for layer in report.layers] == [f"model.layers.{i}.mlp.experts" for i in range(first, 2)]
    assert all(layer.backend in str(report) and layer.reason for layer in report.layers)
    close(step(model, ids_BS), want)
    disable(model)
    assert model.config._experts_implementation == "eager"
    got = step(model, ids_BS)
    assert all(torch.equal(got[key], want[key]) for key in want)


def test_weights_are_shared_and_the_state_dict_round_trips():
    model, other = build("qwen3_moe"), build("qwen3_moe")
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    enable(model)
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    nn.init.normal_(model.model.layers[1].mlp.experts.gate_up_proj)
    other.load_state_dict(model.state_dict())
    ids_BS = torch.randint(0, 64, (1, 9))
    close({"logits": other(ids_BS).logits}, {"logits": model(ids_BS).logits})


def test_by_name_and_through_saved_files(tmp_path):
    register()
    model = build("qwen3_moe", "fastmoe")
    assert model.config._experts_implementation == "fastmoe"
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="fastmoe")
    ids_BS = torch.randint(0, 64, (1, 9))
    assert torch.equal(loaded(ids_BS).logits, model(ids_BS).logits)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._experts_implementation == "grouped_mm"


def test_enable_twice_and_disable_restores_the_first_choice():
    model = build("mixtral", "grouped_mm")
    enable(model)
    assert enable(model).layers
    disable(model)
    assert model.config._experts_implementation == "grouped_mm"
    with pytest.raises(ValueError, match="fastmoe.disable: model must have been enabled"):
        disable(model)


def test_gpt_oss_is_refused_and_left_alone():
    config = GptOssConfig(
        **SIZES, intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, head_dim=8, eos_token_id=1
    )
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with pytest.raises(NotImplementedError, match=r"layers.0.mlp.experts \(GptOssExperts\): is_concatenated must"):
        enable(model)
    assert model.config._experts_implementation == "eager"
    register()
    model.set_experts_implementation("fastmoe")
    with pytest.raises(NotImplementedError, match="experts: GptOssExperts: is_concatenated must be True, got False"):
        model(torch.tensor([[1, 2]]))


@pytest.mark.parametrize(
    "flag, value",
    [
        ("is_transposed", True),
        ("is_concatenated", False),
        ("has_bias", True),
        ("has_gate", False),
        ("has_post_expert_norm", True),
    ],
)
def test_each_flag_is_refused(flag, value):
    experts = Plain(config_of())
    assert refusal(experts) is None
    setattr(experts, flag, value)
    with pytest.raises(NotImplementedError, match=f"enable: experts .Plain.: {flag} must be {not value}, got {value}"):
        enable(nn.ModuleDict({"experts": experts}))


def test_other_gates_activations_and_dtypes_are_refused():
    clamped = type("Clamped", (Plain,), {"_apply_gate": lambda self, z: z.chunk(2, -1)[0].clamp(max=1)})
    assert "_apply_gate must be the default" in refusal(clamped(config_of()))
    assert "act_fn must be SiLU, got GELU" in refusal(type("Gelu", (Plain,), {"act": nn.GELU})(config_of()))
    experts = Plain(config_of())
    experts.gate_up_proj = nn.Parameter(experts.gate_up_proj.to(torch.float8_e4m3fn), requires_grad=False)
    assert "float16 or float64 tensor, got torch.float8_e4m3fn" in refusal(experts)
    inputs = torch.zeros(1, 16), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
    with pytest.raises(NotImplementedError, match="process_group must be None"):
        experts_forward(Plain(config_of()), *inputs, process_group=1)
    with pytest.raises(ValueError, match="fastmoe.enable: model must hold experts modules .* got a Linear with none"):
        enable(nn.Linear(2, 2))


def test_a_bare_block_is_switched_too():
    block = nn.Sequential(Plain(config_of("eager")))
    enable(block)
    assert block[0].config._experts_implementation == "fastmoe"
    disable(block)
    assert block[0].config._experts_implementation == "eager"


def test_slots_of_other_ranks_add_nothing():
    """Expert id == num_experts with weight 0, beside an expert of NaN that a product with 0 would let through."""
    register()
    torch.manual_seed(1)
    experts = Plain(config_of())
    with torch.no_grad():
        experts.gate_up_proj[3] = float("nan")
    x_TD = torch.randn(6, 16, requires_grad=True)
    ids_TK = torch.tensor([[0, 4], [4, 1], [4, 4], [2, 0], [1, 2], [0, 1]])
    weights_TK = torch.rand(6, 2).masked_fill(ids_TK == 4, 0).requires_grad_()
    dy_TD = torch.randn(6, 16)
    got, want = {}, {}
    for out, implementation in ((got, "fastmoe"), (want, "eager")):
        experts.config._experts_implementation = implementation
        experts.zero_grad()
        y_TD = experts(x_TD, ids_TK, weights_TK)
        out["y"] = y_TD.detach()
        out["dx"], out["dw"], out["dgate_up"], out["ddown"] = torch.autograd.grad(
            y_TD, (x_TD, weights_TK, experts.gate_up_proj, experts.down_proj), dy_TD
        )
    close(got, want)
    assert (got["y"][2] == 0).all() and (got["dw"][ids_TK == 4] == 0).all()


def test_frozen_experts_get_no_gradient_and_3d_input_keeps_its_shape():
    register()
    experts = Plain(config_of()).requires_grad_(False)
    x_BSD = torch.randn(2, 3, 16, requires_grad=True)
    y_BSD = experts(x_BSD, torch.zeros(6, 2, dtype=torch.long), torch.ones(6, 2))
    y_BSD.sum().backward()
    assert y_BSD.shape == x_BSD.shape and x_BSD.grad.abs().sum() > 0 and experts.gate_up_proj.grad is None


def test_compiles_in_one_graph():
    experts = Plain(config_of())
    x_TD, ids_TK, weights_TK = torch.randn(5, 16), torch.randint(0, 5, (5, 2)), torch.rand(5, 2)
    compiled = torch.compile(experts_forward, fullgraph=True, backend="aot_eager")
    want = experts_forward(experts, x_TD, ids_TK, weights_TK)
    want.sum().backward()
    want_grad, experts.gate_up_proj.grad = experts.gate_up_proj.grad, None
    got = compiled(experts, x_TD, ids_TK, weights_TK)
    got.sum().backward()
    close({"y": got, "dw": experts.gate_up_proj.grad}, {"y": want, "dw": want_grad}, 1e-6)


def test_bf16_is_as_close_to_float64_as_eager():
    register()
    torch.manual_seed(2)
    exact = Plain(config_of("eager")).double()
    x_TD, ids_TK, weights_TK = torch.randn(64, 16), torch.randint(0, 4, (64, 2)), torch.rand(64, 2)
    for weight in exact.parameters():
        weight.data = weight.data.bfloat16().double()
    x_TD = x_TD.bfloat16()
    want = exact(x_TD.double(), ids_TK, weights_TK.double())
    experts = Plain(config_of()).bfloat16()
    experts.load_state_dict(exact.state_dict())
    error = (experts(x_TD, ids_TK, weights_TK).double() - want).abs().max()
    experts.config._experts_implementation = "eager"
    eager_error = (experts(x_TD, ids_TK, weights_TK.bfloat16()).double() - want).abs().max()
    assert error <= 2 * eager_error


def test_importing_the_door_leaves_transformers_alone():
    code = "import sys, fastmoe.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
