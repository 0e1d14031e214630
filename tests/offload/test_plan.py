from __future__ import annotations

import random

import pytest

from fastmoe.offload import plan


def test_pieces_named_first_get_the_faster_tier_beside_the_buffers():
    made = plan(dict.fromkeys("abcdefghij", 10), {"disk": 1000, "host": 35, "device": 50})
    assert made.tier == {
        **dict.fromkeys("ab", "device"),
        **dict.fromkeys("cde", "host"),
        **dict.fromkeys("fghij", "disk"),
    }
    assert made.used == {"device": 20, "host": 30, "disk": 50} and made.buffers == {"device": 30, "host": 0, "disk": 0}
    assert str(made).splitlines()[2].split() == ["host", "3", "30", "B", "0", "B", "35", "B"]


def test_no_buffers_where_nothing_lives_lower():
    assert plan({"a": 60, "b": 40}, {"host": 100, "disk": 0}).buffers == {"host": 0, "disk": 0}


def test_a_large_last_piece_that_fits_spares_its_buffers():
    made = plan({**dict.fromkeys("abcd", 10), "large": 100}, {"host": 140, "disk": 100})
    assert made.tier["large"] == "host" and made.used["host"] + made.buffers["host"] <= 140


def test_what_passes_what_stays_and_what_is_copied():
    sizes = {"a": 10, "rest": 15, "b": 10, "c": 10}
    made = plan(sizes, {"host": 30, "disk": 100}, {"a": 5, "b": 5, "c": 4}, ["rest"])
    assert made.tier == {"a": "host", "rest": "host", "b": "disk", "c": "disk"} and made.buffers["host"] == 5
    assert plan(sizes, {"host": 45, "disk": 52}, mirror=7).used == {"host": 45, "disk": 52}
    with pytest.raises(ValueError, match="short of 1 B on disk"):
        plan(sizes, {"host": 45, "disk": 51}, mirror=7)
    with pytest.raises(ValueError, match="short of 1 B on host"):
        plan(sizes, {"host": 18, "disk": 100}, {"a": 4, "b": 4, "c": 4}, ["rest"])


@pytest.mark.parametrize(
    "budgets, shortfall",
    [
        ({"host": 40, "disk": 89}, "short of 1 B on disk"),
        ({"host": 20, "disk": 100}, "short of 10 B on host"),
        ({"device": 0, "host": 2048}, "short of 30 B on device"),
        ({"host": 0}, "short of 100 B on host"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_shortfall(budgets, shortfall):
    with pytest.raises(ValueError, match=rf"fastmoe\.offload: budgets must hold 100 B .* on \w+: {shortfall}$"):
        plan({str(i): 10 for i in range(10)}, budgets)


def test_random_plans_keep_their_budgets():
    draw = random.Random(0)
    for _ in range(200):
        sizes = {str(i): draw.randrange(50) for i in range(draw.randrange(1, 30))}
        budgets = {"device": 150 + draw.randrange(200), "host": draw.randrange(400), "disk": sum(sizes.values())}
        made = plan(sizes, budgets)
        elsewhere = [size for piece, size in sizes.items() if made.tier[piece] != "device"]
        assert made.buffers == {"device": 3 * max(elsewhere, default=0), "host": 0, "disk": 0}
        assert all(made.used[tier] + made.buffers[tier] <= budgets[tier] for tier in budgets)
        needed = made.used["disk"]
        if needed:
            assert plan(sizes, budgets | {"disk": needed}).tier == made.tier
            with pytest.raises(ValueError, match="short of 1 B on disk"):
                plan(sizes, budgets | {"disk": needed - 1})


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="budgets must name some of .* got \\['tape'\\]"):
        plan({"a": 1}, {"tape": 5})
    with pytest.raises(ValueError, match="the bytes of a must be at least 0, got -1"):
        plan({"a": -1}, {"host": 5})
