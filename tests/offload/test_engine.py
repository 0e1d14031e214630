"""The engine against the same training in memory, bit for bit."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fastmoe.nn import Experts, MoE
from fastmoe.offload import Engine
from fastmoe.optim import AdamW
from tests.offload.models import (
    LARGE,
    assert_equal,
    contents,
    contents_plain,
    host_bytes,
    loss_of,
    make_engine,
    make_model,
    make_optimizer,
    train,
    train_plain,
)


def plain(steps: int, model=make_model, optimizer=make_optimizer, **options):
    torch.manual_seed(0)
    model = model()
    optimizer = optimizer(model)
    losses = train_plain(model, optimizer, range(steps), **options)
    return losses, contents_plain(model, optimizer)


MODES = {
    "one pass": {},
    "previous norm": {"clip_norm": 0.3, "clip": "previous"},
    "exact norm": {"clip_norm": 0.3},
    "durable": {"clip_norm": 0.3, "durable": True},
    "accumulated": {"accumulation": 2},
    "accumulated, durable": {"accumulation": 2, "durable": True, "clip_norm": 0.3},
}
KEEPING = set(MODES) - {"one pass", "previous norm"}


@pytest.mark.parametrize("resident, checkpointed", [(6, True), (2, True), (0, True), (0, False)])
@pytest.mark.parametrize("mode", MODES)
def test_steps_equal_those_in_memory(tmp_path, resident, mode, checkpointed):
    model = lambda: make_model(checkpointed=checkpointed)
    budgets = {
        "host": host_bytes(resident, keeps=mode in KEEPING, slots=resident < 6, durable="durable" in mode),
        "disk": LARGE,
    }
    engine = make_engine(tmp_path, budgets, model=model, **MODES[mode])
    assert list(engine.plan.tier.values()) == ["host"] * (1 + resident) + ["disk"] * (6 - resident)
    losses, ended = train(engine, range(3))
    scales = [step.scale for step in ended]
    norms = [math.inf] + [step.norm for step in ended] if mode == "previous norm" else [step.norm for step in ended]
    limit = engine.clip_norm or math.inf
    assert scales == [1.0 if math.isinf(norm) else min(1.0, limit / norm) for norm in norms[:3]]
    wanted = plain(3, model, scales=scales, accumulation=engine.accumulation)
    assert losses == wanted[0] and [step.step for step in ended] == [1, 2, 3]
    assert_equal(contents(engine), wanted[1])
    engine.close()


def test_the_norm_is_that_of_all_gradients(tmp_path):
    torch.manual_seed(0)
    model = make_model()
    loss_of(model, 0).backward()
    wanted = math.sqrt(sum(p.grad.double().square().sum().item() for p in model.parameters()))
    engine = make_engine(tmp_path)
    engine.backward(loss_of(engine.model, 0))
    assert engine.gradients()[0] == pytest.approx(wanted, rel=1e-12)
    engine.step()
    engine.close()


STATES = [
    ("fp32", None, torch.float32),
    ("bf16", None, torch.float32),
    ("fp32", "fp32", torch.bfloat16),
    ("fp16", "residual8", torch.bfloat16),
    ("int8", "residual8", torch.bfloat16),
    ("int8", None, torch.bfloat16),
]


@pytest.mark.parametrize("options", [{}, {"durable": True}], ids=["one pass", "durable"])
@pytest.mark.parametrize("state_dtype, master, dtype", STATES)
def test_every_kind_of_state(tmp_path, state_dtype, master, dtype, options):
    model = lambda: make_model(dtype)
    optimizer = lambda model: make_optimizer(model, state_dtype=state_dtype, master=master, seed=3)
    engine = make_engine(tmp_path, model=model, optimizer=optimizer, **options)
    losses, _ = train(engine, range(3))
    wanted = plain(3, model, optimizer)
    assert losses == wanted[0]
    assert_equal(contents(engine), wanted[1])
    engine.close()


def test_three_tiers(tmp_path):
    """On a CPU "device" is memory too: what lives in "host" is copied to work on it, as to a device."""
    for name, mode in MODES.items():
        keeps = name in KEEPING
        layer = host_bytes(1, keeps) - host_bytes(0, keeps)
        budgets = {"device": host_bytes(1, keeps), "host": round(1.7 * layer), "disk": LARGE}
        engine = make_engine(tmp_path / name, budgets, **mode)
        assert sorted(engine.plan.tier.values()) == ["device", "device", "disk", "disk", "disk", "disk", "host"]
        losses, ended = train(engine, range(3))
        wanted = plain(3, scales=[step.scale for step in ended], accumulation=engine.accumulation)
        assert losses == wanted[0]
        assert_equal(contents(engine), wanted[1])
        engine.close()


class Plain(nn.Module):
    """Layers whose weights are initialised after they were registered, one used twice, one without gradient."""

    alive: list[int] = []

    class Layer(nn.Module):
        def __init__(self, made: list):
            super().__init__()
            full = lambda param: param.device.type != "meta" and param.untyped_storage().nbytes() > 4
            Plain.alive.append(sum(any(map(full, layer.parameters())) for layer in made))
            self.linear, self.norm = nn.Linear(24, 24), nn.LayerNorm(24)
            self.unused = nn.Linear(24, 24)
            self.frozen = nn.Linear(24, 24).requires_grad_(False)
            made.append(self)

        def forward(self, x):
            return x + torch.tanh(self.frozen(self.linear(self.linear(self.norm(x)))))

    def __init__(self, count: int = 6):
        super().__init__()
        made: list = []
        self.layers = nn.ModuleList(Plain.Layer(made) for _ in range(count))
        self.head = nn.Linear(24, 1)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x).square().mean()


@pytest.mark.parametrize("mode", MODES)
def test_any_module_of_layers(tmp_path, mode):
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(5))
    adamw = lambda model: AdamW(model.parameters(), lr=1e-2)
    Plain.alive.clear()
    torch.manual_seed(1)
    engine = Engine(Plain, adamw, {"host": 100_000, "disk": LARGE}, tmp_path, **MODES[mode])
    assert max(Plain.alive) <= 1 and engine.report()["offloaded"] > 0.9  # one layer at a time was in memory
    torch.manual_seed(1)
    model = Plain()
    optimizer = adamw(model)
    for _ in range(3):
        optimizer.zero_grad()
        for _ in range(engine.accumulation):
            loss, wanted = (net(x) / engine.accumulation for net in (engine.model, model))
            assert torch.equal(loss, wanted)
            assert all(p.untyped_storage().nbytes() == 4 for p in engine.model.layers.parameters())
            engine.backward(loss)
            wanted.backward()
        optimizer.step(grad_scale=engine.step().scale)
    got, wanted = contents(engine), contents_plain(model, optimizer)
    unused = {name for name in got if name not in wanted}
    assert all(".unused." in name and ":" in name for name in unused)  # they have states, and no step
    assert_equal({name: got[name] for name in wanted}, wanted)
    engine.close()


def test_evaluation_and_generation_use_the_weights(tmp_path):
    engine = make_engine(tmp_path)
    torch.manual_seed(0)
    model = make_model()
    with torch.no_grad():
        for step in range(2):
            assert torch.equal(loss_of(engine.model, step), loss_of(model, step))
    train(engine, range(1))
    engine.close()


def test_resident_bytes_are_linear_in_the_fraction(tmp_path):
    points = []
    for i in range(3):
        engine = make_engine(tmp_path / str(i), {"host": host_bytes(i), "disk": LARGE})
        held = sum(memory.nbytes for unit in engine.units for memory in unit.memory.values())
        points.append((engine.report()["offloaded"], held + engine.report()["buffers"]))
        train(engine, range(1))
        engine.close()
    (x0, y0), _, (x1, y1) = points
    assert x0 > 0.8 and len({x for x, _ in points}) == 3
    for x, y in points:
        assert y == pytest.approx(y0 + (y1 - y0) * (x - x0) / (x1 - x0), rel=0.02)


def poison(model: nn.Module, name: str):
    """From now on the gradient of this parameter has an infinite value."""

    def spoil(grad):
        grad = grad.clone()
        grad.view(-1)[3] = math.inf
        return grad

    return dict(model.named_parameters())[name].register_hook(spoil)


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped(tmp_path):
    for durable in (False, True):
        engine = make_engine(tmp_path / str(durable), clip_norm=1.0, durable=durable)
        train(engine, range(1))
        before = contents(engine)
        handle = poison(engine.model, "layers.1.feed_forward.experts.down_proj")
        _, (ended,) = train(engine, range(1, 2))
        assert ended.bad == "layers.1.feed_forward.experts.down_proj" and (ended.step, engine.skipped) == (1, 1)
        handle.remove()
        assert_equal(contents(engine), before)
        engine.backward(loss_of(engine.model, 1) * math.nan)
        assert engine.step().bad == "loss" and engine.skipped == 2
        assert_equal(contents(engine), before)
        assert train(engine, range(1, 3))[1][-1].step == 3
        wanted = make_engine(tmp_path / f"{durable}, whole", clip_norm=1.0)
        train(wanted, range(3))
        assert_equal(contents(engine), contents(wanted))


def test_in_one_pass_it_ends_the_run(tmp_path):
    engine = make_engine(tmp_path)
    poison(engine.model, "layers.1.attention.qkv_proj")
    with pytest.raises(FloatingPointError, match="gradient of layers.1.attention.qkv_proj is not finite.*checkpoint"):
        train(engine, range(1))
    for use in (engine.step, engine.flush, lambda: loss_of(engine.model, 0)):
        with pytest.raises(RuntimeError, match="a step did not finish.*start from a checkpoint"):
            use()


def make_experts(count: int = 16) -> nn.Module:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.moe = MoE(16, 32, count, 2, experts=lambda d, f: nn.Sequential(nn.Linear(d, f), nn.Linear(f, d)))

        def forward(self, x):
            out = self.moe(x)
            return (out.y - x.roll(1, 0)).square().mean() + out.aux_loss, out.load_E

    return Model()


def test_groups_of_experts_move_by_use(tmp_path):
    adamw = lambda model: AdamW(model.parameters(), lr=1e-2)
    groups = lambda model: [list(model.moe.experts[i : i + 2]) for i in range(0, 16, 2)]
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    engine = Engine(make_experts, adamw, {"host": 200_000, "disk": LARGE}, tmp_path, units=groups)
    torch.manual_seed(0)
    model = make_experts()
    optimizer = adamw(model)
    tiers = lambda: [engine.plan.tier[unit.name] for unit in engine.units[1:]]
    fast = tiers().count("host")
    assert 0 < fast < 8 and tiers()[:fast] == ["host"] * fast
    use = torch.zeros(8)
    for step in range(4):
        loss, load_E = engine.model(x)
        use += load_E.view(8, 2).sum(1)
        engine.backward(loss)
        engine.step()
        optimizer.zero_grad()
        wanted, _ = model(x)
        wanted.backward()
        optimizer.step()
        assert torch.equal(loss, wanted)
        if step == 1:
            engine.rebalance({engine.units[8].name: 5, engine.units[1].name: -1})
            assert tiers()[7] == "host" and tiers()[0] == "disk" and tiers().count("host") == fast
    engine.rebalance({unit.name: count for unit, count in zip(engine.units[1:], use.tolist())})
    hot = sorted(range(8), key=lambda i: -use[i])[:fast]
    assert {i for i, tier in enumerate(tiers()) if tier == "host"} == set(hot)
    assert_equal(contents(engine), contents_plain(model, optimizer))
    on_disk = {path.name for path in tmp_path.glob("unit-*")}
    assert on_disk == {f"unit-{i + 1:05d}" for i in range(8) if tiers()[i] == "disk"}
    with pytest.raises(ValueError, match="counts must be of .* got 'other'"):
        engine.rebalance({"other": 1})
    engine.close()


def test_bad_arguments_are_named(tmp_path):
    for options, message in [
        ({"accumulation": 0}, "accumulation must be at least 1, got 0"),
        ({"clip_norm": -1.0}, "clip_norm must be at least 0, got -1.0"),
        ({"clip": "late"}, "clip must be exact or previous, got 'late'"),
        ({"optimizer": lambda m: torch.optim.SGD(m.parameters())}, "must return one of fastmoe.optim, got SGD"),
        ({"units": lambda m: []}, "units must give at least one module"),
        ({"units": lambda m: [m.layers[0], m.layers]}, "unit layers must have parameters that no other has"),
        ({"units": lambda m: [nn.Linear(2, 2)]}, "units must be modules of the model, got another Linear"),
        ({"budgets": {"host": 0, "disk": LARGE}}, "short of .* on host"),
        ({"budgets": {"host": host_bytes(0), "disk": 0}}, "short of .* on disk"),
        ({"budgets": {"host": LARGE}, "durable": True}, "budgets must name disk"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_engine(tmp_path / "new", options.pop("budgets", None), **options)
        assert not list(tmp_path.rglob("unit-*"))
    engine = make_engine(tmp_path, accumulation=2)
    with pytest.raises(RuntimeError, match="must come by engine.backward"):
        loss_of(engine.model, 0).backward()
    engine = make_engine(tmp_path / "other", accumulation=2)
    engine.backward(loss_of(engine.model, 0))
    with pytest.raises(ValueError, match="step\\(\\) must follow 2 calls of backward .* got 1"):
        engine.step()
    engine.backward(loss_of(engine.model, 1))
    with pytest.raises(ValueError, match="step\\(\\) must follow 2 calls of backward"):
        engine.backward(loss_of(engine.model, 1))
    engine.step()
    engine.close()
    assert isinstance(engine.model.layers[0].feed_forward.experts, Experts)
