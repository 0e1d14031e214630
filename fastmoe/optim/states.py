"""What every optimizer here shares: states declared once, kept in the dtype asked for, updated in one call a group."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from operator import attrgetter

import torch

from fastmoe.native import PLAIN

STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
MASTERS = (None, "residual8", "fp32")
_grad = attrgetter("grad")
Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]  # name -> shape, dtype of a state tensor


class Optimizer(torch.optim.Optimizer):
    """A torch optimizer whose states are declared by `layout` and whose update is one call of `update` a group.

    A parameter's state is a dict: the tensors of its layout, "step", how often it was updated (int), "index", its place
    among all parameters of the optimizer, which with the seed decides the draws of its rounding, and "first_row", the
    place of its first row ([-1, last dimension]) in the whole where it is a shard. Whoever keeps states elsewhere
    (fastmoe.offload) makes them by `new_state`, and passes them to `update`.

    Of a DTensor only the local shard counts: states are plain tensors of its shape, and no rank needs another's. Where
    dimension 0 is sharded (FSDP2), the update is that of the whole tensor, bit for bit.
    """

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "seed": self.seed}

    def layout(self, param: torch.Tensor, group: dict) -> Layout:
        """The state tensors of a parameter beside its step."""
        raise NotImplementedError

    def update(
        self, params: list[torch.Tensor], grads: list[torch.Tensor], states: list[dict], group: dict, grad_scale: float
    ) -> None:
        """Updates parameters and states in place; states[i]["step"] counts this update already."""
        raise NotImplementedError

    def new_state(self, param: torch.Tensor, group: dict, index: int, make: Callable = torch.zeros) -> dict:
        """The state before the first update. make(shape, dtype=, device=): zeros, wherever they should lie."""
        own = local(param)
        tensors = {
            name: make(shape, dtype=dtype, device=own.device)
            for name, (shape, dtype) in self.layout(own, group).items()
        }
        if "master" in tensors and tensors["master"].dtype == torch.float32:
            tensors["master"].copy_(own)
        return {"step": 0, "index": index, "first_row": first_row(param), **tensors}

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None, grad_scale: float = 1.0) -> torch.Tensor | None:
        """grad_scale: every gradient is multiplied by it on the way (clipping without a pass of its own)."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        index = 0
        for group in self.param_groups:
            params, grads = group["params"], [*map(_grad, group["params"])]
            places = [i for i, grad in enumerate(grads) if grad is not None]
            if len(places) < len(params):
                params, grads = [params[i] for i in places], [grads[i] for i in places]
            states = [*map(self.state.get, params)]  # long lists: one pass for each thing that is looked at
            for i, state in enumerate(states):
                if not state:
                    states[i] = self.state[params[i]] = self.new_state(params[i], group, index + places[i])
            for state in states:
                state["step"] += 1
            index += len(group["params"])
            if not set(map(type, params)) <= PLAIN:
                params, grads = [*map(local, params)], [*map(local, grads)]
            self.update(params, grads, states, group, grad_scale)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which would round the states to the parameters' dtype; here they keep their own.

        Options that the saved groups lack stay as they are here. Errors: ValueError for a state that its parameter
        does not have here.
        """
        before = [dict(group) for group in self.param_groups]
        super().load_state_dict(state_dict)
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        index = 0
        for group, old in zip(self.param_groups, before):
            for name, value in old.items():
                group.setdefault(name, value)
            for param in group["params"]:
                given = state_dict["state"].get(ids[index])
                if given:
                    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
                    tensors.pop("step", None)
                    self.state[param] = {
                        "step": int(given["step"]),
                        "index": given.get("index", index),
                        "first_row": first_row(param),
                        **self.adopt(param, group, index, tensors, "index" not in given),
                    }
                index += 1

    def adopt(
        self, param: torch.Tensor, group: dict, index: int, given: dict[str, torch.Tensor], foreign: bool
    ) -> dict:
        """Copies of the tensors of a saved state, which must be those of the layout. foreign: of another class."""
        wanted = self.layout(local(param), group)
        found = {name: (tuple(value.shape), value.dtype) for name, value in given.items()}
        if found != wanted:
            raise ValueError(
                f"fastmoe.{type(self).__name__}: the saved state of parameter {index} must hold {wanted}, got {found}"
            )
        return {name: value.to(param.device, copy=True) for name, value in given.items()}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """A DTensor's shard on this rank; any other tensor itself."""
    return tensor.to_local() if _is_sharded(tensor) else tensor


def first_row(tensor: torch.Tensor) -> int:
    """Where the rows of `local` begin in the whole; 0 where it is not sharded along its first dimension. A plain tensor
    says so by an attribute of this name.
    """
    if not _is_sharded(tensor):
        return getattr(tensor, "first_row", 0)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0] * torch.Size(tensor.shape[1:-1]).numel() if offset else 0


def _is_sharded(tensor: torch.Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not loaded: then there is no DTensor
    return module is not None and isinstance(tensor, module.DTensor)


def rounding_key(seed: int, index: int, step: int) -> int:
    """The key of a parameter's draws at a step, for ops: 63 bits."""
    return ((seed & 0x7FFF) << 48 | (index & 0xFFFFFF) << 24 | step & 0xFFFFFF) & (1 << 63) - 1


def check_rule(name: str, rules: Iterable[tuple[str, object, bool, str]]) -> None:
    """rules: argument, value, whether it is good, what it must be."""
    for argument, value, good, wanted in rules:
        if not good:
            raise ValueError(f"fastmoe.{name}: {argument} must be {wanted}, got {value!r}")
