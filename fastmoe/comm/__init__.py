"""Communication between ranks: process groups behind one protocol, dispatch and combine of expert rows, launchers."""

from fastmoe.comm.dispatch import Dispatch, combine, dispatch, expert_parallel_moe
from fastmoe.comm.group import Group, LocalGroup
from fastmoe.comm.launch import torchrun_environment
from fastmoe.comm.torch_dist import TorchGroup

__all__ = [
    "Dispatch",
    "Group",
    "LocalGroup",
    "TorchGroup",
    "combine",
    "dispatch",
    "expert_parallel_moe",
    "torchrun_environment",
]
