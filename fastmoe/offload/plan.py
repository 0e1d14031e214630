"""What lives where, from sizes and budgets in bytes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

TIERS = ("device", "host", "disk")  # fastest first


@dataclass(frozen=True)
class Plan:
    """tier: of each piece. used, buffers, budgets: bytes by tier; buffers are of the fastest, for pieces elsewhere."""

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


def plan(
    sizes: Mapping[str, int],
    budgets: Mapping[str, int],
    flight: Mapping[str, int] | None = None,
    resident: Collection[str] = (),
    mirror: int | None = None,
) -> Plan:
    """Gives each piece the fastest tier that has room, pieces named first first.

    sizes: bytes of each piece, a layer's or an expert group's weights, states and gradients; a piece is never split.
    budgets: bytes by tier, any of "device", "host", "disk"; work is done in the fastest of them. flight: bytes which
    that one keeps free for the passage of a piece that lives elsewhere, as much as the largest asks for; None: 3 times
    its size. resident: pieces that must be in the fastest tier. mirror: None, or on disk lies a copy of every piece and
    so many bytes beside. Activations are not counted.

    Errors: ValueError for unknown tiers or negative bytes, and where it cannot fit, naming the bytes that are missing.
    """
    tiers = [tier for tier in TIERS if tier in budgets]
    if not tiers or len(tiers) < len(budgets):
        raise ValueError(f"fastmoe.offload: budgets must name some of {TIERS}, got {list(budgets)}")
    if mirror is not None and tiers[-1] != "disk":
        raise ValueError(f"fastmoe.offload: budgets must name disk, where the copies are to lie, got {list(budgets)}")
    for name, size in [*sizes.items(), *budgets.items()]:
        if size < 0:
            raise ValueError(f"fastmoe.offload: the bytes of {name} must be at least 0, got {size}")
    passing = flight or {piece: 3 * size for piece, size in sizes.items()}
    first, total = tiers[0], sum(sizes.values())
    tier = dict.fromkeys(sizes, first)
    if total > budgets[first] and len(tiers) > 1:
        placed = _fastest(sizes, budgets[first], passing, resident)
        left = [piece for piece in sizes if piece not in placed]
        for name in tiers[1:]:
            used, kept = 0, []
            for piece in left:
                if name != tiers[-1] and used + sizes[piece] > budgets[name]:
                    kept.append(piece)
                else:
                    tier[piece], used = name, used + sizes[piece]
            left = kept
    used = {name: sum(sizes[piece] for piece in sizes if tier[piece] == name) for name in tiers}
    if mirror is not None:
        used["disk"] = total + mirror
    buffers = dict.fromkeys(tiers, 0)
    buffers[first] = max((passing[piece] for piece in sizes if tier[piece] != first), default=0)
    missing = {name: used[name] + buffers[name] - budgets[name] for name in tiers}
    if max(missing.values()) > 0:
        shortfall = ", ".join(f"{human(short)} on {name}" for name, short in missing.items() if short > 0)
        given = ", ".join(f"{human(budgets[name])} on {name}" for name in tiers)
        raise ValueError(
            f"fastmoe.offload: budgets must hold {human(total)} and their buffers, got {given}: short of {shortfall}"
        )
    return Plan(tier, used, buffers, {name: budgets[name] for name in tiers})


def _fastest(sizes: Mapping[str, int], budget: int, passing: Mapping[str, int], resident: Collection[str]) -> set[str]:
    """The pieces that go into `budget` beside the buffers that the others then need."""
    placed, before = set(resident), -1
    used = sum(sizes[piece] for piece in placed)
    while before != len(placed):  # placing the piece that asks for the largest buffers shrinks them, so look again
        before = len(placed)
        for piece in sizes:
            if piece not in placed:
                others = max((passing[name] for name in sizes if name != piece and name not in placed), default=0)
                if used + sizes[piece] + others <= budget:
                    placed.add(piece)
                    used += sizes[piece]
    return placed


def human(size: int) -> str:
    """1610612736 -> "1.50 GiB"."""
    power = min(max(0, size.bit_length() - 1) // 10, 4)
    return f"{size / 1024**power:.2f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" if power else f"{size} B"
