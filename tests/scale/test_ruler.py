import pytest
import torch

from fastmoe.optim import Adafactor, AdamW
from fastmoe.scale.ruler import REGIMES, activation_bytes, max_params, moe_activation_bytes, moe_rank_bytes, regime

GB = 1e9


@pytest.mark.parametrize(
    "name, device, host",
    [
        ("fp32", 16, 0),
        ("mixed", 16, 0),
        ("mixed-accumulate", 18, 0),
        ("mixed-half-moments", 12, 0),
        ("zero1", 16, 0),
        ("zero2", 16, 0),
        ("zero3", 16, 0),
        ("host-states", 4, 12),
        ("zero-offload", 2, 14),
        ("zero-infinity", 0, 20),
    ],
)
def test_bytes_per_parameter(name, device, host):
    assert (regime(name).device_bytes(), regime(name).host_bytes()) == (device, host)


@pytest.mark.parametrize("name, without_gradient", [("int8", 4.125), ("int8-residual8", 5.125)])
def test_states_in_8_bits(name, without_gradient):
    parts = regime(name).device_parts()
    assert parts["weights"] + parts["states"] == without_gradient


def test_the_regimes_are_what_the_optimizers_keep():
    weight = torch.zeros(64, 96, dtype=torch.bfloat16)
    made = {
        "int8": AdamW([weight], state_dtype="int8"),
        "int8-residual8": AdamW([weight], state_dtype="int8", master="residual8"),
        "adafactor-bf16": Adafactor([weight]),
    }
    for name, optimizer in made.items():
        layout = optimizer.layout(weight, optimizer.param_groups[0])
        states = sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in layout.values())
        assert states / weight.numel() == pytest.approx(regime(name).device_parts(matrix=(64, 96))["states"]), name


def test_adafactor_keeps_a_row_and_a_column():
    assert regime("adafactor").device_bytes(matrix=(1024, 4096)) == 8 + 4 * (1024 + 4096) / (1024 * 4096)
    with pytest.raises(ValueError, match="fastmoe.ruler: matrix must be"):
        regime("adafactor").device_bytes()


@pytest.mark.parametrize(
    "name, golden, traffic", [("mixed", 120, 2), ("zero1", 31.4, 2), ("zero2", 16.6, 2), ("zero3", 1.9, 3)]
)
def test_zero_paper_7_5b_on_64(name, golden, traffic):
    assert round(7.5e9 * regime(name).device_bytes(64) / GB, 1) == golden
    assert regime(name).traffic == traffic


def test_sharding_saves_nothing_on_experts_when_ep_is_dp():
    zero = regime("zero2")
    assert moe_rank_bytes(0, 64e9, zero, dp=64, ep=64) == 16e9
    assert moe_rank_bytes(1e9, 64e9, zero, dp=64, ep=16) == 1e9 * (2 + 14 / 64) + 4e9 * (2 + 14 / 4)
    with pytest.raises(ValueError, match="ep must divide dp = 64, got 5"):
        moe_rank_bytes(1, 1, zero, dp=64, ep=5)


@pytest.mark.parametrize(
    "golden, device, host, pooled",
    [(9.31e9, 16, 0, False), (11.42e9, 4, 12, False), (17.88e9, 16, 0, True), (35.75e9, 8, 0, True)],
)
def test_largest_model_on_149_gb_and_137_gb(golden, device, host, pooled):
    assert max_params(149 * GB, 137 * GB, device, host, pooled) == pytest.approx(golden, abs=0.005e9)


def test_activation_bytes():
    T, D, s, a = 4096, 1024, 2048, 16
    assert activation_bytes(T, D, "none", s, a) == T * D * (34 + 5 * a * s / D)
    assert activation_bytes(T, D) == 34 * T * D
    assert activation_bytes(T, D, "full") == 2 * T * D
    with pytest.raises(ValueError, match="recompute must be 'none', 'selective' or 'full', got 'some'"):
        activation_bytes(T, D, "some")
    with pytest.raises(ValueError, match="seq_len and heads must be at least 1"):
        activation_bytes(T, D, "none")


@pytest.mark.parametrize("gated", [False, True])
def test_moe_activation_bytes(gated):
    T, D, F, K = 512, 64, 96, 4
    kept = lambda save: moe_activation_bytes(T, D, F, K, gated, save)
    assert kept("all") == 2 * K * T * (D + 2 * F) + (2 * K * T * F if gated else 0)
    assert kept("z") == 2 * T * D + (4 if gated else 2) * T * K * F + 16 * T * K
    assert kept("z8") == 2 * T * D + (2 if gated else 1) * T * K * (F + 2 * 2) + 16 * T * K  # 96 columns: 2 scales
    assert kept("x") == 2 * T * D + 16 * T * K
    with pytest.raises(ValueError, match="save must be one of 'all', 'z', 'z8', 'x', got 'y'"):
        kept("y")


def test_unknown_regime():
    with pytest.raises(ValueError, match=f"regime must be one of {', '.join(REGIMES)}, got 'zero9'"):
        regime("zero9")
