from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from fastmoe import ops


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW's rule, one call of fastmoe.ops.adamw_step for all tensors of a group. Moments are float32.

    `step(grad_scale=s)` multiplies every gradient by s on the way (clipping without a pass of its own).
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ):
        for name, value, good in (
            ("lr", lr, lr >= 0),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps >= 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
        ):
            if not good:
                raise ValueError(f"fastmoe.AdamW: {name} must be at least 0 (betas below 1), got {value}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's, which would round the moments to the parameters' dtype; here they keep their own."""
        super().load_state_dict(state_dict)
        ids = (i for group in state_dict["param_groups"] for i in group["params"])
        for i, param in zip(ids, (param for group in self.param_groups for param in group["params"])):
            for name in ("exp_avg", "exp_avg_sq"):
                if i in state_dict["state"]:
                    self.state[param][name] = state_dict["state"][i][name].to(param.device, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None, grad_scale: float = 1.0) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[torch.Tensor]] = {}
            for param in group["params"]:
                if param.grad is None:
                    continue
                state = self.state[param]
                if not state:
                    wide = torch.float64 if param.dtype == torch.float64 else torch.float32
                    state.update(
                        step=0,
                        exp_avg=torch.zeros_like(param, dtype=wide),
                        exp_avg_sq=torch.zeros_like(param, dtype=wide),
                    )
                state["step"] += 1
                by_step.setdefault(state["step"], []).append(param)
            for step, params in by_step.items():
                ops.adamw_step(
                    params,
                    [p.grad for p in params],
                    [self.state[p]["exp_avg"] for p in params],
                    [self.state[p]["exp_avg_sq"] for p in params],
                    step,
                    group["lr"],
                    *group["betas"],
                    group["eps"],
                    group["weight_decay"],
                    grad_scale,
                )
        return loss
