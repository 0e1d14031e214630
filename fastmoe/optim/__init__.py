"""Optimizers on fastmoe.ops, schedules and clipping."""

from fastmoe.optim.adamw import AdamW

__all__ = ["AdamW"]
