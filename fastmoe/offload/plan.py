"""What lives where, from sizes and budgets in bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

TIERS = ("device", "host", "disk")  # fastest first
IN_FLIGHT = 3  # one piece in use, the next being read, the last being written


@dataclass(frozen=True)
class Plan:
    """tier: of each piece. used, buffers, budgets: bytes by tier; buffers are kept free for pieces of slower tiers."""

    tier: dict[str, str]
    used: dict[str, int]
    buffers: dict[str, int]
    budgets: dict[str, int]

    def __str__(self) -> str:
        rows = [("tier", "pieces", "bytes", "buffers", "budget")]
        for tier, budget in self.budgets.items():
            pieces = sum(where == tier for where in self.tier.values())
            rows.append((tier, str(pieces), *map(human, (self.used[tier], self.buffers[tier], budget))))
        return "\n".join("  ".join(f"{cell:>10}" for cell in row) for row in rows)


def plan(sizes: Mapping[str, int], budgets: Mapping[str, int]) -> Plan:
    """Gives each piece the fastest tier that has room, pieces named first first.

    sizes: bytes of each piece, a layer's or an expert group's states; a piece is never split. budgets: bytes by tier,
    any of "device", "host", "disk". A tier above pieces that live lower keeps room for 3 of the largest in flight.

    Errors: ValueError for unknown tiers or negative bytes, and where it cannot fit, naming the bytes that are missing.
    """
    tiers = [tier for tier in TIERS if tier in budgets]
    if not tiers or len(tiers) < len(budgets):
        raise ValueError(f"fastmoe.offload: budgets must name some of {TIERS}, got {list(budgets)}")
    for name, size in [*sizes.items(), *budgets.items()]:
        if size < 0:
            raise ValueError(f"fastmoe.offload: the bytes of {name} must be at least 0, got {size}")
    tier, left, buffers, missing = {}, dict(sizes), dict.fromkeys(tiers, 0), {}
    for name in tiers:
        if name == tiers[-1] or sum(left.values()) <= budgets[name]:
            placed = left
        else:
            placed = _fill(left, budgets[name])
        left = {piece: size for piece, size in left.items() if piece not in placed}
        buffers[name] = IN_FLIGHT * max(left.values(), default=0)
        tier.update(dict.fromkeys(placed, name))
        short = sum(placed.values()) + buffers[name] - budgets[name]
        if short > 0:
            missing[name] = short
    if missing:
        shortfall = ", ".join(f"{human(short)} on {name}" for name, short in missing.items())
        given = ", ".join(f"{human(budgets[name])} on {name}" for name in tiers)
        raise ValueError(
            f"fastmoe.offload: budgets must hold {human(sum(sizes.values()))} and their buffers, "
            f"got {given}: short of {shortfall}"
        )
    used = {name: sum(sizes[piece] for piece in sizes if tier[piece] == name) for name in tiers}
    return Plan(tier, used, buffers, {name: budgets[name] for name in tiers})


def _fill(sizes: dict[str, int], budget: int) -> dict[str, int]:
    """The pieces that go into `budget` beside the buffers that the others then need."""
    placed, used, before = {}, 0, None
    largest = deque(sorted(sizes, key=sizes.get, reverse=True))  # not placed yet, but for some behind the first
    while before != len(placed):  # placing a large piece shrinks the buffers, so look again
        before = len(placed)
        for piece in [name for name in sizes if name not in placed]:
            other = next((name for name in largest if name != piece and name not in placed), None)
            if used + sizes[piece] + IN_FLIGHT * sizes.get(other, 0) <= budget:
                placed[piece] = sizes[piece]
                used += sizes[piece]
                while largest and largest[0] in placed:
                    largest.popleft()
    return placed


def human(size: int) -> str:
    """1610612736 -> "1.50 GiB"."""
    power = min(max(0, size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" if power else f"{size} B"
