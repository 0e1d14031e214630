"""Modules: thin holders of parameters around fastmoe.ops."""

from fastmoe.nn.attention import Attention, KVCache
from fastmoe.nn.domains import DomainMixture, MixtureOutput, add_expert, remove_expert
from fastmoe.nn.experts import Experts, FeedForward, ModuleExperts
from fastmoe.nn.moe import MoE, MoEOutput
from fastmoe.nn.norm import RMSNorm
from fastmoe.nn.router import ROUTERS, Router, RouterInputs, RouterOutput
from fastmoe.nn.transformer import Output, Transformer

__all__ = [
    "Attention",
    "DomainMixture",
    "Experts",
    "FeedForward",
    "KVCache",
    "MoE",
    "MoEOutput",
    "MixtureOutput",
    "ModuleExperts",
    "Output",
    "RMSNorm",
    "ROUTERS",
    "Router",
    "RouterInputs",
    "RouterOutput",
    "Transformer",
    "add_expert",
    "remove_expert",
]
