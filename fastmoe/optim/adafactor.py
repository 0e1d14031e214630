from __future__ import annotations

from collections.abc import Iterable

import torch

from fastmoe import ops
from fastmoe.optim.states import MASTERS, Layout, Optimizer, check_rule, rounding_key


class Adafactor(Optimizer):
    """Shazeer and Stern's rule (arXiv 1804.04235), one call of fastmoe.ops.adafactor_step for all tensors of a group.

    The second moment of a matrix [n, m] is kept as n + m float32 numbers, there is no first: bfloat16 weights with
    their states take 2 + 4 (n + m) / (n m) bytes a parameter. Parameters [..., n, m] are stacks of matrices, each with
    factors and scales of its own; those with fewer than two dimensions keep their whole second moment.

    lr: the step, where updates are clipped to an RMS of clip_threshold; None: max(eps[1], RMS of the weights) times
    min(1e-2, 1/sqrt(step)), the paper's, which needs no schedule. decay_rate: the second moment forgets with 1 -
    step^-decay_rate. weight_decay: decoupled, times the same step. master, for parameters in 16 bits: None, rounded up
    or down by chance, without bias; "residual8" (bfloat16 only), a third byte; "fp32", a float32 copy. seed: of all
    rounding, which with it is the same on every run.

    `step(grad_scale=s)` multiplies every gradient by s on the way.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float | None = None,
        decay_rate: float = 0.8,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        weight_decay: float = 0.0,
        *,
        master: str | None = None,
        seed: int = 0,
    ):
        check_rule(
            "Adafactor",
            [
                ("lr", lr, lr is None or lr >= 0, "None (relative to the weights) or at least 0"),
                ("decay_rate", decay_rate, 0 < decay_rate <= 1, "in (0, 1]"),
                ("eps", eps, min(eps) > 0, "positive"),
                ("clip_threshold", clip_threshold, clip_threshold > 0, "positive"),
                ("weight_decay", weight_decay, weight_decay >= 0, "at least 0"),
                ("master", master, master in MASTERS, f"one of {MASTERS}"),
            ],
        )
        self.seed = seed
        defaults = dict(
            lr=lr,
            decay_rate=decay_rate,
            eps=eps,
            clip_threshold=clip_threshold,
            weight_decay=weight_decay,
            master=master,
        )
        super().__init__(params, defaults)

    def layout(self, param: torch.Tensor, group: dict) -> Layout:
        shape = tuple(param.shape)
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        if param.dim() < 2:
            tensors = {"square": (shape, dtype)}
        else:
            tensors = {"row": (shape[:-1], dtype), "column": (shape[:-2] + shape[-1:], dtype)}
        if group["master"] == "residual8" and param.dtype == torch.float16:
            raise ValueError(
                "fastmoe.Adafactor: master must be None or 'fp32' for float16 params, got 'residual8' for one of shape "
                f"{list(shape)}"
            )
        if group["master"] and param.dtype in (torch.bfloat16, torch.float16):
            tensors["master"] = (shape, torch.float32 if group["master"] == "fp32" else torch.int8)
        return tensors

    def update(
        self, params: list[torch.Tensor], grads: list[torch.Tensor], states: list[dict], group: dict, grad_scale: float
    ) -> None:
        of = lambda name: [state.get(name) for state in states]
        ops.adafactor_step(
            params,
            grads,
            of("row"),
            of("column"),
            of("square"),
            of("step"),
            group["lr"],
            group["decay_rate"],
            group["eps"],
            group["clip_threshold"],
            group["weight_decay"],
            grad_scale,
            masters=of("master"),
            keys=[rounding_key(self.seed, state["index"], state["step"]) for state in states],
        )
