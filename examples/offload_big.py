"""Trains MoE layers whose AdamW moments do not fit the host memory they are given: the rest lives on disk.

python examples/offload_big.py [--layers 8] [--d-model 256]
"""

import argparse
import resource
import shutil
import tempfile

import torch

from fastmoe.nn import MoE
from fastmoe.offload import OffloadedAdamW, plan

parser = argparse.ArgumentParser()
parser.add_argument("--layers", type=int, default=8)
parser.add_argument("--d-model", type=int, default=256)
args = parser.parse_args()
torch.manual_seed(0)
layers = torch.nn.ModuleList(MoE(args.d_model, 2 * args.d_model, num_experts=16, top_k=2) for _ in range(args.layers))
x_TD = torch.randn(256, args.d_model)

with tempfile.TemporaryDirectory() as folder:
    sizes = {f"layer {i}": 8 * sum(p.numel() for p in layer.parameters()) for i, layer in enumerate(layers)}
    made = plan(sizes, {"host": 5 * max(sizes.values()), "disk": shutil.disk_usage(folder).free})  # else: the shortfall
    print(made)
    groups = [{"params": layer.parameters(), "tier": made.tier[f"layer {i}"]} for i, layer in enumerate(layers)]
    optimizer = OffloadedAdamW(groups, folder, lr=1e-3)
    for step in range(3):
        y_TD = x_TD
        for layer in layers:
            y_TD = y_TD + layer(y_TD).y
        loss = (y_TD - x_TD.roll(1, 0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}  loss {loss.item():.4f}")
    optimizer.close()  # the states could be reopened now; here the folder goes
print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
