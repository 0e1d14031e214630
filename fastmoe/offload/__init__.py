"""Training with states larger than memory: what lives where, file-backed tensors, an optimizer that streams them."""

from fastmoe.offload.disk import TensorFile
from fastmoe.offload.plan import Plan, plan
from fastmoe.offload.stream import OffloadedAdamW

__all__ = ["OffloadedAdamW", "Plan", "TensorFile", "plan"]
