import copy
import re

import pytest
import torch

from fastmoe import ops, testing
from fastmoe.ops.adamw import native
from fastmoe.ops.quantize.reference import decode, join
from fastmoe.testing import SHAPES, draw
from tests.ops.battery import Battery, Case

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs")


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [
    (param, moments, master)
    for param, masters in zip(FLOATS, [(None,), (None, torch.int8, torch.float32), (None, torch.float32)])
    for master in masters
    for moments in (*FLOATS, torch.int8)
]
SCALE = torch.ones(1, dtype=torch.bfloat16)
CODED = {"exp_avgs": [torch.ones(5, dtype=torch.int8)], "exp_avg_sqs": [torch.ones(5, dtype=torch.uint8)]}
RULE = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, grad_scale=0.5)


class Entry:
    """A parameter with gradient and states of one kind; what an update of it must give, in float64."""

    def __init__(self, dtype, moments, master, shape):
        self.kind = dtype, moments, master
        weight, mean, square = (draw(*shape, seed=i, scale=scale) for i, scale in enumerate((1.0, 0.1, 0.1)))
        square = square.square() * (draw(*shape, seed=7) * 3).exp()  # small ones beside large ones
        self.param, self.grad = weight.to(dtype), draw(*shape, dtype=dtype, seed=4, scale=0.1)
        self.master = self.m_scale = self.v_scale = None
        if master == torch.float32:
            self.master = weight.clone()
        elif master == torch.int8:
            self.master = draw(*shape, seed=5, scale=50.0).clamp(-128, 127).to(torch.int8)
        if moments == torch.int8:
            self.m, self.m_scale = ops.quantize(mean)
            self.v, self.v_scale = ops.quantize(square.sqrt(), signed=False)
        else:
            self.m, self.v = mean.to(moments), (square.sqrt() if moments == torch.float16 else square).to(moments)

    NAMES = ("param", "grad", "m", "v", "m_scale", "v_scale", "master")

    def map(self, change):
        other = copy.copy(self)
        for name in self.NAMES:
            if getattr(self, name) is not None:
                setattr(other, name, change(getattr(self, name)))
        return other

    def copy(self):
        return self.map(torch.clone)

    def rows(self, first, past):
        return self.map(lambda tensor: tensor[first:past].clone())

    def equal(self, other):
        for name in self.NAMES:
            if getattr(self, name) is not None:
                testing.assert_bit_equal(getattr(self, name), getattr(other, name), name)

    def decoded(self):
        """Weight, m and what is kept of v, as float64."""
        weight, m, v = self.param, self.m, self.v
        if self.master is not None:
            weight = join(self.param, self.master) if self.master.dtype == torch.int8 else self.master
        if m.dtype == torch.int8:
            m, v = decode(m, self.m_scale, torch.float64), decode(v, self.v_scale, torch.float64)
        return weight.double(), m.double(), v.double()

    def exact(self, step=3, rule=RULE):
        """Weight, m, what is kept of v and the update."""
        weight, m, v = self.decoded()
        rooted = self.m.dtype in (torch.float16, torch.int8)
        g = self.grad.double() * rule["grad_scale"]
        m = rule["beta1"] * m + (1 - rule["beta1"]) * g
        v = rule["beta2"] * (v * v if rooted else v) + (1 - rule["beta2"]) * g * g
        unbiased = m / (1 - rule["beta1"] ** step), v / (1 - rule["beta2"] ** step)
        update = rule["lr"] * unbiased[0] / (unbiased[1].sqrt() + rule["eps"])
        return weight * (1 - rule["lr"] * rule["weight_decay"]) - update, m, v.sqrt() if rooted else v, update

    def deviations(self, after, step=3):
        """(got - exact) / the step of the code it is rounded to, of weight, m and v."""
        weight, m, v, _ = self.exact(step)
        got = after.decoded()
        result = {}
        dtypes = None, self.m.dtype, self.v.dtype
        for name, x, y, dtype in zip(("weight", "m", "v"), (weight, m, v), got, dtypes):
            if name == "weight":
                result[name] = (y - x) / self.weight_step()
            elif dtype in (torch.int8, torch.uint8):
                scale, codes = (after.m_scale, after.m) if name == "m" else (after.v_scale, after.v)
                wide = scale.double().repeat_interleave(32, -1)[..., : x.shape[-1]]
                result[name] = codes.double().abs() - (127 if name == "m" else 255) * (x.abs() / wide).sqrt()
            else:
                least, bits = {torch.float16: (2.0**-14, 10), torch.bfloat16: (0, 7), torch.float32: (0, 23)}[dtype]
                result[name] = (y - x) / 2.0 ** (x.abs().clamp(min=least).log2().floor() - bits)
        return result

    def weight_step(self):
        """The distance between the numbers that a weight is rounded to."""
        dtype, weight = (self.param if self.master is None else self.master).dtype, self.exact()[0]
        bits = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10, torch.int8: 15}[dtype]
        return 2.0 ** (weight.abs().clamp(min=2.0**-14).log2().floor() - bits)

    def fast_error(self):
        """What the update may be off by."""
        return (1e-6 + (0 if self.m.dtype == torch.float32 else 1.3e-4)) * self.exact()[3].abs()

    def check(self, after, step=3):
        _, m, _, _ = self.exact(step)
        for name, deviation in self.deviations(after, step).items():
            # a step of the code, or some steps of float32; reciprocals of 14 bits in the update; codes are at least 1
            dtype = (self.master if self.master is not None else self.param).dtype if name == "weight" else self.m.dtype
            allowed = torch.full_like(deviation, 8.0 if dtype == torch.float32 else 1.01)
            if dtype == torch.float32:
                allowed += 8 * RULE["grad_scale"] * self.grad.double().abs() / m.abs() if name == "m" else 0
            if name == "weight":
                allowed += self.fast_error() / self.weight_step()
            assert bool((deviation.abs() <= allowed).all()), (name, (deviation.abs() - allowed).max())
        if self.master is not None and self.master.dtype == torch.float32:
            assert torch.equal(after.param, after.master.to(self.param.dtype))
        if self.m.dtype == torch.int8:
            for scale, x in ((after.m_scale, m), (after.v_scale, self.exact(step)[2])):
                most = torch.nn.functional.pad(x.abs(), (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32)).amax(-1)
                assert bool((scale.double() >= most * (1 - 1e-6)).all())
                assert bool((scale.double() <= most * (1 + 2.0**-7 + 1e-6)).all())


def run(entries, **options):
    of = lambda name: [getattr(entry, name) for entry in entries]
    ops.adamw_step(
        of("param"),
        of("grad"),
        of("m"),
        of("v"),
        **dict(steps=3) | RULE | options,
        exp_avg_scales=of("m_scale"),
        exp_avg_sq_scales=of("v_scale"),
        masters=of("master"),
    )


def state(dtype, sizes):
    """params, grads, exp_avgs, exp_avg_sqs as one dict: names like params0."""
    tensors = {}
    for i, size in enumerate(sizes):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors |= {
            f"params{i}": draw(*size, dtype=dtype, seed=i),
            f"grads{i}": draw(*size, dtype=dtype, seed=i + 50, scale=0.1),
            f"exp_avgs{i}": draw(*size, dtype=wide, seed=i + 100, scale=0.1),
            f"exp_avg_sqs{i}": draw(*size, dtype=wide, seed=i + 150, scale=0.1).square(),
        }
    return tensors


def step(tensors, count, **options):
    """adamw_step on copies; returns the new params, exp_avgs and exp_avg_sqs."""
    lists = {name: [tensors[f"{name}{i}"] for i in range(count)] for name in LISTS}
    lists = {
        name: values if name == "grads" else [v.clone(memory_format=torch.contiguous_format) for v in values]
        for name, values in lists.items()
    }
    settings = dict(steps=3, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1) | options
    ops.adamw_step(*lists.values(), **settings)
    return [*lists["params"], *lists["exp_avgs"], *lists["exp_avg_sqs"]]


def adamw_case(name, sizes, thorough=False, parallel=False, **options):
    frozen = tuple(f"{kind}{i}" for kind in LISTS for i in range(len(sizes)))
    return Case(
        name, lambda x: step(x, len(sizes), **options), lambda dtype: state(dtype, sizes), frozen, thorough, parallel
    )


class TestAdamW(Battery):
    family = "adamw"
    cases = [
        adamw_case(size, [(s.E, s.D, s.F), (s.D,)], thorough=size == "odd", parallel=size == "tiny")
        for size, s in SHAPES.items()
    ] + [
        adamw_case("first_step", [(65,)], steps=1),
        adamw_case("late_step", [(65,)], steps=100_000),
        adamw_case("clipped", [(65,)], grad_scale=0.125),
        adamw_case("no_decay", [(65,)], weight_decay=0.0),
        adamw_case("no_tensors", []),
        adamw_case("scalar", [()]),
        adamw_case("many", [(i % 7, 3) for i in range(60)], parallel=True),
    ]

    def test_matches_torch(self, backend):
        param = draw(300).requires_grad_()
        twin = param.detach().double().requires_grad_()
        optimizer = torch.optim.AdamW([twin], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        m, v = torch.zeros(300), torch.zeros(300)
        with self.on(backend):
            for i in range(1, 6):
                grad = draw(300, seed=i)
                twin.grad = grad.double()
                optimizer.step()
                ops.adamw_step([param.detach()], [grad], [m], [v], i, 1e-2, 0.9, 0.95, 1e-8, 0.1)
        torch.testing.assert_close(param.double(), twin, rtol=1e-6, atol=1e-6)

    def test_storage_types_may_mix_in_one_call(self, backend):
        tensors = {}
        for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float32)):
            tensors |= {f"{name[:-1]}{i}": tensor for name, tensor in state(dtype, [(33,)]).items()}
        with self.on(backend):
            together = step(tensors, 4)
            alone = [step({f"{name}0": tensors[f"{name}{i}"] for name in LISTS}, 1) for i in range(4)]
        for i in range(4):
            assert all(torch.equal(together[i + 4 * part], alone[i][part]) for part in range(3))

    def test_zero_gradient_and_state_only_decay(self, backend):
        zeros = [torch.zeros(10)]
        param = torch.ones(10)
        with self.on(backend):
            ops.adamw_step([param], [torch.zeros(10)], zeros, [torch.zeros(10)], 1, 0.1, 0.9, 0.95, 1e-8, 0.5)
        torch.testing.assert_close(param, torch.full((10,), 0.95))

    def test_an_update_counts_as_in_place(self, backend):
        """Autograd must notice that a tensor it saved has changed."""
        param = draw(8).requires_grad_()
        loss = param.square().sum()
        with self.on(backend), torch.no_grad():
            ops.adamw_step([param], [torch.ones(8)], [torch.zeros(8)], [torch.zeros(8)], 1, 0.1, 0.9, 0.95, 1e-8, 0.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_the_registered_op_equals_the_direct_call(self, backend):
        tensors = state(torch.float32, [(33,), (4, 5)])
        lists = [[tensors[f"{name}{i}"].clone() for i in range(2)] for name in LISTS]
        with self.on(backend):
            torch.ops.fastmoe.adamw_step(*registered(lists))
            want = step(tensors, 2)
        assert all(torch.equal(a, b) for a, b in zip(lists[0] + lists[2] + lists[3], want))

    def test_opcheck(self, case, backend):  # the public door calls the binding itself, so no operator can be recorded
        tensors, count = case.make(torch.float32), sum(name.startswith("params") for name in case.make(torch.float32))
        lists = [[tensors[f"{name}{i}"] for i in range(count)] for name in LISTS]
        with self.on(backend):
            torch.library.opcheck(torch.ops.fastmoe.adamw_step.default, registered(lists))

    @pytest.mark.parametrize("shape", [(5, 32), (7, 45), (3, 3), (2, 3, 1), (2, 700), (1, 16500)], ids=str)
    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_states_are_within_a_step_of_exact(self, backend, kind, shape):
        before = Entry(*kind, shape)
        after = before.copy()
        with self.on(backend):
            run([after], keys=[5])
        before.check(after)

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_rounding_has_no_bias(self, backend, kind):
        """Over keys; within 4 standard errors, the error of the quick update and the 1/512 that 8 bits cannot tell."""
        before, count = Entry(*kind, (8, 40)), 200 if backend == "native" else 50
        entries = [before.copy() for _ in range(count)]
        with self.on(backend):
            run(entries, keys=[1000 + i for i in range(count)])
        deviations = [before.deviations(entry) for entry in entries]
        weight = before.param if before.master is None else before.master
        drawn = {"weight": weight.dtype, "m": before.m.dtype, "v": before.v.dtype}
        for name in [name for name, dtype in drawn.items() if dtype != torch.float32]:
            mean = torch.stack([d[name] for d in deviations]).mean().item()
            allowed = 4 * 0.5 / (count * 320) ** 0.5 + 1 / 512
            if name == "weight":
                allowed += (before.fast_error() / before.weight_step()).mean().item()
            assert abs(mean) < allowed, (name, mean)
            assert torch.stack([d[name] for d in deviations]).std(0).mean() > 0.2, "keys change the draws"

    @pytest.mark.parametrize("threads", [1, 2, 3])
    def test_all_kinds_in_one_call_at_any_thread_count(self, backend, threads):
        shapes = [(33, 45), (3, 17000), (40, 1000)] if backend == "native" else [(33, 45), (3, 700)]
        entries = [Entry(*kind, shape) for shape in shapes for kind in KINDS]
        alone = [entry.copy() for entry in entries]
        numbers = [dict(steps=1 + i, key=i, first_row=i, decay=1 - 1e-3 * i) for i in range(len(entries))]
        with self.on(backend), testing.threads(threads):
            run(
                entries,
                steps=[n["steps"] for n in numbers],
                keys=[n["key"] for n in numbers],
                first_rows=[n["first_row"] for n in numbers],
                decays=[n["decay"] for n in numbers],
            )
        with self.on(backend), testing.threads(1):
            for entry, n in zip(alone, numbers):
                run([entry], steps=n["steps"], keys=[n["key"]], first_rows=[n["first_row"]], decays=[n["decay"]])
        for got, want in zip(entries, alone):
            got.equal(want)

    @pytest.mark.parametrize("kind", KINDS, ids=str)
    def test_a_part_is_updated_as_in_the_whole(self, backend, kind):
        whole = Entry(*kind, (4, 5, 70))
        first, second = whole.rows(0, 1), whole.rows(1, 4)
        with self.on(backend):
            run([whole], keys=[9])
            run([second, first], keys=[9, 9], first_rows=[5, 0])
        whole.rows(0, 1).equal(first)
        whole.rows(1, 4).equal(second)

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[1] == torch.int8], ids=str)
    def test_a_gradient_that_is_not_finite_spoils_its_block_alone(self, backend, kind):
        entry = Entry(*kind, (2, 70))
        entry.grad[0, 40], entry.grad[1, 3] = torch.nan, torch.inf
        with self.on(backend):
            run([entry])
        for scale in (entry.m_scale, entry.v_scale):
            assert scale.isnan().tolist() == [[False, True, False], [True, False, False]]
        assert entry.param.isfinite().sum() == 2 * 70 - 2

    def test_zero_blocks_stay_zero(self, backend):
        entry = Entry(torch.bfloat16, torch.int8, None, (3, 50))
        for tensor in (entry.grad, entry.m, entry.v):
            tensor.zero_()
        with self.on(backend):
            run([entry])
        assert not any(tensor.any() for tensor in (entry.m, entry.v, entry.m_scale, entry.v_scale))


def registered(lists):
    """The arguments of torch.ops.fastmoe.adamw_step for float32 moments."""
    count = len(lists[0])
    absent = [[torch.empty(0)] * count for _ in range(3)]
    numbers = [3] * count, [0] * count, [0] * count, [1 - 1e-3] * count
    return (*lists, *absent, *numbers, 1e-2, 0.9, 0.95, 1e-8, 1.0)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        *[
            (ValueError, f"{name} must be a list of 1 like params, got {n}", {name: [draw(5)] * n})
            for name in LISTS[1:]
            for n in (0, 2)
        ],
        (ValueError, "keys must be a list of 1 like params, got 2", {"keys": [1, 2]}),
        (ValueError, "grads[0] must be of shape [5]", {"grads": [draw(6)]}),
        (ValueError, "exp_avgs[0] must be of shape [5]", {"exp_avgs": [draw(6)]}),
        (ValueError, "exp_avg_sqs[0] must be on cpu, got meta", {"exp_avg_sqs": [draw(5).to("meta")]}),
        (TypeError, "grads[0] must be float32, got torch.bfloat16", {"grads": [draw(5).bfloat16()]}),
        (TypeError, "exp_avgs[0] must be float32 or bfloat16 or", {"exp_avgs": [draw(5).double()]}),
        (TypeError, "exp_avg_sqs[0] must be bfloat16, got torch.float32", {"exp_avgs": [draw(5).bfloat16()]}),
        (TypeError, "exp_avg_sqs[0] must be uint8, got torch.float32", {"exp_avgs": [draw(5).to(torch.int8)]}),
        (TypeError, "exp_avg_scales[0] must be a torch.Tensor, got NoneType", CODED),
        (
            ValueError,
            "exp_avg_sq_scales[0] must be of shape [1], got [2]",
            CODED | {"exp_avg_scales": [SCALE], "exp_avg_sq_scales": [torch.cat([SCALE, SCALE])]},
        ),
        (ValueError, "exp_avg_scales[0] must be None for torch.float32 moments", {"exp_avg_scales": [SCALE]}),
        (ValueError, "masters[0] must be None for a torch.float32 param", {"masters": [draw(5)]}),
        (TypeError, "params[0] must be", {"params": [torch.ones(5, dtype=torch.int64)]}),
        (TypeError, "params[0] must be a torch.Tensor, got list", {"params": [[1.0]]}),
        (ValueError, "params[0] must be contiguous", {"params": [draw(10)[::2]]}),
        (ValueError, "exp_avgs[0] must be contiguous", {"exp_avgs": [draw(10)[::2]]}),
        (ValueError, "steps[0] must be at least 1, got 0", {"steps": 0}),
    ],
)
def test_bad_input(error, message, changes):
    lists = {name: [draw(5)] for name in LISTS} | {"steps": 1} | changes
    with pytest.raises(error, match=re.escape("fastmoe.adamw_step: " + message)):
        ops.adamw_step(**lists, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def test_moments_of_a_scalar_cannot_be_codes():
    codes = {"exp_avgs": [torch.tensor(1, dtype=torch.int8)], "exp_avg_sqs": [torch.tensor(1, dtype=torch.uint8)]}
    with pytest.raises(TypeError, match=re.escape("exp_avgs[0] must be float32 for a param without dimensions")):
        ops.adamw_step([draw()], [draw()], **codes, steps=1, lr=1.0, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0)


def test_the_binding_refuses_what_the_checks_would():
    """The operator called past the public door."""
    if "native" not in testing.backends("adamw"):
        pytest.skip("the extension is not built")
    lists = [[draw(5)] for _ in LISTS]
    args = list(registered(lists))
    for place, error, value in (
        (7, ValueError, [0]),
        (0, ValueError, [draw(10)[::2]]),
        (0, KeyError, [draw(5).double()]),
    ):
        changed = [*args[:place], value, *args[place + 1 :]]
        with testing.backend("adamw=native"), pytest.raises(error):
            native.adamw_step(*changed)


def test_backends_agree_on_a_large_list():
    sizes = [(1000,)] * 3 + [(7, 11)] * 5
    tensors = state(torch.float32, sizes)
    results = []
    for backend in testing.backends("adamw"):
        with testing.backend(f"adamw={backend}"):
            results.append(step(tensors, len(sizes)))
    for result in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(result, results[0]))
