"""`python -m benchmarks.optimizers`: every arm trains, what is written, what is not done twice."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import optimizers
from fastmoe import config as configs
from fastmoe.config import from_dict
from fastmoe.trainer import data
from fastmoe.trainer.recipes import recipe

SMALL = "--model.d-model 16 --model.num-layers 1 --model.d-ff 8 --train.batch-size 2 --train.seq-len 16"


@pytest.mark.parametrize("arm", optimizers.ARMS)
def test_every_arm_is_a_good_setting(arm):
    flat = {**configs.flat(recipe(optimizers.RECIPE)), **optimizers.MODEL, **optimizers.ARMS[arm]}
    groups = {}
    for name, value in flat.items():
        group, field = name.split(".")
        groups.setdefault(group, {})[field] = value
    configs.check(from_dict(groups))


def test_trains_tabulates_and_does_not_repeat(tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(30):
        (texts / f"{i}.py").write_text(f"def f{i}(x):\n    return x * {i}\n" * 9)
    data.prepare([texts], "byte", tmp_path / "data")
    arms = ["AdamW, int8 states, bf16 weights", "Adafactor"]
    words = ["--steps", "2", "--seeds", "1", "--jobs", "2", "--out", str(tmp_path / "out"), "--arms", *arms]
    words += ["--options", "--data.path", str(tmp_path / "data"), *SMALL.split()]
    assert optimizers.main(words) == 0
    assert capsys.readouterr().out.count("seed 0") == 2
    content = json.loads((tmp_path / "out" / "optimizers.json").read_text())
    assert [row["arm"] for row in content["rows"]] == arms and content["steps"] == 2
    for row in content["rows"]:
        assert [step for step, _ in row["curve"]] == [1, 2] and row["curve"][-1][1] == row["heldout"]
        assert 2 < row["bytes_per_parameter"] < 8
    assert "| Adafactor | " in (tmp_path / "out" / "optimizers.md").read_text()
    ElementTree.parse(tmp_path / "out" / "optimizers.svg")
    assert optimizers.main(words) == 0
    assert "seed" not in capsys.readouterr().out, "done runs are not repeated"
