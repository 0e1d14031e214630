from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastmoe.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from fastmoe.trainer import data


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_texts(folder: Path, count: int = 60) -> Path:
    folder.mkdir()
    for i in range(count):
        lines = [f"def f{i}_{j}(x):\n    return x * {i * j % 97} + {j}\n" for j in range(4 + i % 5)]
        (folder / f"part{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "src")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts) -> Path:
    out = tmp_path_factory.mktemp("corpus") / "data"
    data.prepare([texts], "byte", out)
    return out


@pytest.fixture
def tiny(tmp_path, corpus):
    """A function that makes a Config of a run of about a second; keywords like train={"steps": 4} override."""

    def make(dir: str = "run", **groups) -> Config:
        config = Config(
            model=ModelConfig(d_model=32, num_layers=2, num_experts=4, d_ff=32, max_seq_len=256),
            optim=OptimConfig(warmup_steps=2),
            train=TrainConfig(steps=8, batch_size=4, seq_len=32, device="cpu"),
            data=DataConfig(str(corpus)),
            eval=EvalConfig(every=3, tokens=128),
            checkpoint=CheckpointConfig(every=4),
            run=RunConfig(str(tmp_path / dir)),
        )
        return replace(config, **{name: replace(getattr(config, name), **values) for name, values in groups.items()})

    return make


@pytest.fixture(scope="session")
def flags(corpus):
    """Command-line words for the same tiny run."""
    words = (
        "--model.d-model 32 --model.num-layers 2 --model.num-experts 4 --model.d-ff 32 --optim.warmup-steps 2 "
        "--train.batch-size 4 --train.seq-len 32 --train.device cpu --eval.every 3 --eval.tokens 128"
    )
    return [*words.split(), "--data.path", str(corpus)]


@pytest.fixture
def metrics_of():
    """The records of a run without their wall-clock figures."""

    def read(run_dir: str | Path) -> list[dict]:
        records = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in record.items() if key != "perf"} for record in records]

    return read
