"""Tokens/s of the `tiny` recipe's training step against the same model as a transformers Mixtral, in one process,
interleaved.

python -m benchmarks.train_tiny [--steps 20] [--dtype fp32|bf16] [--experts default|eager|grouped_mm|batched_mm]

Both arms: the same sizes and data, router losses on, clipping by global norm, AdamW (torch's fused one for Mixtral),
median step. Before timing, the two models are given the same weights and their losses compared.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from fastmoe.nn import Transformer
from fastmoe.optim import AdamW
from fastmoe.optim.clip import grad_norm
from fastmoe.trainer.recipes import RECIPES


def mixtral(model, experts: str) -> MixtralForCausalLM:
    """A Mixtral of the same shape holding the same weights as a fastmoe Transformer."""
    c = model.config
    config = MixtralConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.d_model,
        intermediate_size=c.d_ff,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads or c.num_heads,
        num_local_experts=c.num_experts,
        num_experts_per_tok=c.top_k,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps,
        output_router_logits=True,
        router_aux_loss_coef=c.aux_loss_weight / c.top_k,
        tie_word_embeddings=False,
        use_cache=False,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )
    peer = MixtralForCausalLM(config)
    if experts != "default":
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--experts", default="default")
    args = parser.parse_args()
    config = RECIPES["tiny"]()
    torch.manual_seed(0)
    ours = Transformer(config.model)
    theirs = mixtral(ours, args.experts)
    ids_BS = torch.randint(0, config.model.vocab_size, (config.train.batch_size, config.train.seq_len + 1))
    inputs_BS, targets_BS = ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()

    def our_loss():
        out = ours(inputs_BS, targets_BS)
        return out.loss, out.aux_loss

    def their_loss():
        # Mixtral shifts labels itself: give it the full sequence's inputs with targets moved one to the right
        out = theirs(input_ids=inputs_BS, labels=None, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), targets_BS.flatten())
        return loss, theirs.router_aux_loss_coef * out.aux_loss

    with torch.no_grad():
        a, b = float(our_loss()[0]), float(their_loss()[0])
    assert abs(a - b) < 1e-4 * abs(b), f"the two models differ: loss {a} and {b}"
    optimizers = AdamW(ours.parameters(), lr=1e-4), torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)

    def step(arm):
        model, loss, optimizer = ((ours, our_loss, optimizers[0]), (theirs, their_loss, optimizers[1]))[arm]
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bf16"):
            terms = loss()
        sum(terms).backward()
        if arm == 0:
            optimizer.step(grad_scale=min(1.0, config.optim.clip_norm / float(grad_norm(model.parameters()))))
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            optimizer.step()
        optimizer.zero_grad()

    seconds = [], []
    for i in range(args.steps + 2):
        for arm in (0, 1):
            start = time.perf_counter()
            step(arm)
            if i >= 2:
                seconds[arm].append(time.perf_counter() - start)
    rates = [inputs_BS.numel() / statistics.median(s) for s in seconds]
    print(
        f"losses {a:.6f} and {b:.6f}; {torch.get_num_threads()} threads, {args.dtype}, "
        f"experts {theirs.config._experts_implementation}"
    )
    print(
        f"fastmoe {rates[0]:,.0f} tokens/s; transformers Mixtral {rates[1]:,.0f} tokens/s; "
        f"ratio {rates[0] / rates[1]:.2f}x"
    )


if __name__ == "__main__":
    main()
