"""Training on several gloo ranks against one process that takes the same batches."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from fastmoe.trainer import checkpoint

MODEL = {"model.d_model": 32, "model.num_layers": 2, "model.num_heads": 2, "model.d_ff": 16, "model.num_experts": 8}
TRAIN = {"train.batch_size": 8, "train.seq_len": 32, "train.steps": 6, "optim.warmup_steps": 2, "log.every": 1}
EVAL = {"eval.every": 0, "eval.final_tokens": 512, "checkpoint.every": 3, "checkpoint.keep": 9}
# balance over the global batch, and what is drawn by token, are the same however tokens lie on ranks
ROUTER = {"model.router_options": "global_balance=True"}


def run(folder, world, *, resume=False, fails=False, **options):
    """`fastmoe train tiny` on `world` ranks as torchrun would start them; its outputs by rank."""
    words = {**MODEL, **TRAIN, **EVAL, **ROUTER, **options, "run.dir": str(folder)}
    args = [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        env = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in env.items()}}
        command = [sys.executable, "-m", "fastmoe", "train", "tiny", *args, *(["--resume"] if resume else [])]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, env=env if world > 1 else None, **pipes))
    outputs = [process.communicate(timeout=300)[0] for process in started]
    for process, output in zip(started, outputs):
        assert (process.returncode == 2) == fails and process.returncode in (0, 2), output
    return outputs


def losses(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["loss"], record["aux_loss"], record["grad_norm"]) for record in records], records[-1]["heldout"]


def tensors(folder, step):
    found = checkpoint._stored(folder / "checkpoints" / f"step-{step:08d}", "model")
    return {name: file.get_tensor(name) for name, file in found.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    run(folder, 1)
    return folder


def same(folder, alone):
    (got, heldout), (want, heldout_alone) = losses(folder), losses(alone)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=2e-5, atol=1e-6)
    assert abs(heldout - heldout_alone) < 1e-5
    found, expected = tensors(folder, 6), tensors(alone, 6)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.apart
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("dp", "ep"), [(4, 1), (4, 2), (4, 4)])
def test_ranks_train_as_one_process(alone, tmp_path, dp, ep):
    outputs = run(tmp_path, dp, **{"mesh.ep": ep})
    assert "held-out" in outputs[0] and not any(output.strip() for output in outputs[1:]), outputs
    same(tmp_path, alone)


@pytest.mark.apart
@pytest.mark.timeout(600)
def test_checkpoints_go_on_at_any_size(alone, tmp_path):
    """3 steps on 4 ranks with experts split over 4, then 3 more on 2 ranks, split over 2; then read by one process."""
    run(tmp_path, 4, **{"mesh.ep": 4, "train.steps": 6, "optim.state_dtype": "int8"})
    whole = tensors(tmp_path, 6)
    for step in checkpoint.steps(tmp_path / "checkpoints")[1:]:
        checkpoint._remove(step)
    outputs = run(tmp_path, 2, resume=True, **{"mesh.ep": 2, "optim.state_dtype": "int8"})
    assert "resuming after step 3" in outputs[0]
    for name, tensor in tensors(tmp_path, 6).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    run(tmp_path, 1, resume=True, **{"train.steps": 7, "optim.state_dtype": "int8"})


@pytest.mark.apart
@pytest.mark.timeout(600)
def test_settings_that_do_not_fit_the_ranks(tmp_path):
    for options, message in (
        ({"mesh.ep": 4}, "fastmoe.mesh: --mesh.ep must divide dp = 2, be one of [1, 2], got 4"),
        (
            {"mesh.dp": 3},
            "fastmoe.mesh: pp x dp x tp must be 2 (ranks), got 1 x 3 x 1; --mesh.pp 1 --mesh.dp 2 --mesh.tp",
        ),
        ({"train.batch_size": 7}, "fastmoe.train: --train.batch-size = 7 must be a multiple of 2"),
    ):
        for output in run(tmp_path / "run", 2, fails=True, **options):
            assert message in output
