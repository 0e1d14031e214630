"""The `tiny` recipe's training step against the same model as a transformers Mixtral with each experts implementation.

All arms: the same weights, data, router losses, clipping by global norm and AdamW (torch's fused one for Mixtral), in
fp32 and with bf16 autocast. The loss of the first step is compared with the loss in float64.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator

import torch

from benchmarks import peers
from benchmarks.ops.harness import TOLERANCE, Case, Outputs, name_of
from benchmarks.peers import Shape
from fastmoe.config import Config
from fastmoe.nn import Transformer
from fastmoe.optim import AdamW
from fastmoe.optim.clip import grad_norm
from fastmoe.trainer.recipes import recipe

EXPERTS = ("grouped_mm", "batched_mm", "eager")


def mixtral(model: Transformer, experts: str) -> torch.nn.Module:
    """A transformers Mixtral of the same shape holding the same weights as a fastmoe Transformer."""
    from transformers import MixtralConfig, MixtralForCausalLM

    c = model.config
    config = MixtralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads or c.num_heads,
        num_local_experts=c.num_experts,
        num_experts_per_tok=model.top_k,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps,
        output_router_logits=True,
        router_aux_loss_coef=model.layers[0].feed_forward.router.loss_weights["balance"] / model.top_k,
        tie_word_embeddings=False,
        use_cache=False,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )
    peer = MixtralForCausalLM(config)
    peer.set_experts_implementation(experts)
    with torch.no_grad():
        peer.model.embed_tokens.weight.copy_(model.embedding)
        peer.lm_head.weight.copy_(model.head)
        peer.model.norm.weight.copy_(model.norm.weight)
        for theirs, ours in zip(peer.model.layers, model.layers):
            theirs.input_layernorm.weight.copy_(ours.attention_norm.weight)
            theirs.post_attention_layernorm.weight.copy_(ours.feed_forward_norm.weight)
            attention = theirs.self_attn
            for linear, rows in zip(
                (attention.q_proj, attention.k_proj, attention.v_proj), ours.attention.qkv_proj.chunk(3)
            ):
                linear.weight.copy_(rows)
            attention.o_proj.weight.copy_(ours.attention.out_proj)
            theirs.mlp.gate.weight.copy_(ours.feed_forward.router.weight)
            theirs.mlp.experts.gate_up_proj.copy_(ours.feed_forward.experts.gate_up_proj)
            theirs.mlp.experts.down_proj.copy_(ours.feed_forward.experts.down_proj)
    return peer


def our_step(model: Transformer, config: Config, dtype: torch.dtype, ids_BS: torch.Tensor) -> Callable[[], Outputs]:
    """A call of one whole training step; it returns the loss before the update."""
    optimizer = AdamW(model.parameters(), lr=1e-4)
    inputs_BS, targets_BS = ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()

    def call() -> Outputs:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model(inputs_BS, targets_BS)
        (out.loss + out.aux_loss).backward()
        optimizer.step(grad_scale=min(1.0, config.optim.clip_norm / float(grad_norm(model.parameters()))))
        optimizer.zero_grad()
        return [out.loss.detach()]

    return call


def their_step(model: torch.nn.Module, config: Config, dtype: torch.dtype, ids_BS: torch.Tensor):
    """The same of a Mixtral."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs_BS, targets_BS = ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()

    def call() -> Outputs:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model(input_ids=inputs_BS, output_router_logits=True)
            loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), targets_BS.flatten())
        (loss + model.router_aux_loss_coef * out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        return [loss.detach()]

    return call


def case(config: Config, dtype: torch.dtype) -> Case:
    torch.manual_seed(0)
    c, batch = config.model, config.train.batch_size
    model = Transformer(c)
    ids_BS = torch.randint(0, c.vocab_size, (batch, config.train.seq_len + 1))
    tokens = batch * config.train.seq_len
    double = copy.deepcopy(model).double()
    with torch.no_grad():
        exact = double(ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()).loss
    arms = {}
    # what batched_mm gathers in every layer is kept until the backward
    shape = Shape(tokens * c.num_layers, c.d_model, c.d_ff, c.num_experts, model.top_k)
    found, left_out = peers.arms(shape, torch.float32, "cpu")
    for experts in EXPERTS:
        if f"transformers {experts}" in found:
            arms[f"transformers Mixtral, {experts}"] = their_step(mixtral(model, experts), config, dtype, ids_BS)
    left_out = {f"transformers Mixtral, {e}": left_out[p] for e in EXPERTS if (p := f"transformers {e}") in left_out}
    return Case(
        f"{name_of(dtype)}, {tokens} tokens a step",
        {"fastmoe": our_step(model, config, dtype, ids_BS), **arms},
        lambda: [exact],
        work=model.flops_per_token(config.train.seq_len) * tokens,
        roof="mm",
        tolerance=TOLERANCE[dtype],
        labels={"dtype": name_of(dtype), "tokens": tokens},
        left_out=left_out,
    )


def cases(quick: bool) -> Iterator[Case]:
    config = recipe("tiny")
    if quick:
        model = dataclasses.replace(config.model, num_layers=1, d_model=32, d_ff=16)
        train = dataclasses.replace(config.train, batch_size=1, seq_len=32)
        config = dataclasses.replace(config, model=model, train=train)
    for dtype in TOLERANCE:
        yield case(config, dtype)
