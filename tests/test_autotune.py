"""The choice of blocks for Triton's kernels, with a made-up clock: no GPU is needed."""

from __future__ import annotations

import json
import os
import stat
import warnings
from types import SimpleNamespace

import pytest
import torch

from fastmoe import cli
from fastmoe.ops import autotune

SMALL, LARGE, HUGE = ({"BLOCK_M": size, "num_warps": 4} for size in (16, 64, 128))
CANDIDATES = [SMALL, LARGE, HUGE]
TIMES = {16: 3.0, 64: 2.0, 128: 1.0}


@pytest.fixture(autouse=True)
def cache_home(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    autotune._choices.cache_clear()
    yield tmp_path / "fastmoe"
    autotune._choices.cache_clear()


def search(agrees=lambda config: True, broken=()):
    """The choice where a run takes TIMES of its BLOCK_M, and those of `broken` raise."""
    ran = []

    def run(config):
        if config["BLOCK_M"] in broken:
            raise RuntimeError("out of shared memory")
        ran.append(config["BLOCK_M"])

    def timer(call):
        call()
        return TIMES[ran[-1]]

    return autotune.search("gate_up", CANDIDATES, run, agrees, timer)


def test_the_fastest_is_taken():
    assert search() == HUGE


def test_a_wrong_one_is_passed_over_however_fast():
    with pytest.warns(UserWarning, match="gate_up is wrong with .*128"):
        assert search(lambda config: config != HUGE) == LARGE


def test_one_that_does_not_run_is_passed_over():
    assert search(broken=(128, 64)) == SMALL


def test_none_that_is_right_is_an_error():
    with pytest.warns(UserWarning), pytest.raises(RuntimeError, match="no config of gate_up runs and agrees"):
        search(lambda config: False)


def test_close_is_the_rule_of_accuracy():
    exact = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    plain = exact.bfloat16()
    assert autotune.close(plain, exact, plain)
    assert not autotune.close(plain + 0.25, exact, plain)
    assert not autotune.close(plain * float("nan"), exact, plain)


def on_a_gpu(monkeypatch, capturing=False):
    """A tensor that says it is on a GPU, and a timer for it; returns what was timed."""
    timed = []

    def timer(call):
        call()
        return TIMES[timed[-1]]

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(autotune, "_milliseconds", timer)
    like = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))
    call = lambda key=("bfloat16", 256): autotune.choose(
        "rows", key, CANDIDATES, lambda config: timed.append(config["BLOCK_M"]), lambda config: True, like, ()
    )
    return call, timed


def test_off_a_gpu_the_first_is_taken_untried():
    untried = pytest.fail
    assert autotune.choose("rows", (), CANDIDATES, untried, untried, torch.empty(0), ()) is SMALL


def test_choices_outlive_the_process(monkeypatch, cache_home):
    call, timed = on_a_gpu(monkeypatch)
    assert call() == HUGE and len(timed) == 3
    assert call() == HUGE and len(timed) == 3
    autotune._choices.cache_clear()  # as a new process does
    assert call() == HUGE and len(timed) == 3
    call(("bfloat16", 512))
    assert len(timed) == 6
    (file,) = cache_home.iterdir()
    assert json.loads(file.read_text())["choices"] == {"rows bfloat16 256": HUGE, "rows bfloat16 512": HUGE}
    assert stat.S_IMODE(cache_home.stat().st_mode) == 0o700 and stat.S_IMODE(file.stat().st_mode) == 0o600


def test_another_device_or_other_kernels_start_anew(monkeypatch, cache_home):
    call, timed = on_a_gpu(monkeypatch)
    call()
    autotune._choices.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    call()
    assert len(timed) == 6 and len(list(cache_home.iterdir())) == 2


def test_processes_add_to_each_others_choices(cache_home):
    first, second = (autotune.Choices("autotune-x.json", {"device": "H200"}) for _ in range(2))
    first.put("a", SMALL)
    second.put("b", LARGE)
    assert autotune.Choices("autotune-x.json", {}).known == {"a": SMALL, "b": LARGE}
    assert [file.name for file in cache_home.iterdir()] == ["autotune-x.json"]


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch, cache_home):
    call, timed = on_a_gpu(monkeypatch, capturing=True)
    assert call() is SMALL and not timed and not list(cache_home.iterdir())


def test_a_choice_that_is_no_candidate_is_not_taken(monkeypatch):
    call, timed = on_a_gpu(monkeypatch)
    call()
    autotune._choices(0, ()).known["rows bfloat16 256"] = {"BLOCK_M": 4096}
    assert call() == HUGE and len(timed) == 6


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"choices": []}', '{"choices": {"a": {"BLOCK_M": "x"}}}', '{"choices": {"a": 1}}']
)
def test_a_damaged_file_counts_as_none(text, cache_home):
    autotune.folder()
    (cache_home / "autotune-x.json").write_text(text)
    with pytest.warns(UserWarning, match="autotune cache is ignored"):
        choices = autotune.Choices("autotune-x.json", {})
    assert choices.known == {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        choices.put("a", SMALL)
    assert autotune.Choices("autotune-x.json", {}).known == {"a": SMALL}


def test_what_another_user_owns_is_refused(monkeypatch, cache_home):
    autotune.Choices("autotune-x.json", {}).put("a", SMALL)
    other = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: other)
    with pytest.raises(PermissionError, match="must be the user's own"):
        autotune.folder()
    with pytest.warns(UserWarning, match="must be the user's own"):
        choices = autotune.Choices("autotune-x.json", {})
    assert choices.known == {}
    with pytest.warns(UserWarning):
        choices.put("b", LARGE)
    assert choices.get("b") == LARGE
    monkeypatch.undo()
    assert json.loads((cache_home / "autotune-x.json").read_text())["choices"] == {"a": SMALL}


def test_a_link_in_place_of_the_folder_or_the_file_is_refused(cache_home, tmp_path):
    real = tmp_path / "real"
    real.mkdir()
    cache_home.symlink_to(real)
    with pytest.raises(PermissionError):
        autotune.folder()
    cache_home.unlink()
    autotune.folder()
    (real / "file").write_text('{"choices": {"a": {"BLOCK_M": 16}}}')
    (cache_home / "autotune-x.json").symlink_to(real / "file")
    with pytest.warns(UserWarning, match="ignored"):
        assert autotune.Choices("autotune-x.json", {}).known == {}


def test_a_folder_open_to_others_is_closed(cache_home):
    cache_home.mkdir(mode=0o777)
    autotune.folder()
    assert stat.S_IMODE(cache_home.stat().st_mode) == 0o700


def test_cache_list_and_clear(cache_home, capsys):
    autotune.Choices("autotune-x.json", {"device": "H200", "torch": "2.11"}).put("rows bfloat16 256", LARGE)
    assert cli.main(["cache", "list"]) == 0
    out = capsys.readouterr().out
    assert "device H200, torch 2.11" in out and "rows bfloat16 256: BLOCK_M=64 num_warps=4" in out
    assert cli.main(["cache", "clear"]) == 0
    assert capsys.readouterr().out.startswith("1 files removed")
    assert not list(cache_home.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_cache_warm_says_that_it_needs_a_gpu(capsys):
    assert cli.main(["cache", "warm", "--shape", "64,16,16,4,2", "--dtype", "float16"]) == 1
    assert "no CUDA device" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ["1,2,3,4", "a,2,3,4,5", "0,2,3,4,5"])
def test_cache_warm_names_a_bad_shape(shape, capsys):
    assert cli.main(["cache", "warm", "--shape", shape]) == 2
    assert "--shape must be T,D,F,E,K" in capsys.readouterr().err
