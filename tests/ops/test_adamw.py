import re

import pytest
import torch

from fastmoe import ops, testing
from fastmoe.testing import SHAPES, draw
from tests.ops.battery import Battery, Case

LISTS = ("params", "grads", "exp_avgs", "exp_avg_sqs")


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
    settings = dict(step=3, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1) | options
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
        adamw_case("first_step", [(65,)], step=1),
        adamw_case("late_step", [(65,)], step=100_000),
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
        settings = (3, 1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0)
        lists = [[tensors[f"{name}{i}"].clone() for i in range(2)] for name in LISTS]
        with self.on(backend):
            torch.ops.fastmoe.adamw_step(*lists, *settings)
            want = step(tensors, 2)
        assert all(torch.equal(a, b) for a, b in zip(lists[0] + lists[2] + lists[3], want))

    def test_opcheck(self, case, backend):  # the public door calls the binding itself, so no operator can be recorded
        tensors, count = case.make(torch.float32), sum(name.startswith("params") for name in case.make(torch.float32))
        lists = [[tensors[f"{name}{i}"] for i in range(count)] for name in LISTS]
        with self.on(backend):
            torch.library.opcheck(torch.ops.fastmoe.adamw_step.default, (*lists, 3, 1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0))


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        *[
            (ValueError, f"{name} must be a list of 1 tensors like params, got {n}", {name: [draw(5)] * n})
            for name in LISTS[1:]
            for n in (0, 2)
        ],
        (ValueError, "grads[0] must be of shape [5]", {"grads": [draw(6)]}),
        (ValueError, "exp_avgs[0] must be of shape [5]", {"exp_avgs": [draw(6)]}),
        (ValueError, "exp_avg_sqs[0] must be on cpu, got meta", {"exp_avg_sqs": [draw(5).to("meta")]}),
        (TypeError, "grads[0] must be float32, got torch.bfloat16", {"grads": [draw(5).bfloat16()]}),
        (TypeError, "exp_avgs[0] must be float32, got torch.float64", {"exp_avgs": [draw(5).double()]}),
        (TypeError, "params[0] must be", {"params": [torch.ones(5, dtype=torch.int64)]}),
        (ValueError, "params[0] must be contiguous", {"params": [draw(10)[::2]]}),
        (ValueError, "step must be at least 1, got 0", {"step": 0}),
    ],
)
def test_bad_input(error, message, changes):
    lists = {name: [draw(5)] for name in LISTS} | {"step": 1} | changes
    with pytest.raises(error, match=re.escape("fastmoe.adamw_step: " + message)):
        ops.adamw_step(**lists, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


def test_backends_agree_on_a_large_list():
    sizes = [(1000,)] * 3 + [(7, 11)] * 5
    tensors = state(torch.float32, sizes)
    results = []
    for backend in testing.backends("adamw"):
        with testing.backend(f"adamw={backend}"):
            results.append(step(tensors, len(sizes)))
    for result in results[1:]:
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(result, results[0]))
