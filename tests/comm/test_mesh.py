"""The rank map, and data and expert parallel training steps over gloo ranks against one process on the joined batch."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from fastmoe.comm import Mesh, Ranks, fit, launched, reduce_gradients
from fastmoe.config import ModelConfig
from fastmoe.nn import RouterInputs, Transformer
from fastmoe.optim.clip import grad_norm

WORLD, STEPS, LR = 8, 20, 0.5
CONFIG = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_dense_layers=0,
    num_experts=8,
    d_ff=8,
    router_options="global_balance=True",
    init_std=0.2,
)


def steps(ranks: Ranks) -> dict[str, object]:
    """Losses and norms of STEPS steps of clipped SGD, the first gradients, the weights at the end."""
    torch.manual_seed(0)
    model = Transformer(CONFIG, ranks.expert)
    parts = model.expert_parts()
    dense = [param for name, param in model.named_parameters() if name not in parts]
    found = {"losses": []}
    for step in range(STEPS):
        ids_BS = torch.randint(0, 32, (WORLD, 17), generator=torch.Generator().manual_seed(step))
        mine_BS = ids_BS.chunk(ranks.data.size)[ranks.data.rank]
        out = model(mine_BS[:, :-1], mine_BS[:, 1:], inputs=RouterInputs(group=ranks.data))
        model.zero_grad()
        (out.loss + out.aux_loss).backward()
        reduce_gradients(dense, list(parts.values()), ranks)
        norm = grad_norm(dense, parts.values(), ranks.expert)
        if not step:
            found["grads"] = {name: param.grad.clone() for name, param in model.named_parameters()}
        with torch.no_grad():
            for param in model.parameters():
                param -= LR * min(1.0, 1 / norm.item()) * param.grad
        loss = torch.stack([out.loss.detach(), out.aux_loss.detach()])
        found["sizes"] = model.num_parameters(), model.flops_per_token(16)
        found["losses"].append([*(ranks.data.all_reduce(loss) / ranks.data.size).tolist(), norm.item()])
    return found | {"weights": {name: param.detach() for name, param in model.named_parameters()}, "parts": set(parts)}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    for ep in (1, 2, 4, 8):
        with launched(ep=ep) as ranks:
            torch.save(steps(ranks), f"{folder}/{ep}-{rank}.pt")
        del ranks
    gc.collect()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """What 8 processes computed, the experts split over 1, 2, 4 and 8 of them."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["fastmoe.nn"])
    multiprocessing.start_processes(run_rank, (folder,), WORLD, start_method="forkserver")
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, object]:
    return steps(Ranks())


@pytest.mark.apart
@pytest.mark.timeout(600)
@pytest.mark.parametrize("ep", [1, 2, 4, 8])
def test_steps_are_those_of_one_process(folder, alone, ep):
    got = [torch.load(f"{folder}/{ep}-{rank}.pt") for rank in range(WORLD)]
    for found in got:
        assert len(found["parts"]) == (0 if ep == 1 else 4) and found["sizes"] == alone["sizes"]
        torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(alone["losses"]), rtol=0, atol=1e-5)
        for kind in ("grads", "weights"):
            for name, whole in alone[kind].items():
                own = (
                    torch.cat([got[e][kind][name] for e in range(ep)]) if name in found["parts"] else found[kind][name]
                )
                error, largest = (own - whole).abs().max().item(), whole.abs().max().item()
                assert error <= 1e-5 * max(largest, 1e-3), f"{kind} of {name}: {error} of {largest}"
    for first, second in zip(got[:ep], got[ep : 2 * ep]):  # expert-data-parallel ranks stay bit-equal
        assert all(torch.equal(tensor, second["weights"][name]) for name, tensor in first["weights"].items())


def test_the_rank_map_of_the_golden_table():
    """systems of 4 pipeline stages, 2 data-parallel and 4 tensor-parallel ranks."""
    mesh = Mesh(pp=4, dp=2, tp=4)
    for data in range(2):
        for tensor in range(4):
            ranks = [8 * pipe + 4 * data + tensor for pipe in range(4)]
            assert ranks in mesh.groups("pipe")
            assert [mesh.place(rank) for rank in ranks] == [(pipe, data, 0, tensor) for pipe in range(4)]
    assert mesh.groups("tensor") == [[4 * i + j for j in range(4)] for i in range(8)]
    assert [0, 4] in mesh.groups("data") and [27, 31] in mesh.groups("data")
    for kind in ("pipe", "data", "expert", "expert_data", "tensor"):
        for ep in (1, 2):
            groups = dataclasses.replace(mesh, ep=ep).groups(kind)
            assert sorted(rank for group in groups for rank in group) == list(range(32))


@pytest.mark.parametrize(
    ("world", "sizes", "message"),
    [
        (4, {"dp": 3}, "must be 4 (ranks), got 1 x 3 x 1; --mesh.pp 1 --mesh.dp 4 --mesh.tp 1 would fit"),
        (6, {"pp": 4}, "got 4 x 1 x 1; --mesh.pp 6 --mesh.dp 1 --mesh.tp 1"),
        (8, {"ep": 3}, "--mesh.ep must divide dp = 8, be one of [1, 2, 4, 8], got 3"),
        (8, {"tp": 0}, "--mesh.tp must be at least 1, got 0"),
    ],
)
def test_a_mesh_that_does_not_fit_names_those_that_do(world, sizes, message):
    with pytest.raises(ValueError) as caught:
        fit(world, **sizes)
    assert message in str(caught.value)
