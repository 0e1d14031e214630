"""A Hugging Face Qwen3-MoE of random weights learns the bytes of a text, its expert layers computed by fastmoe."""

import sys
from pathlib import Path

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from fastmoe import enable

torch.manual_seed(0)
model = Qwen3MoeForCausalLM(
    Qwen3MoeConfig(
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        output_router_logits=True,
    )
)
print(enable(model))

path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent.parent / "README.md"
text = torch.tensor(list(path.read_bytes()))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(1, 31):
    starts = torch.randint(len(text) - 128, (8,))
    ids_BS = torch.stack([text[start : start + 128] for start in starts])
    loss = model(ids_BS, labels=ids_BS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        print(f"step {step}  loss {loss.item():.3f}")
