"""Communication between ranks: process groups behind one protocol, dispatch and combine of expert rows, launchers."""

from fastmoe.comm.dispatch import Dispatch, combine, dispatch, expert_parallel_moe
from fastmoe.comm.group import Group, LocalGroup
from fastmoe.comm.launch import torchrun_environment
from fastmoe.comm.mesh import Mesh, Ranks, fit, launched, reduce_gradients
from fastmoe.comm.torch_dist import TorchGroup

__all__ = [
    "Dispatch",
    "Group",
    "LocalGroup",
    "Mesh",
    "Ranks",
    "TorchGroup",
    "combine",
    "dispatch",
    "expert_parallel_moe",
    "fit",
    "launched",
    "reduce_gradients",
    "torchrun_environment",
]
