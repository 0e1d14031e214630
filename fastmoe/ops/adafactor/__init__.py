"""Adafactor: one update of a whole list of tensors, whose second moments are a row and a column a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmoe.ops import check
from fastmoe.ops.registry import OPS, define

_LISTS = ("grads", "rows", "columns", "squares", "masters")


def adafactor_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor | None],
    columns: Sequence[torch.Tensor | None],
    squares: Sequence[torch.Tensor | None],
    steps: int | Sequence[int],
    lr: float | None = None,
    decay_rate: float = 0.8,
    eps: tuple[float, float] = (1e-30, 1e-3),
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    grad_scale: float = 1.0,
    *,
    masters: Sequence[torch.Tensor | None] | None = None,
    keys: Sequence[int] | None = None,
    first_rows: Sequence[int] | None = None,
) -> None:
    """Updates params and their states in place, all tensors in one call.

    Of a matrix X [n, m] with G = grad * grad_scale at step t, b = 1 - t^-decay_rate: R = b R + (1-b) mean of G^2 +
    eps[0] over a row, C the same over a column, V = R C^T / mean(R); U = G / sqrt(V), divided by max(1, RMS(U) /
    clip_threshold); X = X - a (U + weight_decay X). a = lr, or with lr None max(eps[1], RMS(X)) min(1e-2, 1/sqrt t).
    A tensor [..., n, m] is a stack of matrices, each with factors, RMS and a of its own, as if they came one by one.
    A vector or a scalar keeps V whole: V = b V + (1-b) (G^2 + eps[0]).

    params: float32, bfloat16 or float16 (float64 on the reference), each grad in its param's dtype. rows [..., n] and
    columns [..., m] for two or more dimensions, squares of the param's shape for fewer, the others None; float32
    (float64 with float64 params). masters: None; for a bfloat16 param an int8 residual, the third byte of a 24-bit
    weight; for a 16-bit param a float32 weight; as in `adamw_step`. steps: of all or of each, from 1. Sums are float32.

    Rounding: float32 and a param from its float32 master to nearest; other 16-bit and 24-bit weights up or down with
    the probability of the fraction, by draws that keys[i], row and column alone decide (`ops.quantize`): row r of the
    tensor ([-1, last dimension]) is drawn as row first_rows[i] + r, so a matrix is updated as in its stack. All is
    contiguous. Errors: ValueError or TypeError naming the argument and its index. Source: Shazeer and Stern, arXiv
    1804.04235.
    """
    op, count = "adafactor_step", len(params)
    none = [None] * count
    lists = dict(zip(_LISTS, (grads, rows, columns, squares, masters)))
    numbers = {
        "steps": [steps] * count if isinstance(steps, int) else steps,
        "keys": keys or [0] * count,
        "first_rows": first_rows or [0] * count,
    }
    lists = {name: none if tensors is None else tensors for name, tensors in lists.items()}
    for name, values in (lists | numbers).items():
        if len(values) != count:
            check.fail(op, name, f"a list of {count} like params", len(values))
    for i, (param, *states) in enumerate(zip(params, *lists.values())):
        _check(i, param, *states)
    for i, step in enumerate(numbers["steps"]):
        if step < 1:
            check.fail(op, f"steps[{i}]", "at least 1", step)
    for name, value, good in (("eps", eps, min(eps) > 0), ("clip_threshold", clip_threshold, clip_threshold > 0)):
        if not good:
            check.fail(op, name, "positive", value)
    absent = params[0].new_empty(0) if count else None  # the schema has no lists of optional tensors
    tensors = [[absent if t is None else t for t in values] for values in lists.values()]
    call = _adafactor_step if torch.compiler.is_compiling() else OPS[op]  # the dispatcher costs 2 us a tensor
    call(params, *tensors, *map(list, numbers.values()), lr, decay_rate, *eps, clip_threshold, weight_decay, grad_scale)


def _check(i, param, grad, row, column, square, master) -> None:
    op = "adafactor_step"
    check.tensor(op, f"params[{i}]", param, tuple(param.shape))
    shape = tuple(param.shape)
    check.tensor(op, f"grads[{i}]", grad, shape, (param.dtype,), param)
    wide = (torch.float64 if param.dtype == torch.float64 else torch.float32,)
    matrix = len(shape) > 1
    wanted = {
        "rows": (row, shape[:-1] if matrix else None, wide),
        "columns": (column, shape[:-2] + shape[-1:] if matrix else None, wide),
        "squares": (square, None if matrix else shape, wide),
        "masters": (master, None if master is None else shape, _MASTERS.get(param.dtype)),
    }
    for name, (tensor, size, dtypes) in wanted.items():
        if tensor is not None and (size is None or dtypes is None):
            kind = f"{len(shape)} dimensions" if dtypes else f"a {param.dtype} param"
            check.fail(op, f"{name}[{i}]", f"None for {kind}", "a tensor")
        if size is not None:
            check.tensor(op, f"{name}[{i}]", tensor, size, dtypes, param)
    for name, tensor in (("params", param), *((name, tensor) for name, (tensor, _, _) in wanted.items())):
        if tensor is not None and not tensor.is_contiguous():
            check.fail(op, f"{name}[{i}]", "contiguous (it is updated in place)", f"strides {tensor.stride()}")


_MASTERS = {torch.bfloat16: (torch.int8, torch.float32), torch.float16: (torch.float32,)}

_adafactor_step = define(
    "adafactor",
    "adafactor_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] rows, Tensor(c!)[] columns, Tensor(d!)[] "
    "squares, Tensor(e!)[] masters, int[] steps, int[] keys, int[] first_rows, float? lr, float decay_rate, float "
    "eps_square, float eps_weight, float clip_threshold, float weight_decay, float grad_scale) -> ()",
    fake=lambda *args: None,
)
