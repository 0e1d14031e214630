"""Routing in a file: what every step chose, the same choices again, and what they would cost with other settings.

A file is a header (_HEADER: magic, format version, Shape) and a block a micro-batch, appended: _BLOCK (step, index of
the micro-batch, bytes of an id, bytes of the payload, CRC-32 of all that and the payload), then the payload: zlib over
[L, T, K] little-endian unsigned ids plus 1, 0 for a slot that chooses nothing.
"""

from __future__ import annotations

import math
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastmoe.nn.moe import MoEOutput
from fastmoe.ops import check

PLACEMENTS = ("contiguous", "balanced")
_HEADER = struct.Struct("<16s7I")
_MAGIC, _VERSION = b"fastmoe routing\0", 1
_BLOCK = struct.Struct("<QIIII")


class Shape(NamedTuple):
    layers: int  # with experts
    first_layer: int  # layers before the first of them
    tokens: int  # of a micro-batch
    top_k: int
    num_experts: int
    micro_batches: int  # of a step


class _Block(NamedTuple):
    step: int
    index: int
    width: int
    start: int  # of the payload, in the file
    end: int


def pack(routed: Sequence[MoEOutput], num_experts: int) -> torch.Tensor:
    """[L, T, K] ids plus 1, in few bytes. ValueError where experts choose, as there is no K."""
    if any(out.topk_ids_TK is None for out in routed):
        check.fail("routing", "--routing.record", "off with this --model.router, whose experts choose", "a file")
    dtype = torch.uint8 if num_experts < 256 else torch.int32
    return torch.stack([(out.topk_ids_TK + 1).to(dtype) for out in routed])


class Recorder:
    """Appends the choices of every step to a file.

    step: the last one done. Of a file that is there already, blocks after it, whole or torn, are cut off first, so that
    file and checkpoint agree. ValueError where the file is not such a one, of another shape, or ends before that step,
    and for one that a run without `resume` would overwrite.
    """

    def __init__(self, path: str | Path, shape: Shape, step: int, resume: bool):
        self.path, end = Path(path), 0
        if self.path.exists():
            if not resume:
                check.fail("routing", "--routing.record", "a new file (or the run resumed)", repr(str(path)))
            end = self._kept(shape, step)
        try:
            self.file = open(self.path, "r+b" if end else "wb")  # noqa: SIM115
        except OSError as error:
            check.fail("routing", "--routing.record", "a file to write to", f"{str(path)!r}: {error.strerror}")
        if not end:
            end = self.file.write(_HEADER.pack(_MAGIC, _VERSION, *shape))
        self.file.seek(end)
        self.file.truncate()

    def _kept(self, shape: Shape, step: int) -> int:
        """Where the blocks up to the step end; 0 where not even the header is whole."""
        if self.path.stat().st_size < _HEADER.size:
            return 0
        file, got = _open("--routing.record", self.path)
        with file:
            _fit("--routing.record", self.path, got, shape)
            kept = [block for block in _blocks(file) if block.step <= step]
        if kept and (kept[-1].step, kept[-1].index) != (step, shape.micro_batches - 1):
            wanted = f"a file that reaches step {step}, the checkpoint's"
            check.fail("routing", "--routing.record", wanted, f"{self.path}, which ends at step {kept[-1].step}")
        return kept[-1].end if kept else _HEADER.size

    def write(self, step: int, chosen: Sequence[torch.Tensor]) -> None:
        """chosen: what `pack` gave for every micro-batch."""
        blocks = []
        for index, ids_LTK in enumerate(chosen):
            ids_LTK = ids_LTK.cpu().numpy()
            width = np.min_scalar_type(ids_LTK.max(initial=0)).itemsize
            payload = zlib.compress(ids_LTK.astype(f"<u{width}").tobytes(), 1)
            blocks += [_head(step, index, width, payload), payload]
        try:
            self.file.write(b"".join(blocks))
            self.file.flush()
        except OSError as error:
            raise RuntimeError(
                f"fastmoe.routing: cannot write {self.path}: {error.strerror}; the checkpoints are intact"
            ) from error

    def sync(self) -> None:
        """Makes what is written survive a power cut."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


class Replay:
    """The choices of a file, for steps first to last. ValueError where it has another shape or lacks one of them."""

    def __init__(self, path: str | Path, shape: Shape, first: int, last: int):
        self.path = Path(path)
        self.file, self.shape = _open("--routing.replay", self.path)
        _fit("--routing.replay", self.path, self.shape, shape)
        self.blocks = {(block.step, block.index): block for block in _blocks(self.file)}
        for step in range(first, last + 1):
            if (step, shape.micro_batches - 1) not in self.blocks:
                steps = [step for step, _ in self.blocks]
                held = f"steps {min(steps)} to {max(steps)}" if steps else "none"
                check.fail("routing", "--routing.replay", f"a file with steps {first} to {last}", f"{path} with {held}")

    def at(self, step: int, index: int, device: torch.device) -> list[torch.Tensor]:
        """Of each layer [T, K] int64, -1 for a slot that chooses nothing."""
        ids_LTK = _read(self.file, self.blocks[step, index], self.shape)
        return list(torch.from_numpy(ids_LTK).to(device).unbind())

    def close(self) -> None:
        self.file.close()


class Drops(NamedTuple):
    factor: float
    capacity: int  # slots an expert keeps of a micro-batch
    rate: float  # dropped slots over all
    rate_L: list[float]  # of each layer
    worst: float  # the largest of a layer's in one micro-batch


class Load(NamedTuple):
    ranks: int
    placement: str
    max_over_mean_L: list[float]  # the busiest rank's rows over the mean, averaged over micro-batches
    worst: float  # the largest of a layer's in one micro-batch


class Simulation(NamedTuple):
    shape: Shape
    steps: tuple[int, int]  # first and last
    drops: list[Drops]
    loads: list[Load]


def simulate(
    path: str | Path,
    capacity_factors: Sequence[float] = (1.0, 1.25, 1.5, 2.0),
    ranks: Sequence[int] = (),
    placements: Sequence[str] = PLACEMENTS,
) -> Simulation:
    """What the recorded choices would drop at these capacity factors, ceil(factor * T * K / E) slots an expert, and how
    uneven ranks would be with each rank holding E / ranks experts.

    placements: "contiguous", ranks are runs of experts; "balanced", of each layer the expert with most rows in the
    whole file goes first, to the rank with fewest among those with room. A torn last block is left out.

    Errors: ValueError for a file without whole blocks, factors that are not positive, ranks that do not divide E.
    """
    file, shape = _open("FILE", Path(path))
    E = shape.num_experts
    for factor in capacity_factors:
        if not factor > 0:
            check.fail("routing", "--capacity-factor", "positive", factor)
    for size in ranks:
        if size < 1 or E % size:
            check.fail("routing", "--ep", f"a divisor of {E} (the experts)", size)
    for placement in placements:
        check.option("routing", "--placement", placement, PLACEMENTS)
    capacities = [math.ceil(factor * shape.tokens * shape.top_k / E) for factor in capacity_factors]
    cases = [(size, placement) for size in ranks for placement in placements]
    with file:
        blocks = list(_blocks(file))
        if not blocks:
            check.fail("routing", "FILE", "a file with at least one whole block", repr(str(path)))
        count_LE = sum(_count(file, block, shape) for block in blocks)
        homes = [_place(count_LE, *case) for case in cases]
        slots_L, worst_F, worst_C = count_LE.sum(1), np.zeros(len(capacities)), np.ones(len(cases))
        dropped_FL, uneven_CL = (np.zeros((len(each), shape.layers)) for each in (capacities, cases))
        for block in blocks:
            load_LE = _count(file, block, shape)
            total_L = load_LE.sum(1)
            for f, capacity in enumerate(capacities):
                over_L = np.maximum(load_LE - capacity, 0).sum(1)
                dropped_FL[f] += over_L
                worst_F[f] = max(worst_F[f], (over_L / np.maximum(total_L, 1)).max())
            for c, (size, _) in enumerate(cases):
                peak_L = np.take_along_axis(load_LE, homes[c], 1).reshape(-1, size, E // size).sum(2).max(1)
                share_L = np.where(total_L, peak_L * size / np.maximum(total_L, 1), 1)
                uneven_CL[c] += share_L / len(blocks)
                worst_C[c] = max(worst_C[c], share_L.max())
    rate_FL = dropped_FL / np.maximum(slots_L, 1)
    return Simulation(
        shape,
        (blocks[0].step, blocks[-1].step),
        [
            Drops(*row, float(dropped_L.sum() / max(slots_L.sum(), 1)), rate_L.tolist(), float(worst))
            for *row, dropped_L, rate_L, worst in zip(capacity_factors, capacities, dropped_FL, rate_FL, worst_F)
        ],
        [Load(*case, uneven_L.tolist(), float(worst)) for case, uneven_L, worst in zip(cases, uneven_CL, worst_C)],
    )


def table(found: Simulation) -> str:
    """A simulation as text, for a terminal."""
    shape, (first, last) = found.shape, found.steps
    name = lambda values_L: f"{shape.first_layer + int(np.argmax(values_L))}"
    lines = [
        f"steps {first} to {last}, {shape.layers} layers, {shape.micro_batches} x {shape.tokens} tokens a step, "
        f"{shape.top_k} of {shape.num_experts} experts"
    ]
    if found.drops:
        head = ("capacity factor", "slots an expert", "dropped", "worst layer", "worst micro-batch")
        rows = [
            (f"{d.factor:g}", d.capacity, f"{d.rate:.2%}", f"{max(d.rate_L):.2%} ({name(d.rate_L)})", f"{d.worst:.2%}")
            for d in found.drops
        ]
        lines += ["", *_columns(head, rows)]
    if found.loads:
        head = ("ranks", "placement", "experts a rank", "rows, max/mean", "worst layer", "worst micro-batch")
        rows = []
        for load in found.loads:
            mean_L = load.max_over_mean_L
            mean, worst = sum(mean_L) / len(mean_L), f"{max(mean_L):.2f} ({name(mean_L)})"
            each = shape.num_experts // load.ranks
            rows.append((load.ranks, load.placement, each, f"{mean:.2f}", worst, f"{load.worst:.2f}"))
        lines += ["", *_columns(head, rows)]
    return "\n".join(lines)


def _columns(head: tuple[str, ...], rows: list[tuple]) -> list[str]:
    widths = [max(len(str(row[i])) for row in (head, *rows)) for i in range(len(head))]
    return ["  ".join(f"{cell!s:>{width}}" for cell, width in zip(row, widths)) for row in (head, *rows)]


def _place(count_LE: np.ndarray, ranks: int, placement: str) -> np.ndarray:
    """[L, E], the experts in the order of their ranks, E / ranks each."""
    L, E = count_LE.shape
    if placement == "contiguous":
        return np.tile(np.arange(E), (L, 1))
    home_LE = []
    for count_E in count_LE:
        held, rows = [[] for _ in range(ranks)], [0] * ranks
        for e in np.argsort(-count_E, kind="stable").tolist():
            rank = min((r for r in range(ranks) if len(held[r]) < E // ranks), key=lambda r: rows[r])
            held[rank].append(e)
            rows[rank] += int(count_E[e])
        home_LE.append([e for experts in held for e in experts])
    return np.array(home_LE)


def _count(file, block: _Block, shape: Shape) -> np.ndarray:
    """[L, E], how often each expert was chosen in a block."""
    ids_LR = _read(file, block, shape).reshape(shape.layers, -1)
    return np.stack([np.bincount(ids_R + 1, minlength=shape.num_experts + 1)[1:] for ids_R in ids_LR])


def _fit(option: str, path: Path, got: Shape, wanted: Shape) -> None:
    differing = [name for name in Shape._fields if getattr(got, name) != getattr(wanted, name)]
    if differing:
        say = lambda shape: ", ".join(f"{name} = {getattr(shape, name)}" for name in differing)
        check.fail("routing", option, f"a file with {say(wanted)}", f"{path} with {say(got)}")


def _open(option: str, path: Path):
    """The file and its shape."""
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        check.fail("routing", option, "a recorded file", f"{str(path)!r}: {error.strerror}")
    return file, _header(option, path, file)


def _header(option: str, path: Path, file) -> Shape:
    header = file.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        check.fail("routing", option, "a file made by --routing.record", repr(str(path)))
    _, version, *shape = _HEADER.unpack(header)
    if version != _VERSION:
        check.fail("routing", option, f"of format {_VERSION}", f"{path} of format {version}")
    return Shape(*shape)


def _head(step: int, index: int, width: int, payload: bytes) -> bytes:
    head = _BLOCK.pack(step, index, width, len(payload), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(payload, zlib.crc32(head)))


def _blocks(file) -> Iterator[_Block]:
    """The blocks of a file up to the first that is torn."""
    start = _HEADER.size
    while True:
        file.seek(start)
        head = file.read(_BLOCK.size)
        if len(head) < _BLOCK.size:
            return
        step, index, width, size, _ = _BLOCK.unpack(head)
        payload = file.read(size)
        if len(payload) < size or _head(step, index, width, payload) != head:
            return
        start += _BLOCK.size
        yield _Block(step, index, width, start, start + size)
        start += size


def _read(file, block: _Block, shape: Shape) -> np.ndarray:
    """[L, T, K] int64, -1 for a slot that chooses nothing."""
    file.seek(block.start)
    ids_R = np.frombuffer(zlib.decompress(file.read(block.end - block.start)), f"<u{block.width}")
    return ids_R.reshape(shape.layers, shape.tokens, shape.top_k).astype(np.int64) - 1
