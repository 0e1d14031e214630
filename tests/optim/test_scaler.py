import json

import pytest
import torch

from fastmoe.optim import LossScaler


def run(scaler, events):
    """events: "." a clean step, "x" an overflow. The factor after each."""
    values = []
    for event in events:
        scaler.update(event == ".")
        values.append(scaler.value)
    return values


def test_golden_state_machine():
    scaler = LossScaler(window=3, hysteresis=2, minimum=0.5, initial=8)
    assert run(scaler, "..") == [8, 8]
    assert run(scaler, ".") == [16], "doubled after 3 clean steps"
    assert run(scaler, "..x") == [16, 16, 16], "the first overflow is borne"
    assert run(scaler, "xx") == [8, 4], "each further one halves"
    assert run(scaler, "..x") == [4, 4, 2], "until it doubles again none is borne"
    assert run(scaler, "...") == [2, 2, 4], "clean steps count from the overflow"
    assert run(scaler, "xx") == [4, 2]
    assert run(scaler, "xxxx") == [1, 0.5, 0.5, 0.5], "never below the minimum"
    assert scaler.skipped == 10
    assert run(scaler, "......") == [0.5, 0.5, 1, 1, 1, 2]


def test_defaults():
    scaler = LossScaler()
    assert scaler.value == 2.0**16
    assert run(scaler, "." * 1000)[-2:] == [2.0**16, 2.0**17]
    assert run(scaler, "xx") == [2.0**17, 2.0**16]
    assert min(run(scaler, "x" * 30)) == 1.0
    assert run(LossScaler(hysteresis=1), "x") == [2.0**15]


def test_it_scales_a_loss_and_its_gradient():
    x = torch.tensor(3.0, requires_grad=True)
    scaled = LossScaler().scale(x * x)
    scaled.backward()
    assert scaled.item() == 9 * 2.0**16 and x.grad.item() == 6 * 2.0**16


def test_its_state_goes_through_json():
    first = LossScaler(window=5)
    run(first, "..x...")
    second = LossScaler(window=5)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert run(second, "..x....x") == run(first, "..x....x") and second.state_dict() == first.state_dict()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 0}, "window must be at least 1"),
        ({"hysteresis": 0}, "hysteresis must be at least 1"),
        ({"minimum": 0.0}, "minimum must be in"),
        ({"initial": 0.5}, "minimum must be in"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=rf"fastmoe\.LossScaler: {message}"):
        LossScaler(**settings)
