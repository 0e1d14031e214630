from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from fastmoe.cli import main


def run(capsys, *words: str) -> tuple[int, str, str]:
    try:
        status = main(list(words))
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    "words, names",
    [
        (["train", "tiny", "--optim.lrr", "1"], ["--optim.lrr", "--optim.lr "]),
        (["train", "tiny", "--train.batchsize", "1"], ["--train.batchsize", "--train.batch-size"]),
        (["train", "tiny", "--steps", "1"], ["--steps", "--train.steps"]),
        (["train", "tiny", "--optim.lr", "fast"], ["--optim.lr", "'fast'"]),
        (["explian"], ["'explian'", "explain"]),
        (["explain", "--all"], ["--all"]),
    ],
)
def test_unknown_words_are_refused_with_the_nearest_name(capsys, words, names):
    status, _, err = run(capsys, *words)
    assert status == 2 and "Traceback" not in err
    for name in names:
        assert name in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "tinny"], "fastmoe.train: the recipe must be one of tiny, got 'tinny'; did you mean tiny?"),
        (["train", "tiny", "--train.steps", "0"], "fastmoe.train: --train.steps must be at least 1, got 0"),
        (["train", "tiny", "--data.path", "/nowhere"], "fastmoe.data: --data.path must be a folder made by"),
        (["generate", "--run.dir", "/nowhere"], "fastmoe.generate: --run.dir must be the folder of a run"),
        (["report", "/nowhere"], "fastmoe.report: DIR must be the folder of a run"),
        (["checkpoint", "verify", "/nowhere"], "fastmoe.checkpoint: DIR must be"),
        (["data", "prepare", "--input", "/nowhere", "--out", "/nowhere/out"], "fastmoe.data: --input must be files"),
    ],
)
def test_an_error_is_one_line_and_status_2(capsys, tmp_path, words, message):
    if words[0] == "train":
        words = [*words, "--run.dir", str(tmp_path)]
    status, _, err = run(capsys, *words)
    assert status == 2 and err.startswith(message) and err.count("\n") == 1


def test_a_bug_is_not_hidden(monkeypatch):
    monkeypatch.setattr("fastmoe.explain", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["explain"])


def test_help(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0 and "143 after SIGTERM" in out
    assert all(command in out for command in ("train", "generate", "data", "report", "explain", "checkpoint"))
    status, out, _ = run(capsys, "train", "--help")
    assert status == 0 and "tiny:" in out and "--resume" in out and "143 after SIGTERM" in out
    status, out, _ = run(capsys, "train", "tiny", "--help")
    assert status == 0 and "--model.num-experts" in out and "143 after SIGTERM" in out
    assert run(capsys, "train")[0] == run(capsys)[0] == 2


def test_from_text_to_a_checkpoint(capsys, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"line {i} of the text\n" * 5}) for i in range(60)))
    assert run(capsys, "data", "prepare", "--input", str(texts), "--out", str(tmp_path / "data"))[0] == 0
    model = "--model.d_model 32 --model.num_layers 1 --model.num_experts 2 --model.d_ff 16"
    small = f"{model} --train.seq_len 16 --train.batch_size 2 --checkpoint.every 1".split()
    words = ["train", "tiny", *small, "--data.path", str(tmp_path / "data"), "--run.dir", str(tmp_path / "run")]
    status, out, err = run(capsys, *words, "--train.steps", "2")
    assert status == 0 and "held-out" in out, err
    status, _, err = run(capsys, *words, "--train.steps", "3")
    assert status == 2 and "--resume" in err and err.count("\n") == 1
    status, out, _ = run(capsys, *words, "--train.steps", "3", "--resume")
    assert status == 0 and "resuming after step 2" in out
    status, out, _ = run(capsys, "checkpoint", "verify", str(tmp_path / "run"))
    assert (status, out.count(": intact")) == (0, 2)
    (tmp_path / "run" / "checkpoints" / "step-00000003" / "state.json").write_text("{}")
    status, out, _ = run(capsys, "checkpoint", "verify", str(tmp_path / "run" / "checkpoints"))
    assert status == 1 and "step-00000003: damaged: state.json has 2 bytes" in out
    (tmp_path / "run" / "report.html").unlink()
    status, out, _ = run(capsys, "report", str(tmp_path / "run"))
    assert status == 0 and out.strip() == str(tmp_path / "run" / "report.html") and os.path.exists(out.strip())
    assert run(capsys, "explain")[1].startswith("op ")


def test_kill_9_at_a_random_step(tmp_path):
    root = os.path.dirname(os.path.dirname(__file__))
    words = [sys.executable, f"{root}/benchmarks/kill_resume.py", "--tries", "1", "--seed", "1", "--dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(words, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0 and done.stdout.count("PASS") == 2, done.stdout + done.stderr
