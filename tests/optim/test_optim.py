import copy
import math

import pytest
import torch

from fastmoe import config, testing
from fastmoe.optim import AdamW
from fastmoe.optim.clip import grad_norm
from fastmoe.optim.schedule import cosine
from fastmoe.testing import draw

BACKENDS = [name for name in testing.backends("adamw") if name in ("native", "reference")]


def params(dtype=torch.float32):
    return [
        torch.nn.Parameter(draw(*shape, dtype=dtype, seed=i)) for i, shape in enumerate([(33, 7), (5,), (2, 3, 4), ()])
    ]


def set_grads(tensors, step):
    for i, p in enumerate(tensors):
        p.grad = draw(*p.shape, dtype=p.dtype, seed=100 * step + i)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch(backend, dtype):
    ours, theirs = params(dtype), params(dtype)
    settings = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6)
    groups = lambda p: [{"params": p[:2], "weight_decay": 0.2}, {"params": p[2:], "lr": 3e-3, "weight_decay": 0.0}]
    mine, torchs = AdamW(groups(ours), **settings), torch.optim.AdamW(groups(theirs), **settings)
    with testing.backend("reference" if dtype == torch.float64 else f"adamw={backend}"):
        for step in range(1, 8):
            for tensors, optimizer in ((ours, mine), (theirs, torchs)):
                set_grads(tensors, step)
                optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_grad_scale_scales_every_gradient():
    ours, theirs = params(), params()
    mine, torchs = AdamW(ours), torch.optim.AdamW(theirs)
    for step in range(1, 4):
        set_grads(ours, step)
        set_grads(theirs, step)
        for p in theirs:
            p.grad *= 0.25
        mine.step(grad_scale=0.25)
        torchs.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[0].grad, draw(33, 7, seed=300)), "gradients are left as they were"


def test_params_without_gradient_are_left_alone_and_join_later():
    ours, theirs = params(), params()
    mine, torchs = AdamW(ours, lr=0.1), torch.optim.AdamW(theirs, lr=0.1)
    for step in range(1, 5):
        for tensors, optimizer in ((ours, mine), (theirs, torchs)):
            set_grads(tensors, step)
            if step < 3:
                tensors[1].grad = None
            optimizer.step()
        if step == 2:
            assert torch.equal(ours[1], params()[1]) and ours[1] not in mine.state
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_closure_is_called_with_gradients():
    (p,) = tensors = [torch.nn.Parameter(torch.tensor([3.0]))]
    optimizer = AdamW(tensors, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0 and p.item() < 3.0


@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_state_dict_round_trip_goes_on_bit_for_bit(dtype, tmp_path):
    straight, resumed = params(dtype), params(dtype)
    first, second = AdamW(straight, lr=1e-2), AdamW(resumed, lr=1e-2)
    for step in range(1, 7):
        if step == 4:
            torch.save((second.state_dict(), [p.detach() for p in resumed]), tmp_path / "state")
            state, saved = torch.load(tmp_path / "state")
            resumed = [torch.nn.Parameter(t) for t in saved]
            second = AdamW(resumed, lr=999.0)
            second.load_state_dict(copy.deepcopy(state))
        for tensors, optimizer in ((straight, first), (resumed, second)):
            set_grads(tensors, step)
            optimizer.step()
    for a, b in zip(straight, resumed):
        testing.assert_bit_equal(b.detach(), a.detach())
        assert second.state[b]["exp_avg"].dtype == torch.float32
        testing.assert_bit_equal(second.state[b]["exp_avg"], first.state[a]["exp_avg"])
        testing.assert_bit_equal(second.state[b]["exp_avg_sq"], first.state[a]["exp_avg_sq"])


def test_a_torch_scheduler_drives_it():
    tensors = params()
    optimizer = AdamW(tensors, lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rates = []
    for step in range(1, 4):
        set_grads(tensors, step)
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.5, 0.25, 0.125]


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"eps": -1e-8}, {"weight_decay": -1.0}],
    ids=str,
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=rf"fastmoe\.AdamW: {next(iter(settings))} must be at least 0"):
        AdamW(params(), **settings)


def test_a_channels_last_gradient_is_accepted():
    p = torch.nn.Parameter(draw(4, 6))
    p.grad = draw(6, 4, seed=1).t()
    twin = torch.nn.Parameter(draw(4, 6))
    twin.grad = p.grad.contiguous()
    AdamW([p]).step()
    AdamW([twin]).step()
    assert torch.equal(p, twin)


def test_schedule():
    optim = config.OptimConfig(lr=2.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [cosine(step, optim, 20) for step in range(1, 25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert all(a > b for a, b in zip(rates[3:19], rates[4:20])) and rates[19:] == [pytest.approx(0.2)] * 5
    assert rates[11] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5))))
    assert cosine(1, config.OptimConfig(lr=2.0, warmup_steps=0), 20) < 2.0
    assert cosine(7, config.OptimConfig(lr=2.0, warmup_steps=7), 7) == 2.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grad_norm(dtype):
    tensors = params(dtype)
    set_grads(tensors, 1)
    tensors[1].grad = None
    want = torch.cat([p.grad.flatten().double() for p in tensors if p.grad is not None]).norm()
    torch.testing.assert_close(grad_norm(tensors).double(), want, rtol=1e-6, atol=0)
    assert grad_norm([]) == 0


def test_clipping_bounds_the_norm():
    tensors = params()
    set_grads(tensors, 1)
    scale = min(1.0, 0.5 / grad_norm(tensors).item())
    for p in tensors:
        p.grad *= scale
    assert grad_norm(tensors).item() == pytest.approx(0.5)
