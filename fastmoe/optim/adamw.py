from __future__ import annotations

from collections.abc import Iterable, Iterator
from operator import attrgetter, itemgetter

import torch

from fastmoe import ops
from fastmoe.ops.adamw import Memo
from fastmoe.ops.quantize import quantize, scales_shape
from fastmoe.optim.states import MASTERS, STATE_DTYPES, Layout, Optimizer, check_rule, local, rounding_key

HALVES = {torch.bfloat16, torch.float16}
_is_sparse, _dtype = attrgetter("is_sparse"), attrgetter("dtype")


class AdamW(Optimizer):
    """torch.optim.AdamW's rule, one call of fastmoe.ops.adamw_step for all tensors of a group.

    state_dtype: what the moments are kept in, "fp32", "bf16", "fp16" or "int8" (2 bytes a parameter and two bfloat16
    scales for every 32); moments of parameters with fewer than two dimensions stay float32. master, for parameters in
    16 bits: None, rounded up or down by chance, without bias; "residual8" (bfloat16 only), a third byte; "fp32", a
    float32 copy. seed: of all rounding, which with it is the same on every run.

    sparse_experts: in parameters of three dimensions [E, ...] with sparse gradients over dimension 0 (as
    `ops.moe_mlp(..., sparse_grads=True)` gives) only the experts with gradient are touched; a dense gradient touches
    all. An expert's moments and step count ("steps", int64 [E]) stand still while it idles, and at its next touch its
    weights decay by D(now) / D(then): D is the product of 1 - lr * weight_decay over the optimizer's steps, kept in
    the group ("decay_product") and, of the last touch, in "decay" (float64 [E]). torch's rule would let the moments of
    idle experts fade and go on moving their weights with them: where every expert is touched in one step of four, by
    gradients of one distribution, it moves the weights 2.0 times as far, in the same direction (cosine above 0.999);
    where all are touched in every step, the two are equal.

    Parameters, states and gradients may be DTensors' shards (see Optimizer); torch.optim.AdamW's state_dict can be
    loaded. `step(grad_scale=s)` multiplies every gradient by s on the way (clipping without a pass of its own).

    Errors: ValueError naming the setting (and the group) for settings that do not fit, for sparse gradients without
    sparse_experts, and for a state_dict with amsgrad or maximize.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_dtype: str = "fp32",
        master: str | None = None,
        sparse_experts: bool = False,
        seed: int = 0,
    ):
        self.seed = seed
        self._memos: dict[int, Memo] = {}  # by id of the group
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            state_dtype=state_dtype,
            master=master,
            sparse_experts=sparse_experts,
            decay_product=1.0,
        )
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        group, number = self.param_groups[-1], len(self.param_groups) - 1
        at_least_0 = "at least 0 (betas below 1)"
        halves = any(param.dtype == torch.float16 for param in group["params"])
        check_rule(
            "AdamW",
            [
                ("lr", group["lr"], group["lr"] >= 0, at_least_0),
                ("betas", group["betas"], all(0 <= beta < 1 for beta in group["betas"]), at_least_0),
                ("eps", group["eps"], group["eps"] >= 0, at_least_0),
                ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0, at_least_0),
                (
                    "state_dtype",
                    group["state_dtype"],
                    group["state_dtype"] in STATE_DTYPES,
                    f"one of {', '.join(STATE_DTYPES)}",
                ),
                ("master", group["master"], group["master"] in MASTERS, f"one of {MASTERS}"),
                (
                    f"master of group {number}",
                    group["master"],
                    not (halves and group["master"] == "residual8"),
                    "None or 'fp32' for float16 parameters",
                ),
            ],
        )

    def layout(self, param: torch.Tensor, group: dict) -> Layout:
        shape, dtype = tuple(param.shape), STATE_DTYPES[group["state_dtype"]]
        if param.dtype == torch.float64:
            dtype = torch.float64
        elif param.dim() < 2:
            dtype = torch.float32
        coded = dtype == torch.int8
        tensors = {"exp_avg": (shape, dtype), "exp_avg_sq": (shape, torch.uint8 if coded else dtype)}
        if coded:
            scales = tuple(scales_shape(param.shape)), torch.bfloat16
            tensors |= {"exp_avg_scale": scales, "exp_avg_sq_scale": scales}
        if group["master"] and param.dtype in HALVES:
            tensors["master"] = (shape, torch.float32 if group["master"] == "fp32" else torch.int8)
        if group["sparse_experts"] and param.dim() == 3:
            tensors |= {"steps": (shape[:1], torch.int64), "decay": (shape[:1], torch.float64)}
        return tensors

    def new_state(self, param: torch.Tensor, group: dict, index: int, make=torch.zeros) -> dict:
        state = super().new_state(param, group, index, make)
        if "decay" in state:
            state["decay"].fill_(group["decay_product"])
        return state

    def update(
        self, params: list[torch.Tensor], grads: list[torch.Tensor], states: list[dict], group: dict, grad_scale: float
    ) -> None:
        decay = 1 - group["lr"] * group["weight_decay"]
        group["decay_product"] *= decay
        kept = {
            "exp_avg": True,
            "exp_avg_sq": True,
            "exp_avg_scale": group["state_dtype"] == "int8",
            "exp_avg_sq_scale": group["state_dtype"] == "int8",
            "master": group["master"] is not None,
        }
        none = [None] * len(states)
        lists = [[state.get(name) for state in states] if some else none for name, some in kept.items()]
        lists = [params, grads, *lists]
        numbers = [
            [*map(itemgetter("step"), states)],
            self._keys(params, states, group),
            [state.get("first_row", 0) for state in states],
            [decay] * len(states),
        ]
        special = []
        if group["sparse_experts"] or any(map(_is_sparse, grads)) or not HALVES.isdisjoint(map(_dtype, params)):
            special = [
                i
                for i, (param, grad, state) in enumerate(zip(params, grads, states))
                if grad.is_sparse or "steps" in state or (param.dtype in HALVES and param.dim() == 1)
            ]
        if special:
            lists, numbers = self._with_parts(set(special), lists, numbers, states, group)
        params, grads, ms, vs, m_scales, v_scales, masters = lists
        steps, keys, first_rows, decays = numbers
        ops.adamw_step(
            params,
            grads,
            ms,
            vs,
            steps,
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            grad_scale,
            exp_avg_scales=m_scales,
            exp_avg_sq_scales=v_scales,
            masters=masters,
            keys=keys,
            first_rows=first_rows,
            decays=decays,
            memo=None if special else self._memo(group),
        )

    def __setstate__(self, state: dict) -> None:
        self._memos = {}
        super().__setstate__(state)

    def _memo(self, group: dict) -> Memo | None:
        """None for a group that is not one of these: its tensors come and go (fastmoe.offload)."""
        own = any(group is other for other in self.param_groups)
        return self._memos.setdefault(id(group), Memo()) if own else None

    def _keys(self, params: list[torch.Tensor], states: list[dict], group: dict) -> list[int]:
        """Of what is rounded by chance."""
        if group["state_dtype"] == "fp32" and HALVES.isdisjoint(map(_dtype, params)):
            return [0] * len(states)
        return [rounding_key(self.seed, state["index"], state["step"]) for state in states]

    def _with_parts(
        self, special: set[int], lists: list[list], numbers: list[list], states: list[dict], group: dict
    ) -> tuple[list[list], list[list]]:
        """The lists with an entry for every touched expert; vectors in 16 bits as columns, so that a shard of them is
        rounded as in the whole."""
        new_lists, new_numbers = [[] for _ in lists], [[] for _ in numbers]

        def add(tensors, values):
            for new, entry in zip((*new_lists, *new_numbers), (*tensors, *values)):
                new.append(entry)

        for i, (tensors, values) in enumerate(zip(zip(*lists), zip(*numbers))):
            if i not in special:
                add(tensors, values)
            elif "steps" in states[i]:
                for part in _experts(tensors, values, states[i], group["decay_product"]):
                    add(*part)
            elif tensors[1].is_sparse:
                raise ValueError(
                    f"fastmoe.AdamW: gradients must be dense, or of three dimensions and sparse over the first with "
                    f"sparse_experts=True, got a sparse one of shape {list(tensors[1].shape)}"
                )
            else:
                add([tensor if tensor is None else tensor.view(-1, 1) for tensor in tensors], values)
        return new_lists, new_numbers

    def adopt(
        self, param: torch.Tensor, group: dict, index: int, given: dict[str, torch.Tensor], foreign: bool
    ) -> dict:
        """Also a state of torch.optim.AdamW."""
        if foreign:
            if group.get("amsgrad") or group.get("maximize"):
                raise ValueError("fastmoe.AdamW: a state_dict must be without amsgrad and maximize, got one with")
            given = self._from_torch(param, group, index, given)
        return super().adopt(param, group, index, given, foreign)

    def _from_torch(self, param: torch.Tensor, group: dict, index: int, given: dict[str, torch.Tensor]) -> dict:
        """float moments in the dtypes of the layout."""
        state = self.new_state(param, group, index)
        tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
        for name, root in (("exp_avg", False), ("exp_avg_sq", True)):
            value, kind = local(given[name]), state["exp_avg"].dtype
            if root and kind in (torch.float16, torch.int8):
                value = value.float().sqrt()
            if kind == torch.int8:
                tensors[name], tensors[f"{name}_scale"] = quantize(value.to(param.device).float(), signed=not root)
            else:
                tensors[name] = value.to(kind)
        return tensors


def _experts(tensors: tuple, values: tuple, state: dict, decay_product: float) -> Iterator[tuple[list, tuple]]:
    """Entries of the experts with gradient, of lists and of numbers; their steps and decays are brought up to date."""
    param, grad, *others = tensors
    _, key, first_row, _ = values
    touched, parts = range(param.shape[0]), grad
    if grad.is_sparse:
        grad = grad.coalesce()
        if grad.sparse_dim() != 1:
            raise ValueError(
                f"fastmoe.AdamW: sparse gradients must be sparse over dimension 0 alone, got {grad.sparse_dim()}"
            )
        touched, parts = grad.indices()[0].tolist(), grad.values()
    at = torch.tensor(touched, dtype=torch.int64, device=param.device)
    state["steps"][at] += 1
    steps, decays = state["steps"][at].tolist(), (decay_product / state["decay"][at]).tolist()
    state["decay"][at] = decay_product
    views = [tensor if tensor is None else tensor.unbind() for tensor in (param, *others)]
    for e, part, step, decay in zip(touched, parts.unbind(), steps, decays):
        own = [view if view is None else view[e] for view in views]
        yield [own[0], part, *own[1:]], (step, key, first_row + e * param.shape[1], decay)
