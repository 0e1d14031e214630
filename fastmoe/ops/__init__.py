"""Pure functions on tensors: no parameters, no process groups, no configuration."""

from fastmoe.ops.adamw import adamw_step
from fastmoe.ops.assignment import balanced_assignment, swipe
from fastmoe.ops.experts import moe_mlp
from fastmoe.ops.gating import topk_gate
from fastmoe.ops.gemm import linear
from fastmoe.ops.loss import linear_cross_entropy
from fastmoe.ops.norm import rms_norm
from fastmoe.ops.permutation import (
    Routing,
    build_routing,
    build_routing_from_experts,
    permute,
    round_routing,
    unpermute,
)
from fastmoe.ops.random import random_uniform

__all__ = [
    "Routing",
    "adamw_step",
    "balanced_assignment",
    "build_routing",
    "build_routing_from_experts",
    "linear",
    "linear_cross_entropy",
    "moe_mlp",
    "permute",
    "random_uniform",
    "rms_norm",
    "round_routing",
    "swipe",
    "topk_gate",
    "unpermute",
]
