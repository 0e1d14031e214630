"""Modules: thin holders of parameters around fastmoe.ops."""

from fastmoe.nn.attention import Attention, KVCache
from fastmoe.nn.experts import Experts, FeedForward
from fastmoe.nn.moe import MoE, MoEOutput
from fastmoe.nn.norm import RMSNorm
from fastmoe.nn.router import Router, RouterOutput
from fastmoe.nn.transformer import Output, Transformer

__all__ = [
    "Attention",
    "Experts",
    "FeedForward",
    "KVCache",
    "MoE",
    "MoEOutput",
    "Output",
    "RMSNorm",
    "Router",
    "RouterOutput",
    "Transformer",
]
