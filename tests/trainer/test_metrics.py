from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from fastmoe.config import ModelConfig
from fastmoe.nn import RouterInputs, Transformer
from fastmoe.trainer import alarms, data, metrics
from fastmoe.trainer.train import train


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(metrics, "measured_peak", lambda device, dtype: 1e11)


def described(load, dropped=0.0, norm=1.0, **losses):
    """describe_routing of loads [L, E]; other arguments are numbers or lists over layers."""
    load_LE = torch.as_tensor(load, dtype=torch.float64)
    over_layers = lambda value: torch.as_tensor(value, dtype=torch.float64).expand(len(load))
    return metrics.describe_routing(
        load_LE, over_layers(dropped), over_layers(norm), {name: over_layers(loss) for name, loss in losses.items()}
    )


def test_each_metric_is_its_formula():
    load = [[8] * 6, [48, 0, 0, 0, 0, 0], [40, 2, 3, 0, 1, 2], [0] * 6, [28, 8, 12, 0, 0, 0]]
    record = described(load, [0, 12, 6, 0, 0], [1, 2, 3, 4, 1 / 3], balance=[1, 6, 5, 0, 3], z=0.25)
    layers = record["layers"]
    assert layers.keys() == {
        *("max_over_mean", "cv", "entropy", "dead", "hot", "drop_rate", "logit_norm", "loss_balance", "loss_z")
    }
    for i, row in enumerate(load):
        total = sum(row)
        mean = total / 6 or 1
        entropy = -sum(x / total * math.log(x / total) for x in row if x) / math.log(6)
        assert layers["max_over_mean"][i] == pytest.approx(max(row) / mean, rel=1e-3)
        assert layers["cv"][i] == pytest.approx(statistics.pstdev(row) / mean, rel=1e-3)
        assert layers["entropy"][i] == pytest.approx(entropy, rel=1e-3, abs=1e-12)
        assert layers["dead"][i] == row.count(0)
        assert layers["hot"][i] == sum(x > 4 * mean for x in row)
    assert layers["max_over_mean"][:2] == [1, 6] and layers["entropy"][:2] == [1, 0]
    assert layers["hot"] == [0, 1, 1, 0, 0] and layers["dead"] == [0, 5, 1, 6, 3]
    assert layers["drop_rate"] == [0, 0.25, 0.125, 0, 0] and layers["logit_norm"] == [1, 2, 3, 4, 0.3333]
    assert layers["loss_balance"] == [1, 6, 5, 0, 3] and layers["loss_z"] == [0.25] * 5
    assert record["load"] == load and record["load_max_over_mean"] == 6 and record["drop_rate"] == 18 / 192


def test_one_expert_and_no_layers():
    layers = described([[7]])["layers"]
    assert [layers[key] for key in ("max_over_mean", "cv", "entropy", "dead", "hot")] == [[1], [0], [1], [0], [0]]
    record = described(torch.zeros(0, 8))
    assert record == {"load": [], "load_max_over_mean": 1.0, "drop_rate": 0.0, "layers": {}}


def test_records_stay_small():
    torch.manual_seed(0)
    few, many = (described(torch.rand(L, E).mul(1000).floor().tolist(), balance=1.0) for L, E in ((1, 65), (60, 1000)))
    assert few.keys() == many.keys() and few["layers"].keys() == many["layers"].keys()
    assert len(json.dumps(many)) < 20_000


def test_a_step_records_what_the_model_says(tiny, metrics_of):
    config = tiny(train={"steps": 1, "grad_accumulation": 2}, model={"num_dense_layers": 1, "capacity_factor": 0.5})
    train(config)
    record = metrics_of(config.run.dir)[0]
    torch.manual_seed(config.train.seed)
    model = Transformer(config.model)
    batches = data.Batches(config.data.path, "train", 32)
    outs = [model(*batches.at(2 * i, 2), inputs=RouterInputs(key=torch.tensor([0, 0, 64 * i]))) for i in range(2)]
    mean = lambda value: sum(value(out) for out in outs).item() / 2
    layers = record["layers"]
    assert layers["logit_norm"] == pytest.approx([mean(lambda out: out.logit_norm_L[0])], rel=1e-3)
    for name in ("balance", "z"):
        assert layers[f"loss_{name}"] == pytest.approx([mean(lambda out, n=name: out.losses[n][0])], rel=1e-3)
    assert record["load"] == sum(out.load_LE for out in outs).tolist()
    assert layers["drop_rate"] == pytest.approx([sum(out.dropped_L for out in outs).item() / 256], rel=1e-3)
    assert len(layers["dead"]) == 1 and 0 < layers["drop_rate"][0] < 1


def test_tensorboard_gets_the_mean_and_the_worst_of_the_layers(tiny, metrics_of):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []
    for dir, layers, experts in (("a", 2, 4), ("b", 3, 65)):
        model = {"num_layers": layers, "num_experts": experts}
        config = tiny(dir, train={"steps": 1}, model=model, log={"tensorboard": True})
        train(config)
        events = EventAccumulator(str(Path(config.run.dir) / "tensorboard")).Reload()
        seen.append(set(events.Tags()["scalars"]))
        recorded = metrics_of(config.run.dir)[0]["layers"]
        for key, worst in (("entropy", min), ("max_over_mean", max), ("loss_z", max)):
            value = lambda tag: events.Scalars(f"layers/{tag}")[0].value  # noqa: B023
            assert value(key) == pytest.approx(sum(recorded[key]) / layers)
            assert value(f"{key}_worst") == pytest.approx(worst(recorded[key]))
        assert events.Tags()["histograms"] == ["layers/load_over_mean"]
    assert seen[0] == seen[1]


MODEL = ModelConfig(num_experts=8, top_k=2, num_dense_layers=3)


def history(steps, change=lambda step: {}, layers=2, experts=8, seed=0, **every):
    """Records of loads drawn from a mildly uneven distribution; change(step): arguments of `described`, its `load` of
    the last layer.
    """
    draws = torch.Generator().manual_seed(seed)
    odds_E = torch.linspace(0.5, 1.5, experts)
    records = []
    for step in range(1, steps + 1):
        drawn_LR = torch.multinomial(odds_E, 512 * layers, True, generator=draws).view(layers, 512)
        load = [ids_R.bincount(minlength=experts) for ids_R in drawn_LR]
        given = {**every, **change(step)}
        if "load" in given:
            load[-1] = torch.tensor(given.pop("load"))
        records.append({"step": step, **described([row.tolist() for row in load], **given)})
    return records


def test_a_healthy_run_raises_no_alarm():
    for experts in (8, 128):
        grown = lambda step: {"norm": 1 + step / 100}
        records = history(300, grown, experts=experts, dropped=20, balance=1.0)
        assert alarms.find(records, ModelConfig(num_experts=experts)) == []
    assert alarms.find([{"step": 1, "load": [], "layers": {}}] * 300, MODEL) == []


def within(first, last, **values):
    return lambda step: values if first <= step <= last else {}


@pytest.mark.parametrize(
    ("records", "layer", "what", "words"),
    [
        (
            history(300, within(51, 200, load=[100, 100, 100, 100, 112, 0, 0, 0])),
            4,
            "3 of 8 experts idle for 150 steps (51 to 200)",
            ["--model.aux-loss-weight", "--model.router deepseek-v3", "--model.num-experts"],
        ),
        (
            history(250, within(101, 250, load=[32, 32, 32, 32, 32, 310, 21, 21])),
            4,
            "expert 5 gets 4.8 times the mean load for 150 steps (101 to 250)",
            ["--model.aux-loss-weight is the router's own", "base"],
        ),
        (
            history(120, within(1, 120, dropped=[0.0, 128.0])),
            4,
            "25% of the slots dropped for 120 steps (1 to 120)",
            ["--model.capacity-factor (the router's own)", "fastmoe routing"],
        ),
        (
            history(200, lambda step: {"norm": [0.5 + step / 10, 1.0]}),
            3,
            "the router's logits went from 1.55 to 19.6 (root mean square) for 200 steps (1 to 200)",
            ["--model.z-loss-weight", "--optim.lr"],
        ),
        (
            history(100, norm=[1.0, 40.0]),
            4,
            "the router's logits went from 40 to 40 (root mean square) for 100 steps (1 to 100)",
            ["--model.z-loss-weight"],
        ),
        (
            history(140, within(11, 140, load=[0, 0, 256, 0, 256, 0, 0, 0])),
            4,
            "nearly all tokens go to the same 2 of 8 experts for 130 steps (11 to 140)",
            ["--model.aux-loss-weight", "--optim.warmup-steps"],
        ),
    ],
    ids=["idle", "hot", "drops", "grown", "large", "collapse"],
)
def test_each_alarm_names_layer_figure_steps_causes_and_remedies(records, layer, what, words):
    (alarm,) = alarms.find(records, MODEL)
    text = str(alarm)
    assert text.startswith(f"layer {layer}: {what}; likely causes: ") and "; remedies: " in text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    "change",
    [
        within(51, 149, load=[100, 100, 100, 100, 112, 0, 0, 0]),
        within(51, 139, load=[32, 32, 32, 32, 32, 310, 21, 21]),
        within(51, 139, dropped=128.0),
        within(51, 139, load=[0, 0, 256, 0, 256, 0, 0, 0]),
        lambda step: {"norm": 0.1 + step / 120},
        within(281, 289, norm=100.0),
    ],
    ids=["idle", "hot", "drops", "collapse", "grown from little", "large for a while"],
)
def test_what_passes_raises_no_alarm(change):
    assert alarms.find(history(300, change), MODEL) == []


def test_steps_of_an_alarm_may_have_gaps():
    change = lambda step: {"dropped": 0.0 if step % 20 == 0 else 128.0} if step > 100 else {}
    (alarm,) = alarms.drops(history(300, change, layers=1), MODEL)
    assert (alarm.first, alarm.last) == (101, 299)


def test_many_experts_are_judged_by_their_quantiles():
    model = ModelConfig(num_experts=128, top_k=2)
    load = [0] * 64 + [16] * 64
    (alarm,) = alarms.find(history(150, lambda step: {"load": load}, experts=128), model)
    assert str(alarm).startswith("layer 1: 64 of 128 experts idle for 150 steps (1 to 150)")
    sparse = [0] * 64 + [2] * 64  # two tokens an expert: idle ones are no news
    assert alarms.find(history(150, lambda step: {"load": sparse}, experts=128), model) == []


@pytest.mark.parametrize(("router", "words"), [("hash", "balanced=True"), ("domain", "--data.path")])
def test_alarms_of_routers_without_a_loss_name_their_own_remedies(router, words):
    model = ModelConfig(num_experts=8, top_k=1, router=router)
    (alarm,) = alarms.find(history(150, lambda step: {"load": [100, 100, 100, 100, 112, 0, 0, 0]}), model)
    assert words in alarm.remedies and "aux-loss" not in str(alarm)


def test_a_run_ends_with_its_alarms(tiny, monkeypatch, capsys):
    monkeypatch.setattr(alarms, "WINDOW", 5)
    config = tiny(model={"capacity_factor": 0.25})
    result = train(config)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ALARM: layer ")]
    assert len(lines) == 2 and "slots dropped for 8 steps (1 to 8); likely" in lines[1]
    page = result.report.read_text()
    assert page.index('id="alarms"') < page.index('class="tiles"') and "of the slots dropped, steps 1 to 8" in page
