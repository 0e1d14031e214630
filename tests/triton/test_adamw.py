from __future__ import annotations

import itertools

import pytest
import torch

from fastmoe import testing
from fastmoe.ops import adamw_step
from fastmoe.ops.adamw import kernels, reference
from fastmoe.ops.quantize.reference import dequantize, join, quantize
from fastmoe.ops.registry import OPS, select

KINDS = [
    (param, moments, master)
    for param, masters in (
        (torch.float32, (None,)),
        (torch.bfloat16, (None, torch.int8, torch.float32)),
        (torch.float16, (None, torch.float32)),
    )
    for moments in kernels.MOMENTS
    for master in masters
]
SOME = [KINDS[0], (torch.bfloat16, torch.int8, torch.int8), (torch.float16, torch.float16, None)]
RULE = dict(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, grad_scale=0.5)
Tensors = list[torch.Tensor]


def draw(shape: tuple[int, ...], param: torch.dtype, moments: torch.dtype, master: torch.dtype | None) -> Tensors:
    """A tensor's arguments as the operator takes them: param, grad, moments, their scales, master."""
    weight, none = testing.draw(*shape), torch.empty(0)
    grad, m, v = (testing.draw(*shape, seed=i, scale=0.1) for i in (1, 2, 3))
    states = [m.to(moments), v.square().to(moments) if moments.itemsize == 4 else v.abs().to(moments), none, none]
    if moments == torch.int8:
        (m, m_scale), (v, v_scale) = quantize(m, True, None, 0), quantize(v.abs(), False, None, 0)
        states = [m, v, m_scale, v_scale]
    residual = torch.randint(-128, 128, shape, dtype=torch.int8, generator=testing.generator())
    kept = {None: none, torch.float32: weight.clone(), torch.int8: residual}[master]
    return [weight.to(param), grad.to(param), *states, kept]


def step(module, tensors: list[Tensors], numbers: list[tuple[int, int, int, float]], **rule) -> list[Tensors]:
    """One step of copies; numbers: step, key, first row and decay of each tensor."""
    tensors = [[tensor.clone() for tensor in one] for one in tensors]
    lists = [list(values) for values in zip(*tensors)]
    module.adamw_step(*lists, *(list(values) for values in zip(*numbers)), **(RULE | rule))
    return tensors


def values(tensors: Tensors) -> dict[str, torch.Tensor]:
    param, _, m, v, m_scale, v_scale, master = tensors
    weight = {"weight": join(param, master)} if master.dtype == torch.int8 else {"param": param, "master": master}
    return weight | {"m": m, "v": v, "m_scale": m_scale, "v_scale": v_scale}


def check(got: Tensors, want: Tensors, about: str) -> None:
    """Equal but where a sum is rounded in another order: then by a step of the storage type, and that seldom."""
    for (name, a), b in zip(values(got).items(), values(want).values()):
        assert a.dtype == b.dtype, f"{about}: {name}"
        if not a.numel():
            continue
        if not a.is_floating_point():
            off, allowed, close = (a.int() - b.int()).abs(), 1, 0
        else:
            off = (a.double() - b.double()).abs()
            close = 2e-6 * b.double().abs() + 1e-7
            allowed = (2**-15 if name == "weight" else torch.finfo(a.dtype).eps) * b.double().abs() + close
        assert (off <= allowed).all(), f"{about}: {name} is off by {off.max()}"
        assert (off > close).sum() <= 1 + a.numel() // 200, f"{about}: {name} differs in {(off > close).sum()}"


def test_the_backend_is_triton():
    assert select(OPS["adamw_step"], "cpu")[0] == "triton"


def test_every_kind_in_one_call():
    shapes = [(70, 40), (2, 5, 32)]
    tensors = [draw(shape, *kind) for kind in KINDS for shape in shapes]
    numbers = [(3 + i % 2, 1000 * i - 7, i % 3, 1 - 1e-3 * (i % 4)) for i in range(len(tensors))]
    got = step(kernels, tensors, numbers)
    for i, (kind, shape) in enumerate(itertools.product(KINDS, shapes)):
        (want,) = step(reference, tensors[i : i + 1], numbers[i : i + 1])
        check(got[i], want, f"{kind} {shape}")
        if i % 10 == 0:
            (alone,) = step(kernels, tensors[i : i + 1], numbers[i : i + 1])
            for tensor, same in zip(alone, got[i]):
                testing.assert_bit_equal(tensor, same, f"{kind} {shape} alone")


@pytest.mark.parametrize("kind", [KINDS[0], (torch.bfloat16, torch.int8, torch.int8)])
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1,), (3, 9000), (2000, 17)])
def test_chunks(shape, kind):
    tensors = [draw(s, *kind) for s in ((5, 3), shape, (33,))]
    for i, got in enumerate(step(kernels, tensors, [(1, 5, 0, 1.0)] * 3)):
        (want,) = step(reference, tensors[i : i + 1], [(1, 5, 0, 1.0)])
        check(got, want, f"{shape}, tensor {i}")


def test_a_part_is_updated_as_in_the_whole():
    for kind in SOME:
        whole = draw((9, 40), *kind)
        part = [tensor[4:].clone() if tensor.dim() == 2 else tensor for tensor in whole]
        (want,), (got,) = (step(kernels, [x], [(2, 3, row, 1.0)]) for x, row in ((whole, 100), (part, 104)))
        for tensor, same in zip(got, want):
            testing.assert_bit_equal(tensor, same[4:] if tensor.dim() == 2 else same, str(kind))


def test_addresses_that_are_not_multiples_of_16_give_the_same_bits():
    for kind in SOME:
        tensors = draw((6, 64), *kind)
        moved = [torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x) for x in tensors]
        (want,) = step(kernels, [tensors], [(2, 3, 1, 1.0)])
        lists = [[tensor] for tensor in moved]
        kernels.adamw_step(*lists, [2], [3], [1], [1.0], **RULE)
        for tensor, same in zip(moved, want):
            testing.assert_bit_equal(tensor, same, str(kind))


def test_values_that_are_not_finite():
    for kind in SOME:
        tensors = draw((4, 32), *kind)
        tensors[1][1, 3], tensors[1][2, 4] = torch.inf, torch.nan
        (got,), (want,) = (step(module, [tensors], [(2, 3, 1, 1.0)]) for module in (kernels, reference))
        for a, b in ((got[0], want[0]), (got[4], want[4]), (got[5], want[5])):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf()), kind
        assert got[0][0].isfinite().all() and not got[0][2].isfinite().all()


def test_zeros_stay_and_tiny_moments_fade():
    for kind in SOME:
        weight, grad, m, v, m_scale, v_scale, master = draw((2, 64), *kind)
        for tensor in (grad, m, v, m_scale, v_scale):
            tensor.zero_()
        if kind[1] != torch.int8:
            m[1], v[1] = 1e-40, 1e-40
        (got,) = step(kernels, [[weight, grad, m, v, m_scale, v_scale, master]], [(2, 3, 1, 1.0)], eps=1e-30)
        assert got[0].isfinite().all() and torch.equal(got[0][0], weight[0]), kind
        assert (got[2][0] == 0).all() and (got[3][0] == 0).all(), kind
        if kind[1] == torch.int8:
            assert (dequantize(got[2], got[4]) == 0).all(), kind


@pytest.mark.parametrize("kind", [KINDS[0], (torch.float16, torch.bfloat16, None)])
def test_a_tensor_without_dimensions(kind):
    (got,), (want,) = (step(kernels, [draw(shape, *kind)], [(2, 3, 1, 1.0)]) for shape in ((), (1,)))
    assert all(torch.equal(a.view(-1), b.view(-1)) for a, b in zip(got, want))


def test_through_the_public_door():
    kind = (torch.bfloat16, torch.int8, torch.int8)
    param, grad, m, v, m_scale, v_scale, master = draw((7, 40), *kind)
    states = dict(exp_avg_scales=[m_scale], exp_avg_sq_scales=[v_scale], masters=[master], keys=[5])
    versions = [tensor._version for tensor in (param, m, v, m_scale, v_scale, master)]
    with torch.no_grad():
        (want,) = step(kernels, [[param, grad, m, v, m_scale, v_scale, master]], [(4, 5, 0, 1 - 1e-3)])
        adamw_step([param], [grad], [m], [v], 4, 1e-2, 0.9, 0.95, 1e-8, 0.1, 0.5, **states)
    for tensor, same in zip((param, grad, m, v, m_scale, v_scale, master), want):
        testing.assert_bit_equal(tensor, same)
    after = [tensor._version for tensor in (param, m, v, m_scale, v_scale, master)]
    assert all(new > old for new, old in zip(after, versions))
    adamw_step([], [], [], [], 1, 1e-2, 0.9, 0.95, 1e-8, 0.1)
