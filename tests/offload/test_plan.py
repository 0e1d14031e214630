from __future__ import annotations

import random

import pytest

from fastmoe.offload import plan


def test_pieces_named_first_get_the_faster_tier_beside_the_buffers():
    made = plan(dict.fromkeys("abcdefghij", 10), {"disk": 1000, "host": 65, "device": 50})
    assert made.tier == {
        **dict.fromkeys("ab", "device"),
        **dict.fromkeys("cde", "host"),
        **dict.fromkeys("fghij", "disk"),
    }
    assert made.used == {"device": 20, "host": 30, "disk": 50} and made.buffers == {"device": 30, "host": 30, "disk": 0}
    assert str(made).splitlines()[2].split() == ["host", "3", "30", "B", "30", "B", "65", "B"]


def test_no_buffers_where_nothing_lives_lower():
    assert plan({"a": 60, "b": 40}, {"host": 100, "disk": 0}).buffers == {"host": 0, "disk": 0}


def test_a_large_last_piece_that_fits_spares_its_buffers():
    made = plan({**dict.fromkeys("abcd", 10), "large": 100}, {"host": 140, "disk": 100})
    assert made.tier["large"] == "host" and made.used["host"] + made.buffers["host"] <= 140


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
        budgets = {"device": 150 + draw.randrange(200), "host": 150 + draw.randrange(400), "disk": sum(sizes.values())}
        made = plan(sizes, budgets)
        for i, tier in enumerate(budgets):
            lower = [size for piece, size in sizes.items() if made.tier[piece] in list(budgets)[i + 1 :]]
            assert made.buffers[tier] == 3 * max(lower, default=0)
            assert made.used[tier] + made.buffers[tier] <= budgets[tier]
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
