"""fastmoe: kernels and a reference trainer for Mixture-of-Experts models."""

from fastmoe import config, nn, ops, optim
from fastmoe.ops.registry import explain

__version__ = "0.1.0"
__all__ = ["config", "explain", "nn", "ops", "optim", "__version__"]
