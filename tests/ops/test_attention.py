import re

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from fastmoe import ops, testing
from fastmoe.ops.attention.reference import visible
from fastmoe.testing import draw
from tests.ops.battery import Battery, Case


def attention_case(
    name, B, N, M, Sq, Sk, H, lse=False, causal=False, seen=None, thorough=False, parallel=False, **options
):
    """lse: also its gradient. seen: the share of the blocks that a mask leaves."""

    def make(dtype):
        shapes = {"q": (B, Sq, N, H), "k": (B, Sk, M, H), "v": (B, Sk, M, H)}
        drawn = {x: draw(*shape, dtype=dtype, seed=i).transpose(1, 2) for i, (x, shape) in enumerate(shapes.items())}
        if seen is not None:
            drawn["mask"] = torch.rand(-(-Sq // 64), -(-Sk // 64), generator=testing.generator(7)) < seen
        return drawn

    def call(x):
        arguments = x["q"], x["k"], x["v"], causal, x.get("mask")
        if not lse:
            return ops.attention(*arguments, **options)
        out, lse_BNS = ops.attention_with_lse(*arguments, **options)
        return out, lse_BNS.nan_to_num(neginf=0)  # infinities cannot be compared by their distance

    return Case(name, call, make, thorough=thorough, parallel=parallel)


def rope_case(name, B, S, N, M, H, start=0, thorough=False, parallel=False):
    make = lambda dtype: {"qkv": draw(B, S, N + 2 * M, H, dtype=dtype)}
    return Case(name, lambda x: ops.rope(x["qkv"], N, M, start, 100.0), make, thorough=thorough, parallel=parallel)


class TestAttention(Battery):
    family = "attention"
    cases = [
        attention_case("empty", 0, 2, 2, 5, 5, 8),
        attention_case("no_queries", 1, 2, 2, 0, 5, 8, causal=True),
        attention_case("no_keys", 1, 2, 1, 5, 0, 8, lse=True),
        attention_case("one", 1, 1, 1, 1, 1, 1),
        attention_case("odd", 2, 3, 1, 37, 37, 19, lse=True, causal=True, thorough=True),
        attention_case("more_keys", 1, 4, 2, 7, 150, 16, causal=True, thorough=True),
        attention_case("more_queries", 1, 2, 2, 150, 70, 8, lse=True, causal=True),
        attention_case("both_sides", 1, 2, 2, 67, 131, 33, scale=0.5),
        attention_case("window", 1, 2, 1, 200, 200, 24, lse=True, window=(40, 3)),
        attention_case("causal_window", 1, 2, 2, 330, 330, 16, causal=True, window=(99, None), parallel=True),
        attention_case("window_beyond_the_keys", 1, 1, 1, 140, 20, 8, lse=True, window=(10, 10)),
        attention_case("mask", 2, 2, 1, 150, 140, 8, lse=True, seen=0.6, thorough=True),
        attention_case("causal_mask", 1, 2, 2, 400, 400, 8, seen=0.5, causal=True, parallel=True),
        attention_case("many_tiles", 1, 2, 1, 513, 513, 64, causal=True, parallel=True),
        attention_case("one_head", 1, 1, 1, 640, 640, 32, parallel=True),
        attention_case("a_query", 2, 4, 2, 1, 300, 24, causal=True),
        attention_case("largest_head", 1, 1, 1, 90, 90, 256, causal=True),
        attention_case("head_128", 1, 2, 1, 65, 129, 128, causal=True),
        *(
            attention_case(f"{S}x{H}", 1, 1, 1, S, S + 1, H, causal=S % 2 == 0)
            for S, H in ((64, 31), (63, 65), (6, 193))
        ),
        rope_case("rope_nothing", 2, 0, 2, 2, 8),
        rope_case("rope_one", 1, 1, 1, 1, 2),
        rope_case("rope_odd", 2, 5, 3, 2, 38, start=3, thorough=True),
        rope_case("rope_many", 2, 70, 4, 1, 64, parallel=True),
    ]

    @pytest.mark.parametrize("window", [(None, None), (30, 5)])
    def test_matches_torch(self, backend, window):
        leaves = [
            draw(2, heads, S, 16, seed=i).requires_grad_() for i, (heads, S) in enumerate(((4, 90), (2, 70), (2, 70)))
        ]
        exact = [x.detach().double().requires_grad_() for x in leaves]
        dout = draw(2, 4, 90, 16, seed=3)
        left, right = (200 if side is None else side for side in window)
        seen = torch.tensor([[i - 20 - left <= j <= i - 20 + right for j in range(70)] for i in range(90)])
        with self.on(backend):
            out, lse = ops.attention_with_lse(*leaves, window=window)
            out.backward(dout)
        want = scaled_dot_product_attention(*exact, seen, enable_gqa=True).nan_to_num()
        want.backward(dout.double())
        rows = seen.any(1)
        assert bool((out[:, :, ~rows] == 0).all()) and bool((lse[:, :, ~rows] == -torch.inf).all())
        for got, right in ((out, want), *((a.grad, b.grad.nan_to_num()) for a, b in zip(leaves, exact))):
            torch.testing.assert_close(got.double(), right, rtol=1e-5, atol=1e-5)

    def test_parts_join(self, backend):
        """Attention over two halves of the keys, joined by lse, is attention over all, and so are its gradients."""
        leaves = [draw(1, 2, 80, 16, seed=i).requires_grad_() for i in range(3)]
        dout = draw(1, 2, 80, 16, seed=3)

        def joined(q, k, v):
            halves = [ops.attention_with_lse(q, k[:, :, s], v[:, :, s]) for s in (slice(0, 30), slice(30, 80))]
            share = torch.stack([lse for _, lse in halves]).softmax(0)
            return sum(part[..., None] * out for part, (out, _) in zip(share, halves))

        with self.on(backend):
            results = []
            for function in (ops.attention, joined):
                out = function(*leaves)
                results.append([out, *torch.autograd.grad(out, leaves, dout)])
        for got, want in zip(*results):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    def test_large_scores_stay_finite(self, backend, dtype):
        q, k, v = ((draw(1, 2, 70, 16, seed=i) * 100).to(dtype).requires_grad_() for i in range(3))
        with self.on(backend):
            out = ops.attention(q, k, v, causal=True)
            out.sum().backward()
        assert all(bool(x.isfinite().all()) for x in (out, q.grad, k.grad, v.grad))

    @pytest.mark.parametrize("place", [0, 1])
    def test_nan_shows_where_it_is_seen(self, backend, place):
        inputs = [draw(1, 1, 130, 8, seed=i) for i in range(3)]
        inputs[place][0, 0, 100, 3] = torch.nan
        with self.on(backend):
            out = ops.attention(*inputs, causal=True)[0, 0]
        assert bool(out[:100].isfinite().all()) and bool(out[100].isnan().all())

    def test_views_of_a_projection_are_not_copied(self):
        """What the kernel gets are the addresses inside the projection."""
        if "native" not in testing.backends("attention"):
            pytest.skip("the extension is not built")
        qkv = draw(2, 40, 3, 2, 8)
        q, k, v = qkv.transpose(1, 3).unbind(2)
        from fastmoe.ops.attention import native

        assert native._heads(native._rows(k)) == (k.data_ptr(), *k.stride()[:3])
        out = ops.attention(q, k, v)
        assert out.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(out, ops.attention(*(x.contiguous() for x in (q, k, v))), rtol=0, atol=0)

    def test_unseen_blocks_are_not_touched(self, backend):
        """NaN in keys that the layout leaves out would show in any product."""
        if backend == "reference":
            return
        q, k, v = (draw(1, 1, 256, 16, seed=i) for i in range(3))
        mask = torch.tensor([[True, False, True, False]] * 4)
        want = ops.attention(q, k, v, mask=mask)
        for x in (k, v):
            x[:, :, 64:128] = torch.nan
        assert torch.equal(ops.attention(q, k, v, mask=mask), want)

    def test_rope_turns_by_position(self, backend):
        """As complex numbers l + i r, turned by position * theta^(-2h / H); scores depend on distances alone."""
        qkv = draw(1, 9, 4, 6).double()
        with self.on(backend):
            q, k, v = ops.rope(qkv.float(), 2, 1, 5, 50.0)
        angle = torch.outer(torch.arange(5, 14.0), 50.0 ** -(torch.arange(3) / 3)).double()
        whole = torch.complex(*qkv.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
        want = torch.cat([whole.real, whole.imag], -1).transpose(1, 2)
        torch.testing.assert_close(torch.cat([q, k], 1).double(), want[:, :3], rtol=0, atol=1e-5)
        assert torch.equal(v.double(), qkv[:, :, 3:].transpose(1, 2))

    def test_autocast_lowers_all(self, backend):
        leaves = [draw(1, 2, 9, 8, seed=i).requires_grad_() for i in range(3)]
        with self.on(backend):
            want = ops.attention(*(x.bfloat16() for x in leaves), causal=True)
            with torch.autocast("cpu", torch.bfloat16):
                got = ops.attention(leaves[0].bfloat16(), *leaves[1:], causal=True)
            got.sum().backward()
        assert got.dtype == torch.bfloat16 and torch.equal(got, want)
        assert all(x.grad.dtype == torch.float32 for x in leaves)


@pytest.mark.parametrize(("left", "right"), [(0, 0), (5, 0), (70, 3), (400, 400), (3, 64), (64, 63)])
@pytest.mark.parametrize(("Sq", "Sk"), [(130, 130), (65, 200), (200, 65), (64, 128)])
def test_layout_covers_what_is_seen(Sq, Sk, left, right):
    """Every pair that is seen lies in a listed block, no listed block is empty, and whole ones have no other pairs."""
    native = pytest.importorskip("fastmoe.ops.attention.native")
    seen = visible(Sq, Sk, None, left, right, "cpu")
    padded = torch.zeros(-(-Sq // 64) * 64, -(-Sk // 64) * 64, dtype=torch.bool)
    padded[:Sq, :Sk] = seen
    inside = torch.zeros_like(padded)
    inside[:Sq, :Sk] = True
    tiles = lambda x: x.unflatten(1, (-1, 64)).unflatten(0, (-1, 64))
    some, every = tiles(padded).any(3).any(1), (tiles(padded) | ~tiles(inside)).all(3).all(1)
    q_first, q_entries, q_order, k_first, k_entries, k_turn = native._layout_of(Sq, Sk, Sk - Sq - left, Sk - Sq + right)
    for i in range(some.shape[0]):
        want = [2 * j + int(every[i, j]) for j in range(some.shape[1]) if some[i, j]]
        assert q_entries[q_first[i] : q_first[i + 1]].tolist() == want
    for j in range(some.shape[1]):
        want = [(2 * i + int(every[i, j]), int(some[i, :j].sum())) for i in range(some.shape[0]) if some[i, j]]
        span = slice(k_first[j], k_first[j + 1])
        assert list(zip(k_entries[span].tolist(), k_turn[span].tolist())) == want
    lengths = some.sum(1)[q_order.long()].tolist()
    assert lengths == sorted(lengths, reverse=True) and sorted(q_order.tolist()) == list(range(some.shape[0]))


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (TypeError, "q_BNSH must be a torch.Tensor, got NoneType", {"q_BNSH": None}),
        (ValueError, "q_BNSH must be of shape [B, N, Sq, H]", {"q_BNSH": draw(4, 9, 8)}),
        (TypeError, "q_BNSH must be float32 or", {"q_BNSH": torch.ones(1, 4, 9, 8, dtype=torch.int32)}),
        (
            ValueError,
            "k_BMSH must be of shape [B, M, Sk, H] = [1, any, any, 8], got [1, 2, 7, 9]",
            {"k_BMSH": draw(1, 2, 7, 9)},
        ),
        (TypeError, "k_BMSH must be float32, got torch.bfloat16", {"k_BMSH": draw(1, 2, 7, 8).bfloat16()}),
        (
            ValueError,
            "v_BMSH must be of shape [B, M, Sk, H] = [1, 2, 7, 8], got [1, 2, 6, 8]",
            {"v_BMSH": draw(1, 2, 6, 8)},
        ),
        (ValueError, "v_BMSH must be on cpu, got meta", {"v_BMSH": draw(1, 2, 7, 8).to("meta")}),
        (ValueError, "N must be a multiple of M = 2, got 3", {"q_BNSH": draw(1, 3, 9, 8)}),
        (ValueError, "M must be at least 1, got 0", {"k_BMSH": draw(1, 0, 7, 8), "v_BMSH": draw(1, 0, 7, 8)}),
        (ValueError, "H must be at most 256, got 257", {x: draw(1, 2, 7, 257) for x in ("q_BNSH", "k_BMSH", "v_BMSH")}),
        (ValueError, "H must be at least 1, got 0", {x: draw(1, 2, 7, 0) for x in ("q_BNSH", "k_BMSH", "v_BMSH")}),
        (
            ValueError,
            "mask must be of shape [ceil(Sq / 64), ceil(Sk / 64)] = [1, 1], got [2, 1]",
            {"mask": torch.ones(2, 1).bool()},
        ),
        (TypeError, "mask must be bool, got torch.float32", {"mask": torch.ones(1, 1)}),
        (ValueError, "scale must be positive, got 0.0", {"scale": 0}),
        (ValueError, "scale must be positive, got nan", {"scale": float("nan")}),
        (ValueError, "window must be (left, right), each None or at least 0, got (-1, 0)", {"window": (-1, 0)}),
    ],
)
def test_bad_input(error, message, changes):
    arguments = {"q_BNSH": draw(1, 4, 9, 8), "k_BMSH": draw(1, 2, 7, 8), "v_BMSH": draw(1, 2, 7, 8)} | changes
    with pytest.raises(error, match=re.escape("fastmoe.attention: " + message)):
        ops.attention(**arguments)


def test_gradients_twice_are_refused():
    q, k, v = (draw(1, 1, 5, 4, seed=i).requires_grad_() for i in range(3))
    with pytest.raises(NotImplementedError, match="fastmoe.attention: gradients of gradients"):
        torch.autograd.grad(ops.attention(q, k, v).square().sum(), q, create_graph=True)


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "qkv_BSAH must be of shape [B, S, A, H]", {"qkv_BSAH": draw(5, 4, 8)}),
        (ValueError, "A must be num_heads + 2 num_kv_heads = 6, got 4", {"num_heads": 4}),
        (ValueError, "num_kv_heads must be at least 1, got 0", {"num_kv_heads": 0}),
        (ValueError, "H must be even, got 7", {"qkv_BSAH": draw(1, 5, 4, 7)}),
        (ValueError, "start must be at least 0, got -1", {"start": -1}),
    ],
)
def test_bad_input_of_rope(error, message, changes):
    with pytest.raises(error, match=re.escape("fastmoe.rope: " + message)):
        ops.rope(**{"qkv_BSAH": draw(1, 5, 4, 8), "num_heads": 2, "num_kv_heads": 1} | changes)
