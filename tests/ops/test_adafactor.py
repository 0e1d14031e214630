import math
import re

import pytest
import torch

from fastmoe import ops, testing
from fastmoe.ops.quantize.reference import join
from fastmoe.testing import SHAPES, draw
from tests.ops.battery import Battery, Case

LISTS = ("params", "grads", "rows", "columns", "squares")
RULE = dict(steps=3, lr=None, decay_rate=0.8, eps=(1e-30, 1e-3), clip_threshold=1.0, weight_decay=0.1, grad_scale=1.0)


def state(dtype, sizes, master=None):
    """The lists' tensors as one dict: names like params0; of a vector there are no rows0."""
    tensors = {}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    positive = lambda size, seed: draw(*size, dtype=wide, seed=seed, scale=0.1).square()
    for i, size in enumerate(sizes):
        tensors |= {
            f"params{i}": draw(*size, dtype=dtype, seed=i),
            f"grads{i}": draw(*size, dtype=dtype, seed=i + 50, scale=0.1),
        }
        if len(size) < 2:
            tensors[f"squares{i}"] = positive(size, i + 100)
        else:
            tensors |= {
                f"rows{i}": positive(size[:-1], i + 100),
                f"columns{i}": positive(size[:-2] + size[-1:], i + 150),
            }
        if master == "fp32":
            tensors[f"masters{i}"] = tensors[f"params{i}"].to(wide) + draw(*size, dtype=wide, seed=i, scale=1e-3)
        elif master:
            tensors[f"masters{i}"] = draw(*size, seed=i, scale=40).clamp(-128, 127).to(torch.int8)
    return tensors


def step(tensors, count, **options):
    """adafactor_step on copies; returns what it changed."""
    lists = {name: [tensors.get(f"{name}{i}") for i in range(count)] for name in (*LISTS, "masters")}
    lists = {
        name: values
        if name == "grads"
        else [v if v is None else v.clone(memory_format=torch.contiguous_format) for v in values]
        for name, values in lists.items()
    }
    ops.adafactor_step(**lists, **(RULE | options))
    return [v for name, values in lists.items() if name != "grads" for v in values if v is not None]


def adafactor_case(name, sizes, thorough=False, parallel=False, **options):
    names = tuple(state(torch.float32, sizes))
    options.setdefault("lr", 1e-2)
    return Case(
        name, lambda x: step(x, len(sizes), **options), lambda dtype: state(dtype, sizes), names, thorough, parallel
    )


def formula(x, g, row, column, square, t, lr, d, decay, scale):
    """One matrix or vector by the paper, float64: the weights after the step."""
    x, g = x.double(), g.double() * scale
    beta, squared = 1 - t**-0.8, g * g + 1e-30
    if square is not None:
        v = beta * square.double() + (1 - beta) * squared
    else:
        r = beta * row.double() + (1 - beta) * squared.mean(1)
        c = beta * column.double() + (1 - beta) * squared.mean(0)
        v = torch.outer(r, c) / r.mean()
    rms = lambda t: math.sqrt(t.square().mean().item())
    u = g / v.sqrt()
    u = u / max(1.0, rms(u) / d)
    rate = lr if lr is not None else max(1e-3, rms(x)) * min(1e-2, t**-0.5)
    return x - rate * (u + decay * x)


BACKENDS = [name for name in testing.backends("adafactor") if name in ("native", "reference")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lr", [None, 3e-2])
@pytest.mark.parametrize(
    "size", [(7, 33), (130, 70), (600, 500), (3, 2, 9, 20), (50,), (300_000,), (), (1, 1)], ids=str
)
def test_equals_the_formula(backend, lr, size):
    tensors = state(torch.float32, [size])
    for t, d, scale, weights in ((1, 1.0, 1.0, 1.0), (5, 0.3, 0.5, 1e-4), (20_000, 1.0, 1.0, 1e-2)):
        tensors["params0"] = draw(*size, scale=weights)
        options = dict(steps=t, lr=lr, clip_threshold=d, weight_decay=0.2, grad_scale=scale)
        with testing.backend(f"adafactor={backend}"):
            got = step(tensors, 1, **options)[0]
        if len(size) < 2:
            want = formula(tensors["params0"], tensors["grads0"], None, None, tensors["squares0"], t, lr, d, 0.2, scale)
        else:
            units = tensors["params0"].view(-1, *size[-2:]), tensors["grads0"].view(-1, *size[-2:])
            factors = tensors["rows0"].view(-1, size[-2]), tensors["columns0"].view(-1, size[-1])
            parts = [formula(*unit, None, t, lr, d, 0.2, scale) for unit in zip(*units, *factors)]
            want = torch.stack(parts).view(size)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", testing.DTYPES, ids=str)
def test_a_stack_is_so_many_matrices(backend, dtype):
    tensors = state(dtype, [(3, 2, 7, 21)])
    parts = {}
    for name, tensor in tensors.items():
        tail = 1 if name in ("rows0", "columns0") else 2
        for i, part in enumerate(tensor.reshape(-1, *tensor.shape[-tail:])):
            parts[name[:-1] + str(i)] = part
    options = {"lr": None, "weight_decay": 0.1}
    with testing.backend(f"adafactor={backend}"):
        whole = step(tensors, 1, keys=[5], **options)
        alone = step(parts, 6, keys=[5] * 6, first_rows=[7 * i for i in range(6)], **options)
    for i, tensor in enumerate(whole):
        pieces = torch.stack(alone[6 * i : 6 * i + 6]).view(tensor.shape)
        if backend == "native":
            testing.assert_bit_equal(tensor, pieces)
        else:
            torch.testing.assert_close(tensor, pieces, rtol=1e-2 if dtype != torch.float32 else 1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "master"), [(torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, "residual8")]
)
def test_rounding_is_between_neighbours_and_unbiased(backend, dtype, master):
    size, keys = (16, 37), range(400)
    tensors = state(dtype, [size], master)
    tensors["params0"][0, :12] = torch.logspace(-7.5, -1, 12).to(dtype) * torch.tensor(
        [1.0, -1.0] * 6
    )  # subnormal, too
    weight = tensors["params0"].float() if not master else join(tensors["params0"], tensors["masters0"])
    options = dict(lr=1e-5, steps=4, weight_decay=0.0)
    sub = {name: tensor for name, tensor in tensors.items() if not name.startswith("masters")}
    exact = step({name: t.double() for name, t in sub.items()} | {"params0": weight.double()}, 1, **options)[0]
    unit = 2.0 ** torch.floor(torch.log2(exact.abs().clamp(min=2.0**-14 if dtype == torch.float16 else 1e-30)))
    unit *= 2.0**-15 if master else torch.finfo(dtype).eps
    total = torch.zeros(size, dtype=torch.float64)
    with testing.backend(f"adafactor={backend}"):
        for key in keys:
            out = step(tensors, 1, keys=[key], **options)
            got = (join(out[0], out[-1]) if master else out[0]).double()
            assert bool(((got - exact).abs() <= 1.01 * unit).all())
            total += (got - exact) / unit
    mean = total / len(keys)
    assert (
        mean.abs().max() < 5 * 0.5 / len(keys) ** 0.5
        and mean.mean().abs() < 4 * 0.5 / (len(keys) * mean.numel()) ** 0.5
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float_master_is_the_weight(backend, dtype):
    tensors = state(dtype, [(9, 20), (33,)], "fp32")
    as_float = {n: t.float() for n, t in tensors.items() if not n.startswith("masters")}
    as_float |= {f"params{i}": tensors[f"masters{i}"] for i in range(2)}
    with testing.backend(f"adafactor={backend}"):
        got, want = step(tensors, 2), step(as_float, 2)
    for i in range(2):
        testing.assert_bit_equal(got[-2 + i], want[i])
        testing.assert_bit_equal(got[i], want[i].to(dtype))


class TestAdafactor(Battery):
    family = "adafactor"
    cases = [
        adafactor_case(size, [(s.E, s.D, s.F), (s.D,)], thorough=size == "odd", parallel=size == "tiny")
        for size, s in SHAPES.items()
    ] + [
        adafactor_case("relative", [(6, 65), (65,)], lr=None, parallel=True),
        adafactor_case("first_step", [(65, 4)], steps=1),
        adafactor_case("scaled_gradient", [(65, 4)], grad_scale=0.125),
        adafactor_case("no_tensors", []),
        adafactor_case("scalar", [()]),
        adafactor_case("shared_by_the_team", [(700, 401)], parallel=True),
        adafactor_case("many", [(i % 7, 3) for i in range(60)], parallel=True),
    ]

    def test_an_update_counts_as_in_place(self, backend):
        """Autograd must notice that a tensor it saved has changed."""
        param = draw(2, 8).requires_grad_()
        loss = param.square().sum()
        with self.on(backend), torch.no_grad():
            ops.adafactor_step([param], [torch.ones(2, 8)], [torch.zeros(2)], [torch.zeros(8)], [None], 1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_opcheck(self, case, backend):  # the public door calls the binding itself, so no operator can be recorded
        tensors, count = case.make(torch.float32), sum(name.startswith("params") for name in case.make(torch.float32))
        lists = [[tensors.get(f"{name}{i}", torch.empty(0)) for i in range(count)] for name in (*LISTS, "masters")]
        numbers = [[3] * count, [0] * count, [0] * count]
        with self.on(backend):
            args = (*lists, *numbers, 1e-2, 0.8, 1e-30, 1e-3, 1.0, 0.1, 1.0)
            torch.library.opcheck(torch.ops.fastmoe.adafactor_step.default, args)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        *[
            (ValueError, f"{name} must be a list of 1 like params, got 2", {name: [draw(5)] * 2})
            for name in (*LISTS[1:], "masters")
        ],
        (ValueError, "steps must be a list of 1 like params, got 2", {"steps": [1, 2]}),
        (ValueError, "grads[0] must be of shape [5, 4]", {"grads": [draw(5, 5)]}),
        (TypeError, "grads[0] must be float32", {"grads": [draw(5, 4).half()]}),
        (ValueError, "rows[0] must be of shape [5]", {"rows": [draw(4)]}),
        (ValueError, "columns[0] must be of shape [4]", {"columns": [draw(5)]}),
        (TypeError, "columns[0] must be a torch.Tensor, got NoneType", {"columns": [None]}),
        (TypeError, "rows[0] must be float32", {"rows": [draw(5).bfloat16()]}),
        (ValueError, "squares[0] must be None for 2 dimensions", {"squares": [draw(5, 4)]}),
        (ValueError, "masters[0] must be None for a torch.float32 param", {"masters": [draw(5, 4)]}),
        (ValueError, "params[0] must be contiguous", {"params": [draw(4, 5).t()]}),
        (ValueError, "steps[0] must be at least 1, got 0", {"steps": 0}),
        (ValueError, "clip_threshold must be positive, got 0.0", {"clip_threshold": 0.0}),
        (ValueError, "eps must be positive, got (0.0, 0.001)", {"eps": (0.0, 1e-3)}),
    ],
)
def test_bad_input(error, message, changes):
    lists = dict(params=[draw(5, 4)], grads=[draw(5, 4)], rows=[draw(5)], columns=[draw(4)], squares=[None], steps=1)
    with pytest.raises(error, match=re.escape("fastmoe.adafactor_step: " + message)):
        ops.adafactor_step(**(lists | changes))
