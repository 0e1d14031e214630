import math

import pytest
import torch

from fastmoe import testing
from fastmoe.optim import Adafactor
from fastmoe.testing import draw

BACKENDS = [name for name in testing.backends("adafactor") if name in ("native", "reference")]


def params(dtype=torch.float32):
    return [torch.nn.Parameter(draw(*shape, dtype=dtype, seed=i)) for i, shape in enumerate([(33, 7), (5,), (6, 9)])]


def set_grads(tensors, step):
    for i, p in enumerate(tensors):
        p.grad = draw(*p.shape, dtype=p.dtype, seed=100 * step + i)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch(backend, dtype):
    """torch's rule is ours with lr=None, its lr the bound on the relative step; its decay is not relative."""
    ours, theirs = params(dtype), params(dtype)
    eps, d = (1e-30, 1e-3), 1.5
    mine = Adafactor(ours, eps=eps, clip_threshold=d)
    torchs = torch.optim.Adafactor(theirs, lr=1e-2, eps=eps, d=d)
    with testing.backend("reference" if dtype == torch.float64 else f"adafactor={backend}"):
        for step in range(1, 8):
            for tensors, optimizer in ((ours, mine), (theirs, torchs)):
                set_grads(tensors, step)
                optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_grad_scale_and_groups():
    ours, theirs = params(), params()
    mine = Adafactor([{"params": ours[:1], "lr": 0.1, "weight_decay": 0.5}, {"params": ours[1:]}])
    plain = Adafactor([{"params": theirs[:1], "lr": 0.1, "weight_decay": 0.5}, {"params": theirs[1:]}])
    for step in range(1, 4):
        set_grads(ours, step), set_grads(theirs, step)
        for p in theirs:
            p.grad *= 0.25
        mine.step(grad_scale=0.25)
        plain.step()
    for a, b, start in zip(ours, theirs, params()):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert not torch.equal(a, start)
    assert torch.equal(ours[0].grad, draw(33, 7, seed=300)), "gradients are left as they were"


@pytest.mark.parametrize("master", [None, "residual8", "fp32"])
def test_state_dict_round_trip_goes_on_bit_for_bit(master, tmp_path):
    straight, resumed = params(torch.bfloat16), params(torch.bfloat16)
    first, second = (Adafactor(tensors, master=master, seed=3) for tensors in (straight, resumed))
    for step in range(1, 7):
        if step == 4:
            torch.save((second.state_dict(), [p.detach() for p in resumed]), tmp_path / "state")
            state, saved = torch.load(tmp_path / "state")
            resumed = [torch.nn.Parameter(t) for t in saved]
            second = Adafactor(resumed, lr=999.0, seed=3)
            second.load_state_dict(state)
        for tensors, optimizer in ((straight, first), (resumed, second)):
            set_grads(tensors, step)
            optimizer.step()
    for a, b in zip(straight, resumed):
        testing.assert_bit_equal(b.detach(), a.detach())
        for name, value in first.state[a].items():
            same = second.state[b][name]
            testing.assert_bit_equal(same, value) if isinstance(value, torch.Tensor) else None
            assert isinstance(value, torch.Tensor) or same == value


def test_bytes_per_parameter():
    weight = torch.nn.Parameter(torch.zeros(8, 64, 32, dtype=torch.bfloat16))
    optimizer = Adafactor([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    states = sum(t.nbytes for t in optimizer.state[weight].values() if isinstance(t, torch.Tensor))
    assert states == 8 * 4 * (64 + 32)
    assert (weight.nbytes + states) / weight.numel() <= 2.6


@pytest.mark.parametrize("master", [None, "residual8", "fp32"])
def test_small_updates_of_bf16_weights_are_not_lost(master):
    """A step of 1/40 of a bfloat16 weight's spacing moves the weights by so much on average."""
    weight = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    step = 2.0**-7 / 40
    optimizer = Adafactor([weight], lr=step, master=master)
    for _ in range(200):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.float().mean().item() == pytest.approx(1 - 200 * step, rel=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be None .* or at least 0, got -1.0"),
        ({"decay_rate": 0.0}, "decay_rate must be in"),
        ({"eps": (0.0, 1e-3)}, "eps must be positive"),
        ({"clip_threshold": 0.0}, "clip_threshold must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"master": "fp16"}, "master must be one of"),
    ],
    ids=str,
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=rf"fastmoe\.Adafactor: {message}"):
        Adafactor(params(), **settings)


def test_a_residual_needs_bfloat16():
    tensors = params(torch.float16)
    set_grads(tensors, 1)
    with pytest.raises(ValueError, match=r"fastmoe\.Adafactor: master must be None or 'fp32' for float16 params"):
        Adafactor(tensors, master="residual8").step()


def test_it_learns():
    torch.manual_seed(0)
    weight, x = torch.nn.Parameter(torch.zeros(4, 8)), torch.randn(256, 8)
    target = x @ torch.randn(8, 4)
    optimizer, losses = Adafactor([weight], lr=0.05), []
    for step in range(200):
        loss = (x @ weight.t() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 200)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 1e-2 * losses[0] and math.isfinite(losses[-1])
