"""AdamW: one update of a whole list of tensors, whatever their moments and weights are kept in."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from operator import attrgetter, is_

import torch

from fastmoe.native import PLAIN, Known
from fastmoe.ops import check
from fastmoe.ops.quantize import scales_shape
from fastmoe.ops.registry import OPS, define

_LISTS = ("grads", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales", "masters")
MOMENTS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
MASTERS = {torch.bfloat16: (torch.int8, torch.float32), torch.float16: (torch.float32,)}
FLOATS = {torch.float32, torch.bfloat16, torch.float16}
_shape, _dtype, _device, _is_cpu, _is_sparse = map(attrgetter, ("shape", "dtype", "device", "is_cpu", "is_sparse"))


class Memo:
    """What a call of adamw_step found out about its params and states. With the same tensors at the same addresses the
    next call looks at their gradients only: of 10,000 small tensors it takes longer to look at each than to update it.
    """

    def __init__(self):
        self.given, self.known, self.present = [], [], []
        self.shapes, self.dtypes, self.device = [], [], None

    def holds(self, lists: Sequence[Sequence[torch.Tensor | None]]) -> bool:
        same = len(lists) == len(self.given) and all(
            len(a) == len(b) and all(map(is_, a, b)) for a, b in zip(lists, self.given)
        )
        return same and all(_addresses(known) == known.addresses for known in self.present)

    def serves(self, grads: Sequence[torch.Tensor]) -> bool:
        """Whether these can be the gradients."""
        return (
            set(map(type, grads)) <= PLAIN
            and not any(map(_is_sparse, grads))
            and [*map(_dtype, grads)] == self.dtypes
            and (all(map(_is_cpu, grads)) if self.device.type == "cpu" else {*map(_device, grads)} == {self.device})
            and [*map(_shape, grads)] == self.shapes
        )

    def keep(self, lists: Sequence[Sequence[torch.Tensor | None]], absent: torch.Tensor) -> None:
        """lists: params, then states, all of which are good."""
        self.given = [list(tensors) for tensors in lists]
        self.known = [Known(absent if t is None else t for t in tensors) for tensors in lists]
        for known in self.known:
            known.addresses = _addresses(known)
        self.present = [known for known in self.known if known.addresses.count(0) < len(known)]
        params = lists[0]
        self.shapes, self.dtypes, self.device = [*map(_shape, params)], [*map(_dtype, params)], params[0].device


def _addresses(tensors: Sequence[torch.Tensor]) -> array:
    return array("Q", map(torch.Tensor.data_ptr, tensors))


def adamw_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    steps: int | Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
    *,
    exp_avg_scales: Sequence[torch.Tensor | None] | None = None,
    exp_avg_sq_scales: Sequence[torch.Tensor | None] | None = None,
    masters: Sequence[torch.Tensor | None] | None = None,
    keys: Sequence[int] | None = None,
    first_rows: Sequence[int] | None = None,
    decays: Sequence[float] | None = None,
    memo: Memo | None = None,
) -> None:
    """Updates params and their states in place, all tensors in one call.

    g = grad * grad_scale; m = m + (1-beta1)(g-m); v = beta2 v + (1-beta2) g^2; p = p decay - lr / (1-beta1^step) * m /
    (sqrt(v / (1-beta2^step)) + eps). steps: of all or of each, from 1. decays: of each; else 1 - lr weight_decay.

    params: float32, bfloat16 or float16 (float64 on the reference), each grad in its param's dtype. Moments, both of a
    tensor alike: float32 (float64 with float64 params); bfloat16; float16, where exp_avg_sqs holds sqrt(v); int8 (and
    uint8 for exp_avg_sqs), where it holds sqrt(v) too, with exp_avg_scales and exp_avg_sq_scales as `ops.quantize`
    makes them. masters: None; for a bfloat16 param an int8 residual, the third byte of a 24-bit weight (its float32 is
    (param bits << 16) + (residual << 8)); for a 16-bit param a float32 weight. Sums are float32.

    Rounding: a float32 state or weight, and a param from its float32 master, to nearest. All else is rounded up or
    down, with the probability of its fraction, by draws that keys[i], row and column alone decide: what row r of the
    tensor ([-1, last dimension]) gets is drawn as for row first_rows[i] + r, so a part is updated as in the whole.

    All of a tensor's states have its shape (scales [..., ceil(I / 32)]) and are contiguous. grad_scale: the clip
    factor. memo: a Memo() to pass with every call for the same params; it keeps them and their states alive. Errors:
    ValueError or TypeError naming the argument and its index. Source: Loshchilov and Hutter, arXiv 1711.05101; 24-bit
    weights and companded moments after FlashOptim (arXiv 2602.23349).
    """
    count = len(params)
    none = [None] * count
    lists = dict(zip(_LISTS, (grads, exp_avgs, exp_avg_sqs, exp_avg_scales, exp_avg_sq_scales, masters)))
    numbers = {
        "steps": [steps] * count if isinstance(steps, int) else steps,
        "keys": keys or [0] * count,
        "first_rows": first_rows or [0] * count,
        "decays": [1 - lr * weight_decay] * count if decays is None else decays,
    }
    lists = {name: none if tensors is None else tensors for name, tensors in lists.items()}
    for name, values in (lists | numbers).items():
        if len(values) != count:
            check.fail("adamw_step", name, f"a list of {count} like params", len(values))
    if count and min(numbers["steps"]) < 1:
        i = [step < 1 for step in numbers["steps"]].index(True)
        check.fail("adamw_step", f"steps[{i}]", "at least 1", numbers["steps"][i])
    compiling = torch.compiler.is_compiling()
    _, *states = lists.values()
    if memo is None or compiling or not count or not (memo.holds([params, *states]) and memo.serves(grads)):
        quick = _good(params, *lists.values())
        if not quick:
            for i, (param, *others) in enumerate(zip(params, *lists.values())):
                _check(i, param, *others)
        absent = params[0].new_empty(0) if count else None  # the schema has no lists of optional tensors
        if memo is None or not quick:
            known = [params, *([absent if t is None else t for t in tensors] for tensors in states)]
        else:
            memo.keep([params, *states], absent)
            known = memo.known
    else:
        quick, known = True, memo.known
    op = OPS["adamw_step"]  # called directly: the dispatcher costs 2 us a tensor
    if compiling:
        op = _adamw_step
    elif quick:
        op = op.on(params[0].device.type, False)
    op(known[0], grads, *known[1:], *map(list, numbers.values()), lr, beta1, beta2, eps, grad_scale)


def _good(params, grads, ms, vs, m_scales, v_scales, masters) -> bool:
    """Whether nothing is wrong with plain tensors in the usual dtypes, found out list by list: quick for long lists."""
    if torch.compiler.is_compiling() or not params:
        return False
    states = [tensor for tensors in (m_scales, v_scales, masters) for tensor in tensors if tensor is not None]
    everything = [*params, *grads, *ms, *vs, *states]
    if not set(map(type, everything)) <= PLAIN or len(set(map(_device, everything))) > 1:
        return False
    dtypes, m_dtypes = [*map(_dtype, params)], [*map(_dtype, ms)]
    coded = torch.int8 in m_dtypes
    v_dtypes = [torch.uint8 if dtype is torch.int8 else dtype for dtype in m_dtypes] if coded else m_dtypes
    same = all(p.shape == g.shape == m.shape == v.shape for p, g, m, v in zip(params, grads, ms, vs))
    return (
        same
        and {*dtypes} <= FLOATS
        and {*m_dtypes} <= {*MOMENTS}
        and dtypes == [*map(_dtype, grads)]
        and v_dtypes == [*map(_dtype, vs)]
        and all(map(torch.Tensor.is_contiguous, [*params, *ms, *vs, *states]))
        and (not states and not coded or all(map(_good_states, params, ms, m_scales, v_scales, masters)))
    )


def _good_states(param, m, m_scale, v_scale, master) -> bool:
    shape = scales_shape(param.shape) if m.dtype is torch.int8 and param.dim() else None
    return (
        (m.dtype is not torch.int8 or param.dim() > 0)
        and all(
            scale is None
            if shape is None
            else scale is not None and scale.shape == shape and scale.dtype is torch.bfloat16
            for scale in (m_scale, v_scale)
        )
        and (master is None or master.shape == param.shape and master.dtype in MASTERS.get(param.dtype, ()))
    )


def _check(i, param, grad, m, v, m_scales, v_scales, master) -> None:
    op = "adamw_step"
    shape = tuple(getattr(param, "shape", ()))
    check.tensor(op, f"params[{i}]", param, shape)
    moments = (torch.float64,) if param.dtype == torch.float64 else MOMENTS
    check.tensor(op, f"grads[{i}]", grad, shape, (param.dtype,), param)
    check.tensor(op, f"exp_avgs[{i}]", m, shape, moments, param)
    coded = m.dtype == torch.int8
    check.tensor(op, f"exp_avg_sqs[{i}]", v, shape, (torch.uint8 if coded else m.dtype,), param)
    for name, scales in (("exp_avg_scales", m_scales), ("exp_avg_sq_scales", v_scales)):
        if coded:
            if not shape:
                check.fail(op, f"exp_avgs[{i}]", "float32 for a param without dimensions", m.dtype, TypeError)
            check.tensor(op, f"{name}[{i}]", scales, tuple(scales_shape(param.shape)), (torch.bfloat16,), param)
        elif scales is not None:
            check.fail(op, f"{name}[{i}]", f"None for {m.dtype} moments", "a tensor")
    if master is not None:
        kinds = MASTERS.get(param.dtype)
        if kinds is None:
            check.fail(op, f"masters[{i}]", f"None for a {param.dtype} param", "a tensor")
        check.tensor(op, f"masters[{i}]", master, shape, kinds, param)
    for name, tensor in zip(("params", *_LISTS[1:]), (param, m, v, m_scales, v_scales, master)):
        if tensor is not None and not tensor.is_contiguous():
            check.fail(op, f"{name}[{i}]", "contiguous (it is updated in place)", f"strides {tensor.stride()}")


_adamw_step = define(
    "adamw",
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] "
    "exp_avg_scales, Tensor(e!)[] exp_avg_sq_scales, Tensor(f!)[] masters, int[] steps, int[] keys, int[] first_rows, "
    "float[] decays, float lr, float beta1, float beta2, float eps, float grad_scale) -> ()",
    fake=lambda *args: None,
)
