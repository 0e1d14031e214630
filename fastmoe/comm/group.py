"""What the rest of fastmoe asks of a group of ranks, and the group of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class Group(Protocol):
    """Ranks 0..size-1. Every rank makes the same calls in the same order, also with nothing to send."""

    rank: int
    size: int

    def all_to_all(self, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> torch.Tensor:
        """Sends the first send_counts[0] rows to rank 0, the next to rank 1, ...; returns what came, by source rank.

        rows: [sum(send_counts), ...], any dtype. send_counts, recv_counts: `size` row counts; what w sends to r is what
        r expects of w.
        """

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in a new tensor of the same shape and dtype."""

    def all_gather(self, counts: torch.Tensor) -> torch.Tensor:
        """counts: int64 [...], of one shape on all ranks. Returns [size, ...] in order of rank."""


class LocalGroup:
    """One process on its own: nothing moves."""

    rank = 0
    size = 1

    def all_to_all(self, rows: torch.Tensor, send_counts: Sequence[int], recv_counts: Sequence[int]) -> torch.Tensor:
        return rows

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def all_gather(self, counts: torch.Tensor) -> torch.Tensor:
        return counts[None].clone()
