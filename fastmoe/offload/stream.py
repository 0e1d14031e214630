"""AdamW whose moments pass through memory one parameter group at a time."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from fastmoe import ops
from fastmoe.offload import disk

_MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedAdamW(torch.optim.Optimizer):
    """fastmoe.optim.AdamW, bit for bit, with its moments in files of `directory`.

    params: as for any optimizer; a parameter group (a layer, say) is what moves at once. A group's `tier`, "disk" or
    "host", says where its moments live between steps. While a group on disk is updated, a thread reads the next one and
    another writes the last one back, so that three are in memory at most. Parameters and gradients are on the CPU.

    directory: made if absent. reopen: go on from the states that `flush` or `close` left there, whatever the tiers
    were; else it must hold none. A run that ended without either leaves nothing to reopen: start from a checkpoint,
    whose `state_dict` (AdamW's, too) goes to `load_state_dict`.

    Errors: ValueError naming the argument; FileExistsError, FileNotFoundError and other OSErrors naming the directory,
    with no file left behind; an error in a background read or write is raised by the step that waits for it.
    """

    def __init__(
        self,
        params: Iterable,
        directory: str | Path,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        tier: str = "disk",
        reopen: bool = False,
    ):
        for name, values in dict(lr=[lr], betas=betas, eps=[eps], weight_decay=[weight_decay]).items():
            if not all(0 <= value < (1 if name == "betas" else math.inf) for value in values):
                raise ValueError(f"fastmoe.OffloadedAdamW: {name} must be at least 0 (betas below 1), got {values}")
        self._files: list[disk.TensorFile] | None = None
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, tier=tier))
        for group in self.param_groups:
            if group["tier"] not in ("disk", "host"):
                raise ValueError(f"fastmoe.OffloadedAdamW: tier must be 'disk' or 'host', got {group['tier']!r}")
            for param in group["params"]:
                if param.device.type != "cpu":
                    raise ValueError(f"fastmoe.OffloadedAdamW: params must be on the CPU, got one on {param.device}")
        self._directory = Path(directory)
        self._record = self._directory / "states.json"  # present while the files are whole
        self._files = self._open() if reopen else self._create()
        self._reader, self._writer = (ThreadPoolExecutor(1, f"offload-{name}") for name in ("read", "write"))
        self._writing: dict[int, Future] = {}  # by group, oldest first
        self._whole = True

    def add_param_group(self, param_group: dict) -> None:
        if getattr(self, "_files", None) is not None:
            raise NotImplementedError("fastmoe.OffloadedAdamW: all parameter groups must be given at construction")
        super().add_param_group(param_group)

    def _layouts(self) -> list[list[tuple[list[int], torch.dtype]]]:
        """Per group, shape and dtype of each parameter's moments; a file holds every exp_avg, then every exp_avg_sq."""
        wide = lambda param: torch.float64 if param.dtype == torch.float64 else torch.float32
        return [[(list(param.shape), wide(param)) for param in group["params"]] for group in self.param_groups]

    def _path(self, i: int) -> Path:
        return self._directory / f"group-{i:05d}.bin"

    def _create(self) -> list[disk.TensorFile]:
        layouts = [2 * layout for layout in self._layouts()]
        if self._record.exists() or self._path(0).exists():
            raise FileExistsError(
                f"fastmoe.OffloadedAdamW: directory must hold no states (reopen=True goes on from "
                f"them), got {self._directory}"
            )
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk.named(error, "directory must be one that can be made", self._directory) from None
        disk.check_space(self._directory, sum(map(disk.file_size, layouts)))
        files = []
        try:
            for i, layout in enumerate(layouts):
                files.append(disk.TensorFile(self._path(i), layout))
        except BaseException:
            for file in files:
                file.path.unlink()
            raise
        self._adopt(files, [[0] * len(group["params"]) for group in self.param_groups])
        return files

    def _open(self) -> list[disk.TensorFile]:
        try:
            record = json.loads(self._record.read_text())
        except FileNotFoundError:
            raise FileNotFoundError(
                f"fastmoe.OffloadedAdamW: directory must hold states of a run that was closed, got "
                f"{self._directory} without {self._record.name}"
            ) from None
        if record["layouts"] != self._named_layouts():
            raise ValueError(
                f"fastmoe.OffloadedAdamW: {self._directory} must hold states of these parameter groups, "
                "got those of other shapes, dtypes or order"
            )
        files = [disk.TensorFile(self._path(i), 2 * layout, create=False) for i, layout in enumerate(self._layouts())]
        self._adopt(files, record["steps"])
        return files

    def _named_layouts(self) -> list:
        return [[[shape, str(dtype)] for shape, dtype in layout] for layout in self._layouts()]

    def _adopt(self, files: list[disk.TensorFile], steps: list[list[int]]) -> None:
        for group, file, group_steps in zip(self.param_groups, files, steps):
            tensors = [tensor.clone() for tensor in file.tensors] if group["tier"] == "host" else file.tensors
            count = len(group["params"])
            for param, step, m, v in zip(group["params"], group_steps, tensors[:count], tensors[count:]):
                self.state[param] = dict(step=step, exp_avg=m, exp_avg_sq=v)

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None, grad_scale: float = 1.0) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_whole()
        self._whole = self._forget()
        active = [i for i, group in enumerate(self.param_groups) if any(p.grad is not None for p in group["params"])]
        ahead = deque(i for i in active if self.param_groups[i]["tier"] == "disk")
        reading: dict[int, Future] = {}  # the group in use and the next
        for i in active:
            while ahead and len(reading) < 2:
                j = ahead.popleft()
                reading[j] = self._reader.submit(self._read, j, self._writing.pop(j, None))
            if i in reading:
                reading[i].result()
            self._step_group(self.param_groups[i], grad_scale)
            if i in reading:
                del reading[i]
                self._writing[i] = self._writer.submit(self._files[i].write_back)
                self._wait_for_writes(1)
        self._whole = True
        return loss

    def _forget(self) -> bool:
        """Takes the record away before the files change. Returns False: they are not whole."""
        if self._record.exists():
            self._record.unlink()
            self._sync_directory()
        return False

    def _sync_directory(self) -> None:
        directory = os.open(self._directory, os.O_RDONLY)
        os.fsync(directory)
        os.close(directory)

    def _read(self, i: int, write: Future | None) -> None:
        if write is not None:
            write.result()
        self._files[i].prefetch()

    def _wait_for_writes(self, left: int = 0) -> None:
        while len(self._writing) > left:
            write = self._writing.pop(next(iter(self._writing)))
            self._whole = self._whole and write.exception() is None
            write.result()

    def _check_whole(self) -> None:
        if not self._whole:
            raise RuntimeError(
                f"fastmoe.OffloadedAdamW: the last step did not finish, the states in {self._directory} "
                "are of no use; load_state_dict from a checkpoint"
            )

    def _step_group(self, group: dict, grad_scale: float) -> None:
        by_step: dict[int, list[torch.Tensor]] = {}
        for param in group["params"]:
            if param.grad is not None:
                self.state[param]["step"] += 1
                by_step.setdefault(self.state[param]["step"], []).append(param)
        for step, params in by_step.items():
            moments = ([self.state[param][name] for param in params] for name in _MOMENTS)
            ops.adamw_step(
                params,
                [param.grad for param in params],
                *moments,
                step,
                group["lr"],
                *group["betas"],
                group["eps"],
                group["weight_decay"],
                grad_scale,
            )

    def load_state_dict(self, state_dict: dict) -> None:
        """Copies the moments of `state_dict` (of this class or of fastmoe.optim.AdamW) to where this one keeps them."""
        saved = state_dict["state"]
        names = [name for group in state_dict["param_groups"] for name in group["params"]]
        own, tiers = dict(self.state), [group["tier"] for group in self.param_groups]
        wait(self._writing.values())
        self._writing.clear()
        self._whole = self._forget()
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state.update(own)
        names = iter(names)
        for group, tier, file in zip(self.param_groups, tiers, self._files):
            group["tier"] = tier
            for param in group["params"]:
                state, given = self.state[param], saved.get(next(names), {})
                state["step"] = int(given.get("step", 0))
                for moment in _MOMENTS:
                    state[moment].copy_(given[moment]) if given else state[moment].zero_()
            if tier == "disk":
                file.write_back()
        self._whole = True

    def flush(self) -> None:
        """Puts every moment on the disk and records that the files are whole, until the next step changes them.

        Errors: RuntimeError after a step that did not finish; OSError from the disk.
        """
        self._check_whole()
        self._wait_for_writes()
        steps = []
        for group, file in zip(self.param_groups, self._files):
            states = [self.state[param] for param in group["params"]]
            steps.append([state["step"] for state in states])
            if group["tier"] == "host":
                for tensor, kept in zip(file.tensors, [state[name] for name in _MOMENTS for state in states]):
                    tensor.copy_(kept)
                file.write_back()
        draft = self._record.with_suffix(".new")
        with open(draft, "w") as file:
            json.dump({"layouts": self._named_layouts(), "steps": steps}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self._record)
        self._sync_directory()

    def close(self) -> None:
        """Flushes and ends the two threads; the states can be reopened, this optimizer cannot step again."""
        self.flush()
        self._reader.shutdown()
        self._writer.shutdown()
