from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastmoe.comm import torchrun_environment
from fastmoe.comm.launch import first_host

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2"}


@pytest.mark.parametrize("launched", [TORCHRUN, OPEN_MPI, HYDRA, SLURM], ids=["torchrun", "mpirun", "mpiexec", "srun"])
def test_every_launcher_gives_torchrun_names(launched):
    place = {"MASTER_ADDR": "node1", "MASTER_PORT": "1234"}
    assert torchrun_environment(launched | place | {"HOME": "/"}) == TORCHRUN | place


def test_the_innermost_launcher_counts():
    assert torchrun_environment(
        SLURM
        | {
            "OMPI_COMM_WORLD_RANK": "0",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
            "MASTER_ADDR": "a",
        }
    ) == {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
    # srun --mpi=pmi2 sets two of Hydra's three names
    assert torchrun_environment(SLURM | {"PMI_RANK": "9", "PMI_SIZE": "9", "MASTER_ADDR": "a"})["RANK"] == "3"


def test_address_where_none_is_given():
    assert torchrun_environment({}) == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    assert torchrun_environment(HYDRA | {"MPI_LOCALNRANKS": "8"})["MASTER_ADDR"] == "127.0.0.1"
    assert torchrun_environment(SLURM | {"SLURM_JOB_NODELIST": "gpu[07-09],cpu1"})["MASTER_ADDR"] == "gpu07"
    with pytest.raises(ValueError, match=r"fastmoe\.launch: MASTER_ADDR must be .* mpirun"):
        torchrun_environment(OPEN_MPI)


@pytest.mark.parametrize(
    "nodelist, host",
    [("a", "a"), ("a,b", "a"), ("n[3,5]", "n3"), ("n[003-010,12]-ib,m1", "n003-ib"), ("r[1-2]n[4-5]", "r1n4")],
)
def test_first_host_of_a_slurm_list(nodelist, host):
    assert first_host(nodelist) == host


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"RANK of mpiexec \(Hydra\) must be a number, got 'x'"):
        torchrun_environment(HYDRA | {"PMI_RANK": "x", "MASTER_ADDR": "a"})
    with pytest.raises(ValueError, match="must be below WORLD_SIZE = 8, got 8"):
        torchrun_environment(SLURM | {"SLURM_PROCID": "8", "MASTER_ADDR": "a"})


def test_the_scaling_example_runs_as_mpirun_starts_it():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    example = Path(__file__).parents[2] / "examples" / "scaling.py"
    ours = {name: value for name, value in os.environ.items() if name not in TORCHRUN} | {"MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(example), "--tokens", "32"],
            env=ours | dict(zip(OPEN_MPI, (rank, "2", rank, "2"))),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    first, second = (rank.communicate(timeout=120)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "2 ranks, 32 experts" in first and not second
