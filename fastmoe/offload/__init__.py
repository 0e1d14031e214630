"""Training with weights and states larger than memory: what lives where, and the engine that moves it."""

from fastmoe.offload.engine import Engine, Step, clear
from fastmoe.offload.plan import Plan, plan

__all__ = ["Engine", "Plan", "Step", "clear", "plan"]
