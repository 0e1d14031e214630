"""Which block sizes a Triton kernel takes: candidates are timed on the device, kept only where right, remembered.

Choices are kept for each user under XDG_CACHE_HOME (or ~/.cache) in fastmoe/, one file for each device, version of
torch and Triton and text of the kernels, so that none outlives what it was measured on.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import torch

from fastmoe import jit

Config = dict[str, int]
_forced: ContextVar[dict[str, Config] | None] = ContextVar("forced", default=None)


@contextmanager
def forced(configs: dict[str, Config]) -> Iterator[None]:
    """Inside the block kernels take these configs, those not named their first candidate; nothing is tuned."""
    token = _forced.set(configs)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(
    kernel: str,
    key: tuple,
    candidates: list[Config],
    run: Callable[[Config], object],
    agrees: Callable[[Config], bool],
    like: torch.Tensor,
    sources: tuple[Path, ...],
) -> Config:
    """The config that `kernel` takes for `key` on the device of `like`.

    The first candidate is the default: in the interpreter, off a GPU and, where nothing is known yet, during the
    capture of a CUDA graph. Elsewhere an unknown key is searched, which compiles and runs every candidate, and the
    choice is written to the cache. run(config) launches the kernel on the caller's tensors; agrees(config) says whether
    it is right on a small problem.

    Errors: RuntimeError where no candidate is right.
    """
    overrides = _forced.get()
    if overrides is not None:
        return overrides.get(kernel, candidates[0])
    if not like.is_cuda or len(candidates) == 1:
        return candidates[0]
    choices = _choices(like.device.index, sources)
    word = " ".join(str(part) for part in (kernel, *key))
    if choices.get(word) not in candidates:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        choices.put(word, search(kernel, candidates, run, agrees, _milliseconds))
    return choices.get(word)


def search(
    kernel: str,
    candidates: list[Config],
    run: Callable[[Config], object],
    agrees: Callable[[Config], bool],
    timer: Callable[[Callable[[], object]], float],
) -> Config:
    """The fastest candidate that agrees. One that does not compile or run is passed over.

    Errors: RuntimeError where none is left.
    """
    timed = []
    for place, config in enumerate(candidates):
        with suppress(Exception):  # out of shared memory, a compiler's refusal: of many kinds
            timed.append((timer(lambda: run(config)), place))  # noqa: B023
    for _, place in sorted(timed):
        if agrees(candidates[place]):
            return candidates[place]
        warnings.warn(f"fastmoe: {kernel} is wrong with {candidates[place]}, which is passed over", stacklevel=2)
    raise RuntimeError(f"fastmoe.autotune: no config of {kernel} runs and agrees with the reference: {candidates}")


def close(got: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> bool:
    """Whether got's largest distance from the float64 result is within 2 times plain torch's, and 4 eps of the largest
    value.
    """
    error, allowed = ((x.double() - exact).abs().max() for x in (got, plain))
    return bool(error <= 2 * allowed + 4 * torch.finfo(got.dtype).eps * exact.abs().max())


def _milliseconds(call: Callable[[], object]) -> float:
    """Median of 10 runs, each from a cold L2."""
    cold = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(13):
        cold.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:])


def folder() -> Path:
    """The user's cache folder, made where it is missing, mode 0700.

    Errors: PermissionError where it is another user's, or not a folder.
    """
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmoe"
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(path.lstat(), path, stat.S_ISDIR)
    path.chmod(0o700)
    return path


def _check_owner(status: os.stat_result, path: Path, kind: Callable[[int], bool]) -> None:
    if status.st_uid != os.getuid() or not kind(status.st_mode):
        raise PermissionError(
            f"fastmoe.autotune: {path} must be the user's own, got owner {status.st_uid}; it is not used"
        )


class Choices:
    """The choices of one cache file. What cannot be read counts as none; what cannot be written is kept in memory."""

    def __init__(self, name: str, about: dict[str, str]):
        self.name, self.about = name, about
        self.known = self._read()

    def get(self, word: str) -> Config | None:
        return self.known.get(word)

    def put(self, word: str, config: Config) -> None:
        """Adds a choice to what the file holds by now, in one rename."""
        self.known = {**self._read(), **self.known, word: config}
        try:
            handle, temporary = tempfile.mkstemp(dir=folder())  # mode 0600
            with os.fdopen(handle, "w") as file:
                json.dump({**self.about, "choices": self.known}, file, indent=1)
            os.replace(temporary, folder() / self.name)
        except OSError as error:
            warnings.warn(f"fastmoe: the autotune cache is not written: {error}", stacklevel=2)

    def _read(self) -> dict[str, Config]:
        try:
            return load(folder() / self.name)["choices"]
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            warnings.warn(f"fastmoe: the autotune cache is ignored: {error}", stacklevel=2)
            return {}


def load(path: Path) -> dict:
    """A cache file: device, versions and, under "choices", the config of each kernel and key.

    Errors: OSError where it cannot be read or is another user's; ValueError where it is damaged.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as file:
        _check_owner(os.fstat(file.fileno()), path, stat.S_ISREG)
        content = json.load(file)
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, dict) or not all(
        isinstance(config, dict) and all(type(value) is int for value in config.values()) for config in choices.values()
    ):
        raise ValueError(f"fastmoe.autotune: {path} must hold choices, got something else")
    return content


def files() -> list[Path]:
    """The cache files of this user."""
    return sorted(folder().glob("autotune-*.json"))


@cache
def _choices(device: int, sources: tuple[Path, ...]) -> Choices:
    about = {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": jit.triton_version(),
        "kernels": hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return Choices(f"autotune-{key[:16]}.json", about)


def clear() -> int:
    """Removes every cache file; returns how many there were."""
    found = files()
    for path in found:
        path.unlink()
    _choices.cache_clear()
    return len(found)
