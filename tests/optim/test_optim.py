import copy
import math
import subprocess
import sys
from pathlib import Path

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


KINDS = [
    (dtype, state_dtype, master)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for state_dtype in ("fp32", "bf16", "fp16", "int8")
    for master in (None, "residual8", "fp32")
    if (dtype, master) != (torch.float16, "residual8") and (master is None or dtype != torch.float32)
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_kind_of_state_follows_float64_and_resumes_bit_for_bit(kind):
    dtype, state_dtype, master = kind
    straight, resumed, exact = params(dtype), params(dtype), [torch.nn.Parameter(p.double()) for p in params(dtype)]
    settings = dict(lr=1e-2, state_dtype=state_dtype, master=master, seed=3)
    first, second = AdamW(straight, **settings), AdamW(resumed, **settings)
    theirs = torch.optim.AdamW(exact, lr=1e-2)
    for step in range(1, 9):
        if step == 5:
            state = copy.deepcopy(second.state_dict())
            second = AdamW(resumed, lr=9.0, seed=3)
            second.load_state_dict(state)
        for tensors, optimizer in ((straight, first), (resumed, second), (exact, theirs)):
            set_grads(tensors, step)
            optimizer.step()
    for a, b, c in zip(straight, resumed, exact):
        testing.assert_bit_equal(a.detach(), b.detach())
        for name, tensor in first.state[a].items():
            assert isinstance(tensor, int) or torch.equal(tensor, second.state[b][name])
        # 8 updates of at most about 1e-2, off by what their moments lose, and the rounding of the weights
        loss = 8e-2 * (0.1 if state_dtype == "int8" else 0.02)
        rounding = 0.0 if dtype == torch.float32 or master == "fp32" else 2.0**-14 if master else 2.0**-7
        rounding = max(rounding, 0.0 if dtype == torch.float32 else 2.0**-8) * 8**0.5
        assert (a.double() - c).abs().max() <= loss + rounding * c.abs().max()


def test_groups_of_different_kinds():
    together, alone = params(torch.bfloat16), params(torch.bfloat16)
    options = [{"lr": 1e-2, "state_dtype": "int8"}, {"weight_decay": 0.5, "state_dtype": "bf16", "master": "residual8"}]
    halves = lambda p: [p[:2], p[2:]]
    one = AdamW([{"params": half, **option} for half, option in zip(halves(together), options)])
    several = [AdamW(half, **option) for half, option in zip(halves(alone), options)]
    for step in range(1, 4):
        for tensors, optimizers in ((together, [one]), (alone, several)):
            set_grads(tensors, step)
            for optimizer in optimizers:
                optimizer.step()
    for a, b in zip(together[:2], alone[:2]):
        assert torch.equal(a, b)
    kinds = [one.state[p]["exp_avg"].dtype for p in together]
    assert kinds == [torch.int8, torch.float32, torch.bfloat16, torch.float32]
    assert "master" in one.state[together[2]] and "master" not in one.state[together[0]]


def test_the_seed_decides_the_rounding():
    results = []
    for seed in (0, 0, 1):
        tensors = params(torch.bfloat16)
        optimizer = AdamW(tensors, lr=1e-3, seed=seed)
        set_grads(tensors, 1)
        optimizer.step()
        results.append(tensors)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))
    assert not all(torch.equal(a, b) for a, b in zip(results[0], results[2]))


@pytest.mark.parametrize(
    "change", ["weights move", "weights become bfloat16", "a moment is replaced", "a gradient is transposed", "nothing"]
)
def test_tensors_that_change_between_steps_are_seen(change):
    """The steps before have left notes about the tensors."""
    tensors = params()
    optimizer = AdamW(tensors, lr=0.1)
    for step in range(1, 4):
        set_grads(tensors, step)
        optimizer.step()
    before = tensors[0].data
    was = before.clone()
    if change == "weights move":
        tensors[0].data = before.clone()
    elif change == "weights become bfloat16":
        for p in tensors:
            p.data = p.data.bfloat16()
    elif change == "a moment is replaced":
        optimizer.state[tensors[0]]["exp_avg"] = torch.ones(33, 7)
    twins = [torch.nn.Parameter(p.detach().clone()) for p in tensors]
    twin = AdamW(twins, lr=0.1)
    twin.load_state_dict(optimizer.state_dict())
    for p in (tensors, twins):
        set_grads(p, 4)
        if change == "a gradient is transposed":
            p[0].grad = p[0].grad.t().contiguous().t()
    optimizer.step()
    twin.step()
    for p, other in zip(tensors, twins):
        testing.assert_bit_equal(p.detach(), other.detach())
        for name in ("exp_avg", "exp_avg_sq"):
            testing.assert_bit_equal(optimizer.state[p][name], twin.state[other][name])
    if change == "weights move":
        assert torch.equal(before, was), "what the parameter no longer holds is left alone"


def test_a_gradient_that_does_not_fit_is_refused_after_good_ones():
    tensors = params()
    optimizer = AdamW(tensors)
    for step in range(1, 3):
        set_grads(tensors, step)
        optimizer.step()
    for p in tensors[:2]:
        p.data = p.data.double()
    with pytest.raises((TypeError, ValueError), match=r"fastmoe.adamw_step: \w+\[\d\]"):
        optimizer.step()


def test_a_copy_goes_on_by_itself():
    tensors = params(torch.bfloat16)
    optimizer = AdamW(tensors, lr=0.1, state_dtype="int8", seed=5)
    set_grads(tensors, 1)
    optimizer.step()
    copied, twin = copy.deepcopy((tensors, optimizer))
    set_grads(copied, 2)
    set_grads(tensors, 2)
    before = [p.clone() for p in tensors]
    twin.step()
    assert all(map(torch.equal, tensors, before))
    optimizer.step()
    for p, other in zip(tensors, copied):
        testing.assert_bit_equal(p.detach(), other.detach())


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "fp16", "int8"])
def test_takes_over_from_torch(state_dtype):
    ours, theirs = params(), params()
    torchs = torch.optim.AdamW(theirs, lr=1e-2)
    for step in range(1, 4):
        set_grads(theirs, step)
        torchs.step()
    for a, b in zip(ours, theirs):
        a.data.copy_(b)
    mine = AdamW(ours, state_dtype=state_dtype)
    mine.load_state_dict(torchs.state_dict())
    assert [mine.state[p]["step"] for p in ours] == [3] * 4 and mine.param_groups[0]["lr"] == 1e-2
    for tensors, optimizer in ((ours, mine), (theirs, torchs)):
        set_grads(tensors, 4)
        optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if state_dtype == "fp32" else 1e-3)


def test_torch_takes_over_from_fp32_states():
    ours, theirs = params(), params()
    mine = AdamW(ours, lr=1e-2)
    set_grads(ours, 1)
    mine.step()
    state = copy.deepcopy(mine.state_dict())
    for entry in state["state"].values():
        entry["step"] = torch.tensor(float(entry["step"]))
    torchs = torch.optim.AdamW(theirs)
    for a, b in zip(ours, theirs):
        b.data.copy_(a)
    torchs.load_state_dict({**state, "param_groups": [torchs.state_dict()["param_groups"][0] | {"lr": 1e-2}]})
    for tensors, optimizer in ((ours, mine), (theirs, torchs)):
        set_grads(tensors, 2)
        optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_state_dicts_that_do_not_fit():
    saved = AdamW(tensors := params())
    set_grads(tensors, 1)
    saved.step()
    state = saved.state_dict()
    wrong = copy.deepcopy(state)
    wrong["state"][0]["exp_avg"] = wrong["state"][0]["exp_avg"].bfloat16()
    with pytest.raises(ValueError, match=r"fastmoe\.AdamW: the saved state of parameter 0 must hold"):
        AdamW(params()).load_state_dict(wrong)
    amsgrad = torch.optim.AdamW(tensors, amsgrad=True)
    amsgrad.step()
    with pytest.raises(ValueError, match="without amsgrad and maximize"):
        AdamW(params()).load_state_dict(amsgrad.state_dict())


def experts(dtype=torch.float32, E=6, seed=0):
    return torch.nn.Parameter(draw(E, 5, 40, dtype=dtype, seed=seed))


def sparse(grad_EIO, touched):
    ids = torch.tensor([touched], dtype=torch.int64)
    return torch.sparse_coo_tensor(ids, grad_EIO[ids[0]], grad_EIO.shape, is_coalesced=True, check_invariants=True)


TOUCHED = [[0, 2], [2], [], [0, 1, 2, 3, 4], [1, 2], [0, 2, 4]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_experts_follow_their_definition(backend):
    """Each expert against an AdamW of its own in float64, which idles with it and decays for the steps it missed."""
    param, rates = experts(), [1e-2, 2e-2, 5e-3, 1e-2, 3e-2, 1e-2]
    w, m, v, steps = param.detach().double(), torch.zeros(6, 5, 40).double(), torch.zeros(6, 5, 40).double(), [0] * 6
    start = w.clone()
    optimizer = AdamW([param], weight_decay=0.5, betas=(0.8, 0.9), sparse_experts=True)
    decay, last = 1.0, [1.0] * 6
    with testing.backend(f"adamw={backend}"):
        for t, (touched, lr) in enumerate(zip(TOUCHED, rates)):
            grad = draw(6, 5, 40, seed=20 + t)
            optimizer.param_groups[0]["lr"] = lr
            param.grad = sparse(grad, touched)
            optimizer.step()
            decay *= 1 - lr * 0.5
            for e in touched:
                steps[e] += 1
                m[e] = 0.8 * m[e] + 0.2 * grad[e].double()
                v[e] = 0.9 * v[e] + 0.1 * grad[e].double() ** 2
                update = m[e] / (1 - 0.8 ** steps[e]) / ((v[e] / (1 - 0.9 ** steps[e])).sqrt() + 1e-8)
                w[e] = w[e] * (decay / last[e]) - lr * update
                last[e] = decay
    state = optimizer.state[param]
    assert state["steps"].tolist() == steps and state["decay"].tolist() == pytest.approx(last, rel=1e-15)
    assert optimizer.param_groups[0]["decay_product"] == pytest.approx(decay, rel=1e-15)
    for got, want in ((param, w), (state["exp_avg"], m), (state["exp_avg_sq"], v)):
        torch.testing.assert_close(got.detach().double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(param[5].detach().double(), start[5]), "an expert that was never touched is as it was"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_dtype", ["fp32", "int8"])
def test_dense_gradients_touch_all_experts_and_equal_plain_adamw(dtype, state_dtype):
    plain, special, listed = experts(dtype), experts(dtype), experts(dtype)
    optimizers = [
        AdamW([plain], state_dtype=state_dtype),
        AdamW([special], state_dtype=state_dtype, sparse_experts=True),
        AdamW([listed], state_dtype=state_dtype, sparse_experts=True),
    ]
    for step in range(1, 4):
        grad = draw(6, 5, 40, dtype=dtype, seed=step)
        plain.grad, special.grad, listed.grad = grad, grad, sparse(grad, list(range(6)))
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(special, listed)
    if dtype == torch.float32:  # D(now) / D(then) and 1 - lr weight_decay may differ in the last bit
        torch.testing.assert_close(special, plain, rtol=1e-6, atol=1e-6)
    assert all(optimizer.state[p]["step"] == 3 for optimizer, p in zip(optimizers, (plain, special, listed)))


def test_sparse_experts_differ_from_torch_as_stated():
    """The figure in AdamW's docstring: one step of four each, gradients of one distribution, 400 steps."""
    ours, theirs = experts(E=8), experts(E=8)
    mine = AdamW([ours], weight_decay=0.0, sparse_experts=True)
    torchs = torch.optim.AdamW([theirs], weight_decay=0.0)
    start = ours.detach().clone()
    mean = draw(8, 5, 40, seed=3)
    for step in range(400):
        touched = [e for e in range(8) if e % 4 == step % 4]
        grad = torch.zeros(8, 5, 40)
        grad[touched] = (mean + draw(8, 5, 40, seed=1000 + step))[touched]
        ours.grad, theirs.grad = sparse(grad, touched), grad
        mine.step()
        torchs.step()
    moved, other = ours.detach() - start, theirs.detach() - start
    ratio = (other.norm() / moved.norm()).item()
    direction = torch.nn.functional.cosine_similarity(other.flatten(), moved.flatten(), 0).item()
    assert 1.9 < ratio < 2.1 and direction > 0.999


def test_sparse_gradients_without_the_option():
    param = experts()
    param.grad = sparse(param.detach(), [1])
    with pytest.raises(ValueError, match=r"sparse_experts=True, got a sparse one of shape \[6, 5, 40\]"):
        AdamW([param]).step()
    table = torch.nn.Parameter(draw(6, 40))
    table.grad = sparse(table.detach(), [1])
    with pytest.raises(ValueError, match="gradients must be dense, or of three dimensions"):
        AdamW([table], sparse_experts=True).step()


def test_sparse_experts_resume_bit_for_bit():
    straight, resumed = experts(torch.bfloat16), experts(torch.bfloat16)
    settings = dict(state_dtype="int8", weight_decay=0.5, sparse_experts=True)
    first, second = AdamW([straight], **settings), AdamW([resumed], **settings)
    for step, touched in enumerate(TOUCHED):
        if step == 3:
            state = copy.deepcopy(second.state_dict())
            second = AdamW([resumed], sparse_experts=True)
            second.load_state_dict(state)
        for param, optimizer in ((straight, first), (resumed, second)):
            param.grad = sparse(draw(6, 5, 40, dtype=torch.bfloat16, seed=step), touched)
            optimizer.step()
    assert torch.equal(straight, resumed)


SHARDS = """
import os, sys, torch, torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from fastmoe.optim import AdamW
from fastmoe.testing import draw
torch.set_num_threads(1)
rank, file = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
shapes = [(7, 40), (5, 3, 33), (9,), (1, 8)]
kinds = [("int8", None), ("bf16", "residual8"), ("fp16", "fp32"), ("fp32", None)]
for state_dtype, master in kinds:
    whole = [torch.nn.Parameter(draw(*shape, dtype=torch.bfloat16, seed=i)) for i, shape in enumerate(shapes)]
    parts = [torch.nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in whole]
    optimizers = [AdamW(p, lr=1e-2, state_dtype=state_dtype, master=master) for p in (whole, parts)]
    for step in range(3):
        for i, (a, b) in enumerate(zip(whole, parts)):
            a.grad = draw(*a.shape, dtype=torch.bfloat16, seed=100 * step + i)
            b.grad = distribute_tensor(a.grad, mesh, [Shard(0)])
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(whole, parts):
        assert torch.equal(a, b.full_tensor()), (state_dtype, master, a.shape)
        moments = optimizers[1].state[b]["exp_avg"]
        assert type(moments) is torch.Tensor and moments.shape == b.to_local().shape
dist.barrier()
os._exit(0)  # gloo's threads may abort a process that ends in the usual way while the other one does
"""


def test_shards_are_updated_as_the_whole(tmp_path):
    root = Path(__file__).parents[2]
    words = [sys.executable, "-W", "ignore", "-c", SHARDS]
    ranks = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "store")], cwd=root, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors[-3000:]


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1.0}, {"betas": (0.9, 1.0)}, {"betas": (-0.1, 0.9)}, {"eps": -1e-8}, {"weight_decay": -1.0}],
    ids=str,
)
def test_bad_settings(settings):
    with pytest.raises(ValueError, match=rf"fastmoe\.AdamW: {next(iter(settings))} must be at least 0"):
        AdamW(params(), **settings)


def test_bad_settings_of_groups():
    halves = params(torch.float16)
    with pytest.raises(ValueError, match=r"fastmoe\.AdamW: master of group 1 must be None or 'fp32' for float16"):
        AdamW([{"params": params()}, {"params": halves}], master="residual8")
    with pytest.raises(ValueError, match=r"fastmoe\.AdamW: state_dtype must be one of fp32, bf16, fp16, int8, got 'f'"):
        AdamW([{"params": params(), "state_dtype": "f"}])
    with pytest.raises(ValueError, match=r"fastmoe\.AdamW: master must be one of"):
        AdamW(params(), master="bf16")


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
