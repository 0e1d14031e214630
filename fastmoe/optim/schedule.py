from __future__ import annotations

import math

from fastmoe.config import OptimConfig


def cosine(step: int, optim: OptimConfig, total_steps: int) -> float:
    """Learning rate of `step` (from 1): linear warm-up to optim.lr, then cosine down to lr * min_lr_ratio at
    total_steps.
    """
    if step <= optim.warmup_steps:
        return optim.lr * step / optim.warmup_steps
    progress = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))
