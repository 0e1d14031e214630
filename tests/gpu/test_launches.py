"""How the kernels are launched: two for a routing, none waits for the device, in CUDA graphs and on any stream."""

from __future__ import annotations

import pytest
import torch

from fastmoe import ops, testing
from tests.gpu.common import draw

SHAPE = testing.Shape(2048, 256, 128, 16, 4, 1)
NAMES = ("x", "gate_up", "down")


@pytest.fixture
def inputs():
    drawn = draw(SHAPE, torch.bfloat16)
    logits_TE = testing.draw(SHAPE.T, SHAPE.E).cuda()
    return {name: drawn[name].requires_grad_() for name in NAMES} | {"logits": logits_TE.requires_grad_()}


def step(x, save="z") -> list[torch.Tensor]:
    """Gate, routing and layer, forward and backward; the output and every gradient."""
    weights_TK, ids_TK, probs_TE, _ = ops.topk_gate(x["logits"], SHAPE.K)
    routing = ops.build_routing(ids_TK, SHAPE.E)
    y_TD = ops.moe_mlp(x["x"], None, weights_TK, x["gate_up"], x["down"], routing=routing, save=save)
    return [y_TD, *torch.autograd.grad(y_TD.float().square().sum() + probs_TE.square().sum(), list(x.values()))]


@pytest.mark.parametrize("save", ["z", "z8", "x"])
def test_a_cuda_graph_replays_to_the_same_bits(inputs, save):
    want = [tensor.clone() for tensor in step(inputs, save)]  # compiles and tunes
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(inputs, save)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(inputs, save)
    for _ in range(2):
        for tensor in got:
            tensor.detach().fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        for tensor, wanted in zip(got, want):
            testing.assert_bit_equal(tensor.detach(), wanted.detach())
    with torch.no_grad():
        inputs["logits"].copy_(testing.draw(SHAPE.T, SHAPE.E, seed=1))
    graph.replay()
    for tensor, wanted in zip(got, step(inputs, save)):
        testing.assert_bit_equal(tensor.detach(), wanted.detach(), "another routing in the same graph")


def test_nothing_waits_for_the_device(inputs):
    step(inputs)
    for capacity in (None, 100):
        ops.build_routing(torch.zeros(SHAPE.T, SHAPE.K, dtype=torch.int64, device="cuda"), SHAPE.E, capacity)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for save in ("z", "z8", "x"):
            step(inputs, save)
        ops.build_routing(torch.zeros(SHAPE.T, SHAPE.K, dtype=torch.int64, device="cuda"), SHAPE.E, 100)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_side_stream_gives_the_same_bits(inputs):
    want = step(inputs)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(10_000_000)
        got = step(inputs)
    torch.cuda.current_stream().wait_stream(side)
    for tensor, wanted in zip(got, want):
        testing.assert_bit_equal(tensor.detach(), wanted.detach())


@pytest.mark.parametrize("capacity", [None, 300])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_a_routing_takes_two_launches(capacity, dtype):
    ids_TK = testing.draw_ids(testing.Shape(40000, 1, 1, 64, 8, 1), "dropped").cuda().to(dtype)
    ops.build_routing(ids_TK, 64, capacity)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.build_routing(ids_TK, 64, capacity)
        torch.cuda.synchronize()
    on_device = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_device) == 2, on_device


@pytest.mark.parametrize("routing", testing.ROUTINGS)
@pytest.mark.parametrize("T, E, K", [(1, 1, 1), (37, 5, 3), (40000, 64, 8), (9000, 2304, 4), (3000, 65536, 2)])
def test_routing(T, E, K, routing):
    ids_TK = testing.draw_ids(testing.Shape(T, 1, 1, min(E, 512), K, 1), routing) * (E // min(E, 512))
    for capacity in (None, 0, 7, T):
        with testing.backend("reference"):
            want = ops.build_routing(ids_TK, E, capacity)
        with testing.poison():
            got = ops.build_routing(ids_TK.cuda(), E, capacity)
        for name, tensor in want._asdict().items():
            testing.assert_bit_equal(getattr(got, name).cpu(), tensor, name)
