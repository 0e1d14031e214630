from __future__ import annotations

import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoe import ops
from fastmoe.cli import main
from fastmoe.nn import RouterInputs, Transformer
from fastmoe.nn.moe import MoEOutput
from fastmoe.trainer import data, metrics, routing
from fastmoe.trainer.train import train

SHAPE = routing.Shape(layers=2, first_layer=0, tokens=5, top_k=2, num_experts=4, micro_batches=2)


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(metrics, "measured_peak", lambda device, dtype: 1e11)


def chosen(shape, step, index):
    draws = torch.Generator().manual_seed(100 * step + index)
    return torch.randint(-1, shape.num_experts, (shape.layers, shape.tokens, shape.top_k), generator=draws)


def packed(ids_LTK, num_experts):
    return routing.pack([MoEOutput(*[None] * 8, ids_TK) for ids_TK in ids_LTK], num_experts)


def write(path, shape, steps, step=0, resume=False):
    recorder = routing.Recorder(path, shape, step, resume)
    for step in steps:
        micro = range(shape.micro_batches)
        recorder.write(step, [packed(chosen(shape, step, i), shape.num_experts) for i in micro])
    recorder.sync()
    recorder.close()
    return Path(path)


def replayed(path, shape, first, last):
    replay = routing.Replay(path, shape, first, last)
    cpu = torch.device("cpu")
    found = [[replay.at(step, i, cpu) for i in range(shape.micro_batches)] for step in range(first, last + 1)]
    replay.close()
    return found


@pytest.mark.parametrize("num_experts", [1, 4, 255, 256, 300, 65_534, 65_536])
def test_what_is_written_is_read(tmp_path, num_experts):
    shape = SHAPE._replace(num_experts=num_experts)
    path = write(tmp_path / "r", shape, range(1, 5))
    for step, batches in enumerate(replayed(path, shape, 1, 4), 1):
        for index, layers in enumerate(batches):
            assert all(ids_TK.dtype == torch.int64 for ids_TK in layers)
            assert torch.equal(torch.stack(layers), chosen(shape, step, index))


def test_ids_take_the_fewest_bytes(tmp_path):
    torch.manual_seed(0)
    sizes = []
    for num_experts in (200, 60_000, 70_000):
        shape = SHAPE._replace(tokens=4096, num_experts=num_experts)
        sizes.append(write(tmp_path / f"{num_experts}", shape, [1]).stat().st_size / (2 * 4096 * 2 * 2))
    assert sizes[0] < 1.02 and 1.8 < sizes[1] < 2.02 and sizes[2] < 2.7


def test_a_torn_end_is_cut_and_written_again(tmp_path):
    path = write(tmp_path / "r", SHAPE, range(1, 4))
    whole = path.read_bytes()
    two = len(write(tmp_path / "two", SHAPE, range(1, 3)).read_bytes())
    for size in (two, two + 1, two + 30, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:size])
        write(path, SHAPE, [3], step=2, resume=True)
        assert path.read_bytes() == whole
    path.write_bytes(whole[:-3] + b"abc")  # written out of order in a power cut
    write(path, SHAPE, [3], step=2, resume=True)
    assert path.read_bytes() == whole
    write(path, SHAPE, [2], step=1, resume=True)
    assert path.read_bytes() == whole[:two]
    for size in (0, 10, two):  # killed before the first checkpoint
        path.write_bytes(whole[:size])
        write(path, SHAPE, range(1, 4), step=0, resume=True)
        assert path.read_bytes() == whole


def test_a_file_begun_in_a_resumed_run_starts_there(tmp_path):
    path = write(tmp_path / "r", SHAPE, range(8, 10), step=7, resume=True)
    assert len(replayed(path, SHAPE, 8, 9)) == 2
    with pytest.raises(ValueError, match=r"must be a file with steps 1 to 9, got .*/r with steps 8 to 9"):
        routing.Replay(path, SHAPE, 1, 9)


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = write(tmp_path / "r", SHAPE, range(1, 4))
    whole = path.read_bytes()
    for name, value in (("layers", 3), ("tokens", 6), ("top_k", 1), ("num_experts", 5), ("micro_batches", 1)):
        wanted = SHAPE._replace(**{name: value})
        message = rf"must be a file with {name} = {value}, got .*/r with {name} = {getattr(SHAPE, name)}$"
        with pytest.raises(ValueError, match=rf"--routing\.replay {message}"):
            routing.Replay(path, wanted, 1, 3)
        with pytest.raises(ValueError, match=rf"--routing\.record {message}"):
            routing.Recorder(path, wanted, 3, resume=True)
    with pytest.raises(ValueError, match=r"--routing\.record must be a file that reaches step 9, .*ends at step 3"):
        routing.Recorder(path, SHAPE, 9, resume=True)
    with pytest.raises(ValueError, match=r"--routing\.record must be a new file"):
        routing.Recorder(path, SHAPE, 0, resume=False)
    with pytest.raises(ValueError, match=r"must be a file to write to, .*No such file"):
        routing.Recorder(tmp_path / "none" / "r", SHAPE, 0, resume=False)
    assert path.read_bytes() == whole
    with pytest.raises(ValueError, match=r"must be a file with steps 1 to 4, got .* with steps 1 to 3"):
        routing.Replay(path, SHAPE, 1, 4)
    path.write_bytes(whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :])
    with pytest.raises(ValueError, match="must be a file with steps 1 to 3"):
        routing.Replay(path, SHAPE, 1, 3)
    path.write_bytes(whole[:16] + b"\2" + whole[17:])
    with pytest.raises(ValueError, match=r"must be of format 1, got .* of format 2"):
        routing.Replay(path, SHAPE, 1, 3)
    for content in (b"", b"text" * 20):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"must be a file made by --routing\.record"):
            routing.Replay(path, SHAPE, 1, 3)
    with pytest.raises(ValueError, match=r"--routing\.replay must be a recorded file, .*No such file"):
        routing.Replay(tmp_path / "none", SHAPE, 1, 3)


def weights(path):
    return b"".join((path / name).read_bytes() for name in ("model-00001.safetensors", "optimizer-00001.safetensors"))


def test_a_run_records_its_choices(tiny, tmp_path, metrics_of):
    groups = {"train": {"grad_accumulation": 2}, "model": {"num_dense_layers": 1}}
    config = tiny(**groups, routing={"record": str(tmp_path / "r")})
    train(config)
    shape = routing.Shape(layers=1, first_layer=1, tokens=64, top_k=2, num_experts=4, micro_batches=2)
    steps = replayed(tmp_path / "r", shape, 1, 8)
    for record, batches in zip(metrics_of(config.run.dir), steps, strict=True):
        ids_R = torch.cat([ids_TK.flatten() for layers in batches for ids_TK in layers])
        assert ids_R.bincount(minlength=4).tolist() == record["load"][0]
    torch.manual_seed(config.train.seed)
    model = Transformer(config.model)
    batch = data.Batches(config.data.path, "train", 32).at(2, 2)
    out = model(*batch, inputs=RouterInputs(key=torch.tensor([0, 0, 64])))
    assert torch.equal(steps[0][1][0], out.routed[0].topk_ids_TK)


ROUTERS = {
    "topk": {},
    "deepseek-v3": {"num_experts": 8},
    "switch": {},
    "gshard": {},
    "noisy-topk": {"router_options": "std=0.3"},
    "prototype": {"capacity_factor": 0.5},
    "cosine": {"router_options": "noise=1.0, cv=True"},
    "topology": {},
    "base": {},
    "hash": {"top_k": 2},
    "swipe": {},
}


@pytest.mark.parametrize("router", ROUTERS)
def test_a_replayed_run_is_the_recorded_one_bit_for_bit(tiny, tmp_path, metrics_of, router):
    model = {"router": router, "num_layers": 2, "d_model": 16, "d_ff": 16, **ROUTERS[router]}
    options = {"train": {"steps": 5, "grad_accumulation": 2}, "eval": {"every": 0}, "model": model}
    first = train(tiny("a", **options, routing={"record": str(tmp_path / "r")}))
    again = train(tiny("b", **options, routing={"replay": str(tmp_path / "r"), "record": str(tmp_path / "s")}))
    assert weights(again.checkpoint) == weights(first.checkpoint)
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    assert (tmp_path / "r").read_bytes() == (tmp_path / "s").read_bytes()


@pytest.mark.parametrize("options", [{"activation_checkpointing": True}, {"dtype": "bf16"}])
def test_replay_with_recomputation_and_bfloat16(tiny, tmp_path, metrics_of, options):
    options = {"train": {"steps": 4, **options}, "model": {"router": "gshard"}}
    first = train(tiny("a", **options, routing={"record": str(tmp_path / "r")}))
    again = train(tiny("b", **options, routing={"replay": str(tmp_path / "r")}))
    assert weights(again.checkpoint) == weights(first.checkpoint)
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")


def test_the_choices_replayed_are_those_of_the_file(tiny, tmp_path, metrics_of):
    train(tiny("a", train={"steps": 3}, routing={"record": str(tmp_path / "r")}))
    train(tiny("b", train={"steps": 3, "seed": 1}, routing={"replay": str(tmp_path / "r")}))
    train(tiny("c", train={"steps": 3, "seed": 1}))
    a, b, c = ([record["load"] for record in metrics_of(tmp_path / name)] for name in "abc")
    assert a == b != c


def test_a_killed_run_goes_on_in_its_file(tiny, tmp_path):
    config = tiny(train={"grad_accumulation": 2}, routing={"record": str(tmp_path / "r")})
    train(config)
    whole = (tmp_path / "r").read_bytes()
    run = Path(config.run.dir)
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    for keep in (len(whole), len(whole) - 7):
        os.truncate(tmp_path / "r", keep)
        shutil.copytree(run, tmp_path / f"copy{keep}")
        train(replace(config, run=replace(config.run, dir=str(tmp_path / f"copy{keep}"), resume=True)))
        assert (tmp_path / "r").read_bytes() == whole
    os.truncate(tmp_path / "r", len(whole) // 3)
    with pytest.raises(ValueError, match=r"reaches step 4, the checkpoint's, got .* which ends at step [12]$"):
        train(replace(config, run=replace(config.run, resume=True)))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"model": {"router": "expert-choice", "router_options": "in_decoder=True"}, "routing": {"record": "r"}},
            r"--routing\.record must be off with this --model\.router, whose experts choose",
        ),
        (
            {"model": {"router": "token-rounding"}, "routing": {"record": "r"}},
            r"--routing\.record must be off with this --model\.router, whose experts choose",
        ),
        ({"model": {"num_dense_layers": 2}, "routing": {"record": "r"}}, r"need a layer with experts"),
        ({"routing": {"record": "r", "replay": "./r"}}, r"--routing\.record must be another file than --routing"),
        ({"routing": {"replay": "r"}}, r"--routing\.replay must be a recorded file, got 'r': No such file"),
    ],
)
def test_wrong_settings(tiny, tmp_path, monkeypatch, groups, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        train(tiny(**groups))
    assert str(error.value).startswith("fastmoe.")


def test_a_replay_must_reach_the_last_step(tiny, tmp_path):
    train(tiny("a", train={"steps": 2}, routing={"record": str(tmp_path / "r")}))
    with pytest.raises(ValueError, match=r"must be a file with steps 1 to 3, got .*/r with steps 1 to 2"):
        train(tiny("b", train={"steps": 3}, routing={"replay": str(tmp_path / "r")}))


def test_simulated_drops_are_those_of_the_layer(tmp_path):
    shape = SHAPE._replace(tokens=40, num_experts=6)
    path = write(tmp_path / "r", shape, range(1, 4))
    found = routing.simulate(path, [0.5, 1.0, 1.25, 9.0])
    assert found.shape == shape and found.steps == (1, 3) and found.loads == []
    for drops in found.drops:
        capacity = math.ceil(drops.factor * 40 * 2 / 6)
        slots, kept = np.zeros((2, 6)), np.zeros((2, 6))
        for step in range(1, 4):
            for index in range(2):
                for layer, ids_TK in enumerate(chosen(shape, step, index)):
                    slots[layer, step * 2 + index - 2] = (ids_TK >= 0).sum()
                    kept[layer, step * 2 + index - 2] = ops.build_routing(ids_TK, 6, capacity).offsets[-1]
        assert drops.capacity == capacity
        assert drops.rate == pytest.approx(1 - kept.sum() / slots.sum())
        assert drops.rate_L == pytest.approx(1 - kept.sum(1) / slots.sum(1))
        assert drops.worst == pytest.approx((1 - kept / slots).max())
    assert found.drops[0].rate > 0.3 and found.drops[-1].rate == 0


def test_simulated_load_of_ranks(tmp_path):
    shape = routing.Shape(layers=1, first_layer=2, tokens=8, top_k=1, num_experts=4, micro_batches=1)
    recorder = routing.Recorder(tmp_path / "r", shape, 0, resume=False)
    for step, ids in enumerate(([0, 0, 0, 1, 1, 1, 2, 3], [0, 0, 0, 0, 1, 1, 3, -1]), 1):
        recorder.write(step, [packed(torch.tensor(ids).view(1, 8, 1), 4)])
    recorder.close()
    found = routing.simulate(tmp_path / "r", [1.0], [1, 2, 4])
    loads = {(load.ranks, load.placement): load for load in found.loads}
    assert [loads[1, name].max_over_mean_L for name in routing.PLACEMENTS] == [[1.0], [1.0]]
    # contiguous: experts 0 and 1 together have 6 of 8 and 6 of 7; balanced: 0 and 2 (or 3) against 1 and 3
    assert loads[2, "contiguous"].max_over_mean_L == pytest.approx([(6 / 4 + 6 / 3.5) / 2])
    assert loads[2, "contiguous"].worst == pytest.approx(6 / 3.5)
    assert loads[2, "balanced"].max_over_mean_L == pytest.approx([(4 / 4 + 4 / 3.5) / 2])
    assert loads[4, "balanced"].max_over_mean_L == loads[4, "contiguous"].max_over_mean_L
    assert loads[4, "balanced"].max_over_mean_L == pytest.approx([(3 / 2 + 4 / 1.75) / 2])


def test_the_routing_command(tmp_path, capsys):
    path = str(write(tmp_path / "r", SHAPE._replace(num_experts=8, first_layer=1), range(1, 4)))
    assert main(["routing", path, "--capacity-factor", "1", "1.5", "--ep", "2", "8"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "steps 1 to 3, 2 layers, 2 x 5 tokens a step, 2 of 8 experts"
    drops, ranks = out[2:5], out[6:]
    assert [line.split()[:2] for line in drops[1:]] == [["1", "2"], ["1.5", "2"]] and "%" in drops[1]
    assert [line.split()[:3] for line in ranks[1:]] == [
        ["2", "contiguous", "4"],
        ["2", "balanced", "4"],
        ["8", "contiguous", "1"],
        ["8", "balanced", "1"],
    ]
    assert len({len(line) for line in drops}) == len({len(line) for line in ranks}) == 1
    for words, message in (
        (["--ep", "3"], "fastmoe.routing: --ep must be a divisor of 8 (the experts), got 3"),
        (["--capacity-factor", "0"], "fastmoe.routing: --capacity-factor must be positive, got 0.0"),
        (["--placement", "best"], "fastmoe.routing: --placement must be 'contiguous' or 'balanced', got 'best'"),
    ):
        assert main(["routing", path, *words]) == 2
        assert capsys.readouterr().err == message + "\n"
    assert main(["routing", str(tmp_path)]) == 2
    assert "FILE must be a recorded file" in capsys.readouterr().err
