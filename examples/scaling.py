"""Time of an expert-parallel MoE layer, forward and backward, as ranks are added (weak scaling: tokens a rank stay).

torchrun --nproc-per-node 2 examples/scaling.py [--tokens 4096]; mpirun -n 2 python examples/scaling.py starts the same.
"""

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist

from fastmoe import ops
from fastmoe.comm import TorchGroup, expert_parallel_moe, torchrun_environment


def step_seconds(T: int, D: int, F: int, E: int, K: int) -> float:
    """Median seconds of a layer, forward and backward, with T tokens on each rank."""
    group = TorchGroup(dist.group.WORLD)
    torch.manual_seed(group.rank)
    L = E // group.size  # experts of this rank
    gate_up = (torch.randn(L, 2 * F, D) / D**0.5).requires_grad_()
    down = (torch.randn(L, D, F) / F**0.5).requires_grad_()
    x_TD = torch.randn(T, D, requires_grad=True)
    weights_TK, ids_TK, _, _ = ops.topk_gate(torch.randn(T, E), K)
    seconds = []
    for _ in range(8):
        dist.barrier()
        start = time.perf_counter()
        y_TD = expert_parallel_moe(x_TD, ids_TK, weights_TK, gate_up, down, group)
        torch.autograd.grad(y_TD, (x_TD, gate_up, down), torch.ones_like(y_TD))
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


parser = argparse.ArgumentParser()
parser.add_argument("--tokens", type=int, default=4096, help="per rank")
T, E = parser.parse_args().tokens, 32

os.environ.update(torchrun_environment(os.environ))
torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
dist.init_process_group("gloo")
median = step_seconds(T, 256, 512, E, 2)  # a function: whatever holds the group is gone before it is destroyed
if dist.get_rank() == 0:
    W = dist.get_world_size()
    print(f"{W} ranks, {E} experts: {median * 1e3:.1f} ms, {W * T / median:,.0f} tokens/s")
dist.destroy_process_group()
