"""Every peer that runs here computes moe_mlp, forward and backward; the others say why they do not."""

import pytest
import torch

from benchmarks import peers
from benchmarks.ops.bench_experts import SHAPES, Problem, draw_ids
from benchmarks.ops.harness import TOLERANCE
from benchmarks.peers import PEERS, Shape
from fastmoe import ops
from fastmoe.testing import backend

SMALL = Shape(37, 32, 24, 5, 2)
ON_CPU = [peer for peer in PEERS if "cpu" in peer.devices]


def problem(routed="uniform", dtype=torch.float32):
    torch.manual_seed(0)
    return Problem(SMALL, draw_ids(SMALL, routed, "cpu"), dtype)


def assert_close(got, exact, tolerance):
    for name, a, b in zip(("y", "dx", "dweights", "dgate_up_proj", "ddown_proj"), got, exact, strict=True):
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max(), name


@pytest.mark.parametrize("routed", ["uniform", "Zipf", "all-to-one"])
@pytest.mark.parametrize("peer", ON_CPU, ids=lambda peer: peer.name)
def test_a_peer_agrees_with_float64(peer, routed):
    made = problem(routed)
    assert_close(made.compared(made.step(peer.layer)()), made.exact(), TOLERANCE[torch.float32])


@pytest.mark.parametrize("name", ["torch loop", "torch grouped_mm", "transformers grouped_mm", "transformers eager"])
def test_in_bfloat16_and_on_float32_copies(name):
    made = problem(dtype=torch.bfloat16)
    layer = peers.arms(SMALL, torch.bfloat16, "cpu")[0][name]
    exact = made.exact()
    assert_close(made.compared(made.step(layer)()), exact, TOLERANCE[torch.bfloat16])
    upcast = made.compared(made.step(peers.in_float32(layer))())
    assert all(tensor.dtype == torch.bfloat16 for tensor in upcast)
    assert_close(upcast, exact, 1e-2)


def test_exact_is_the_definition_of_moe_mlp():
    made = problem("Zipf")
    with backend("reference"):
        inputs = [tensor.double() for tensor in (made.x_TD, made.weights_TK, made.gate_up_proj, made.down_proj)]
        leaves = [tensor.requires_grad_() for tensor in inputs]
        y_TD = ops.moe_mlp(leaves[0], made.ids_TK, *leaves[1:])
        outputs = made.compared([y_TD.detach(), *torch.autograd.grad(y_TD, leaves, made.dy_TD.double())])
    assert_close(outputs, made.exact(), 1e-13)


@pytest.mark.parametrize("sparse", [False, True])
def test_sparse_and_dense_gradients_compare_alike(sparse):
    made = problem("all-to-one")
    with backend("reference"):
        outputs = made.step(lambda *args: ops.moe_mlp(*args, sparse_grads=sparse))()
    assert outputs[3].is_sparse == sparse
    assert_close(made.compared(outputs), made.exact(), TOLERANCE[torch.float32])


def test_a_gradient_of_an_untouched_expert_is_an_error():
    made = problem("all-to-one")
    outputs = list(made.step(PEERS[0].layer)())
    outputs[4] = outputs[4].clone()
    outputs[4][0, 0, 0] = 1e-30
    assert made.compared(outputs)[4].isnan().all() and not made.compared(outputs)[3].isnan().any()


def test_whoever_cannot_run_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(peers, "free_bytes", lambda device: 24 << 30)
    found, left_out = peers.arms(SMALL, torch.float32, "cpu")
    assert list(found) == [peer.name for peer in ON_CPU]
    assert left_out == dict.fromkeys(("ScatterMoE", "Liger", "SonicMoE"), "runs on cuda only")
    found, left_out = peers.arms(SMALL, torch.float32, "cuda")
    assert left_out["Liger"] == "does not serve torch.float32"
    _, left_out = peers.arms(SMALL, torch.bfloat16, "cpu")
    assert "too far from float64" in left_out["transformers batched_mm"]
    _, left_out = peers.arms(SHAPES["D"], torch.float32, "cpu")
    assert left_out["transformers eager"] == "its backward writes 1,649 GB of gradients a step"


@pytest.mark.parametrize("name", ["transformers batched_mm"])
def test_batched_mm_needs_memory_for_every_slot(name, monkeypatch):
    monkeypatch.setattr(peers, "free_bytes", lambda device: 24 << 30)
    assert peers.arms(SHAPES["A"], torch.float32, "cpu")[1][name] == "takes 96 GiB, 24 are free"
    assert name in peers.arms(SHAPES["D"], torch.float32, "cpu")[0]


def test_a_package_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(peers, "PEERS", (peers.Peer("nobody", None, package="no_such_package"),))
    found, left_out = peers.arms(SMALL, torch.float32, "cpu")
    assert not found and left_out["nobody"] == "cannot be imported: No module named 'no_such_package'"


def test_batched_mm_in_bfloat16_is_too_far_from_float64():
    shape = Shape(1024, 32, 16, 4, 2)
    made = Problem(shape, draw_ids(shape, "all-to-one", "cpu"), torch.bfloat16)
    layer = next(peer.layer for peer in PEERS if peer.name == "transformers batched_mm")
    got, exact = made.compared(made.step(layer)())[3].double(), made.exact()[3]
    assert (got - exact).abs().max() > TOLERANCE[torch.bfloat16] * exact.abs().max()


def test_ids_of_many_experts_differ_within_a_token():
    from benchmarks.ops.harness import topk_ids

    torch.manual_seed(0)
    ids_TK = topk_ids(3000, 4, 1 << 15)  # drawn without a [T, E] matrix
    assert ids_TK.sort(1).values.diff(dim=1).ne(0).all() and ids_TK.min() >= 0 and ids_TK.max() < 1 << 15
    torch.manual_seed(0)
    assert torch.equal(ids_TK, topk_ids(3000, 4, 1 << 15))
