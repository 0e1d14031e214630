"""fastmoe: kernels and a reference trainer for Mixture-of-Experts models."""

from fastmoe import config, nn, ops, optim
from fastmoe.integrations import disable, enable
from fastmoe.ops.registry import explain
from fastmoe.version import __version__

__all__ = ["__version__", "config", "disable", "enable", "explain", "nn", "ops", "optim"]
