"""The `tiny` recipe's training step against the same model as a transformers Mixtral, in one process, interleaved.

python -m benchmarks.train_tiny [--steps 20] [--experts default|eager|grouped_mm|batched_mm] [--record]

Both arms: the same weights, data, router losses, clipping by global norm and AdamW (torch's fused one for Mixtral), in
fp32 and with bf16 autocast; the median step. Before timing, both losses are compared with the loss in float64.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from benchmarks import machine
from benchmarks.ops.harness import TOLERANCE, name_of
from benchmarks.run import print_record, write
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


def measure(config, experts: str, dtype: torch.dtype, steps: int, roofs: dict[str, float]) -> dict:
    """The JSON record of one case, as benchmarks.ops.harness.measure makes it; the error is that of the first loss."""
    torch.manual_seed(0)
    ours = Transformer(config.model)
    theirs = mixtral(ours, experts)
    ids_BS = torch.randint(0, config.model.vocab_size, (config.train.batch_size, config.train.seq_len + 1))
    inputs_BS, targets_BS = ids_BS[:, :-1].contiguous(), ids_BS[:, 1:].contiguous()
    with torch.no_grad():
        exact = float(copy.deepcopy(ours).double()(inputs_BS, targets_BS).loss)

    def our_losses():
        out = ours(inputs_BS, targets_BS)
        return out.loss, out.aux_loss

    def their_losses():
        out = theirs(input_ids=inputs_BS, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1).float(), targets_BS.flatten())
        return loss, theirs.router_aux_loss_coef * out.aux_loss

    our_optimizer = AdamW(ours.parameters(), lr=1e-4)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4, fused=True)

    def our_update():
        our_optimizer.step(grad_scale=min(1.0, config.optim.clip_norm / float(grad_norm(ours.parameters()))))
        our_optimizer.zero_grad()

    def their_update():
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), config.optim.clip_norm)
        their_optimizer.step()
        their_optimizer.zero_grad()

    arms = {"fastmoe": (our_losses, our_update)}
    arms[f"transformers Mixtral, {theirs.config._experts_implementation}"] = (their_losses, their_update)
    errors, seconds = {}, {name: [] for name in arms}
    for i in range(steps + 2):
        for name, (losses, update) in arms.items():
            start = time.perf_counter()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                terms = losses()
            sum(terms).backward()
            update()
            if i == 0:
                errors[name] = abs(terms[0].item() - exact) / exact
            elif i > 1:
                seconds[name].append(time.perf_counter() - start)
    work = ours.flops_per_token(config.train.seq_len) * inputs_BS.numel()
    ms = {name: 1e3 * statistics.median(s) for name, s in seconds.items()}
    record = {
        "case": f"{name_of(dtype)}, {inputs_BS.numel()} tokens a step",
        "unit": "GFLOP/s",
        "roof": "mm",
        "arms": {},
    }
    for name in arms:
        record["arms"][name] = {"error": errors[name]}
        if max(errors.values()) > TOLERANCE[dtype]:
            continue
        record["arms"][name] |= {
            "ms": ms[name],
            "ms_min": 1e3 * min(seconds[name]),
            "ms_max": 1e3 * max(seconds[name]),
            "samples": steps,
            "rate": work / ms[name] / 1e6,
            "of_roof": work / ms[name] / 1e6 / roofs["mm"],
            "peak_mib": None,
            "fastmoe_is": ms[name] / ms["fastmoe"],
        }
        print(f"{name}: {inputs_BS.numel() / ms[name] * 1e3:,.0f} tokens/s")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--experts", default="default")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/<machine>/train_tiny.json")
    args = parser.parse_args()
    busy, roofs = machine.others_load(2.0), machine.roofs()
    cases = [measure(RECIPES["tiny"](), args.experts, dtype, args.steps, roofs) for dtype in TOLERANCE]
    for case in cases:
        print_record(case, quick=False)
    after = machine.others_load(1.0)
    if args.record:
        load = {"others_cpus": {"before": busy, "after": after}, "busy": max(busy, after) > machine.BUSY}
        write(machine.ROOT / "benchmarks" / "results", "train_tiny", {"roofs": roofs, **load, "cases": cases})


if __name__ == "__main__":
    main()
