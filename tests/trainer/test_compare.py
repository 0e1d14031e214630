"""`fastmoe bench routers`: what is compared, and what is written about it."""

import json
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import pytest

from fastmoe.cli import main
from fastmoe.nn.router import ROUTERS
from fastmoe.trainer import compare
from fastmoe.trainer.recipes import recipe

SMALL = (
    "--model.d-model 16 --model.num-layers 1 --model.num-heads 2 --model.d-ff 8 --train.steps 2 --train.batch-size 2 "
    "--train.seq-len 16"
)


def test_every_router_is_compared_at_the_same_flops():
    base = recipe("tiny")
    assert set(ROUTERS) <= {compare.settings(name, base)["router"] for name in compare.VARIANTS}
    for name in compare.VARIANTS:
        given = compare.settings(name, base)
        assert given["top_k"] * given["d_ff"] == 2 * base.model.d_ff, name


def test_trains_tabulates_and_does_not_repeat(tmp_path, corpus, capsys):
    words = ["bench", "routers", "--routers", "switch", "topk", "--seeds", "2", "--jobs", "2", "--out", str(tmp_path)]
    words += ["--options", "--data.path", str(corpus), *SMALL.split()]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert out.count("switch, seed") == 2 and "| topk | " in out
    content = json.loads((tmp_path / "routers.json").read_text())
    assert (content["steps"], content["tokens"], content["seeds"]) == (2, 64, 2)
    assert [row["router"] for row in content["rows"]] == ["switch", "topk"]
    for row in content["rows"]:
        assert len(row["heldout"]) == 2 and row["mean"] == pytest.approx(sum(row["heldout"]) / 2)
    picture = ElementTree.parse(tmp_path / "routers.svg")
    assert len(picture.findall(".//{*}circle")) == 4
    assert main(words) == 0
    assert "seed" not in capsys.readouterr().out, "done runs are not repeated"


def test_its_runs_end_with_it(tmp_path, corpus):
    """Started as a user does, and killed as a batch system does."""
    words = [
        "bench",
        "routers",
        "--routers",
        "topk, capacity 1.25",
        "--seeds",
        "1",
        "--out",
        str(tmp_path),
        "--options",
    ]
    words += ["--data.path", str(corpus), *SMALL.replace("steps 2", "steps 100000").split()]
    bench = subprocess.Popen([sys.executable, "-m", "fastmoe", *words], stdout=subprocess.DEVNULL)
    log = tmp_path / "topk-capacity-1.25-0.log"
    wait_for(lambda: log.exists() and "step: 10 " in log.read_text())
    bench.terminate()
    assert bench.wait(30) == 143
    wait_for(lambda: "stopped by SIGTERM" in log.read_text())


def wait_for(what):
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_names_a_variant_it_does_not_know_and_a_run_that_failed(tmp_path, corpus, capsys):
    out = ["--out", str(tmp_path), "--seeds", "1"]
    assert main(["bench", "routers", "--routers", "round-robin", *out]) == 2
    assert "--routers must be of topk, " in capsys.readouterr().err
    words = ["bench", "routers", "--routers", "topk", *out, "--options", "--data.path", str(tmp_path / "none")]
    assert main(words) == 2
    assert "topk, seed 0 failed: fastmoe.data" in capsys.readouterr().err
