from __future__ import annotations

import pytest
import torch

from fastmoe import testing
from fastmoe.ops import dequantize, quantize
from fastmoe.ops.adamw import kernels, reference
from fastmoe.ops.quantize import reference as codes
from tests.triton.test_adamw import KINDS, RULE, check, draw


def on_device(tensors):
    return [tensor.cuda() for tensor in tensors]


def step(tensors, step_number=3, **rule):
    """One step in place; keys and decays by place in the list."""
    count = len(tensors)
    numbers = [step_number] * count, list(range(count)), [0] * count, [0.999] * count
    kernels.adamw_step(*(list(values) for values in zip(*tensors)), *numbers, **(RULE | rule))
    return tensors


@pytest.mark.parametrize("shapes", [[(3, 31), (2, 5, 32)], [(300, 1000), (9,), (64, 2048)]])
def test_every_kind_in_one_call(shapes):
    drawn = [draw(shape, *kind) for kind in KINDS for shape in shapes]
    got = step([on_device(tensors) for tensors in drawn])
    again = step([on_device(tensors) for tensors in drawn])
    for i, (tensors, on_gpu, same) in enumerate(zip(drawn, got, again)):
        lists = [[tensor] for tensor in tensors]
        reference.adamw_step(*lists, [3], [i], [0], [0.999], **RULE)
        check([tensor.cpu() for tensor in on_gpu], tensors, f"{KINDS[i // len(shapes)]} {shapes[i % len(shapes)]}")
        for first, second in zip(on_gpu, same):
            testing.assert_bit_equal(first, second, "second run")


def test_nothing_waits_and_no_number_is_compiled_in():
    tensors = [on_device(draw((64, 256), *kind)) for kind in (KINDS[0], KINDS[-1]) for _ in range(8)]
    step(tensors)
    (kernel_cache, *_) = kernels._adamw_step_kernel.device_caches[torch.cuda.current_device()]
    before = len(kernel_cache)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(tensors, 4, lr=0.0, grad_scale=1, eps=1)
        step(tensors[:5] + tensors[-2:], 5000)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(kernel_cache) == before


def test_one_launch_and_one_copy():
    tensors = [on_device(draw((70, 40), *kind)) for kind in KINDS]
    step(tensors)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(tensors)
        torch.cuda.synchronize()
    on_gpu = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_gpu) == 2, on_gpu


def test_a_capture_is_refused():
    tensors = [on_device(draw((8, 32), *KINDS[0]))]
    step(tensors)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="a CUDA graph would repeat"), torch.cuda.graph(graph):
        step(tensors)


@pytest.mark.parametrize("dtype", testing.DTYPES)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(0, 4), (1,), (70, 33), (1000, 2048)])
def test_codes_are_the_reference_s(shape, signed, dtype):
    x = testing.draw(*shape, dtype=dtype)
    for key in (None, -7):
        with testing.poison():
            got = quantize(x.cuda(), signed, key, 3)
        for tensor, want in zip(got, codes.quantize(x, signed, key, 3)):
            testing.assert_bit_equal(tensor.cpu(), want)
        testing.assert_bit_equal(dequantize(*got).cpu(), codes.dequantize(*(tensor.cpu() for tensor in got)))
