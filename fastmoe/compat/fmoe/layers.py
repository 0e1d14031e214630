"""FMoE: a gate, rows in expert order, experts, and the weighted way back."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from fastmoe import ops
from fastmoe.compat.fmoe.gates import NaiveGate


def mark_module_parallel_comm(module: nn.Module, comm: str) -> None:
    """Tags every parameter with the group that its gradient belongs to, as `dp_comm`."""
    for parameter in module.parameters():
        parameter.dp_comm = comm


class FMoE(nn.Module):
    """An MoE layer over rows [T, D], or over a nest of tensors that share T.

    num_expert: experts on this rank. gate: a class or callable called as gate(d_model, num_expert, world_size, top_k),
    with gate_bias too for subclasses of NaiveGate. expert: a class or function called with d_model for each expert, or
    a list of these or of modules, one for each; an expert is called with its rows and their count, an int64 tensor [1]
    on the CPU. Without one, a subclass sets self.experts, called with all rows and all counts, or overrides expert_fn.
    gate_hook: called with (ids, weights, None). mask: [T] integer; a row whose mask is not 0 skips the experts, and
    each of its slots holds mask_dict[mask] (0 where that has no entry) in their stead. moe_group, slice_group and
    mp_group are for several processes, which are not served yet.

    Errors: NotImplementedError for world_size > 1; ValueError for what a gate returns in another shape.
    """

    pads_rows = False  # True: expert_fn takes rows past the counted ones, which spares the wait for their number

    def __init__(
        self,
        num_expert: int = 32,
        d_model: int = 1024,
        world_size: int = 1,
        mp_group: Any = None,
        slice_group: Any = None,
        moe_group: Any = None,
        top_k: int = 2,
        gate: Callable = NaiveGate,
        expert: Callable | Sequence[Callable] | None = None,
        gate_hook: Callable | None = None,
        mask: torch.Tensor | None = None,
        mask_dict: dict[int, Any] | None = None,
        gate_bias: bool = True,
    ):
        super().__init__()
        if mp_group is not None:
            warnings.warn("fastmoe.compat.FMoE: mp_group is deprecated, use slice_group", stacklevel=2)
            slice_group = mp_group
        ranks = 1 if slice_group is None else slice_group.size()
        for name, size in (("world_size", world_size), ("slice_group.size()", ranks)):
            if size != 1:
                raise NotImplementedError(f"fastmoe.compat.FMoE: {name} must be 1 (more is not served yet), got {size}")
        makers = list(expert) if isinstance(expert, (list, tuple)) else [expert] * num_expert
        self.num_expert, self.d_model, self.world_size = len(makers), d_model, world_size
        self.moe_group, self.slice_group, self.slice_rank, self.slice_size = moe_group, slice_group, 0, 1
        self.top_k, self.gate_hook, self.mask, self.mask_dict = top_k, gate_hook, mask, mask_dict
        options = {"gate_bias": gate_bias} if inspect.isclass(gate) and issubclass(gate, NaiveGate) else {}
        self.gate = gate(d_model, self.num_expert, world_size, top_k, **options)
        self.experts_fused = expert is None
        self.experts = (
            None
            if expert is None
            else nn.ModuleList(make if isinstance(make, nn.Module) else make(d_model) for make in makers)
        )

    def expert_fn(self, inp: Any, fwd_expert_count: torch.Tensor) -> Any:
        """Rows [R, D] in expert order, and how many each expert has [E], to as many rows."""
        if self.experts_fused:
            if self.experts is None:
                raise NotImplementedError(
                    f"fastmoe.compat.{type(self).__name__}: expert must be given, experts set or "
                    "expert_fn overridden, got none of these"
                )
            return self.experts(inp, fwd_expert_count)
        counts, out, start = fwd_expert_count.cpu(), [], 0
        for idx in range(self.num_expert):
            stop = start + int(counts[idx])
            rows = tree_map(lambda rows, start=start, stop=stop: rows[start:stop], inp)
            out.append(self.expert_fn_single(rows, counts[idx : idx + 1], idx))
            start = stop
        return tree_map(lambda *parts: torch.cat(parts), out[0], *out[1:])

    def expert_fn_single(self, inp: Any, fwd_expert_count: torch.Tensor, idx: int) -> Any:
        """The rows of expert `idx` through it."""
        return self.experts[idx](inp, fwd_expert_count)

    def mark_parallel_comm(self, expert_dp_comm: str = "none") -> None:
        """Tags the experts' parameters with expert_dp_comm and the gate's with "gate"."""
        if isinstance(self.experts, nn.Module):
            mark_module_parallel_comm(self.experts, expert_dp_comm)
        if isinstance(self.gate, nn.Module):
            mark_module_parallel_comm(self.gate, "gate")

    def forward(self, moe_inp: Any) -> Any:
        T = {leaf.shape[0] for leaf in tree_leaves(moe_inp)}
        if len(T) != 1:
            raise ValueError(f"fastmoe.compat.FMoE: moe_inp must hold tensors of one number of rows, got {sorted(T)}")
        (T,) = T
        idx, score = self.gate(moe_inp)
        if self.gate_hook is not None:
            self.gate_hook(idx, score, None)
        if T and (idx.numel() % T or not idx.numel() or score.numel() != idx.numel()):
            raise ValueError(
                f"fastmoe.compat.FMoE: the gate must return ids and weights of shape [T, K] with T = {T}, "
                f"got {list(idx.shape)} and {list(score.shape)}"
            )
        K = idx.numel() // T if T else self.top_k
        idx_TK, score_TK = idx.reshape(T, K), score.reshape(T, K)
        if self.mask is not None:
            mask_T = self._mask(T, idx.device)
            idx_TK = idx_TK.masked_fill(mask_T[:, None] != 0, -1)
        routing = ops.build_routing(idx_TK, self.num_expert)
        if not self.pads_rows:
            routing = routing._replace(src_row_R=routing.src_row_R[: int(routing.offsets[-1])])
        rows = tree_map(lambda x_TD: ops.permute(x_TD, routing), moe_inp)
        rows = self.expert_fn(rows, routing.offsets.diff().long())
        out = tree_map(lambda y_RD: ops.unpermute(y_RD, routing, _like(score_TK, y_RD)), rows)
        return out if self.mask is None else tree_map(lambda y_TD: self._fill(y_TD, mask_T, score_TK), out)

    def _mask(self, T: int, device: torch.device) -> torch.Tensor:
        if self.mask_dict is None or self.mask.numel() != T:
            raise ValueError(
                f"fastmoe.compat.FMoE: mask must have {T} entries and come with mask_dict, got "
                f"{self.mask.numel()} and {self.mask_dict}"
            )
        return self.mask.reshape(T).to(device)

    def _fill(self, y_TD: torch.Tensor, mask_T: torch.Tensor, score_TK: torch.Tensor) -> torch.Tensor:
        score_T1 = score_TK.sum(dim=1, keepdim=True)
        for key, value in self.mask_dict.items():
            if key != 0:
                y_TD = torch.where((mask_T == key)[:, None], (score_T1 * value).to(y_TD.dtype), y_TD)
        return y_TD


def _like(score_TK: torch.Tensor, y_RD: torch.Tensor) -> torch.Tensor:
    return score_TK if score_TK.dtype in (y_RD.dtype, torch.float32) else score_TK.float()


__all__ = ["FMoE", "mark_module_parallel_comm"]
