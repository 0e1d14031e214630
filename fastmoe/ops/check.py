"""Argument checks of the public ops: every message names the op, the argument, what was wanted and what came."""

from __future__ import annotations

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTS = (torch.int32, torch.int64)


def fail(op: str, argument: str, wanted: str, got: object, error: type[Exception] = ValueError):
    raise error(f"fastmoe.{op}: {argument} must be {wanted}, got {got}")


def tensor(
    op: str,
    argument: str,
    value: object,
    shape: tuple[int | None, ...],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    like: torch.Tensor | None = None,
    legend: str = "",
) -> None:
    """Checks type, dtype, shape (None = any size) and, with `like`, the device. `legend` names the dimensions, as "T,
    D".
    """
    if not isinstance(value, torch.Tensor):
        fail(op, argument, "a torch.Tensor", type(value).__name__, TypeError)
    if value.dtype not in dtypes:
        fail(op, argument, " or ".join(str(d).removeprefix("torch.") for d in dtypes), value.dtype, TypeError)
    if value.dim() != len(shape) or any(want is not None and want != have for want, have in zip(shape, value.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        fail(op, argument, f"of shape [{legend}] = [{wanted}]" if legend else f"of shape [{wanted}]", list(value.shape))
    if like is not None and value.device != like.device:
        fail(op, argument, f"on {like.device}", value.device)


def positive(op: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            fail(op, name, "at least 1", size)


def option(op: str, argument: str, value: object, choices: tuple) -> None:
    if value not in choices:
        fail(op, argument, " or ".join(repr(c) for c in choices), repr(value))
