"""A Hugging Face Qwen3-MoE of random weights learns the bytes of the Python library's source, twice from the same
start: with transformers' default experts, and with fastmoe's. The losses are the same, the time is not.

python examples/enable_fused_moe.py [STEPS]    (2 or more, 40 if not given)
"""

import sys
import time

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fastmoe
from fastmoe.trainer.data import Batches, default_corpus

B, S = 8, 128  # sequences a step, bytes a sequence


def build() -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=256,
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            num_experts=16,
            num_experts_per_tok=4,
            moe_intermediate_size=128,
            output_router_logits=True,
        )
    )


def fine_tune(model: Qwen3MoeForCausalLM, batches: Batches, steps: int) -> tuple[list[float], float]:
    """(loss of every step, bytes a second); the first step warms up and is not timed."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for step in range(steps):
        if step == 1:
            start = time.perf_counter()
        ids_BS, _ = batches.at(step * B, B)
        loss = model(ids_BS, labels=ids_BS).loss  # transformers shifts the labels itself
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, (steps - 1) * B * S / (time.perf_counter() - start)


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
default, ours = build(), build()
print(fastmoe.enable(ours))  # one line: the weights stay where they are, fastmoe.disable(ours) goes back

batches = Batches(default_corpus(), "train", S)
runs = {name: fine_tune(model, batches, steps) for name, model in (("grouped_mm", default), ("fastmoe", ours))}
print("step  " + "  ".join(f"{name:>10}" for name in runs))
for step in sorted({*range(0, steps, 5), steps - 1}):
    print(f"{step + 1:4}  " + "  ".join(f"{losses[step]:10.5f}" for losses, _ in runs.values()))
print("tokens/s  " + "  ".join(f"{name} {rate:,.0f}" for name, (_, rate) in runs.items()))
