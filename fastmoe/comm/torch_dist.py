"""The Group protocol over a torch.distributed process group (NCCL on GPUs, gloo on CPUs)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist


class TorchGroup:
    """Wraps a process group that the caller made; tensors are on the device its backend serves.

    Let go of it, and of graphs that went through it, before dist.destroy_process_group(): gloo's threads live as long
    as the group and abort a process whose interpreter is ending.
    """

    def __init__(self, process_group: dist.ProcessGroup):
        self.process_group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)

    def all_to_all(self, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> torch.Tensor:
        received = rows.new_empty(sum(recv_counts), *rows.shape[1:])
        sent = rows.contiguous()
        if rows.is_floating_point() and rows.itemsize == 1:  # gloo knows no fp8
            sent, wire = sent.view(torch.uint8), received.view(torch.uint8)
        else:
            wire = received
        dist.all_to_all_single(wire, sent, list(recv_counts), list(send_counts), group=self.process_group)
        return received

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self.process_group)
        return total

    def all_gather(self, counts: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(counts, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(gathered, counts.contiguous(), group=self.process_group)
        return torch.stack(gathered)
