"""What the harness refuses, what it times once, what the commands say and write."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, machine, report, run, sweeps
from benchmarks.ops import harness
from benchmarks.ops.harness import Case, measure
from fastmoe import native

ROOFS = {"mm": 100.0, "triad": 10.0, "update": 10.0}
ONE = torch.ones(4)


def case(**arms):
    arms = {"fastmoe": lambda: [ONE], **arms}
    return Case("a case", arms, lambda: [ONE.double()], work=1e6, roof="mm")


def test_every_right_arm_gets_a_time_and_a_ratio():
    record = measure(case(peer=lambda: [ONE + 1e-7]), ROOFS, 0.05)
    for arm in record["arms"].values():
        assert arm["ms_min"] <= arm["ms"] <= arm["ms_max"] and arm["samples"] >= 3 and arm["peak_mib"] is not None
        assert arm["rate"] == pytest.approx(1 / arm["ms"]) and arm["of_roof"] == pytest.approx(arm["rate"] / 100)
    assert record["arms"]["fastmoe"]["fastmoe_is"] == 1
    assert record["arms"]["peer"]["error"] == pytest.approx(1e-7, rel=0.3)


@pytest.mark.parametrize("wrong", [ONE + 1e-4, ONE * torch.nan, torch.ones(5)])
def test_a_wrong_arm_has_no_time_and_nobody_a_ratio(wrong):
    record = measure(case(peer=lambda: [wrong]), ROOFS, 0.01)
    assert "ms" not in record["arms"]["peer"] and "ms" in record["arms"]["fastmoe"]
    assert not any("fastmoe_is" in arm for arm in record["arms"].values())
    assert run.print_record(record, quick=False) == 1


def test_an_arm_that_raises_is_named_and_ours_may_not():
    def broken():
        raise RuntimeError("no such kernel\nand more")

    record = measure(case(peer=broken), ROOFS, 0.01)
    assert record["arms"]["peer"] == {"failed": "RuntimeError: no such kernel"}
    assert record["arms"]["fastmoe"]["fastmoe_is"] == 1 and run.print_record(record, quick=False) == 1
    with pytest.raises(RuntimeError, match="no such kernel"):
        measure(case(fastmoe=broken), ROOFS, 0.01)


def test_a_slow_arm_is_called_twice_and_timed_once(monkeypatch):
    calls = []

    def slow():
        calls.append(0)
        torch.ones(1 << 22).sin().sum()
        return [ONE]

    monkeypatch.setattr(harness, "SLOW", 1e-3)
    made = case(peer=slow)
    record = measure(made, ROOFS, 0.05)
    assert len(calls) == 2 and record["arms"]["peer"]["samples"] == 1 and record["arms"]["fastmoe"]["samples"] > 1
    assert list(made.slow) == ["peer"] and report.times(record["arms"]["peer"]).endswith("(once)")


def test_memory_kept_by_fastmoe_counts_in_the_peak():
    def call():
        native.empty(16 << 20, dtype=torch.uint8).fill_(1)
        return [ONE]

    call()  # now a block is kept
    peak = measure(case(fastmoe=call), ROOFS, 0.01)["arms"]["fastmoe"]["peak_mib"]
    assert 15 < peak < 40


def test_the_sweeps_and_the_whole_training_step_agree_with_float64(capsys):
    assert run.main(["sweeps", "train_tiny", "--quick"]) == 0
    out = capsys.readouterr().out
    for words in ("experts E 256", "slices E 64", "tokens T 1", "skew Zipf exponent all-to-one", "Mixtral, eager"):
        assert words in out


def test_a_sweep_says_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(sweeps, "free_bytes", lambda: 1 << 30)
    made = sweeps.case("experts", "E", 64, sweeps.Shape(64, 32, 16, 64, 2))
    assert not made.arms and made.left_out == {"fastmoe": "needs 1 GiB, 1 are free"}
    record = measure(made, ROOFS, 0.01)
    assert record["arms"] == {} and record["left_out"] == made.left_out


def test_touched_bytes_are_three_times_those_of_the_experts_with_tokens():
    made = sweeps.case("skew", "Zipf exponent", "all-to-one", sweeps.Shape(8, 6, 4, 5, 2), torch.full((8, 2), 4))
    assert made.labels["touched_bytes"] == 3 * (4 * 3 * 6 * 4)


def test_without_a_gpu_bench_gpu_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda"]) == 1
    assert capsys.readouterr().err == "benchmarks: --device cuda needs a GPU, torch sees none\n"


def test_the_composite_makes_the_same_tiles_as_a_loop():
    torch.manual_seed(0)
    logits_TE = torch.randn(700, 3)
    *_, offsets, tiles, first = gpu.used_tiles(gpu.composite(logits_TE, 2))
    wanted = []
    for e in range(3):
        wanted += [[e, row, int(offsets[e + 1])] for row in range(int(offsets[e]), int(offsets[e + 1]), gpu.BLOCK_M)]
    assert tiles.tolist() == wanted
    experts = [expert for expert, *_ in wanted]
    assert first.tolist() == [len(wanted), *(experts.index(e) for e in range(3))]


def test_a_machine_limited_to_avx2_is_one_of_its_own(monkeypatch):
    limited = []
    fake = SimpleNamespace(limit_isa=limited.append, isa=lambda: "avx2")
    monkeypatch.setattr(native, "_C", fake)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    for name, value in machine.ISAS["avx2"].items():
        monkeypatch.setenv(name, value)
    machine.limit_isa("avx2")
    described, plain = machine.describe("cpu", "avx2"), machine.describe()
    assert limited == ["avx2"] and described["name"] == plain["name"] + "-as-avx2" and described["isa"] == "avx2"
    assert described["instruction_sets"] == [name for name in plain["instruction_sets"] if name == "avx2"]
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    with pytest.raises(SystemExit, match="torch must keep to it, but takes AVX512"):
        machine.limit_isa("avx2")


def test_isa_starts_the_program_again_with_torchs_limits():
    code = (
        "import torch\nfrom types import SimpleNamespace\nfrom fastmoe import native\nfrom benchmarks import machine\n"
        "native._C = SimpleNamespace(limit_isa=lambda isa: print(isa, torch.backends.cpu.get_cpu_capability()))\n"
        "machine.limit_isa('avx2')"
    )
    environment = {name: value for name, value in os.environ.items() if name not in machine.ISAS["avx2"]}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=machine.ROOT
    )
    assert done.stdout == "avx2 AVX2\n", done.stderr


def recorded(tmp_path, family, cases, device="cpu"):
    described = {**machine.describe(), "name": "a-machine", "device": device}
    load = {"others_cpus": {"before": 0.0, "after": 0.1}, "busy": False}
    run.write(tmp_path, {"family": family, "machine": described, "roofs": ROOFS, **load, "cases": cases})


def test_results_are_written_rendered_and_drawn(tmp_path):
    arm = {"ms": 3.0, "ms_min": 2.0, "ms_max": 4.0, "samples": 9, "rate": 12.34, "of_roof": 0.5, "peak_mib": 7.0}
    ours, peer = {"error": 1e-7, **arm, "fastmoe_is": 1.0}, {"error": 1e-7, **arm, "ms": 6.0, "fastmoe_is": 2.0}
    base = {"unit": "GFLOP/s", "roof": "mm"}
    experts = []
    for routed, ms in (("uniform", 3.0), ("Zipf", 4.5)):
        arms = {"fastmoe": {**ours, "ms": ms}, "peer": {**peer, "samples": 1}, "odd": {"failed": "TypeError: a|b"}}
        labels = {"shape": "A", "dtype": "float32", "routing": routed}
        left_out = {"Liger": "runs on cuda only", **({"slow": "took 9 s a call"} if routed == "Zipf" else {})}
        experts.append({**base, "case": f"A float32 {routed}", "arms": arms, "labels": labels, "left_out": left_out})
    recorded(tmp_path, "experts", experts)
    points = [
        {**base, "case": f"experts E {E}: T1", "arms": {"fastmoe": {**ours, "ms": ms}}, "left_out": {}}
        | {"labels": {"sweep": "experts", "axis": "E", "at": E, "touched_bytes": touched}}
        for E, ms, touched in ((64, 3.0, 10_000_000), (4096, 9.0, 50_000_000))
    ]
    recorded(tmp_path, "sweeps", points)
    report.main([str(tmp_path), str(tmp_path / "OUT.md")])
    text = (tmp_path / "OUT.md").read_text()
    assert report.NO_GPU in text and "triad 10 GB/s" in text
    assert "| A float32 uniform | fastmoe | 3.00 (2.00 to 4.00) | 12.3 GFLOP/s | 50% | 7 | 1e-07 |  | 1.00 |" in text
    assert "|  | peer | 6.00 (once) | 12.3 GFLOP/s | 50% | 7 | 1e-07 | 2.00x | 1.00 |" in text
    assert "| A float32 Zipf | fastmoe | 4.50" in text and "|  | 1.50 |" in text and "TypeError: a/b" in text
    assert "- Liger: runs on cuda only\n- slow (A float32 Zipf): took 9 s a call\n" in text
    # 9 ms less 50 MB at 10 GB/s is 4 ms, of 3 ms less 1 ms
    assert "| experts E 4096: T1 | fastmoe | 9.00 (2.00 to 4.00) | 5.00 | 4.00 | 2.00 |" in text
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "a-machine" / "plots").iterdir()}
    assert drawn.keys() == {"experts.svg", "sweep_experts.svg"} and "a-machine/plots/sweep_experts.svg)" in text
    assert all(data.startswith(b"<?xml") and b"fastmoe" in data for data in drawn.values())
    report.main([str(tmp_path), str(tmp_path / "OUT.md")])
    assert drawn == {path.name: path.read_bytes() for path in (tmp_path / "a-machine" / "plots").iterdir()}
    recorded(tmp_path, "metadata", [], device="a GPU")
    assert report.NO_GPU not in report.render(tmp_path, {}, tmp_path)


def test_a_comparison_of_trainings_is_rendered_with_its_table_and_picture(tmp_path):
    arm = {"ms": 3.0, "ms_min": 2.0, "ms_max": 4.0, "samples": 9, "rate": 12.34, "of_roof": 0.5, "peak_mib": 7.0}
    arms = {"fastmoe": {"error": 1e-7, **arm, "fastmoe_is": 1.0}}
    recorded(tmp_path, "gemm", [{"case": "linear", "unit": "GFLOP/s", "roof": "mm", "arms": arms, "left_out": {}}])
    folder = tmp_path / "a-machine" / "training"
    folder.mkdir()
    about = {"date": "2026-01-02", "version": "1", "recipe": "tiny", "steps": 5, "tokens": 50, "seeds": 3, "jobs": 2}
    (folder / "routers.json").write_text(json.dumps(about))
    (folder / "routers.md").write_text("| router |\n|---|\n| topk |\n")
    (folder / "routers.svg").write_text("<svg/>")
    report.main([str(tmp_path), str(tmp_path / "OUT.md")])
    text = (tmp_path / "OUT.md").read_text()
    assert "### routers\n" in text and "| topk |" in text and "](a-machine/training/routers.svg)" in text
    assert "recipe tiny, 5 steps of 10 tokens, seeds 0 to 2" in text


def test_the_recorded_results_can_be_rendered():
    results = machine.ROOT / "benchmarks" / "results"
    records = [json.loads(path.read_text()) for path in results.glob("*/*.json")]
    text = report.render(results, {}, machine.ROOT)
    for record in records:
        for made in record["cases"]:
            assert (made["case"] if made["arms"] else made["case"].split(":")[0]) in text
