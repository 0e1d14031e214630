import os
import re

import pytest
import torch

import fastmoe
from fastmoe import ops, testing
from fastmoe.ops.registry import OPS, explain, select
from fastmoe.testing import draw

X, W = draw(3, 4), draw(4)


@pytest.fixture(autouse=True)
def no_wish(monkeypatch):
    monkeypatch.delenv("FASTMOE_BACKEND", raising=False)


def test_reference_by_name():
    with testing.backend("norm=reference"):
        assert select(OPS["normalize"], "cpu") == ("reference", "asked for by FASTMOE_BACKEND")
        assert select(OPS["moe_mlp"], "cpu")[1] != "asked for by FASTMOE_BACKEND"
        ops.rms_norm(X, W)
    assert OPS["normalize"].ran["cpu"][0] == "reference"


def test_a_change_of_the_wish_takes_effect_at_the_next_call():
    for backend in testing.backends("experts"):
        with testing.backend(f"experts={backend}"):
            ops.moe_mlp(draw(1, 2), torch.zeros(1, 1, dtype=torch.int64), draw(1, 1), draw(1, 2, 2), draw(1, 2, 1))
            assert OPS["moe_mlp"].ran["cpu"][0] == backend


def test_several_words():
    with testing.backend("reference, experts=reference ,"):
        assert all(select(op, "cpu")[0] == "reference" for op in OPS.values())


@pytest.mark.parametrize("wish", ["fast", "experts=fast", "gemms=native", "experts=", "=native", "experts:native"])
def test_an_unknown_wish_names_the_choices(wish):
    with (
        testing.backend(wish),
        pytest.raises(ValueError, match=r"fastmoe: FASTMOE_BACKEND must be words like .*experts.*got '"),
    ):
        ops.rms_norm(X, W)


@pytest.mark.parametrize("wish", ["triton", "cuda", "experts=cuda", "permutation=cuda"])
def test_a_backend_that_cannot_run_is_an_error(wish):
    """On CPU tensors, without TRITON_INTERPRET."""
    ids_TK = torch.zeros(3, 1, dtype=torch.int64)
    call = {"experts=cuda": lambda: ops.moe_mlp(X, ids_TK, draw(3, 1), draw(2, 2, 4), draw(2, 4, 1))}.get(
        wish, lambda: ops.build_routing(ids_TK, 2)
    )
    with (
        testing.backend(wish),
        pytest.raises(
            RuntimeError, match=rf"fastmoe\.\w+: FASTMOE_BACKEND asks for {wish.split('=')[-1]}, which cannot run"
        ),
    ):
        call()


def test_a_general_wish_leaves_out_families_that_lack_the_backend():
    with testing.backend("triton"):
        assert select(OPS["balanced_assignment"], "cpu")[0] != "triton"
        with pytest.raises(RuntimeError):
            select(OPS["topk_gate"], "cpu")


def test_float64_runs_on_the_reference_only():
    assert select(OPS["normalize"], "cpu", True)[0] == "reference"
    assert ops.rms_norm(X.double(), W.double()).dtype == torch.float64
    if "native" in testing.backends("norm"):
        with testing.backend("norm=native"), pytest.raises(RuntimeError, match="float64 runs on the reference only"):
            ops.rms_norm(X.double(), W.double())


def test_native_is_the_first_choice_where_it_exists():
    for op in OPS.values():
        if "native" in testing.backends(op.family):
            assert select(op, "cpu") == ("native", "first choice"), op.name


def test_explain_lists_every_op_and_what_ran():
    with testing.backend("reference"):
        ops.rms_norm(X, W)
        table = fastmoe.explain("cpu")
    rows = {row.split()[0]: row for row in table.splitlines()[1:]}
    assert rows.keys() == {f"{op.family}.{op.name}" for op in OPS.values()}
    assert re.search(r"reference +asked for by FASTMOE_BACKEND +reference$", rows["norm.normalize"])


def test_explain_of_a_gpu_names_what_is_missing():
    if torch.cuda.is_available():
        return
    assert "PyTorch sees no CUDA device" in explain("cuda")


def test_ops_are_registered_with_torch():
    for name, op in OPS.items():
        assert op.overload is getattr(torch.ops.fastmoe, name).default
        assert "FASTMOE_BACKEND" not in os.environ


def test_backend_helper_restores():
    with testing.backend("a"), testing.backend("b"):
        assert os.environ["FASTMOE_BACKEND"] == "b"
    assert "FASTMOE_BACKEND" not in os.environ


def test_the_accuracy_rule():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    plain = exact.float() + torch.tensor([0.0, 1e-3])
    testing.assert_accurate(exact.float() + 1.9e-3, exact, plain)
    for wrong in (exact.float() + 2.1e-3, torch.tensor([1.0, float("nan")]), exact.bfloat16(), exact.float()[:1]):
        with pytest.raises(AssertionError, match="output"):
            testing.assert_accurate(wrong, exact, plain)
    testing.assert_accurate(exact.float() + torch.tensor([0, 2**-21]), exact, exact.float())  # 2 ulp at 2
    with pytest.raises(AssertionError):
        testing.assert_accurate(exact.float() + torch.tensor([0, 2**-20]), exact, exact.float())


def test_poison_reaches_every_allocation():
    from fastmoe import native

    with testing.poison():
        fresh = [
            torch.empty(3),
            X.new_empty(3),
            torch.empty_like(X),
            native.empty(3),
            native.workspace(12).view(torch.float32),
        ]
        assert all(bool(tensor.isnan().all()) for tensor in fresh)
    assert not torch.are_deterministic_algorithms_enabled()


def test_bits_are_compared():
    testing.assert_bit_equal(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    for a, b in (([0.0], [-0.0]), ([1.0], [1.0 + 2**-23])):
        with pytest.raises(AssertionError):
            testing.assert_bit_equal(torch.tensor(a), torch.tensor(b))
