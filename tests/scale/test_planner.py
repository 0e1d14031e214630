import pytest

from fastmoe.config import ModelConfig, parse_bytes
from fastmoe.scale import Machine, from_config, plan, preset
from fastmoe.scale.planner import main

GB = 1e9
V100S = Machine(512, 32 * GB)


def test_m6_10t_must_offload_on_512_v100():
    real = plan("m6-10t", V100S)
    assert real.params_per_device == 10050223472640 / 512
    assert real.device["weights"] == pytest.approx(39.26 * GB, rel=1e-3)
    assert not real.fits and not real.fits_with_offload
    assert real.overflow == real.params_per_device * 16 - 32 * GB
    roomy = plan("m6-10t", Machine(512, 32 * GB, host_memory=2300 * GB, devices_per_host=8))
    assert not roomy.fits and roomy.fits_with_offload and "must offload" in str(roomy)


def test_m6_10t_pseudo_stage_fits():
    pseudo = plan("m6-10t", V100S, shared_layers=True)
    assert pseudo.params_per_device * 512 == 209379655680
    assert pseudo.fits and pseudo.device_bytes == 16 * 209379655680 / 512 and pseudo.verdict == "fits"


def test_parallel_sizes_divide_what_they_should():
    row = preset("dsv2-lite")
    routed = 26 * 64 * 3 * 2048 * 1408
    made = plan(row, Machine(32, 80 * GB), pp=2, tp=2, ep=4, regime="zero1")
    assert made.sizes == dict(pp=2, dp=8, ep=4, tp=2)
    dense = (row.total_params - routed) / 4
    assert made.params_per_device == dense + routed / 8
    assert made.device["states"] == pytest.approx(12 * (dense / 8 + routed / 8 / 2))
    assert made.device["weights"] == pytest.approx(2 * made.params_per_device)


def test_host_regimes_count_every_device_of_a_host():
    made = plan("mixtral-8x7b", Machine(8, 80 * GB, 1000 * GB, 8), regime="zero-offload")
    assert made.host == pytest.approx(14 * preset("mixtral-8x7b").total_params) and made.fits
    assert made.device["working"] == 1 * GB
    small = plan("mixtral-8x7b", Machine(8, 80 * GB, 500 * GB, 8), regime="zero-offload")
    assert not small.fits and not small.fits_with_offload and "a host lacks" in small.verdict


def test_zero3_gathers_one_layer():
    made = plan("gpt3-175b", Machine(64, 80 * GB), regime="zero3")
    assert made.device["working"] == 2 * 12 * 12288**2
    assert sum(made.device.values()) == pytest.approx(16 * 173946175488 / 64 + made.device["working"])


def test_activations_and_a_config():
    config = ModelConfig(num_shared_experts=1)
    made = plan(config, Machine(1, GB), regime="fp32", tokens=4096)
    moe = 2 * 4096 * 128 + (2 + 1) * 4096 * (4 * 256 + 16)
    assert made.device["activations"] == 4 * (34 * 4096 * 128 + moe)
    assert made.device_bytes - made.device["activations"] == 16 * from_config(config).total_params
    full = plan(config, Machine(1, GB), tokens=4096, recompute="full")
    assert full.device["activations"] == 4 * 2 * 4096 * 128


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(pp=3), r"pp \* tp must divide devices = 512, got 3 \* 1"),
        (dict(ep=3), "ep must divide dp = 512 and the 10240 experts, got 3"),
        (dict(tp=0), "tp must be at least 1, got 0"),
        (dict(regime="tiny"), "regime must be one of"),
        (dict(pp=64), "pp must be at most the 48 layers, got 64"),
        (dict(pp=2, shared_layers=True), "pp must be 1"),
    ],
)
def test_what_does_not_divide_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan("m6-10t", V100S, **options)


def test_sizes_in_bytes():
    sizes = {"32GB": 32e9, "1.5 TiB": 1.5 * 2**40, "24gib": 24 * 2**30, "7": 7, "0": 0}
    assert {text: parse_bytes(text) for text in sizes} == sizes
    for text in ("", "GB", "3XB", "many"):
        with pytest.raises(ValueError, match="memory must be like 32GB"):
            parse_bytes(text)


def test_the_command_prints_and_returns_a_status(capsys):
    words = ["m6-10t", "--devices", "512", "--device-memory", "32GB"]
    assert main(words) == 1
    assert "must offload 282.07 GB of each device" in capsys.readouterr().out
    assert main([*words, "--shared-layers"]) == 0
    printed = capsys.readouterr().out
    assert "m6-10t on 512 devices, pp=1 dp=512 ep=512 tp=1, mixed: 408,944,640 parameters a device" in printed
    assert "states" in printed and "4.91 GB" in printed and printed.endswith("fits\n")
