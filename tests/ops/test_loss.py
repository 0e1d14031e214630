import re

import pytest
import torch

from fastmoe import ops, testing
from fastmoe.testing import SHAPES, Shape, draw
from tests.ops.battery import Battery, Case


def targets(shape, ignored=0):
    targets_T = torch.randint(0, shape.V, (shape.T,), generator=testing.generator(3))
    targets_T[:ignored] = -100
    return targets_T


def loss_case(name, shape, ignored=0, reduction="mean", thorough=False, parallel=False, index=torch.int64):
    def make(dtype):
        return {
            "x_TD": draw(shape.T, shape.D, dtype=dtype),
            "weight_VD": draw(shape.V, shape.D, dtype=dtype, scale=0.3, seed=1),
            "targets_T": targets(shape, ignored).to(index),
        }

    return Case(
        name,
        lambda x: ops.linear_cross_entropy(x["x_TD"], x["weight_VD"], x["targets_T"], reduction=reduction),
        make,
        thorough=thorough,
        parallel=parallel,
    )


class TestLoss(Battery):
    family = "loss"
    odd = SHAPES["odd"]
    cases = [loss_case(size, shape) for size, shape in SHAPES.items()] + [
        loss_case("some_ignored", odd, 9, thorough=True),
        loss_case("all_ignored", odd, odd.T),
        loss_case("sum", odd, 9, "sum", thorough=True),
        loss_case("int32_targets", odd, index=torch.int32),
        loss_case("several_chunks", Shape(1500, 40, 1, 1, 1, 70), parallel=True),
    ]

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    def test_matches_torch(self, backend, reduction):
        x_TD, weight_VD, targets_T = (
            draw(50, 24).requires_grad_(),
            draw(17, 24, seed=1).requires_grad_(),
            torch.arange(50) % 17,
        )
        targets_T[::7] = -100
        x64, weight64 = (t.detach().double().requires_grad_() for t in (x_TD, weight_VD))
        with self.on(backend):
            loss = ops.linear_cross_entropy(x_TD, weight_VD, targets_T, reduction=reduction)
            (3 * loss).backward()
        want = torch.nn.functional.cross_entropy(x64 @ weight64.t(), targets_T, reduction=reduction)
        (3 * want).backward()
        for got, exact in ((loss, want), (x_TD.grad, x64.grad), (weight_VD.grad, weight64.grad)):
            torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)

    def test_ignore_index_of_ones_own(self, backend):
        x_TD, weight_VD, targets_T = draw(6, 4), draw(5, 4, seed=1), torch.tensor([0, 3, 1, 3, 4, 2])
        with self.on(backend):
            got = ops.linear_cross_entropy(x_TD, weight_VD, targets_T, ignore_index=3)
        want = torch.nn.functional.cross_entropy(x_TD @ weight_VD.t(), targets_T, ignore_index=3)
        torch.testing.assert_close(got, want)

    def test_large_logits_do_not_overflow(self, backend):
        x_TD = torch.full((3, 8), 100.0, requires_grad=True)
        with self.on(backend):
            loss = ops.linear_cross_entropy(x_TD, draw(9, 8), torch.tensor([0, 4, 8]))
            loss.backward()
        assert loss.isfinite() and x_TD.grad.isfinite().all()

    @pytest.mark.parametrize("bad", [17, -1, -101, 2**31])
    def test_refuses_targets_outside_the_vocabulary(self, backend, bad):
        targets_T = torch.zeros(40, dtype=torch.int64)
        targets_T[23] = bad
        message = rf"fastmoe\.linear_cross_entropy: targets_T must be in 0\.\.16 or -100, got {bad}"
        with self.on(backend), pytest.raises(ValueError, match=message):
            ops.linear_cross_entropy(draw(40, 4), draw(17, 4), targets_T)

    def test_autocast_lowers_the_matrices_and_keeps_the_loss_wide(self, backend):
        x_TD, weight_VD, targets_T = (
            draw(9, 8).requires_grad_(),
            draw(7, 8, seed=1).requires_grad_(),
            torch.arange(9) % 7,
        )
        with self.on(backend):
            want = ops.linear_cross_entropy(x_TD.bfloat16(), weight_VD.bfloat16(), targets_T)
            with torch.autocast("cpu", torch.bfloat16):
                got = ops.linear_cross_entropy(x_TD, weight_VD, targets_T)
                mixed = ops.linear_cross_entropy(x_TD.bfloat16(), weight_VD, targets_T)
            got.backward()
        assert got.dtype == torch.float32 and torch.equal(got, want) and torch.equal(mixed, want)
        assert x_TD.grad.dtype == weight_VD.grad.dtype == torch.float32

    @pytest.mark.parametrize(("need_x", "need_weight"), [(True, False), (False, True), (False, False)])
    def test_frozen_inputs_cost_no_gradient(self, backend, need_x, need_weight):
        x_TD, weight_VD = draw(9, 8).requires_grad_(need_x), draw(7, 8, seed=1).requires_grad_(need_weight)
        with self.on(backend), testing.Recorder() as recorder:
            ops.linear_cross_entropy(x_TD, weight_VD, torch.arange(9) % 7)
        ((_, _, (_, dx_TD, dweight_VD)),) = recorder.calls
        assert list(dx_TD.shape) == ([9, 8] if need_x else [0]) and list(dweight_VD.shape) == (
            [7, 8] if need_weight else [0]
        )

    def test_no_grad_saves_nothing(self, backend):
        with self.on(backend), testing.Recorder() as recorder, torch.no_grad():
            ops.linear_cross_entropy(draw(9, 8).requires_grad_(), draw(7, 8).requires_grad_(), torch.arange(9) % 7)
        ((_, _, (_, dx_TD, dweight_VD)),) = recorder.calls
        assert dx_TD.numel() == dweight_VD.numel() == 0


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "x_TD must be of shape [T, D] = [any, any], got [4]", {"x_TD": draw(4)}),
        (ValueError, "weight_VD must be of shape [V, D] = [any, 8]", {"weight_VD": draw(7, 9)}),
        (ValueError, "targets_T must be of shape [T] = [9]", {"targets_T": torch.zeros(8, dtype=torch.int64)}),
        (ValueError, "V must be at least 1", {"weight_VD": draw(0, 8)}),
        (ValueError, "D must be at least 1", {"x_TD": draw(9, 0), "weight_VD": draw(7, 0)}),
        (ValueError, "weight_VD must be on cpu, got meta", {"weight_VD": draw(7, 8).to("meta")}),
        (
            ValueError,
            "targets_T must be on cpu, got meta",
            {"targets_T": torch.zeros(9, dtype=torch.int64, device="meta")},
        ),
        (ValueError, "reduction must be 'mean' or 'sum', got 'none'", {"reduction": "none"}),
        (TypeError, "weight_VD must be float32, got torch.bfloat16", {"weight_VD": draw(7, 8).bfloat16()}),
        (TypeError, "targets_T must be int32 or int64, got torch.float32", {"targets_T": draw(9)}),
        (TypeError, "x_TD must be a torch.Tensor, got list", {"x_TD": [1.0]}),
    ],
)
def test_bad_input(error, message, changes):
    arguments = {"x_TD": draw(9, 8), "weight_VD": draw(7, 8), "targets_T": torch.zeros(9, dtype=torch.int64)} | changes
    with pytest.raises(error, match=re.escape("fastmoe.linear_cross_entropy: " + message)):
        ops.linear_cross_entropy(**arguments)


def test_gradients_twice_are_refused():
    x_TD = draw(4, 5).requires_grad_()
    loss = ops.linear_cross_entropy(x_TD, draw(3, 5), torch.tensor([0, 1, 2, 0]))
    with pytest.raises(NotImplementedError, match="fastmoe.linear_cross_entropy: gradients of gradients"):
        torch.autograd.grad(loss, x_TD, create_graph=True)
