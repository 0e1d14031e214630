"""Optimizers on fastmoe.ops, schedules, clipping and loss scaling."""

from fastmoe.optim.adafactor import Adafactor
from fastmoe.optim.adamw import AdamW
from fastmoe.optim.scaler import LossScaler

__all__ = ["Adafactor", "AdamW", "LossScaler"]
