"""Checkpoints that are whole or absent.

`<folder>/step-00000100/` holds safetensors shards of the model, the optimizer's moments and the random states,
`state.json` (what the trainer gives: step, position, config) and `manifest.json` (size and SHA-256 of every other
file). All is written and synced in a temporary folder, then committed by one rename. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

SHARD_BYTES = 1 << 30
_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be read."""


def save(
    folder: str | Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict, keep: int
) -> Path:
    """Commits `<folder>/step-<step>` and then removes all but the `keep` newest. Returns its path.

    state: JSON-able; step, optimizer scalars and random states are added. A tensor that the model holds under several
    names is written once. CheckpointError where the disk refuses (full, read-only, broken): the checkpoints already
    there stay as they are.
    """
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    tensors, scalars = _optimizer_state(model, optimizer)
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng |= {f"cuda.{i}": rng_state for i, rng_state in enumerate(torch.cuda.get_rng_state_all())}
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {}
        for prefix, group in (("model", _model_state(model)), ("optimizer", tensors), ("rng", rng)):
            for n, shard in enumerate(_shards(group), 1):
                files |= _write_tensors(temporary / f"{prefix}-{n:05d}.safetensors", shard)
        files |= _write_json(temporary / "state.json", {**state, "step": step, "optimizer": scalars})
        _write_json(temporary / "manifest.json", {"format": 1, "files": files})
        _sync_folder(temporary)
        if final.exists():
            final.rename(_free_name(folder / f"damaged-{final.name}"))
        temporary.rename(final)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"fastmoe.checkpoint: cannot write {final}: {error.strerror or error}; "
            f"the checkpoints already there are intact"
        ) from error
    for path in steps(folder)[:-keep]:
        _remove(path)
    return final


def steps(folder: str | Path) -> list[Path]:
    """The checkpoints of a folder in the order of their step numbers, intact or not."""
    found = [path for path in Path(folder).glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(_STEP.fullmatch(path.name)[1])


def clean(folder: str | Path) -> None:
    """Removes what an interrupted save or removal left behind."""
    for path in Path(folder).glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path, ignore_errors=True)


def verify(path: str | Path) -> list[str]:
    """What is wrong with a checkpoint, a line for each file that is missing, cut short or changed; empty: intact."""
    path = Path(path)
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        files = {name: (entry["size"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"manifest.json cannot be read ({type(error).__name__})"]
    problems = []
    if manifest.get("format") != 1:
        problems.append(f"manifest.json has format {manifest.get('format')!r}, this version reads 1")
    if "state.json" not in files or not any(name.startswith("model-") for name in files):
        problems.append("manifest.json lists no state.json or no model")
    for name, (size, digest) in files.items():
        try:
            with open(path / name, "rb") as file:
                got = os.fstat(file.fileno()).st_size
                if got != size:
                    problems.append(f"{name} has {got} bytes instead of {size}")
                elif _sha256(file) != digest:
                    problems.append(f"{name} has changed (its SHA-256 differs)")
        except OSError as error:
            problems.append(f"{name} cannot be read ({error.strerror})")
    return problems


def newest_intact(folder: str | Path) -> Path | None:
    """The newest checkpoint that verifies, None where there are none at all. Damaged ones are named on stderr and
    passed over.

    CheckpointError where there are some and all are damaged.
    """
    found = steps(folder)
    for path in reversed(found):
        problems = verify(path)
        if not problems:
            return path
        print(
            f"WARNING: checkpoint {path} is damaged: {'; '.join(problems)}; trying the one before it",
            file=sys.stderr,
            flush=True,
        )
    if found:
        raise CheckpointError(
            f"fastmoe.checkpoint: all {len(found)} checkpoints in {folder} are damaged; start over with another "
            "--run.dir"
        )
    return None


def set_aside(folder: str | Path, step: int) -> None:
    """Renames the (damaged) checkpoints after `step` to damaged-*, so that they no longer count and nothing overwrites
    them.
    """
    for path in steps(folder):
        if step_of(path) > step:
            path.rename(_free_name(path.with_name(f"damaged-{path.name}")))


def read_state(path: str | Path) -> dict:
    """state.json of an intact checkpoint."""
    return json.loads((Path(path) / "state.json").read_bytes())


def load_model(path: str | Path, model: nn.Module) -> None:
    """Copies the weights of an intact checkpoint into the model. CheckpointError names a tensor that is missing, new or
    of another shape.
    """
    wanted, given = _model_state(model), _read_tensors(path, "model")
    for name in sorted(wanted.keys() ^ given.keys()):
        where = "the model" if name in given else "the checkpoint"
        raise CheckpointError(
            f"fastmoe.checkpoint: {path} and the model must hold the same tensors, {where} has no {name}"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            if tensor.shape != given[name].shape:
                raise CheckpointError(
                    f"fastmoe.checkpoint: {name} in {path} must have the model's shape "
                    f"{tuple(tensor.shape)}, got {tuple(given[name].shape)}"
                )
            tensor.copy_(given[name])


def load_training(path: str | Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores weights, optimizer moments and random states from an intact checkpoint."""
    load_model(path, model)
    tensors, scalars = _read_tensors(path, "optimizer"), read_state(path)["optimizer"]
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, entry in scalars.items():
        parameter = parameters[name]
        moments = {key: tensors[f"{name}:{key}"].to(parameter.device) for key in entry["tensors"]}
        optimizer.state[parameter] = {**entry["scalars"], **moments}
    rng = _read_tensors(path, "rng")
    torch.set_rng_state(rng["cpu"])
    if torch.cuda.is_available() and f"cuda.{torch.cuda.device_count() - 1}" in rng:
        torch.cuda.set_rng_state_all([rng[f"cuda.{i}"] for i in range(torch.cuda.device_count())])


def _model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    state = {}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor.detach()
    return state


def _optimizer_state(
    model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, dict]]:
    tensors, scalars = {}, {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        if state:
            moments = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
            tensors |= {f"{name}:{key}": value for key, value in moments.items()}
            scalars[name] = {"tensors": list(moments), "scalars": {k: v for k, v in state.items() if k not in moments}}
    return tensors, scalars


def _shards(tensors: dict[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    shard, size = {}, 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, dict]:
    from safetensors.torch import save as to_bytes

    return _write(path, to_bytes({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}))


def _write_json(path: Path, content: dict) -> dict[str, dict]:
    return _write(path, json.dumps(content, indent=1).encode())


def _write(path: Path, content: bytes) -> dict[str, dict]:
    """Writes and syncs; returns the file's entry in the manifest."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return {path.name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}}


def _read_tensors(path: str | Path, prefix: str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = {}
    for file in sorted(Path(path).glob(f"{prefix}-*.safetensors")):
        tensors |= load_file(file)
    return tensors


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _free_name(path: Path) -> Path:
    names = (path if n == 0 else path.with_name(f"{path.name}.{n}") for n in range(sys.maxsize))
    return next(name for name in names if not name.exists())


def _remove(path: Path) -> None:
    """Renamed first, so that an interrupted removal leaves no half checkpoint under a real name."""
    doomed = path.with_name(f"{_TEMPORARY}old-{path.name}")
    try:
        path.rename(doomed)
    except OSError as error:
        print(f"WARNING: cannot remove the old checkpoint {path}: {error.strerror}", file=sys.stderr, flush=True)
    shutil.rmtree(doomed, ignore_errors=True)
