"""Training whose weights and optimizer states live in device memory, host memory or files, and move by units."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from fastmoe.offload import disk
from fastmoe.offload.plan import TIERS, Plan, plan
from fastmoe.offload.units import REGIONS, Journal, Slots, Unit, count_step, digest, places, split, watching

_SLOTS = {"weights": 3, "states": 2, "grads": 2}  # in use, being read, being written


class Step(NamedTuple):
    step: int  # steps done
    norm: float  # of all gradients, before clipping
    scale: float  # the gradients were multiplied by
    bad: str | None  # why the step was skipped: "loss", or the first parameter whose gradient is not finite


class Engine:
    """Trains a model whose weights and optimizer states need not fit in memory.

    make_model() -> the model, make_optimizer(model) -> an optimizer of fastmoe.optim. Both are called twice, first
    without memory (torch.device("meta")) to see the sizes. While the model is made for good, each unit leaves for its
    tier once its parent has it, so that the model itself may be larger than memory (its parent must make one at a time,
    as `nn.ModuleList(Block() for ...)` does). Random numbers are drawn as without the engine.

    budgets: bytes by tier, any of "device", "host", "disk"; work is done in the fastest one named, which is "device"
    where `device` is not the CPU. `plan` says what goes where, ValueError what is missing. directory: of the files,
    made if absent. units: model -> modules, or lists of modules (a group of experts), in the order of use; their
    parameters, weights, gradients and states move together. The rest of the model never moves. Between uses the
    parameters of a unit elsewhere hold nothing. Where layers are not recomputed in backward, autograd gets their
    weights anew.

    A step: `backward(loss)` `accumulation` times, then `step()`; what optimizer.step would have done, bit for bit.
    clip_norm: 0, or the norm gradients are scaled down to. clip: "exact", after backward, by the step's own norm,
    gradients being kept beside the states; "previous", by the norm of the step before. With that, or without clipping,
    a unit is updated inside backward as soon as its gradients are there (so set the learning rate before), and a
    gradient that is not finite ends the run; otherwise such a step is skipped and counted in `skipped`.

    durable: all is on disk after each step, gradients first, then each unit by way of a journal: after a crash at any
    point resume=True finds the last step whole, or finishes it. Else the files can be resumed after `flush` or `close`
    alone. resume also takes other budgets.

    Errors: ValueError naming the argument; OSError naming the file; FileExistsError, FileNotFoundError; RuntimeError
    after a step that did not finish.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        budgets: Mapping[str, int],
        directory: str | Path,
        *,
        units: Callable[[nn.Module], Iterable] = lambda model: model.layers,
        device: str | torch.device = "cpu",
        accumulation: int = 1,
        clip_norm: float = 0.0,
        clip: str = "exact",
        durable: bool = False,
        resume: bool = False,
    ):
        rules = [
            ("accumulation", accumulation, accumulation >= 1, "at least 1"),
            ("clip_norm", clip_norm, clip_norm >= 0, "at least 0"),
            ("clip", clip, clip in ("exact", "previous"), "exact or previous"),
        ]
        for name, value, good, wanted in rules:
            if not good:
                raise ValueError(f"fastmoe.Engine: {name} must be {wanted}, got {value!r}")
        self.device, self.accumulation, self.clip_norm, self.durable = (
            torch.device(device),
            accumulation,
            clip_norm,
            durable,
        )
        self.clip, self.two_phase = clip, durable or (clip_norm > 0 and clip == "exact")
        self._keeps = self.two_phase or accumulation > 1  # gradients, beside the states
        self.steps, self.skipped, self.norm, self.state = 0, 0, None, None
        self.waited, self.traffic = 0.0, disk.Traffic()
        self._cause = self._untold = None
        self._directory, self._record = Path(directory), Path(directory) / "commit"
        self._resume, self._whole = resume, True
        drawn = torch.get_rng_state()
        with torch.device("meta"):
            twin = make_model()
        torch.set_rng_state(drawn)
        optimizer = make_optimizer(twin)
        if not hasattr(optimizer, "new_state"):
            raise ValueError(
                f"fastmoe.Engine: make_optimizer must return one of fastmoe.optim, got {type(optimizer).__name__}"
            )
        self.units = split(twin, units, optimizer)
        self._digest = digest(self.units, optimizer)
        self.plan = self._place(budgets, self.units)
        self._compute = next(iter(self.plan.budgets))
        if (self._compute == "device") < (self.device.type != "cpu"):
            raise ValueError(f"fastmoe.Engine: budgets must name device, which is {self.device}, got {list(budgets)}")
        print(self.plan, flush=True)
        record = self._open_directory()
        try:
            self._open_tiers()
            self._make(make_model, make_optimizer, units, twin, optimizer)
        except BaseException:
            if not resume:
                clear(self._directory)
            raise
        self._start(record)

    def _place(self, budgets: Mapping[str, int], units: list[Unit]) -> Plan:
        regions = REGIONS if self._keeps else REGIONS[:2]
        sizes = {unit.name: unit.header + sum(unit.size[region] for region in regions) for unit in units}
        slots = {region: _SLOTS[region] * size for region, size in self._slot_sizes().items()}
        if self.durable:  # all gradients pass, wherever a unit lives
            sizes[self.units[0].name] += slots.pop("grads")
        flight = sum(slots.values()) + max(unit.size["grads"] for unit in self.units[1:])  # those that autograd makes
        journal = max(unit.file_size for unit in units) if self.durable else None
        return plan(sizes, budgets, dict.fromkeys(sizes, flight), [self.units[0].name], journal)

    def _slot_sizes(self) -> dict[str, int]:
        largest = {region: max(unit.size[region] for unit in self.units[1:]) for region in REGIONS}
        if self.durable:
            largest["grads"] = max(unit.size["grads"] for unit in self.units)
        return largest

    def _open_directory(self) -> dict | None:
        """Makes it, or reads its commit record."""
        found = disk.get(self._record)
        if not self._resume:
            if found is not None or list(self._directory.glob("unit-*")):
                raise FileExistsError(
                    f"fastmoe.Engine: directory must hold no states (resume=True goes on from them), got "
                    f"{self._directory}"
                )
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise disk.named(error, "directory must be one that can be made", self._directory) from None
            return None
        if found is None:
            raise FileNotFoundError(
                f"fastmoe.Engine: directory must hold states of a run that was closed or durable, got "
                f"{self._directory} without {self._record.name}"
            )
        record = disk.unseal(found)
        if record is None:
            raise RuntimeError(f"fastmoe.Engine: {self._record} must be a whole record, got a damaged one")
        if record["layout"] != self._digest:
            raise ValueError(
                f"fastmoe.Engine: {self._directory} must hold states of this model, units and optimizer, got those of "
                "others (names, shapes, dtypes or order differ) or of another version"
            )
        return record

    def _open_tiers(self) -> None:
        for unit in self.units:
            unit.tier = self.plan.tier[unit.name]
            if self._resume or self._on_disk(unit):
                self._open_files(unit, not self._resume)
            if unit.tier != "disk":
                self._give_memory(unit)
        if self.durable:
            self._journal = Journal(self._directory / "journal", self.units, self.traffic)
        moving = self._slot_sizes()
        if not self.durable and all(unit.tier == self._compute for unit in self.units):
            moving = dict.fromkeys(REGIONS, 0)
        self._slots = {region: Slots(_SLOTS[region], moving[region], self.device) for region in REGIONS}

    def _open_files(self, unit: Unit, create: bool) -> None:
        unit.file = disk.File(self._unit_path(unit), unit.file_size, create, self.traffic)
        if self._on_disk(unit) and self._keeps:
            path = self._grads_path(unit)
            unit.grad_file = disk.File(path, unit.size["grads"], not path.exists(), self.traffic)

    def _unit_path(self, unit: Unit) -> Path:
        return self._directory / f"unit-{unit.place + 1:05d}"

    def _grads_path(self, unit: Unit) -> Path:
        return self._directory / f"grads-{unit.place + 1:05d}"

    def _on_disk(self, unit: Unit) -> bool:
        return unit.tier == "disk" or self.durable

    def _give_memory(self, unit: Unit) -> None:
        home = unit.tier == self._compute
        where = {"device": self.device if home else "cpu", "pinned": self.device.type != "cpu" and not home}
        regions = REGIONS[:2] if home or not self._keeps else REGIONS
        unit.memory = {region: disk.buffer(unit.size[region], **where) for region in regions}

    def _make(self, make_model, make_optimizer, units, twin: nn.Module, optimizer) -> None:
        """The model and its optimizer; on the way each unit goes to its tier."""
        done = set()

        def place(unit: Unit, params: list[nn.Parameter]) -> None:
            weights, states = (self._region(unit, region, self.device) for region in REGIONS[:2])
            if not self._resume:
                for view, param in zip(unit.views(weights), params):
                    view.copy_(param.detach())
                unit.new_states(optimizer, weights, states)
                unit.write("weights", weights)
                unit.write("states", states)
                if self.durable:
                    unit.save("weights", weights)
                    unit.save("states", states)
            for piece, view, param in zip(unit.pieces, unit.views(weights), params):
                piece.absent = torch.zeros((), dtype=view.dtype, device=self.device).expand(view.shape)
                param.data = piece.absent
            done.add(unit)

        def found(unit: Unit, modules: list[nn.Module]) -> None:
            seen = {id(param): param for module in modules for param in module.parameters()}
            place(unit, list(seen.values()))

        with watching(self.units[1:], twin, found):
            self.model = make_model()
        named = dict(self.model.named_parameters())
        wanted = [piece.name for unit in self.units for piece in unit.pieces]
        if sorted(named) != sorted(wanted):
            raise ValueError("fastmoe.Engine: make_model must make the same model each time, got another one")
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.device)
        for unit in self.units:
            if unit not in done:
                place(unit, [named[piece.name] for piece in unit.pieces])
            for piece in unit.pieces:
                piece.param = named[piece.name]
        self.optimizer = make_optimizer(self.model)
        where = places(self.optimizer)
        for piece in (piece for unit in self.units for piece in unit.pieces if piece.trained):
            if where.get(id(piece.param)) != (piece.group, piece.index):
                raise ValueError(f"fastmoe.Engine: make_optimizer must give {piece.name} the same place each time")

    def _region(self, unit: Unit, region: str, device: torch.device) -> torch.Tensor:
        """Memory for a region: the unit's own, or some for now."""
        return unit.memory[region] if region in unit.memory else disk.buffer(unit.size[region], device)

    def _start(self, record: dict | None) -> None:
        self._reader, self._worker, self._writer = (
            ThreadPoolExecutor(1, f"offload-{name}") for name in ("read", "work", "write")
        )
        self._side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._order = self.units[1:]
        self._ahead: Unit | None = None  # read before anyone asked
        self._backward = False
        self._micro, self._lost = 0, None
        self._open: list[Unit] = []  # pinned since their backward began
        self._done: set[Unit] = set()  # whose backward is over
        self._jobs: list[Future] = []
        if record is not None:
            self._restore(record)
        elif self.durable:
            self._commit_files()
        for unit in self.units:
            if unit.tier == self._compute:
                unit.bind(unit.memory["weights"])
            for path in unit.modules:
                self._wrap(unit, self.model.get_submodule(path))
            for piece in unit.pieces:
                if piece.trained:
                    piece.param.register_post_accumulate_grad_hook(lambda _, unit=unit: self._landed(unit))

    # Moving weights

    def _wrap(self, unit: Unit, module: nn.Module) -> None:
        inner = module.forward

        def forward(*args, **kwargs):
            if unit.tier == self._compute:
                return inner(*args, **kwargs)
            weights = self._enter(unit)
            unit.bind(weights)
            try:
                recomputed = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
                if self._backward or recomputed or not torch.is_grad_enabled():
                    return inner(*args, **kwargs)
                with saved_tensors_hooks(*self._hooks(unit, weights)):
                    return inner(*args, **kwargs)
            finally:
                unit.bind(None)
                if not self._backward:
                    self._slots["weights"].unpin(unit)

        module.forward = forward

    def _hooks(self, unit: Unit, weights: torch.Tensor) -> tuple[Callable, Callable]:
        """For autograd: what lies in the unit's weights is saved as its place there."""
        first, storage = weights.data_ptr(), weights.untyped_storage().data_ptr()

        def pack(tensor: torch.Tensor):
            if tensor.untyped_storage().data_ptr() != storage:
                return tensor
            return tensor.data_ptr() - first, tensor.shape, tensor.stride(), tensor.dtype

        def unpack(packed):
            if isinstance(packed, torch.Tensor):
                return packed
            start, shape, stride, dtype = packed
            whole = self._enter(unit)[start:]
            return (
                whole[: whole.nbytes // dtype.itemsize * dtype.itemsize]
                .view(dtype)
                .as_strided(shape, stride, whole.storage_offset() // dtype.itemsize)
            )

        return pack, unpack

    def _enter(self, unit: Unit) -> torch.Tensor:
        """The unit's weights, pinned: until its forward is over, or, in backward, until its gradients have landed."""
        self._check_whole()
        slots = self._slots["weights"]
        if self._backward:
            if unit in self._open:
                return unit.coming["weights"].result()
            if unit in self._done and not (self.two_phase or self._micro + 1 < self.accumulation):
                raise RuntimeError(f"fastmoe.Engine: {unit.name} is used in backward after its gradients had landed")
            while len(self._open) >= slots.count - 1:  # its parameters without gradients keep it open
                self._complete(max(self._open, key=lambda other: other.place))
            self._open.append(unit)
        self._take_over(unit)
        if self._backward and self._updates_now():
            self._fetch(unit, "states")
        self._prefetch(unit.place + (-1 if self._backward else 1), -1 if self._backward else 1)
        return self._wait(unit.coming["weights"])

    def _take_over(self, unit: Unit) -> None:
        """Pins the unit's weights; a prefetch of them has done so already, one of others was in vain."""
        if self._ahead is not unit:
            if self._ahead is not None:
                self._slots["weights"].unpin(self._ahead)
            self._fetch(unit, "weights")
        self._ahead = None

    def _prefetch(self, place: int, direction: int) -> None:
        while 0 <= place < len(self._order) and self._order[place].tier == self._compute:
            place += direction
        if 0 <= place < len(self._order):
            self._ahead = self._order[place]
            self._fetch(self._ahead, "weights")

    def _fetch(self, unit: Unit, region: str) -> None:
        """Pins a region of the unit in a slot, and has it read where it is not there."""
        if unit.tier == self._compute:
            return
        if region != "weights" and unit.writing is not None:
            self._wait(unit.writing)
        if self._slots[region].pin(unit):
            unit.coming[region] = self._reader.submit(self._read, unit, region, self._now(), unit.writing)

    def _read(self, unit: Unit, region: str, event, writing: Future | None) -> torch.Tensor:
        slots = self._slots[region]
        out = slots.take(unit)[: unit.size[region]]
        try:
            if writing is not None:
                writing.result()
            with self._beside(event):
                unit.read(region, out)
        except BaseException:
            slots.drop(unit)
            raise
        slots.filled(unit)
        return out

    def _wait(self, future: Future):
        start = time.perf_counter()
        try:
            return future.result()
        except BaseException as error:
            self._break(error)
            self._untold = None
            raise self._cause from None
        finally:
            self.waited += time.perf_counter() - start

    def _now(self):
        """What a thread must wait for before it touches memory that the device works on."""
        return torch.cuda.current_stream(self.device).record_event() if self._side else None

    @contextmanager
    def _beside(self, event) -> Iterator[None]:
        if self._side is None:
            yield
        else:
            with torch.cuda.stream(self._side):
                self._side.wait_event(event)
                yield
                self._side.synchronize()

    def _bytes(self, unit: Unit, region: str) -> torch.Tensor:
        return unit.memory[region] if unit.tier == self._compute else self._wait(unit.coming[region])

    # A step

    def _updates_now(self) -> bool:
        return not self.two_phase and self._micro + 1 == self.accumulation

    def backward(self, loss: torch.Tensor) -> None:
        """Like loss.backward(). The gradients end in the engine, and with the last of a step its updates may begin."""
        self._check_whole()
        if self._micro == self.accumulation:
            raise ValueError(f"fastmoe.Engine: step() must follow {self.accumulation} calls of backward (accumulation)")
        if self._lost or not math.isfinite(loss.item()):
            self._lost = "loss"
        else:
            with self._unbroken():
                self._run_backward(loss)
        self._micro += 1

    def _run_backward(self, loss: torch.Tensor) -> None:
        if not self.durable:
            self._forget()
        self._backward = True
        self._done.clear()
        try:
            loss.backward()
            last = self._micro + 1 == self.accumulation
            left = (unit for unit in self.units if unit.landed or (last and any(unit.kept) and unit not in self._done))
            for unit in [*self._open[::-1], *left]:
                self._complete(unit)
        finally:
            self._backward = False
        for job in self._jobs:
            self._wait(job)
        self._jobs.clear()

    def _landed(self, unit: Unit) -> None:
        if not self._backward:
            raise RuntimeError("fastmoe.Engine: gradients must come by engine.backward(loss), not by loss.backward()")
        if unit in self._done:
            raise RuntimeError(f"fastmoe.Engine: a gradient of {unit.name} came after the others of its unit were used")
        unit.landed += 1
        if unit.landed == unit.trained:
            self._complete(unit)

    def _complete(self, unit: Unit) -> None:
        """Hands the unit's gradients over."""
        if unit in self._done:
            if unit in self._open:
                self._open.remove(unit)
                self._slots["weights"].unpin(unit)
            return
        self._done.add(unit)
        grads = [piece.param.grad if piece.trained else None for piece in unit.pieces]
        for piece, grad in zip(unit.pieces, grads):
            piece.param.grad = None
            if grad is not None and grad.layout != torch.strided:
                raise ValueError(f"fastmoe.Engine: the gradient of {piece.name} must be dense, got {grad.layout}")
        update = self._updates_now() and bool(unit.landed or any(unit.kept))
        if update and unit not in self._open:
            self._fetch(unit, "weights")
            self._fetch(unit, "states")
        elif not update and unit in self._open:
            self._slots["weights"].unpin(unit)
            if self._updates_now():
                self._wait(unit.coming["states"])
                self._slots["states"].drop(unit)
        if unit in self._open:
            self._open.remove(unit)
        unit.landed = 0
        last = self._micro + 1 == self.accumulation
        self._jobs.append(self._worker.submit(self._take, unit, grads, update, last, self._now()))

    def _take(self, unit: Unit, grads: list[torch.Tensor | None], update: bool, last: bool, event) -> None:
        """In the worker: adds what earlier micro-batches left, then updates the unit or keeps the gradients."""
        with self._beside(event):
            grads = self._sum(unit, grads)
            if last:
                unit.squares = [None if grad is None else _squares(grad) for grad in grads]
            if update:
                bad = self._bad([unit])
                if bad:
                    raise FloatingPointError(
                        f"fastmoe.Engine: step {self.steps + 1}: the gradient of {bad} is not finite, and other units "
                        "are updated already: start from a checkpoint (clip='exact' would skip the step)"
                    )
                self._update(unit, grads, self._scale(self.norm))
            elif any(grad is not None for grad in grads):
                self._keep(unit, grads)

    def _sum(self, unit: Unit, grads: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        if not any(unit.kept):
            return grads
        if unit.tier == self._compute:
            kept = unit.grads
        else:
            buffer = self._grads_slot(unit)
            if unit.writing is not None:
                unit.writing.result()
            unit.read("grads", buffer)
            kept = [view if there else None for view, there in zip(unit.views(buffer), unit.kept)]
        for i, grad in enumerate(grads):
            if grad is not None and kept[i] is not None:
                kept[i].add_(grad)
            elif grad is not None:
                kept[i] = grad
        return kept

    def _grads_slot(self, unit: Unit) -> torch.Tensor:
        slots = self._slots["grads"]
        if slots.pin(unit):
            slots.take(unit)
            slots.filled(unit)
        return slots.peek(unit)[: unit.size["grads"]]

    def _keep(self, unit: Unit, grads: list[torch.Tensor | None]) -> None:
        unit.kept = [grad is not None for grad in grads]
        if unit.tier == self._compute:
            unit.grads = grads
            if not self.durable:
                return
        if unit.writing is not None:
            unit.writing.result()
        buffer = self._grads_slot(unit)
        for view, grad in zip(unit.views(buffer), grads):
            if grad is not None and view.data_ptr() != grad.data_ptr():
                view.copy_(grad)
        unit.writing = self._writer.submit(self._write_grads, unit, buffer, self._now())

    def _write_grads(self, unit: Unit, buffer: torch.Tensor, event) -> None:
        try:
            with self._guarding(), self._beside(event):
                unit.write("grads", buffer)
                if self.durable and "grads" in unit.memory:
                    unit.save("grads", buffer)
        finally:
            self._slots["grads"].drop(unit)

    def step(self, state: object = None) -> Step:
        """Ends a step. state: anything that JSON holds, which a durable run finds again in `engine.state`, as of the
        last whole step, like the model's buffers (so change these before).
        """
        self._check_whole()
        if self._micro != self.accumulation:
            raise ValueError(
                f"fastmoe.Engine: step() must follow {self.accumulation} calls of backward (accumulation), "
                f"got {self._micro}"
            )
        norm, bad = self.gradients()
        scale = self._scale(norm if self.clip == "exact" else self.norm)
        self._micro, self._lost = 0, None
        if bad:
            self.skipped += 1
            self._drop_grads()
            return Step(self.steps, norm, 0.0, bad)
        with self._unbroken():
            if self.durable:
                self._commit(self.steps + 1, scale, norm, state)
            if self.two_phase:
                self._update_all(scale)
            count_step(self.optimizer)
            self.steps, self.norm, self.state = self.steps + 1, norm, state
            self._drop_grads()
        if self._ahead is None:
            self._prefetch(0, 1)
        return Step(self.steps, norm, scale, None)

    def gradients(self) -> tuple[float, str | None]:
        """Before `step`: their norm, and, where it is not finite, `Step.bad`."""
        squares = [value for unit in self.units for value in unit.squares if value is not None]
        norm = math.sqrt(sum(torch.stack(squares).tolist())) if squares else 0.0
        return (math.nan, self._lost) if self._lost else (norm, self._bad(self.units))

    def _scale(self, norm: float | None) -> float:
        return min(1.0, self.clip_norm / norm) if self.clip_norm and norm else 1.0

    def _bad(self, units: list[Unit]) -> str | None:
        named = ((piece.name, value) for unit in units for piece, value in zip(unit.pieces, unit.squares))
        return next((name for name, value in named if value is not None and not value.isfinite()), None)

    def _drop_grads(self) -> None:
        for unit in self.units:
            unit.kept, unit.grads, unit.squares = [False] * len(unit.pieces), [], []

    def _update(self, unit: Unit, grads: list[torch.Tensor | None], scale: float) -> None:
        """Updates the unit and hands it to the writer."""
        weights, states = (self._bytes(unit, region) for region in REGIONS[:2])
        unit.update(self.optimizer, weights, states, grads, scale)
        if unit.tier != self._compute or self.durable:
            header = unit.describe(self.steps + 1) if self.durable else None
            unit.writing = self._writer.submit(self._store, unit, weights, states, header, self._now())

    def _store(self, unit: Unit, weights: torch.Tensor, states: torch.Tensor, header: dict | None, event) -> None:
        """In the writer: puts the unit where it lives; with a header, by way of the journal."""
        try:
            with self._guarding(), self._beside(event):  # after a failure all stays, and above all the journal
                if header:
                    self._journal.write(unit, header, weights, states)
                    unit.replace(header, weights, states)
                if unit.memory or not header:
                    unit.write("weights", weights)
                    unit.write("states", states)
        finally:
            self._slots["weights"].unpin(unit)
            self._slots["states"].drop(unit)
            self._slots["grads"].drop(unit)

    def _update_all(self, scale: float) -> None:
        ready = [unit for unit in self.units if any(unit.kept)]
        if self._ahead is not None:
            self._slots["weights"].unpin(self._ahead)
            self._ahead = None
        for unit in ready[:1]:
            self._fetch_all(unit)
        for unit, following in zip(ready, [*ready[1:], None]):
            if following is not None:
                self._fetch_all(following)
            if unit.tier == self._compute:
                grads = unit.grads
            else:
                views = unit.views(self._bytes(unit, "grads"))
                grads = [view if there else None for view, there in zip(views, unit.kept)]
            self._update(unit, grads, scale)
        if self.durable:
            self._settle()

    def _fetch_all(self, unit: Unit) -> None:
        for region in REGIONS:
            self._fetch(unit, region)

    # Files

    def flush(self) -> None:
        """Puts all on the disk, for resume=True, until the next step changes it. Errors: RuntimeError, OSError."""
        self._check_whole()
        self._settle()
        for unit in self.units:
            if unit.file is None:
                unit.file = disk.File(self._unit_path(unit), unit.file_size, True, self.traffic)
            for region in REGIONS[:2] if unit.memory else ():
                unit.save(region, unit.memory[region])
        self._commit_files()

    def close(self) -> None:
        """Flushes and ends the threads: the directory can be resumed, this engine cannot go on."""
        self.flush()
        self._break(RuntimeError("fastmoe.Engine: it is closed"))
        for threads in (self._reader, self._worker, self._writer):
            threads.shutdown()
        for unit in self.units:
            for file in filter(None, (unit.file, unit.grad_file)):
                file.close()

    def _break(self, cause: BaseException) -> None:
        """Nothing can go on. The first cause is the one that whoever waits for something is told."""
        if self._whole:
            self._whole, self._cause, self._untold = False, cause, cause
        for slots in self._slots.values():
            slots.stop()

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        """For what must be done to its end."""
        self._check_whole()
        try:
            yield
        except BaseException as error:
            self._break(error)
            self._untold = None
            if error is self._cause:
                raise
            raise self._cause from None

    @contextmanager
    def _guarding(self) -> Iterator[None]:
        """For a thread that writes: not after a failure of any."""
        if not self._whole:
            raise RuntimeError("fastmoe.Engine: a write before failed")
        try:
            yield
        except BaseException as error:
            self._break(error)
            raise

    def _check_whole(self) -> None:
        if self._untold is not None:  # of a thread
            cause, self._untold = self._untold, None
            raise cause
        if not self._whole:
            remedy = "resume from the directory" if self.durable else "start from a checkpoint"
            raise RuntimeError(f"fastmoe.Engine: a step did not finish, or it is closed; {remedy}") from self._cause

    def _settle(self) -> None:
        for unit in self.units:
            if unit.writing is not None:
                self._wait(unit.writing)
                unit.writing = None

    def _forget(self) -> None:
        """Before the files change: takes away the record that they are whole, and those that will not follow."""
        if self._record.exists():
            self._record.unlink()
            disk.sync_directory(self._directory)
            for unit in self.units:
                if unit.file is not None and not self._on_disk(unit):
                    unit.file.remove()
                    unit.file = None

    def _commit_files(self) -> None:
        """The unit files are a whole step: says so in their headers and in the record."""
        for unit in self.units:
            unit.seal(unit.describe(self.steps))
        if self.durable:
            self._journal.clear()
        disk.sync_directory(self._directory)
        self._commit(self.steps, 1.0, self.norm, self.state)

    def _commit(self, step: int, scale: float, norm: float | None, state: object) -> None:
        """The gradients of `step` are complete: from here on it will be done, whatever happens."""
        self._settle()
        for unit in self.units:
            if any(unit.kept):
                unit.grad_file.sync()
        buffers = {name: buffer.cpu().contiguous() for name, buffer in self._buffers().items()}
        content = bytearray(
            b"".join(buffer.reshape(-1).view(torch.uint8).numpy().tobytes() for buffer in buffers.values()) or b"none"
        )
        data = torch.frombuffer(content, dtype=torch.uint8)
        disk.put(self._buffers_path(step), data)
        record = {
            "layout": self._digest,
            "durable": self.durable,
            "step": step,
            "scale": scale,
            "norm": norm,
            "skipped": self.skipped,
            "state": state,
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups],
            "kept": [unit.kept for unit in self.units],
            "crc": disk.crc(data),
        }
        disk.put(self._record, disk.seal(record))

    def _buffers(self) -> dict[str, torch.Tensor]:
        saved = self.model.state_dict().keys()
        return {name: buffer for name, buffer in self.model.named_buffers() if name in saved}

    def _buffers_path(self, step: int) -> Path:
        return self._directory / f"buffers-{step % 2}"

    def _restore(self, record: dict) -> None:
        """The state of the record's step: finishes it where that is still to do."""
        for group, saved in zip(self.optimizer.param_groups, record["groups"]):
            group.update(saved)
        self.steps, self.norm, self.state = record["step"], record["norm"], record["state"]
        self.skipped = record["skipped"]
        path = self._buffers_path(self.steps)
        data, at = disk.get(path), 0
        if data is None or disk.crc(data) != record["crc"]:
            raise RuntimeError(f"fastmoe.Engine: {path} must be as it was written, got a damaged file")
        for buffer in self._buffers().values():
            buffer.copy_(data[at : at + buffer.nbytes].clone().view(buffer.dtype).view(buffer.shape))
            at += buffer.nbytes
        if record["durable"]:
            self._finish(record)
        for unit in self.units:
            header = unit.read_header()
            if header is None or header["step"] != self.steps:
                raise RuntimeError(f"fastmoe.Engine: {unit.file.path} must be of step {self.steps}, got a damaged file")
            unit.adopt(header)
            for region in unit.memory.keys() - {"grads"}:
                unit.file.read(unit.memory[region], unit.start[region])

    def _finish(self, record: dict) -> None:
        """After a crash: what is left of the record's step, from the gradient files."""
        journal = Journal(self._directory / "journal", self.units, self.traffic)
        journal.finish(self.units, self.steps)
        for unit, kept in zip(self.units, record["kept"]):
            header = unit.read_header()
            if header is None or header["step"] != self.steps - 1:
                continue  # done, or damaged
            unit.adopt(header)
            bytes_ = {region: disk.buffer(unit.size[region], self.device) for region in REGIONS}
            if any(kept):
                for region in REGIONS[:2]:
                    unit.file.read(bytes_[region], unit.start[region])
                file = disk.File(self._grads_path(unit), unit.size["grads"], False, self.traffic)
                file.read(bytes_["grads"], 0)
                file.close()
                grads = [view if there else None for view, there in zip(unit.views(bytes_["grads"]), kept)]
                unit.update(self.optimizer, bytes_["weights"], bytes_["states"], grads, record["scale"])
                header = unit.describe(self.steps)
                journal.write(unit, header, bytes_["weights"], bytes_["states"])
                unit.replace(header, bytes_["weights"], bytes_["states"])
            else:
                unit.seal({**header, "step": self.steps})
        journal.close()
        if any(map(any, record["kept"])):
            count_step(self.optimizer)

    # Weights and states as a whole

    def walk(self) -> Iterator[dict[str, tuple[torch.Tensor, dict]]]:
        """Of one unit after the other, by name of each parameter: its weights and its state, to be read at once."""
        self._settle()
        for unit in self.units:
            with self._whole_unit(unit) as (weights, states):
                yield {
                    piece.name: (weight, {**piece.scalars, **state})
                    for piece, weight, state in zip(unit.pieces, unit.views(weights), unit.views(states, "states"))
                }

    def load(self, get: Callable[[str], tuple[torch.Tensor, dict]], steps: int, norm: float | None = None) -> None:
        """Replaces all weights and states. get: name -> weights, and the state (empty: as before the first update).

        steps: the number of those done. norm: of the last one's gradients, for clip="previous".
        """
        with self._unbroken():
            self._settle()
            self._forget()
            for unit in self.units:
                with self._whole_unit(unit) as (weights, states):
                    given = [get(piece.name) for piece in unit.pieces]
                    for view, (weight, _) in zip(unit.views(weights), given):
                        view.copy_(weight)
                    unit.new_states(self.optimizer, weights, states)
                    for piece, views, (_, state) in zip(unit.pieces, unit.views(states, "states"), given):
                        for key, value in state.items():
                            if key in views:
                                views[key].copy_(value)
                            else:
                                piece.scalars[key] = value
                    for region, data in (("weights", weights), ("states", states)):
                        unit.write(region, data)
            self.steps, self.norm = steps, norm
        if self.durable:
            self.flush()

    def rebalance(self, counts: Mapping[str, float]) -> Plan:
        """Moves units so that those with the highest counts lie in the fastest tiers; between steps.

        counts: by unit name, how much each is used (tokens routed to a group of experts), 0 where absent. Returns the
        new plan. ValueError names a unit that is not there.
        """
        for name in counts.keys() - {unit.name for unit in self.units}:
            raise ValueError(f"fastmoe.Engine: counts must be of {[unit.name for unit in self.units]}, got {name!r}")
        with self._unbroken():
            self._settle()
            ordered = [self.units[0], *sorted(self._order, key=lambda unit: -counts.get(unit.name, 0))]
            self.plan = self._place(self.plan.budgets, ordered)
            moves = [unit for unit in self.units if unit.tier != self.plan.tier[unit.name]]
            for unit in sorted(moves, key=lambda unit: -TIERS.index(self.plan.tier[unit.name])):  # down, then up
                with self._whole_unit(unit) as (weights, states):
                    file, grad_file = unit.file, unit.grad_file
                    unit.memory, unit.tier = {}, self.plan.tier[unit.name]
                    if self._on_disk(unit):
                        self._open_files(unit, create=file is None)
                    elif file is not None:
                        unit.file = unit.grad_file = None
                    if unit.tier != "disk":
                        self._give_memory(unit)
                    unit.write("weights", weights)
                    unit.write("states", states)
                    if not self._on_disk(unit):
                        for old in filter(None, (file, grad_file)):
                            old.remove()
                self._slots["weights"].drop(unit)
                unit.bind(unit.memory["weights"] if unit.tier == self._compute else None)
        return self.plan

    @contextmanager
    def _whole_unit(self, unit: Unit) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The bytes of its weights and states."""
        if self._ahead is not None:
            self._slots["weights"].unpin(self._ahead)
            self._ahead = None
        for region in REGIONS[:2]:
            self._fetch(unit, region)
        weights, states = (self._bytes(unit, region) for region in REGIONS[:2])
        try:
            yield weights, states
        finally:
            self._slots["weights"].unpin(unit)
            self._slots["states"].drop(unit)

    def report(self) -> dict:
        """JSON-able: parameters; bytes by tier, in all and a parameter; the fraction of units' bytes that is not in the
        fastest tier; traffic with the disk in bytes and seconds; seconds spent waiting for it.
        """
        parameters = sum(math.prod(piece.weight[1]) for unit in self.units for piece in unit.pieces)
        sizes = {unit: unit.size["weights"] + unit.size["states"] for unit in self.units}
        tiers = {tier: sum(size for unit, size in sizes.items() if unit.tier == tier) for tier in self.plan.budgets}
        return {
            "parameters": parameters,
            "bytes": tiers,
            "bytes_per_parameter": {tier: size / parameters for tier, size in tiers.items()},
            "buffers": sum(slots.bytes for slots in self._slots.values()),
            "offloaded": 1 - tiers[self._compute] / sum(sizes.values()),
            "moved": dict(self.traffic.bytes),
            "seconds": dict(self.traffic.seconds),
            "waited": self.waited,
        }


def clear(directory: str | Path) -> None:
    """Removes what an engine left in a directory, and nothing else."""
    for pattern in ("commit", "commit.new", "journal", "buffers-[01]", "buffers-[01].new", "unit-?????", "grads-?????"):
        for path in Path(directory).glob(pattern):
            path.unlink()


def _squares(grad: torch.Tensor) -> torch.Tensor:
    """The sum of squares in float64, over fixed tiles."""
    flat, parts = grad.detach().reshape(-1), []
    for part in flat.split(1 << 20):
        whole = len(part) // 1024 * 1024
        rows = part[:whole].double().square_().view(-1, 1024).sum(1).sum()
        parts.append(rows + part[whole:].double().square_().sum())
    return torch.stack(parts).sum() if parts else grad.new_zeros((), dtype=torch.float64)
