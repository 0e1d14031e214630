"""Where a rank stands among all: pipeline x data x tensor parallel, with expert parallel inside data parallel."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastmoe.comm.group import Group, LocalGroup
from fastmoe.comm.launch import torchrun_environment

BUCKET = 1 << 23  # gradients that travel together


class Place(NamedTuple):
    """A rank's coordinates; data = expert_data * ep + expert."""

    pipe: int
    expert_data: int
    expert: int
    tensor: int


_AXES = {"pipe": (0,), "data": (1, 2), "expert_data": (1,), "expert": (2,), "tensor": (3,)}


@dataclass(frozen=True)
class Mesh:
    """pp x dp x tp ranks, rank = (pipe * dp + data) * tp + tensor; the experts are split over ep of the dp.

    Ranks that differ in `expert` alone hold different experts, those that differ in `expert_data` alone the same ones.
    """

    pp: int = 1
    dp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def size(self) -> int:
        return self.pp * self.dp * self.tp

    def _numbers(self) -> torch.Tensor:
        return torch.arange(self.size).view(self.pp, self.dp // self.ep, self.ep, self.tp)

    def place(self, rank: int) -> Place:
        return Place(*(self._numbers() == rank).nonzero()[0].tolist())

    def groups(self, kind: str) -> list[list[int]]:
        """The ranks of every group of a kind: "pipe", "data", "expert_data", "expert" or "tensor".

        Example, pp 1, dp 4, ep 2, tp 1: "expert" [[0, 1], [2, 3]], "expert_data" [[0, 2], [1, 3]], "data" [[0, 1, 2,
        3]].
        """
        axes = _AXES[kind]
        numbers = self._numbers().movedim(axes, tuple(range(-len(axes), 0)))
        return numbers.flatten(-len(axes)).flatten(0, -2).tolist()


def fit(world: int, pp: int = 1, dp: int | None = None, tp: int = 1, ep: int = 1) -> Mesh:
    """The mesh of `world` ranks; dp: None takes what pp and tp leave. ValueError names the meshes that would fit."""
    for name, size in (("pp", pp), ("dp", dp), ("tp", tp), ("ep", ep)):
        if size is not None and size < 1:
            raise ValueError(f"fastmoe.mesh: --mesh.{name} must be at least 1, got {size}")
    given = {"pp": pp, "dp": max(world // (pp * tp), 1) if dp is None else dp, "tp": tp}
    if given["pp"] * given["dp"] * given["tp"] != world:
        fitting = []
        for name in given:
            others = [size for other, size in given.items() if other != name]
            if world % (others[0] * others[1]) == 0:
                sizes = {**given, name: world // (others[0] * others[1])}
                fitting.append(" ".join(f"--mesh.{n} {size}" for n, size in sizes.items()))
        raise ValueError(
            f"fastmoe.mesh: pp x dp x tp must be {world} (ranks), got {' x '.join(map(str, given.values()))}; "
            f"{'; '.join(fitting) or f'--mesh.dp {world}'} would fit"
        )
    if given["dp"] % ep:
        divisors = [size for size in range(1, given["dp"] + 1) if given["dp"] % size == 0]
        raise ValueError(f"fastmoe.mesh: --mesh.ep must divide dp = {given['dp']}, be one of {divisors}, got {ep}")
    return Mesh(**given, ep=ep)


class Ranks(NamedTuple):
    """This process among all, and its groups."""

    mesh: Mesh = Mesh()
    rank: int = 0
    world: Group = LocalGroup()
    data: Group = LocalGroup()
    expert: Group = LocalGroup()
    expert_data: Group = LocalGroup()
    device: str = "cpu"  # what the groups send from

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks and writes for all."""
        return self.rank == 0

    def agree(self, number: int) -> int:
        """The largest number of all ranks, who must all call it."""
        return max(self.gather(number))

    def gather(self, number: int) -> list[int]:
        """The integer of every rank."""
        if self.world.size == 1:
            return [int(number)]
        return self.world.all_gather(torch.tensor(int(number), device=self.device)).tolist()


@contextmanager
def launched(dp: int | None = None, ep: int = 1, device: str = "cpu") -> Iterator[Ranks]:
    """The ranks that torchrun, mpirun, mpiexec or srun started, connected by torch.distributed (gloo, or NCCL for
    device "cuda") unless the caller did so; alone where there is one. ValueError for a mesh that does not fit.
    """
    import torch.distributed as dist

    environment = torchrun_environment(os.environ)
    ours = not (dist.is_available() and dist.is_initialized())
    world = int(environment["WORLD_SIZE"]) if ours else dist.get_world_size()
    mesh = fit(world, dp=dp, ep=ep)
    if world == 1:
        yield Ranks()
        return
    from fastmoe.comm.torch_dist import TorchGroup

    if ours:
        os.environ.update(environment)
        if device == "cuda":
            torch.cuda.set_device(int(environment["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        whole = TorchGroup(dist.group.WORLD)
        groups = {}
        for kind in ("data", "expert", "expert_data"):
            parts = mesh.groups(kind)
            if len(parts) == 1:
                groups[kind] = whole
            elif len(parts[0]) == 1:
                groups[kind] = LocalGroup()
            else:
                groups[kind] = TorchGroup(dist.new_subgroups_by_enumeration(parts)[0])
        yield Ranks(mesh, whole.rank, whole, **groups, device=device)
    finally:
        if ours:
            groups = whole = None  # gloo's threads end with the last reference
            dist.destroy_process_group()


def reduce_gradients(dense: Sequence[torch.Tensor], experts: Sequence[torch.Tensor], ranks: Ranks) -> None:
    """Makes every .grad that of the mean of the data-parallel ranks' losses; all ranks must call it.

    dense: parameters that all of them hold. experts: those of this rank's experts, whose gradients, since dispatch is
    differentiable, are already sums over the tokens of the expert-parallel ranks. A parameter without a gradient on all
    ranks stays without.
    """
    if ranks.mesh.dp == 1:
        return
    for params, group in ((dense, ranks.data), (experts, ranks.expert_data)):
        if group.size > 1 and params:
            present = torch.tensor([param.grad is not None for param in params], dtype=torch.int64)
            found = group.all_reduce(present.to(params[0].device)).tolist()
            for param, count in zip(params, found):
                if count and param.grad is None:
                    param.grad = torch.zeros_like(param)
        grads = [param.grad for param in params if param.grad is not None]
        for bucket in _buckets(grads) if group.size > 1 else ():
            flat = group.all_reduce(torch.cat([grad.reshape(-1) for grad in bucket]))
            for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket])):
                grad.copy_(part.view(grad.shape))
        if grads:
            torch._foreach_div_(grads, ranks.mesh.dp)


def _buckets(grads: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one dtype, up to BUCKET elements together."""
    bucket, size = [], 0
    for grad in grads:
        if bucket and (size + grad.numel() > BUCKET or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(grad)
        size += grad.numel()
    if bucket:
        yield bucket
