"""One set of names for all launchers: torchrun's."""

from __future__ import annotations

import re
from collections.abc import Mapping

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_LAUNCHERS = {
    "torchrun": _NAMES,
    "mpirun (Open MPI)": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpiexec (Hydra)": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}


def torchrun_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT of this process, whoever launched it.

    environ: os.environ. The first of torchrun, mpirun, mpiexec and srun counts whose rank, world size and local rank
    are all set; with none, a world of one. LOCAL_WORLD_SIZE is left out where the launcher does not tell it.
    MASTER_ADDR and MASTER_PORT are kept where set; else the port is 29500 and the address 127.0.0.1 where all ranks are
    local, or the first host of SLURM_JOB_NODELIST under srun.

    Errors: ValueError for a value that is no number, a rank outside the world, or machines without an address.
    """
    launcher = next((who for who, names in _LAUNCHERS.items() if all(name in environ for name in names[:3])), None)
    if launcher:
        found = {ours: environ[theirs] for ours, theirs in zip(_NAMES, _LAUNCHERS[launcher]) if theirs in environ}
    else:
        found = dict(zip(_NAMES, "0101"))
    for name, value in found.items():
        if not value.isdecimal():
            raise ValueError(f"fastmoe.launch: {name} of {launcher} must be a number, got {value!r}")
    if int(found["RANK"]) >= int(found["WORLD_SIZE"]):
        raise ValueError(
            f"fastmoe.launch: RANK of {launcher} must be below WORLD_SIZE = {found['WORLD_SIZE']}, got {found['RANK']}"
        )
    if "MASTER_ADDR" in environ:
        address = environ["MASTER_ADDR"]
    elif found.get("LOCAL_WORLD_SIZE") == found["WORLD_SIZE"]:
        address = "127.0.0.1"
    elif launcher == "srun" and "SLURM_JOB_NODELIST" in environ:
        address = first_host(environ["SLURM_JOB_NODELIST"])
    else:
        raise ValueError(
            f"fastmoe.launch: MASTER_ADDR must be the host of rank 0 for a launch by {launcher} over machines, got none"
        )
    return found | {"MASTER_ADDR": address, "MASTER_PORT": environ.get("MASTER_PORT", "29500")}


def first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: "gpu[07-09,12],cpu1" -> "gpu07"."""
    first = re.match(r"(?:[^,[]|\[[^]]*\])+", nodelist)
    return re.sub(r"\[(\w+)[^]]*\]", r"\1", first[0]) if first else nodelist
