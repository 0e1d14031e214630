"""Pure functions on tensors: no parameters, no process groups, no configuration."""

from fastmoe.ops.adafactor import adafactor_step
from fastmoe.ops.adamw import adamw_step
from fastmoe.ops.assignment import balanced_assignment, swipe
from fastmoe.ops.attention import attention, attention_with_lse, rope
from fastmoe.ops.experts import moe_mlp
from fastmoe.ops.gating import topk_gate
from fastmoe.ops.gemm import linear
from fastmoe.ops.loss import linear_cross_entropy
from fastmoe.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastmoe.ops.permutation import (
    Routing,
    build_routing,
    build_routing_from_experts,
    permute,
    round_routing,
    unpermute,
)
from fastmoe.ops.quantize import dequantize, quantize
from fastmoe.ops.random import random_uniform

__all__ = [
    "Routing",
    "adafactor_step",
    "adamw_step",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_with_lse",
    "balanced_assignment",
    "build_routing",
    "build_routing_from_experts",
    "dequantize",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "moe_mlp",
    "permute",
    "quantize",
    "random_uniform",
    "rms_norm",
    "rope",
    "round_routing",
    "swipe",
    "topk_gate",
    "unpermute",
]
