from __future__ import annotations

import torch


class LossScaler:
    """The factor on an fp16 loss that keeps its gradients within the range of float16.

    It starts at `initial` and doubles after `window` steps without an overflow. An overflow, a gradient that is not
    finite, means that the step is left out; the first `hysteresis` - 1 of them since the last doubling leave the factor
    as it is, each further one halves it, not below `minimum`. Source: Micikevicius et al., arXiv 1710.03740; window,
    hysteresis and minimum as in GLM.
    """

    def __init__(self, initial: float = 2.0**16, window: int = 1000, hysteresis: int = 2, minimum: float = 1.0):
        if not 0 < minimum <= initial:
            raise ValueError(f"fastmoe.LossScaler: minimum must be in (0, initial = {initial}], got {minimum}")
        for name, value in (("window", window), ("hysteresis", hysteresis)):
            if value < 1:
                raise ValueError(f"fastmoe.LossScaler: {name} must be at least 1, got {value}")
        self.window, self.hysteresis, self.minimum = window, hysteresis, minimum
        self.value, self.clean, self.patience, self.skipped = float(initial), 0, hysteresis, 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss * self.value

    def update(self, finite: bool) -> None:
        """finite: whether all gradients of the step were, so that it was taken."""
        if finite:
            self.clean += 1
            if self.clean == self.window:
                self.value, self.clean, self.patience = 2 * self.value, 0, self.hysteresis
            return
        self.clean, self.skipped = 0, self.skipped + 1
        if self.patience > 1:
            self.patience -= 1
        else:
            self.value = max(self.value / 2, self.minimum)

    def state_dict(self) -> dict[str, float]:
        """What changes: the factor, steps since an overflow or a doubling, overflows yet borne, steps left out."""
        return {name: getattr(self, name) for name in ("value", "clean", "patience", "skipped")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self.clean, self.patience, self.skipped = (
            state[name] for name in ("value", "clean", "patience", "skipped")
        )
