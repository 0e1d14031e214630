from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fastmoe.cli import main
from fastmoe.nn import Transformer
from fastmoe.optim import LossScaler
from fastmoe.trainer import checkpoint, data, metrics
from fastmoe.trainer.generate import generate, load_run
from fastmoe.trainer.report import report
from fastmoe.trainer.train import train


@pytest.fixture(autouse=True)
def quick_peak(monkeypatch):
    monkeypatch.setattr(metrics, "measured_peak", lambda device, dtype: 1e11)


def weights(path: Path) -> bytes:
    return b"".join((path / name).read_bytes() for name in ("model-00001.safetensors", "optimizer-00001.safetensors"))


@pytest.fixture
def finished(tiny):
    """A run of 8 steps with checkpoints at 4 and 8."""
    config = tiny()
    return config, train(config)


def test_a_run_leaves_metrics_checkpoints_and_a_summary(finished, metrics_of, capsys):
    config, result = finished
    run = Path(config.run.dir)
    records = metrics_of(run)
    assert [record["step"] for record in records] == list(range(1, 9))
    for record in records:
        assert {
            "step",
            "loss",
            "aux_loss",
            "lr",
            "grad_norm",
            "tokens",
            "load",
            "load_max_over_mean",
            "drop_rate",
            "layers",
        } <= record.keys()
        assert record["tokens"] == record["step"] * 4 * 32
        assert all(sum(layer) == 4 * 32 * 2 for layer in record["load"]) and record["drop_rate"] == 0
        assert record["load_max_over_mean"] == max(max(layer) / (sum(layer) / 4) for layer in record["load"])
    assert [record["step"] for record in records if "heldout" in record] == [3, 6, 8]
    perf = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["perf"]
    assert perf.keys() == {"tokens_per_second", "step_seconds", "tflops", "mfu", "memory_gib"}
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[0]["lr"] == 1.5e-3 and records[-1]["lr"] == pytest.approx(3e-4)
    assert [path.name for path in checkpoint.steps(run / "checkpoints")] == ["step-00000004", "step-00000008"]
    assert (result.step, result.signal, result.heldout) == (8, None, records[-1]["heldout"])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["heldout"] == result.heldout and summary["order2"] == data.order2_bits(config.data.path)


def test_what_a_run_prints(tiny, capsys):
    config = tiny(log={"every": 3})
    result = train(config)
    out = capsys.readouterr().out
    line = r"^step: +(\d+)  loss: +\d+\.\d{5}  grad_norm: .* memory: .*GiB\(.*%\)  tps: [\d,]+  tflops: .* mfu: .*%"
    assert re.findall(line, out, re.M) == ["1", "3", "6", "8"]
    assert f"held-out {result.heldout:.3f} bits/byte; order-2 model {result.order2:.3f} bits/byte\n" in out
    assert re.search(r"^trained 8 steps in \d+ s", out, re.M)
    assert f"checkpoint: {result.checkpoint}" in out and f"report: {result.report}" in out and "\n  | def " in out


def test_a_terminal_gets_a_bar(tiny, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    train(tiny(train={"steps": 2}))
    out = capsys.readouterr().out
    assert "\r\033[K" in out and " 2/2  loss " in out and "step:" not in out


def test_tensorboard(tiny):
    pytest.importorskip("tensorboard")
    config = tiny(train={"steps": 2}, log={"tensorboard": True})
    train(config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(Path(config.run.dir) / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2]
    assert {"lr", "grad_norm", "heldout", "perf/mfu"} <= set(events.Tags()["scalars"])


def test_the_last_evaluation_can_take_some_of_the_tokens(tiny, capsys):
    config = tiny(train={"steps": 1}, eval={"final_tokens": 64})
    some = train(config)
    batches = data.Batches(config.data.path, "heldout", 32)
    assert f"evaluating on 64 of {sum(map(len, batches.shards)):,} held-out tokens" in capsys.readouterr().out
    model, _ = load_run(config.run.dir)
    losses = [model(ids, targets).loss.item() for ids, targets in batches.sweep(2, 64)]
    assert some.heldout == pytest.approx(losses[0] / math.log(2), rel=1e-5) and len(losses) == 1


def test_heldout_is_the_loss_over_every_predicted_byte(finished):
    config, result = finished
    model, _ = load_run(config.run.dir)
    tokens = torch.from_numpy(data.Batches(config.data.path, "heldout", 32).shards[0].astype("int64"))
    nats = count = 0
    for start in range(0, len(tokens) - 1, 32):
        ids, targets = tokens[None, start : start + 32], tokens[None, start + 1 : start + 33]
        nats += model(ids[:, : targets.shape[1]], targets).loss.item() * targets.numel()
        count += targets.numel()
    assert count == len(tokens) - 1
    assert result.heldout == pytest.approx(nats / count / math.log(2), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train": {"dtype": "bf16"}},
        {"train": {"dtype": "fp16"}},
        {"train": {"dtype": "bf16", "param_dtype": "bf16"}, "optim": {"state_dtype": "int8", "master": "residual8"}},
        {"train": {"dtype": "bf16", "param_dtype": "bf16"}, "optim": {"name": "adafactor"}},
        {"train": {"activation_checkpointing": True, "grad_accumulation": 2}},
        {"model": {"tie_embeddings": True, "capacity_factor": 1.0, "num_dense_layers": 1}},
    ],
)
def test_resume_equals_an_uninterrupted_run_bit_for_bit(tiny, metrics_of, changes):
    config = tiny(**changes)
    whole = train(config)
    run, copy = Path(config.run.dir), Path(config.run.dir + "-2")
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-00000008")
    with open(copy / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "los')
    again = train(replace(config, run=replace(config.run, dir=str(copy), resume=True)))
    assert metrics_of(copy) == metrics_of(run)
    assert weights(again.checkpoint) == weights(whole.checkpoint)
    assert (again.heldout, again.sample) == (whole.heldout, whole.sample)


def test_accumulation_and_recomputation_do_not_change_the_gradient(tiny, metrics_of):
    plain, parts, recomputed = (
        tiny("a"),
        tiny("b", train={"grad_accumulation": 4}),
        tiny("c", train={"activation_checkpointing": True}),
    )
    for config in (plain, parts, recomputed):
        config = replace(config, train=replace(config.train, steps=1), model=replace(config.model, aux_loss_weight=0.0))
        train(config)
    one, two, three = (metrics_of(config.run.dir)[0] for config in (plain, parts, recomputed))
    assert one == three
    assert two["load"] == one["load"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6) and two["grad_norm"] == pytest.approx(
        one["grad_norm"], rel=1e-5
    )


def test_a_step_is_clipped_adamw_with_decay_on_matrices(tiny, metrics_of):
    optim = {"eps": 0.1, "clip_norm": 0.05, "weight_decay": 0.5, "lr": 0.1}
    config = tiny(train={"steps": 1}, optim=optim)
    train(config)
    torch.manual_seed(config.train.seed)
    model = Transformer(config.model)
    out = model(*data.Batches(config.data.path, "train", 32).at(0, 4))
    (out.loss + out.aux_loss).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    matrices, others = ([p for p in model.parameters() if (p.ndim > 1) == want] for want in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": others, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=0.05, betas=(0.9, 0.95), eps=0.1).step()
    record = metrics_of(config.run.dir)[0]
    assert record["lr"] == 0.05 and record["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for (name, wanted), got in zip(model.named_parameters(), load_run(config.run.dir)[0].parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def overflowing(monkeypatch, steps):
    """The backward of these steps (from 1) puts an inf into the gradient of the head."""
    forward, calls = Transformer.forward, []

    def hooked(self, ids, targets=None, cache=None, **options):
        calls.append(torch.is_grad_enabled())
        if sum(calls) in steps and calls[-1]:
            handle = self.head.register_hook(lambda grad: (handle.remove(), torch.full_like(grad, torch.inf))[1])
        return forward(self, ids, targets, cache, **options)

    monkeypatch.setattr(Transformer, "forward", hooked)


def test_fp16_leaves_out_the_steps_that_overflow(tiny, monkeypatch, metrics_of, capsys):
    overflowing(monkeypatch, {3, 4, 6})
    config = tiny(train={"dtype": "fp16"}, checkpoint={"every": 1, "keep": 9})
    result = train(config)
    records = metrics_of(config.run.dir)
    assert [record["scale"] for record in records] == [65536, 65536, 65536, 65536, 32768, 32768, 16384, 16384]
    assert [record["skipped"] for record in records] == [0, 0, 1, 2, 2, 3, 3, 3]
    assert [record["grad_norm"] is None for record in records] == [False, False, True, True, False, True, False, False]
    assert [record["tokens"] for record in records] == [step * 4 * 32 for step in range(1, 9)]
    at = lambda step: weights(Path(config.run.dir, "checkpoints", f"step-{step:08d}"))
    assert at(2) == at(3) == at(4) != at(5) == at(6) != at(7)
    assert checkpoint.read_state(result.checkpoint)["scaler"]["value"] == 16384
    out = capsys.readouterr().out
    assert "step 3 left out at loss scale 65536 (first gradient that is not finite: head)" in out
    assert out.count("left out at") == 3
    final = weights(result.checkpoint)
    for step in (7, 8):
        shutil.rmtree(result.checkpoint.with_name(f"step-{step:08d}"))
    again = train(replace(config, run=replace(config.run, resume=True)))
    assert metrics_of(config.run.dir) == records and weights(again.checkpoint) == final


def test_fp16_gives_up_at_the_least_scale(tiny, monkeypatch):
    overflowing(monkeypatch, range(1, 9))
    monkeypatch.setattr(LossScaler.__init__, "__defaults__", (4.0, 1000, 1, 1.0))
    with pytest.raises(FloatingPointError, match=r"step 3: grad_norm = inf \(first gradient .*: head\)"):
        train(tiny(train={"dtype": "fp16"}))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_16_bits_follow_fp32(tiny, metrics_of, dtype):
    optim = {"lr": 1e-2, "eps": 1e-2}  # so that the gradients' scale matters
    plain, lower = tiny("a", optim=optim), tiny("b", optim=optim, train={"dtype": dtype})
    for config in (plain, lower):
        train(config)
    a, b = (
        [record[key] for record in metrics_of(config.run.dir) for key in ("loss", "grad_norm")]
        for config in (plain, lower)
    )
    assert a == pytest.approx(b, rel=0.01 if dtype == "fp16" else 0.05)
    assert a[-2] < a[0] - 0.1


def test_many_experts_are_kept_as_quantiles(tiny, metrics_of):
    config = tiny(model={"num_experts": 65, "capacity_factor": 0.5}, train={"steps": 1})
    train(config)
    record = metrics_of(config.run.dir)[0]
    assert "load" not in record and [len(layer) for layer in record["load_quantiles"]] == [17, 17]
    assert 0 < record["drop_rate"] < 1
    assert record["load_max_over_mean"] == pytest.approx(
        max(layer[-1] for layer in record["load_quantiles"]) * 65 / (4 * 32 * 2)
    )
    assert "quantile" in Path(config.run.dir, "report.html").read_text()


def test_resume_falls_back_past_damage_and_says_so(finished, metrics_of, capsys):
    config, whole = finished
    before, final = metrics_of(config.run.dir), weights(whole.checkpoint)
    os.truncate(whole.checkpoint / "model-00001.safetensors", 50)
    again = train(replace(config, run=replace(config.run, resume=True)))
    captured = capsys.readouterr()
    assert "step-00000008 is damaged" in captured.err and "resuming after step 4" in captured.out
    assert weights(again.checkpoint) == final and metrics_of(config.run.dir) == before
    assert (again.checkpoint.parent / "damaged-step-00000008").is_dir()


def test_a_finished_run_resumes_to_its_end_or_further(finished, metrics_of):
    config, result = finished
    before = metrics_of(config.run.dir)
    same = train(replace(config, run=replace(config.run, resume=True)))
    assert same.heldout == result.heldout and metrics_of(config.run.dir) == before
    further = replace(config, train=replace(config.train, steps=10), run=replace(config.run, resume=True))
    assert train(further).step == 10
    assert metrics_of(config.run.dir)[:8] == before


def test_nothing_saved_is_overwritten(finished):
    config, result = finished
    with pytest.raises(ValueError, match=r"holds checkpoints .*--resume.*--run\.dir"):
        train(config)
    assert checkpoint.verify(result.checkpoint) == []


def test_resume_where_nothing_is_starts_at_step_0(tiny, capsys):
    config = tiny(run={"resume": True}, train={"steps": 1})
    assert train(config).step == 1
    assert "no checkpoint in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"d_model": 64}}, r"--model\.d-model must be 32 as in .*step-00000008, got 64"),
        ({"model": {"tie_embeddings": True}}, r"--model\.tie-embeddings must be False"),
        ({"train": {"steps": 5}}, r"--train\.steps must be at least 8"),
        ({"optim": {"state_dtype": "int8"}}, r"--optim\.state-dtype must be fp32 as in .*step-00000008, got int8"),
    ],
)
def test_resume_with_other_settings_is_refused(finished, changes, message):
    config, _ = finished
    changed = {group: replace(getattr(config, group), **values) for group, values in changes.items()}
    with pytest.raises(ValueError, match=message):
        train(replace(config, run=replace(config.run, resume=True), **changed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"batch_size": 5, "grad_accumulation": 2}}, r"accumulation must be a divisor .* = 5, got 2"),
        ({"train": {"steps": 0}}, r"--train\.steps must be at least 1"),
        ({"train": {"seq_len": 500}}, r"--train\.seq-len must be in 1\.\.256"),
        ({"train": {"dtype": "fp8"}}, r"--train\.dtype must be fp32, bf16 or fp16"),
        ({"train": {"param_dtype": "bf16"}}, r"--train\.param-dtype must be fp32, or bf16 with --train\.dtype bf16"),
        ({"optim": {"name": "sgd"}}, r"--optim\.name must be adamw or adafactor, got sgd"),
        ({"optim": {"state_dtype": "int4"}}, r"--optim\.state-dtype must be fp32, bf16, fp16 or int8"),
        ({"optim": {"name": "adafactor", "state_dtype": "int8"}}, r"--optim\.state-dtype must be fp32 for adafactor"),
        ({"optim": {"master": "fp32"}}, r"--optim\.master must be None, or residual8 or fp32 with --train\.param"),
        ({"train": {"device": "nope"}}, r"--train\.device must be auto or a device"),
        ({"optim": {"lr": 0.0}}, r"--optim\.lr must be positive"),
        ({"checkpoint": {"keep": 0}}, r"--checkpoint\.keep must be at least 1"),
        ({"eval": {"final_tokens": 0}}, r"--eval\.final-tokens must be at least 1"),
        ({"data": {"path": "/nowhere"}}, r"--data\.path must be a folder made by"),
        ({"run": {"dir": "/proc/run"}}, r"--run\.dir must be a folder to write to"),
        ({"model": {"num_experts": 0}}, r"num_experts must be at least 1"),
        ({"model": {"top_k": 5}}, r"top_k must be in 1\.\.4"),
    ],
)
def test_wrong_settings(tiny, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        train(tiny(**changes))
    assert str(error.value).startswith("fastmoe.")


def test_one_run_at_a_time(tiny, monkeypatch):
    config = tiny(train={"steps": 1})
    seen = []

    def second(*args):
        with pytest.raises(ValueError, match="another process is training"):
            train(config)
        seen.append(True)
        return 1.0

    monkeypatch.setattr(metrics, "measured_peak", second)
    train(config)
    assert seen


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"optim": {"lr": 1e37, "warmup_steps": 0}},
            r"step \d: (in layer \d: .*topk_gate.*|loss = .*|grad_norm.*)first",
        ),
        ({"model": {"init_std": 1e17}}, r"step 1: (grad_norm = (inf|nan)|loss = |in layer)"),
    ],
)
def test_what_is_not_finite_never_reaches_the_weights(tiny, changes, message):
    with pytest.raises(FloatingPointError, match=message):
        train(tiny(**changes))


def test_a_nan_flag_names_step_and_layer_and_keeps_the_checkpoint(tiny, monkeypatch, metrics_of):
    forward, calls = Transformer.forward, []

    def flagged(self, ids, targets=None, cache=None, **options):
        out = forward(self, ids, targets, cache, **options)
        calls.append(torch.is_grad_enabled())
        return out._replace(nan_tokens_L=torch.tensor([7])) if sum(calls) == 6 and calls[-1] else out

    monkeypatch.setattr(Transformer, "forward", flagged)
    config = tiny(model={"num_dense_layers": 1})
    with pytest.raises(
        FloatingPointError, match=r"step 6: the router of layer 1 got NaN logits for 7 tokens.*step-00000004"
    ):
        train(config)
    assert [record["step"] for record in metrics_of(config.run.dir)] == [1, 2, 3, 4, 5]
    assert checkpoint.verify(Path(config.run.dir) / "checkpoints" / "step-00000004") == []


def test_a_full_disk_ends_the_run_with_the_checkpoint_before(tiny, monkeypatch, flags, capsys):
    fsync, full = os.fsync, []

    def fill(file):
        if full:
            raise OSError(28, "No space left on device")
        fsync(file)

    monkeypatch.setattr(os, "fsync", fill)
    monkeypatch.setattr(metrics.Metrics, "sync", lambda self: None)
    save = checkpoint.save

    def later(folder, step, *rest):
        full.extend([1] if step == 4 else [])
        return save(folder, step, *rest)

    monkeypatch.setattr(checkpoint, "save", later)
    run = tiny().run.dir
    assert main(["train", "tiny", *flags, "--run.dir", run, "--train.steps", "8", "--checkpoint.every", "2"]) == 2
    assert re.fullmatch(
        r"fastmoe\.checkpoint: cannot write .*step-00000004: No space left on device; .*intact\n",
        capsys.readouterr().err,
    )
    assert [checkpoint.verify(path) for path in checkpoint.steps(run + "/checkpoints")] == [[]]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_set_the_status(tiny, flags, number, status, metrics_of, capsys):
    run = Path(tiny().run.dir)
    words = ["train", "tiny", *flags, "--train.steps", "1000000", "--run.dir", str(run)]
    before = signal.getsignal(signal.SIGINT)

    def send():
        while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").read_text().count("\n") < 3:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    assert main(words) == status
    thread.join()
    step = metrics_of(run)[-1]["step"]
    assert step >= 3 and checkpoint.newest_intact(run / "checkpoints").name == f"step-{step:08d}"
    assert f"stopped by {number.name} after step {step}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generating_with_and_without_a_cache_is_the_same(tiny, temperature):
    torch.manual_seed(1)
    model = Transformer(replace(tiny().model, init_std=0.2, capacity_factor=0.5))
    results = [generate(model, [5, 6, 7], 24, temperature, seed=2, cached=cached) for cached in (True, False)]
    assert results[0] == results[1] and results[0][:3] == [5, 6, 7] and len(results[0]) == 27
    assert model.layers[0].feed_forward.capacity_factors == (0.5, 0.5)
    if temperature:
        assert generate(model, [5, 6, 7], 24, temperature, seed=3) != results[0]
    for ids, tokens, message in (
        ([], 1, "at least one token"),
        ([1] * 250, 7, "fit in 256"),
        ([256], 1, "below 256"),
        ([1], -1, "at least 0"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(model, ids, tokens)


def test_generate_command(finished, capsys):
    config, _ = finished
    outputs = []
    for _ in range(2):
        capsys.readouterr()
        assert (
            main(["generate", "--run.dir", config.run.dir, "--prompt", "def f", "--tokens", "20", "--seed", "1"]) == 0
        )
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and outputs[0].startswith("def f") and len(outputs[0]) > 6
    assert outputs[0].replace("\n", "").replace("\t", "").isprintable()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.plots, self.headings, self.cells = [], [], [], {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids.append(attributes.get("id"))
        if "data-plot" in attributes:
            self.plots[attributes["aria-label"]] = json.loads(attributes["data-plot"])
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "h2":
            self.headings.append(text)
        if self.open and self.open[-1] in ("td", "b"):
            self.cells.append(text)


def test_the_report_is_whole_and_needs_nothing_else(finished, metrics_of):
    config, result = finished
    text = result.report.read_text()
    page = Page(text)
    assert not page.open and not re.search(r"https?://|//cdn|@import|url\(", text)
    assert not [tag for tag, attributes in page.tags if tag == "link" or {"src", "href"} & attributes.keys()]
    assert {"loss", "load", "learning-rate", "grad-norm", "throughput", "memory", "sample", "config"} <= set(page.ids)
    records = metrics_of(config.run.dir)
    series = dict(page.plots["Loss"]["series"])
    assert page.plots["Loss"]["x"] == list(range(1, 9))
    assert series["training, this step"] == pytest.approx(
        [record["loss"] / math.log(2) for record in records], rel=1e-4
    )
    assert [value is not None for value in series["held-out"]] == [False, False, True, False, False, True, False, True]
    layers = [record["layers"] for record in records]
    lowest, largest = (dict(page.plots[name]["series"])[name] for name in ("Load entropy", "Router logits"))
    assert lowest == pytest.approx([min(row["entropy"]) for row in layers], rel=1e-4)
    assert largest == pytest.approx([max(row["logit_norm"]) for row in layers], rel=1e-4)
    row = text[text.index("<td>layer 1</td>") :].split("</td>")[1:]
    ends = [sum(record["max_over_mean"][1] for record in layers) / 8, max(r["max_over_mean"][1] for r in layers)]
    assert row[0] == "<td>{:.2f} <i>{:.2f}</i>".format(*ends)
    heat = page.plots["Expert load"]
    assert heat["values"][5][2] == round(records[2]["load"][1][1] * 4 / 256, 2)
    assert {f"{result.heldout:.3f}", f"{result.order2:.3f}", "num_experts", "clip_norm"} <= set(page.cells)


def test_the_report_of_long_or_unfinished_or_no_runs(finished, tmp_path):
    config, _ = finished
    run = tmp_path / "long"
    run.mkdir()
    about = json.loads((Path(config.run.dir) / "run.json").read_text())
    about["config"]["model"]["num_experts"] = 64
    (run / "run.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="must be the folder of a run"):
        report(run)
    (run / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="no finished step"):
        report(run)
    routed = torch.full((60, 64), 9.0), torch.zeros(60), torch.ones(60)
    record = {
        **json.loads((Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()[0]),
        **metrics.describe_routing(*(value.double() for value in routed), {}),
    }
    lines = [
        json.dumps({**record, "step": step, **({"heldout": 3.0} if step % 200 == 0 else {})}) for step in range(1, 801)
    ]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    page = Page(report(run).read_text())
    assert len(page.plots["Loss"]["x"]) == 600 and page.plots["Loss"]["x"][-1] == 800
    assert sum(value is not None for value in dict(page.plots["Loss"]["series"])["held-out"]) == 4
    assert len(page.plots["Expert load"]["rows"]) == 60 and len(page.plots["Expert load"]["x"]) == 120
    assert page.cells.count("layer 59") == 1 and "alarms" not in page.ids
    assert len(page.plots["Load entropy"]["x"]) == 600
    assert (run / "report.html").stat().st_size < 600_000
