"""A script for FastMoE (`import fmoe`) that runs unchanged after one call: it learns to guess bytes of its own text."""

from pathlib import Path

import fastmoe.compat

fastmoe.compat.install()

import fmoe  # noqa: E402
import torch  # noqa: E402
from fmoe.gates import GShardGate  # noqa: E402
from torch import nn  # noqa: E402

torch.manual_seed(0)
text = torch.tensor(list(Path(__file__).read_bytes()))
context = text.unfold(0, 9, 1)  # eight bytes and the one to guess

embed, head = nn.Embedding(256, 16), nn.Linear(128, 256)
moe = fmoe.FMoETransformerMLP(num_expert=4, d_model=128, d_hidden=256, activation=nn.GELU(), top_k=2, gate=GShardGate)
optimizer = torch.optim.Adam([*embed.parameters(), *moe.parameters(), *head.parameters()], lr=3e-3)
for step in range(60):
    batch = context[torch.randint(len(context), (64,))]
    x_TD = embed(batch[:, :8]).flatten(1)
    loss = nn.functional.cross_entropy(head(x_TD + moe(x_TD)), batch[:, 8])
    (loss + 0.01 * moe.gate.get_loss()).backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1}: loss {loss.item():.3f}")
