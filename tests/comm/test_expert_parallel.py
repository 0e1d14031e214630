"""Expert parallelism over gloo ranks against one process that holds all experts and the joined batch."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from fastmoe import ops
from fastmoe.comm import LocalGroup, TorchGroup, combine, dispatch, expert_parallel_moe

D, F, K, L = 12, 10, 2, 3


def batches(world: int) -> dict[str, list[tuple[torch.Tensor, ...]]]:
    """Per case and rank: x_TD, topk_ids_TK, topk_weights_TK, dy_TD."""
    generator = torch.Generator().manual_seed(world)
    E = L * world

    def tokens(T, ids_TK=None):
        draw = lambda *shape: torch.randn(*shape, generator=generator)
        ids_TK = torch.rand(T, E, generator=generator).argsort(1)[:, :K] if ids_TK is None else ids_TK
        return draw(T, D), ids_TK, draw(T, K).softmax(1), draw(T, D)

    def dropped(T):
        x_TD, ids_TK, weights_TK, dy_TD = tokens(T)
        return x_TD, ids_TK.masked_fill(torch.rand(T, K, generator=generator) < 0.3, -1), weights_TK, dy_TD

    return {
        "uneven": [tokens(5 + 3 * rank) for rank in range(world)],
        "a rank without tokens": [tokens(0 if rank == 1 else 7) for rank in range(world)],
        "no tokens at all": [tokens(0) for _ in range(world)],
        "all to one expert": [tokens(6, torch.full((6, K), E - 1, dtype=torch.int32)) for _ in range(world)],
        "only the first rank's experts": [tokens(6, torch.arange(12).view(6, K) % L) for _ in range(world)],
        "dropped slots": [dropped(9) for _ in range(world)],
        "nothing sent by rank 0": [tokens(4, torch.full((4, K), -1) if rank == 0 else None) for rank in range(world)],
    }


def experts(world: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(99)
    return (
        torch.randn(L * world, 2 * F, D, generator=generator) / D**0.5,
        torch.randn(L * world, D, F, generator=generator) / F**0.5,
    )


def step(layer, x_TD, ids_TK, weights_TK, dy_TD, gate_up, down) -> list[torch.Tensor]:
    """y, dx, dweights, dgate_up, ddown of one layer."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x_TD, weights_TK, gate_up, down)]
    y_TD = layer(leaves[0], ids_TK, *leaves[1:])
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, dy_TD)]


def run_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(computed(rank, world), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def computed(rank: int, world: int) -> dict[str, list[torch.Tensor]]:
    group = TorchGroup(dist.group.WORLD)
    mine = [weight[rank * L : (rank + 1) * L] for weight in experts(world)]
    got = {
        name: step(lambda *args: expert_parallel_moe(*args, group), *ranks[rank], *mine)
        for name, ranks in batches(world).items()
    }
    numbers = torch.arange(world, dtype=torch.int64) + rank
    got["collectives"] = [group.all_reduce(numbers), group.all_gather(numbers)]
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64):
        rows = torch.full((sum(range(world)), 2), rank, dtype=dtype)  # w rows to rank w
        got["collectives"].append(group.all_to_all(rows, list(range(world)), [rank] * world))
    x_TD, ids_TK, weights_TK, _ = batches(world)["dropped slots"][rank]
    rows_ND, sent = dispatch(x_TD, ids_TK, weights_TK, group, L * world)
    here_N1 = (sent.topk_weights_NK * (sent.topk_ids_NK >= 0)).sum(1, keepdim=True)
    got["dispatch"] = [rows_ND, sent.topk_ids_NK, sent.topk_weights_NK, combine(2 * rows_ND * here_N1, sent, group)]
    return got


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request, tmp_path_factory) -> list[dict[str, list[torch.Tensor]]]:
    """What each of 2 and of 4 processes computed."""
    folder = str(tmp_path_factory.mktemp("ranks"))
    multiprocessing.get_context("forkserver").set_forkserver_preload(["fastmoe.comm"])
    multiprocessing.start_processes(run_rank, (request.param, folder), request.param, start_method="forkserver")
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(request.param)]


@pytest.mark.parametrize("case", batches(2))
def test_outputs_and_gradients_equal_one_process_on_the_joined_batch(ranks, case):
    world = len(ranks)
    joined = [
        torch.cat([tensor.long() if i == 1 else tensor for tensor in tensors])
        for i, tensors in enumerate(zip(*batches(world)[case]))
    ]
    want = step(ops.moe_mlp, *joined, *experts(world))
    for exact, parts in zip(want, zip(*(got[case] for got in ranks))):  # y, dx, dweights, dgate_up, ddown
        largest = max([1.0, *exact.abs().flatten().tolist()])
        torch.testing.assert_close(torch.cat(parts), exact, rtol=0, atol=1e-6 * largest)


def test_an_expert_without_tokens_gets_a_zero_gradient(ranks):
    for got in ranks[1:]:
        for gradient in got["only the first rank's experts"][3:]:
            assert gradient.numel() and not gradient.any()


def test_dispatch_sends_a_token_once_to_each_rank_of_its_experts(ranks):
    case = batches(len(ranks))["dropped slots"]
    for rank, got in enumerate(ranks):
        want = []
        for x_TD, ids_TK, weights_TK, _ in case:
            for t, ids in enumerate(ids_TK.tolist()):
                local = [e - rank * L if e >= 0 and e // L == rank else -1 for e in ids]
                if max(local) >= 0:
                    want.append((x_TD[t], local, weights_TK[t]))
        rows_ND, ids_NK, weights_NK, y_TD = got["dispatch"]
        assert ids_NK.tolist() == [local for _, local, _ in want]
        assert torch.equal(rows_ND, torch.stack([row for row, *_ in want]))
        assert torch.equal(weights_NK, torch.stack([weights for *_, weights in want]))
        x_TD, ids_TK, weights_TK, _ = case[rank]
        torch.testing.assert_close(y_TD, 2 * x_TD * (weights_TK * (ids_TK >= 0)).sum(1, keepdim=True))


def test_collectives(ranks):
    world = len(ranks)
    numbers = torch.arange(world)
    for rank, got in enumerate(ranks):
        total, gathered, *exchanged = got["collectives"]
        assert torch.equal(total, world * numbers + sum(range(world)))
        assert torch.equal(gathered, numbers + numbers[:, None])
        for rows in exchanged:
            assert rows.float().tolist() == [[source] * 2 for source in range(world) for _ in range(rank)]


def test_one_rank_is_the_op_itself():
    arguments = [*batches(1)["dropped slots"][0], *experts(1)]
    got = step(lambda *args: expert_parallel_moe(*args, LocalGroup()), *arguments)
    assert all(map(torch.equal, got, step(ops.moe_mlp, *arguments)))
    x_TD, ids_TK, weights_TK, *_ = arguments
    rows_ND, sent = dispatch(x_TD, ids_TK, weights_TK, LocalGroup(), L)
    some_T = (ids_TK >= 0).any(1)
    assert torch.equal(rows_ND, x_TD[some_T]) and torch.equal(sent.topk_ids_NK.long(), ids_TK[some_T])
    assert torch.equal(combine(rows_ND, sent, LocalGroup()), x_TD * some_T[:, None])


def test_the_example_of_the_docstring():
    class Pair(LocalGroup):
        """Rank 0 of two that hold the same data."""

        size = 2

        def all_to_all(self, rows, send_counts, recv_counts):
            return torch.cat([rows[: send_counts[0]]] * 2)

    rows_ND, sent = dispatch(torch.ones(1, 3), torch.tensor([[1, 2, 0]]), torch.ones(1, 3), Pair(), 4)
    assert sent.send_counts == sent.recv_counts == [1, 1] and sent.topk_ids_NK.tolist() == [[1, -1, 0]] * 2
    assert torch.equal(rows_ND, torch.ones(2, 3))


def test_a_token_with_8_experts_on_4_ranks_costs_half_of_its_routes():
    class Counting(LocalGroup):
        """Rank 0 of four that hold the same data; counts the bytes of rows, ids, weights and counts that leave it."""

        size, sent = 4, 0

        def all_to_all(self, rows, send_counts, recv_counts):
            self.sent += rows[send_counts[0] :].nbytes
            return torch.cat([rows[: send_counts[0]]] * 4)

    T, E, D, group = 1024, 64, 512, Counting()
    x_TD = torch.randn(T, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    ids_TK = torch.rand(T, E, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :8]
    dispatch(x_TD, ids_TK, torch.ones(T, 8), group, E)
    routes = int((ids_TK >= E // 4).sum()) * x_TD[0].nbytes
    assert group.sent <= 0.52 * routes


def test_bad_input_is_named():
    class Pair(LocalGroup):
        size = 2

    x_TD, ids_TK, weights_TK = torch.ones(2, 3), torch.tensor([[0], [1]]), torch.ones(2, 1)
    for num_experts in (0, 3):
        with pytest.raises(ValueError, match=rf"fastmoe\.dispatch: num_experts must be .* got {num_experts}"):
            dispatch(x_TD, ids_TK, weights_TK, Pair(), num_experts)
    with pytest.raises(ValueError, match="fastmoe.dispatch: topk_ids_TK must be in -1..0, got 1"):
        dispatch(x_TD, ids_TK, weights_TK, LocalGroup(), 1)
    with pytest.raises(ValueError, match=r"fastmoe.dispatch: topk_weights_TK must be of shape \[T, K\] = \[2, 1\]"):
        dispatch(x_TD, ids_TK, torch.ones(2, 2), LocalGroup(), 2)
    rows_ND, sent = dispatch(x_TD, ids_TK, weights_TK, LocalGroup(), 2)
    with pytest.raises(ValueError, match=r"fastmoe\.combine: y_ND must be of shape \[N, D\] with N = 2, got \[1, 3\]"):
        combine(rows_ND[:1], sent, LocalGroup())
