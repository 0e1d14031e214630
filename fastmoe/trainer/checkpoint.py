"""Checkpoints that are whole or absent.

`<folder>/step-00000100/` holds safetensors shards of the model, the optimizer's states and the random states,
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
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from fastmoe.comm import Group, LocalGroup, Ranks
from fastmoe.offload import Engine
from fastmoe.optim.states import Layout, Optimizer, first_row

SHARD_BYTES = 1 << 30
_STEP = re.compile(r"step-(\d{8,})")
_TEMPORARY = ".tmp-"


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be read."""


def save(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    keep: int,
    engine: Engine | None = None,
    ranks: Ranks | None = None,
) -> Path:
    """Commits `<folder>/step-<step>` and then removes all but the `keep` newest. Returns its path.

    state: JSON-able; step, optimizer scalars and random states are added. A tensor that the model holds under several
    names is written once. engine: of the model, where it has one; a unit of it is in memory at a time. ranks: all must
    call it; the first writes, and gets the parts of the others tensor by tensor. CheckpointError, on every rank, where
    the disk refuses (full, read-only, broken): the checkpoints already there stay as they are.
    """
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    scalars: dict[str, dict] = {}
    ranks = ranks or Ranks()
    parts = model.expert_parts() if ranks.expert.size > 1 else {}
    whole = engine.walk if engine else lambda: _in_memory(model, optimizer, parts, ranks.expert)
    groups = ("model", _weights(model, whole())), ("optimizer", _moments(whole(), scalars))
    if not ranks.first:
        if ranks.rank < ranks.expert.size:  # its parts are those that are written
            for _, tensors in groups:
                for _ in tensors:
                    pass
        if ranks.agree(0):
            raise CheckpointError(f"fastmoe.checkpoint: the first rank could not write {final}")
        return final
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng |= {f"cuda.{i}": rng_state for i, rng_state in enumerate(torch.cuda.get_rng_state_all())}
    failed = None
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {}
        for prefix, pieces in (*groups, ("rng", [rng])):
            for n, shard in enumerate((shard for piece in pieces for shard in _shards(piece)), 1):
                files |= _write_tensors(temporary / f"{prefix}-{n:05d}.safetensors", shard)
        files |= _write_json(temporary / "state.json", {**state, "step": step, "optimizer": scalars})
        _write_json(temporary / "manifest.json", {"format": 1, "files": files})
        _sync_folder(temporary)
        if final.exists():
            final.rename(_free_name(folder / f"damaged-{final.name}"))
        temporary.rename(final)
        _sync_folder(folder)
    except OSError as error:
        failed = error
        shutil.rmtree(temporary, ignore_errors=True)
        for _, tensors in groups:  # the others send all the same
            for _ in tensors:
                pass
    ranks.agree(failed is not None)
    if failed:
        raise CheckpointError(
            f"fastmoe.checkpoint: cannot write {final}: {failed.strerror or failed}; "
            f"the checkpoints already there are intact"
        ) from failed
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
    """Copies the weights of an intact checkpoint into the model, in the model's dtypes. CheckpointError names a tensor
    that is missing, new or of another shape.
    """
    given = _stored_weights(path, model)
    with torch.no_grad():
        for name, tensor in _model_state(model).items():
            tensor.copy_(given[name].get_tensor(name))


def load_training(
    path: str | Path, model: nn.Module, optimizer: Optimizer, engine: Engine | None = None, group: Group | None = None
) -> None:
    """Restores weights, optimizer states and random states from an intact checkpoint; an engine's by units. group: of
    the ranks that have the experts in parts, however many had when it was written.

    CheckpointError where weights or states are kept otherwise than there: another dtype or shape, another optimizer's.
    """
    group = group or LocalGroup()
    parts = set(model.expert_parts()) if group.size > 1 else set()
    state, tensors, weights = read_state(path), _stored(path, "optimizer"), _stored_weights(path, model, parts, group)

    def own(file, key: str, name: str) -> torch.Tensor:
        """Of a tensor that belongs to parameter `name` what this rank has of it."""
        if name not in parts:
            return file.get_tensor(key)
        stored = file.get_slice(key)
        share = stored.get_shape()[0] // group.size
        return stored[group.rank * share : (group.rank + 1) * share]

    groups = ((parameter, group) for group in optimizer.param_groups for parameter in group["params"])
    places = {parameter: (index, group) for index, (parameter, group) in enumerate(groups)}
    wanted = _model_state(model)

    def weight(name: str) -> torch.Tensor:
        stored = own(weights[name], name, name)
        if stored.dtype != wanted[name].dtype:
            raise CheckpointError(
                f"fastmoe.checkpoint: {name} in {path} must be {wanted[name].dtype} as in the model, got {stored.dtype}"
            )
        return stored

    def states(name: str) -> dict:
        """Of a parameter; empty before its first update."""
        entry = state["optimizer"].get(name)
        if entry is None:
            return {}
        index, group = places[wanted[name]]
        stored = {key: own(tensors[f"{name}:{key}"], f"{name}:{key}", name) for key in entry["tensors"]}
        layout, got = optimizer.layout(wanted[name], group), {k: (tuple(t.shape), t.dtype) for k, t in stored.items()}
        if got != layout:
            raise CheckpointError(
                f"fastmoe.checkpoint: the optimizer states of {name} in {path} must be {_describe(layout)}, got "
                f"{_describe(got)}"
            )
        return {"index": index, **entry["scalars"], "first_row": first_row(wanted[name]), **stored}

    with torch.no_grad():
        for name, tensor in wanted.items():
            if not (engine and isinstance(tensor, nn.Parameter)):
                tensor.copy_(weight(name))
    if engine:
        engine.load(lambda name: (weight(name), states(name)), state["step"])
    else:
        optimizer.state.clear()
        for name in state["optimizer"]:
            device = wanted[name].device
            optimizer.state[wanted[name]] = {
                key: value.to(device) if isinstance(value, torch.Tensor) else value
                for key, value in states(name).items()
            }
    rng = {name: file.get_tensor(name) for name, file in _stored(path, "rng").items()}
    torch.set_rng_state(rng["cpu"])
    if torch.cuda.is_available() and f"cuda.{torch.cuda.device_count() - 1}" in rng:
        torch.cuda.set_rng_state_all([rng[f"cuda.{i}"] for i in range(torch.cuda.device_count())])


def _model_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, each once."""
    state = {}
    seen = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            state[name] = tensor
    return state


def _describe(layout: Layout) -> str:
    return ", ".join(
        f"{key} {str(dtype).removeprefix('torch.')} {list(shape)}" for key, (shape, dtype) in layout.items()
    )


Whole = Iterable[dict[str, tuple[torch.Tensor, dict]]]  # by name of a parameter its weights and its optimizer state


def _in_memory(
    model: nn.Module, optimizer: torch.optim.Optimizer, parts: Mapping[str, torch.Tensor], group: Group
) -> Whole:
    """What the group's ranks have in parts is put together, about a shard's worth at a time."""
    piece, size = {}, 0
    for name, param in model.named_parameters():
        weight, state = param.detach(), optimizer.state.get(param, {})
        if name in parts:
            weight = group.all_gather(weight).flatten(0, 1)
            state = {
                key: group.all_gather(value).flatten(0, 1) if isinstance(value, torch.Tensor) else value
                for key, value in state.items()
            }
            size += weight.nbytes
        piece[name] = weight, state
        if size > SHARD_BYTES:
            yield piece
            piece, size = {}, 0
    yield piece


def _weights(model: nn.Module, whole: Whole) -> Iterator[dict[str, torch.Tensor]]:
    buffers = {name: t for name, t in _model_state(model).items() if not isinstance(t, nn.Parameter)}
    for part in whole:
        yield {**buffers, **{name: weight for name, (weight, _) in part.items()}}
        buffers = {}


def _moments(whole: Whole, scalars: dict[str, dict]) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of the optimizer's states; the rest of them goes to `scalars`."""
    for part in whole:
        tensors = {}
        for name, (_, state) in part.items():
            if state.get("step"):
                moments = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
                tensors |= {f"{name}:{key}": value for key, value in moments.items()}
                others = {key: value for key, value in state.items() if key not in moments}
                scalars[name] = {"tensors": list(moments), "scalars": others}
        yield tensors


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


def _stored(path: str | Path, prefix: str) -> dict:
    """By name of each tensor the open file that has it."""
    from safetensors import safe_open

    files = [safe_open(file, "pt") for file in sorted(Path(path).glob(f"{prefix}-*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118


def _stored_weights(
    path: str | Path, model: nn.Module, parts: Collection[str] = (), group: Group | None = None
) -> dict:
    """As _stored; CheckpointError where the model has other tensors. parts: the model has its share of these alone."""
    wanted, given = _model_state(model), _stored(path, "model")
    for name in sorted(wanted.keys() ^ given.keys()):
        where = "the model" if name in given else "the checkpoint"
        raise CheckpointError(
            f"fastmoe.checkpoint: {path} and the model must hold the same tensors, {where} has no {name}"
        )
    for name, tensor in wanted.items():
        shape = tuple(given[name].get_slice(name).get_shape())
        if name in parts and shape and shape[0] % group.size == 0:
            shape = shape[0] // group.size, *shape[1:]
        if tensor.shape != shape:
            raise CheckpointError(
                f"fastmoe.checkpoint: {name} in {path} must have the model's shape {tuple(tensor.shape)}, got {shape}"
            )
    return given


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
