"""Routers that need more of the data than its ids: domain and balanced hash tables."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fastmoe.cli import main
from fastmoe.nn import RouterInputs
from fastmoe.nn.router import HashRouter
from fastmoe.trainer import data, metrics
from fastmoe.trainer.generate import generate, load_run, printable
from fastmoe.trainer.train import train


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(metrics, "measured_peak", lambda device, dtype: 1e11)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A data folder of three domains."""
    root = tmp_path_factory.mktemp("folders")
    for i in range(60):
        path = root / "src" / ("law", "code", "news")[i % 3] / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(("the court held ", "def f(x): ", "today in town ")[i % 3] * (3 + i % 5))
    data.prepare([root / "src"], "byte", root / "data")
    return str(root / "data")


def test_domain_router_gets_each_tokens_domain(tiny, folders, metrics_of, capsys):
    config = tiny(
        model={"router": "domain"}, data={"path": folders}, train={"grad_accumulation": 2, "compile": False, "steps": 6}
    )
    result = train(config)
    batches = data.Batches(folders, "train", 32, domains=True)
    for record in metrics_of(config.run.dir):
        domains_BS = batches.at((record["step"] - 1) * 4, 4)[2]
        assert record["load"] == [torch.bincount(domains_BS.flatten(), minlength=4).tolist()] * 2
    model, _ = load_run(config.run.dir)
    nats = count = 0
    for ids_BS, targets_BS, domains_BS in data.Batches(folders, "heldout", 32, domains=True).sweep(1):
        tokens = int((targets_BS != -100).sum())
        inputs = RouterInputs(domains_T=domains_BS.flatten())
        nats, count = nats + model(ids_BS, targets_BS, inputs=inputs).loss.item() * tokens, count + tokens
    assert result.heldout == pytest.approx(nats / count / math.log(2), rel=1e-5)
    outs = [generate(model, [0], 20, 0.0, domain=d, cached=cached) for d in (0, 1) for cached in (True, False)]
    assert outs[0] == outs[1] and outs[2] == outs[3] and outs[0] != outs[2]
    text = printable(bytes(outs[2][1:]).decode(errors="replace"))
    capsys.readouterr()
    words = ["generate", "--run.dir", config.run.dir, "--tokens", "20", "--temperature", "0", "--domain"]
    assert main([*words, "1"]) == 0 and capsys.readouterr().out.strip() == text.strip()
    assert main([*words, "9"]) == 2 and "domains_T must be in 0..3, got 9" in capsys.readouterr().err


def test_too_few_experts_for_the_domains(tiny, folders):
    with pytest.raises(ValueError, match=r"fastmoe.train: --model.num-experts must be at least 3, the domains of .* 2"):
        train(tiny(model={"router": "domain", "num_experts": 2}, data={"path": folders}))


def test_balanced_hash_tables_come_from_the_training_tokens(tiny, corpus, folders, capsys):
    options = {"router": "hash", "router_options": "balanced=True"}
    config = tiny(model=options, train={"steps": 4})
    first = train(config).checkpoint
    shards = [np.fromfile(corpus / shard["file"], "uint8") for shard in data.load_meta(corpus)["splits"]["train"]]
    wanted = HashRouter(32, 4, vocab_size=256)
    wanted.balance_tables(torch.from_numpy(np.bincount(np.concatenate(shards), minlength=256)))
    resumed = train(tiny(model=options, train={"steps": 6}, data={"path": folders}, run={"resume": True})).checkpoint
    assert first != resumed
    for path in (first, resumed):  # the tables stay, whatever the data of a resumed run
        tables = [value for name, value in load_file(path / "model-00001.safetensors").items() if "table_VK" in name]
        assert len(tables) == 2 and all(torch.equal(table_VK, wanted.table_VK) for table_VK in tables)
    model, _ = load_run(config.run.dir)
    assert torch.equal(model.layers[1].feed_forward.router.table_VK, wanted.table_VK)
    random = train(replace(tiny("other", model={"router": "hash"}, train={"steps": 1}))).checkpoint
    assert not torch.equal(
        load_file(random / "model-00001.safetensors")["layers.0.feed_forward.router.table_VK"], tables[0]
    )
