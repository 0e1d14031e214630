"""Tiny transformers models with random weights, and what one step of them gives."""

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

V = 64
SIZES = dict(
    vocab_size=V,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=1,
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
        **SIZES, intermediate_size=24, num_experts=8, num_experts_per_tok=3, output_router_logits=True
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
    "gpt_oss": lambda: GptOssConfig(
        **SIZES,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        head_dim=8,
        sliding_window=8,
        swiglu_limit=1.0,  # low enough that gate and up are clamped here
        output_router_logits=True,
    ),
}


def build(name, implementation="eager", std=0.3, **settings):
    """A model whose matrices and biases are normal of this width, the same at every call."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key, value in settings.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation)
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 or key.endswith("bias"):
            nn.init.normal_(parameter, std=std)
    return model


def tokens(*shape, seed=0):
    return torch.randint(2, V, shape, generator=torch.Generator().manual_seed(seed))


def step(model, ids_BS, **inputs):
    """Logits, loss and the gradient of every parameter that takes one."""
    model.zero_grad()
    out = model(ids_BS, **{"labels": ids_BS, **inputs})
    out.loss.backward()
    return {"logits": out.logits.detach(), "loss": out.loss.detach(), **gradients(model)}


def gradients(model):
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}


def experts_of(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "_apply_gate")}


def close(ours, theirs, tolerance=1e-5):
    """Each within `tolerance` of the largest magnitude."""
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert (ours[name] - want).abs().max() <= tolerance * want.abs().max(), name
