"""Trains a transformer of experts whose weights and optimizer states do not fit the memory it is given: the rest is
on disk, also while the model is made.

python examples/offload_big.py [--layers 16] [--d-model 256] [--host 160MiB] [--disk 8GiB] [--dir FOLDER]
"""

import argparse
import resource
import tempfile

import torch

from fastmoe.config import ModelConfig, parse_bytes
from fastmoe.nn import Transformer
from fastmoe.offload import Engine
from fastmoe.optim import AdamW

parser = argparse.ArgumentParser()
parser.add_argument("--layers", type=int, default=16)
parser.add_argument("--d-model", type=int, default=256)
parser.add_argument("--host", default="160MiB", help="budget of memory")
parser.add_argument("--disk", default="8GiB", help="budget of disk")
parser.add_argument("--dir", help="an empty folder, which can be resumed later (default: a temporary one)")
args = parser.parse_args()
size = ModelConfig(d_model=args.d_model, num_layers=args.layers, num_experts=16, top_k=2, d_ff=args.d_model)
torch.manual_seed(0)


def make_model() -> Transformer:
    model = Transformer(size)
    model.checkpointed = True  # layers are recomputed in backward, from weights read again
    return model


with tempfile.TemporaryDirectory() as folder:
    budgets = {"host": int(parse_bytes(args.host)), "disk": int(parse_bytes(args.disk))}
    engine = Engine(make_model, lambda model: AdamW(model.parameters(), lr=1e-3), budgets, args.dir or folder)
    ids_BS = torch.randint(0, 256, (4, 129))
    for _ in range(5):
        out = engine.model(ids_BS[:, :-1], ids_BS[:, 1:])
        engine.backward(out.loss + out.aux_loss)  # instead of loss.backward()
        done = engine.step()  # instead of optimizer.step() and zero_grad()
        print(f"step {done.step}  loss {out.loss.item():.4f}  gradient norm {done.norm:.3f}")
    report = engine.report()
    engine.close()  # all can be resumed from the folder now
print(f"{report['parameters']:,} parameters, {report['offloaded']:.0%} of their bytes on disk")
print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
