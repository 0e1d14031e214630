"""A model's parameters by unit, and the bytes of a unit: header, weights, optimizer states, gradients."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fastmoe.offload import disk

REGIONS = ("weights", "states", "grads")
Span = tuple[int, tuple[int, ...], torch.dtype]  # first byte, shape, dtype


@dataclass(eq=False)
class Piece:
    """One parameter. weight: its span among the weights, and its gradient's among the gradients."""

    name: str
    group: int | None  # of the optimizer; None: not trained
    index: int  # its place among the optimizer's parameters
    weight: Span
    states: dict[str, Span]
    scalars: dict = field(default_factory=dict)  # its state beside the tensors
    param: nn.Parameter | None = None
    absent: torch.Tensor | None = None  # what the parameter holds while its weights are elsewhere

    @property
    def trained(self) -> bool:
        return self.group is not None


class Unit:
    """Parameters that move at once. size: bytes by region, whole pages; a region's first byte in the unit's file is
    `start[region]`; gradients have a file of their own.
    """

    def __init__(self, name: str, modules: list[str], params: dict[str, torch.Tensor], optimizer, places: dict):
        self.name, self.modules, self.pieces = name, modules, []
        self.place = -1  # in the order of use; -1: the rest of the model, which never moves
        ends = dict.fromkeys(("weights", "states"), 0)

        def span(region: str, shape: Sequence[int], dtype: torch.dtype) -> Span:
            first = -(-ends[region] // 64) * 64
            ends[region] = first + torch.Size(shape).numel() * dtype.itemsize
            return first, tuple(shape), dtype

        for param_name, param in params.items():
            group, index = places.get(id(param), (None, -1)) if param.requires_grad else (None, -1)
            layout = {} if group is None else optimizer.layout(param, optimizer.param_groups[group])
            states = {key: span("states", *kind) for key, kind in layout.items()}
            self.pieces.append(Piece(param_name, group, index, span("weights", param.shape, param.dtype), states))
        self.size = {region: disk.pages(ends[region]) for region in ends}
        self.size["grads"] = self.size["weights"]
        self.header = disk.pages(256 + 128 * len(self.pieces))
        self.start = {"weights": self.header, "states": self.header + self.size["weights"], "grads": 0}
        self.file_size = self.header + self.size["weights"] + self.size["states"]
        self.trained = sum(piece.trained for piece in self.pieces)
        self.tier = ""
        self.memory: dict[str, torch.Tensor] = {}  # by region, where a tier is memory
        self.file: disk.File | None = None
        self.grad_file: disk.File | None = None
        self.coming: dict[str, Future] = {}  # by region, the last read into a slot
        self.writing: Future | None = None
        self.landed = 0
        self.kept = [False] * len(self.pieces)  # whose gradients of this step are kept
        self.grads: list[torch.Tensor | None] = []  # kept ones, of a unit in the fastest tier
        self.squares: list[torch.Tensor | None] = []

    def views(self, bytes_: torch.Tensor, region: str = "weights") -> list:
        """A tensor of each piece on the bytes of a region; of "states" a dict."""
        if region == "states":
            return [{key: _view(bytes_, span) for key, span in piece.states.items()} for piece in self.pieces]
        return [_view(bytes_, piece.weight) for piece in self.pieces]

    def read(self, region: str, out: torch.Tensor) -> None:
        if region in self.memory:
            out.copy_(self.memory[region])
        else:
            (self.grad_file if region == "grads" else self.file).read(out, self.start[region])

    def write(self, region: str, data: torch.Tensor) -> None:
        if region in self.memory:
            if data is not self.memory[region]:
                self.memory[region].copy_(data)
        else:
            self.save(region, data)

    def save(self, region: str, data: torch.Tensor) -> None:
        (self.grad_file if region == "grads" else self.file).write(data, self.start[region])

    def replace(self, header: dict, weights: torch.Tensor, states: torch.Tensor) -> None:
        """Writes the unit's file, and returns when it is on the disk."""
        self.save("weights", weights)
        self.save("states", states)
        self.seal(header)

    def seal(self, header: dict) -> None:
        self.file.write(disk.seal(header, self.header), 0)
        self.file.sync()

    def describe(self, step: int) -> dict:
        return {"unit": self.name, "step": step, "scalars": [piece.scalars for piece in self.pieces]}

    def read_header(self) -> dict | None:
        record = disk.buffer(self.header)
        self.file.read(record, 0)
        return disk.unseal(record)

    def adopt(self, header: dict) -> None:
        for piece, scalars in zip(self.pieces, header["scalars"]):
            piece.scalars = scalars

    def bind(self, weights: torch.Tensor | None) -> None:
        """Lets the parameters hold these bytes, or, with None, nothing."""
        for piece, view in zip(self.pieces, self.views(weights) if weights is not None else self.pieces):
            piece.param.data = piece.absent if weights is None else view

    def new_states(self, optimizer, weights: torch.Tensor, states: torch.Tensor) -> None:
        """Fills `states` with those before the first update."""
        for piece, weight, views in zip(self.pieces, self.views(weights), self.views(states, "states")):
            if piece.trained:
                group, unused = optimizer.param_groups[piece.group], list(views.values())[::-1]
                state = optimizer.new_state(
                    weight, group, piece.index, lambda *_, unused=unused, **__: unused.pop().zero_()
                )
                piece.scalars = {key: value for key, value in state.items() if key not in views}

    def update(self, optimizer, weights: torch.Tensor, states: torch.Tensor, grads: Sequence, scale: float) -> None:
        """One step of the optimizer on these bytes. grads: of each piece, None where it has none.

        What an update changes in the settings of a group is left to `count_step`: they are the same for all units.
        """
        weights, states = self.views(weights), self.views(states, "states")
        by_group: dict[int, list[int]] = {}
        for i, (piece, grad) in enumerate(zip(self.pieces, grads)):
            if grad is not None:
                by_group.setdefault(piece.group, []).append(i)
        with torch.no_grad():
            for group, members in by_group.items():
                full = [{**self.pieces[i].scalars, **states[i]} for i in members]
                for state in full:
                    state["step"] += 1
                params, settings = [weights[i] for i in members], dict(optimizer.param_groups[group])
                optimizer.update(params, [grads[i] for i in members], full, settings, scale)
                for i, state in zip(members, full):
                    self.pieces[i].scalars = {key: value for key, value in state.items() if key not in states[i]}


def count_step(optimizer) -> None:
    """What a step does to the groups themselves, once for all units."""
    for group in optimizer.param_groups:
        optimizer.update([], [], [], group, 1.0)


def _view(bytes_: torch.Tensor, span: Span) -> torch.Tensor:
    first, shape, dtype = span
    return bytes_[first : first + torch.Size(shape).numel() * dtype.itemsize].view(dtype).view(shape)


def places(optimizer) -> dict[int, tuple[int, int]]:
    """By id of each parameter its group and its place among all."""
    every = [(i, param) for i, group in enumerate(optimizer.param_groups) for param in group["params"]]
    return {id(param): (group, index) for index, (group, param) in enumerate(every)}


def split(model: nn.Module, units: Callable, optimizer) -> list[Unit]:
    """The rest of the model, then its units in order. ValueError where units share parameters or hold none."""
    paths = {id(module): name for name, module in model.named_modules()}
    names = {id(param): name for name, param in model.named_parameters()}
    where, taken, made = places(optimizer), {}, []
    for given in units(model):
        modules = [given] if isinstance(given, nn.Module) else list(given)
        strange = [type(module).__name__ for module in modules if id(module) not in paths]
        if strange:
            raise ValueError(f"fastmoe.offload: units must be modules of the model, got another {strange[0]}")
        params = {names[id(param)]: param for module in modules for param in module.parameters()}
        name = paths[id(modules[0])] + (f"..{paths[id(modules[-1])]}" if len(modules) > 1 else "")
        shared = [key for key in params if key in taken]
        if shared or not params:
            wanted = f"have parameters that no other has, got {shared[0] if shared else 'none'}"
            raise ValueError(f"fastmoe.offload: unit {name} must {wanted}")
        taken |= params
        made.append(Unit(name, [paths[id(module)] for module in modules], params, optimizer, where))
    if not made:
        raise ValueError("fastmoe.offload: units must give at least one module, got none")
    rest = {name: param for name, param in model.named_parameters() if name not in taken}
    for place, unit in enumerate(made):
        unit.place = place
    return [Unit("rest", [], rest, optimizer, where), *made]


def digest(units: Sequence[Unit], optimizer) -> str:
    """Of what decides the meaning of the files."""
    layout = [
        [unit.name, [[p.name, p.group, p.index, str(p.weight), str(p.states)] for p in unit.pieces]] for unit in units
    ]
    text = json.dumps([1, type(optimizer).__name__, getattr(optimizer, "seed", None), layout])
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def watching(units: Iterable[Unit], twin: nn.Module, found: Callable[[Unit, list[nn.Module]], None]) -> Iterator[None]:
    """Calls `found` with each unit's modules as soon as they were made and given to their parent, in order.

    twin: the same model, made before.
    """

    def kind(module: nn.Module) -> tuple:
        return type(module), [(name, param.shape) for name, param in module.named_parameters()]

    awaited = [(unit, kind(twin.get_submodule(path))) for unit in units for path in unit.modules]
    waiting: list[nn.Module] = []

    def registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if awaited and child is not None and type(child) is awaited[0][1][0] and kind(child) == awaited[0][1]:
            unit, _ = awaited.pop(0)
            waiting.append(child)
            if len(waiting) == len(unit.modules):
                found(unit, waiting.copy())
                waiting.clear()

    handle = torch_module.register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


class Slots:
    """Buffers through which units pass. A unit keeps its own while pinned, and until another unit needs it."""

    def __init__(self, count: int, size: int, device: torch.device):
        self.count, self.bytes = count, count * size
        self._free = [disk.buffer(size, device) for _ in range(count)] if size else [None] * count
        self._held: dict[Unit, list] = {}  # unit -> buffer, pins, whether it is being filled; oldest first
        self._asked: dict[Unit, int] = {}  # unit -> pins, before it has a buffer
        self._changed, self._stopped = threading.Condition(), False

    def stop(self) -> None:
        """Ends all waiting, for good."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def pin(self, unit: Unit) -> bool:
        """Whether the unit has no buffer and none is asked for, so that the caller must ask by `take`."""
        with self._changed:
            if unit in self._held:
                self._held[unit] = entry = self._held.pop(unit)
                entry[1] += 1
                return False
            first = unit not in self._asked
            self._asked[unit] = self._asked.get(unit, 0) + 1
            return first

    def take(self, unit: Unit) -> torch.Tensor:
        """A buffer to fill, for a unit that was pinned; waits for one."""
        with self._changed:
            while not self._free:
                idle = next(
                    (other for other, (_, pins, filling) in self._held.items() if not pins and not filling), None
                )
                if idle is not None:
                    self._free.append(self._held.pop(idle)[0])
                elif self._stopped:
                    raise RuntimeError("fastmoe.Engine: a step before did not finish")
                else:
                    self._changed.wait()
            buffer = self._free.pop()
            self._held[unit] = [buffer, self._asked.pop(unit), True]
            return buffer

    def peek(self, unit: Unit) -> torch.Tensor:
        with self._changed:
            return self._held[unit][0]

    def filled(self, unit: Unit) -> None:
        with self._changed:
            self._held[unit][2] = False
            self._changed.notify_all()

    def unpin(self, unit: Unit) -> None:
        with self._changed:
            if unit in self._asked:
                self._asked[unit] -= 1
            elif unit in self._held:
                self._held[unit][1] -= 1
            self._changed.notify_all()

    def drop(self, unit: Unit) -> None:
        with self._changed:
            if unit in self._held:
                self._free.append(self._held.pop(unit)[0])
            self._changed.notify_all()


class Journal:
    """A file with the next content of one unit: whole, or known not to be."""

    def __init__(self, path: Path, units: Sequence[Unit], traffic: disk.Traffic):
        self._head = disk.PAGE + max(unit.header for unit in units)
        size = self._head + max(unit.file_size for unit in units)
        self._file = disk.File(path, size, not path.exists(), traffic)

    def write(self, unit: Unit, header: dict, weights: torch.Tensor, states: torch.Tensor) -> None:
        about = {"place": unit.place, "step": header["step"], "crc": [disk.crc(weights), disk.crc(states)]}
        self._file.write(disk.seal(about, disk.PAGE), 0)
        self._file.write(disk.seal(header, unit.header), disk.PAGE)
        self._file.write(weights, self._head)
        self._file.write(states, self._head + weights.nbytes)
        self._file.sync()

    def clear(self) -> None:
        self._file.write(disk.buffer(disk.PAGE).zero_(), 0)
        self._file.sync()

    def finish(self, units: Sequence[Unit], step: int) -> None:
        """Puts a unit of `step` in its place; it may be half there."""
        about = disk.unseal(self._read(disk.PAGE, 0))
        if about and about["step"] == step:
            unit = units[about["place"] + 1]
            header = disk.unseal(self._read(unit.header, disk.PAGE))
            weights = self._read(unit.size["weights"], self._head)
            states = self._read(unit.size["states"], self._head + weights.nbytes)
            if header and [disk.crc(weights), disk.crc(states)] == about["crc"]:
                unit.replace(header, weights, states)

    def _read(self, size: int, offset: int) -> torch.Tensor:
        out = disk.buffer(size)
        self._file.read(out, offset)
        return out

    def close(self) -> None:
        self._file.close()
