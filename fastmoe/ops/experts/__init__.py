"""Experts: the whole expert layer as one op, from token rows to the weighted sum of what their experts say."""

from __future__ import annotations

import torch

from fastmoe.ops import check
from fastmoe.ops.permutation import Routing, build_routing, check_routing
from fastmoe.ops.registry import define

ACTIVATIONS = ("swiglu",)


def moe_mlp(
    x_TD: torch.Tensor,
    topk_ids_TK: torch.Tensor | None,
    topk_weights_TK: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    activation: str = "swiglu",
    *,
    routing: Routing | None = None,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
    interleaved: bool = False,
    transposed: bool = False,
    save: str = "z",
) -> torch.Tensor:
    """y_t = sum_k weight[t, k] * down_e(silu(gate_e(x_t)) * up_e(x_t)) with e = topk_ids_TK[t, k].

    x_TD: [T, D] float32, bfloat16 or float16 (float64 on the reference). topk_ids_TK: [T, K] int32 or int64, -1 adds
    nothing; unused (None) when `routing` is given. topk_weights_TK: [T, K] in x's dtype or float32. gate_up_proj: [E,
    2F, D], gate rows first. down_proj: [E, D, F]. Both in x's dtype, the layout of Hugging Face transformers. routing:
    a Routing of these tokens, built once by the caller (with a capacity, or from experts). Products accumulate in
    float32.

    Returns y_TD [T, D] in x's dtype; differentiable in x, the weights and both projections. A frozen input costs no
    gradient work; without gradients nothing is saved. Saved for backward: x, the pre-activation z [R, 2F], the routing
    and the weights. Experts without tokens get a gradient of exactly zero.

    Errors: ValueError or TypeError naming the argument for shapes, dtypes and devices that do not fit; ValueError for
    ids outside -1..E-1 on the CPU; NotImplementedError for biases, `interleaved`, `transposed` and `save` other than
    "z". Source: SonicMoE (Guo et al., arXiv 2512.14080) for what is saved.
    """
    check.tensor("moe_mlp", "x_TD", x_TD, (None, None), legend="T, D")
    check.option("moe_mlp", "activation", activation, ACTIVATIONS)
    check.not_yet(
        "moe_mlp",
        gate_up_bias=(gate_up_bias, None),
        down_bias=(down_bias, None),
        interleaved=(interleaved, False),
        transposed=(transposed, False),
        save=(save, "z"),
    )
    T, D = x_TD.shape
    same = (x_TD.dtype,)
    autocast = torch.is_autocast_enabled(x_TD.device.type)
    check.tensor(
        "moe_mlp", "down_proj", down_proj, (None, D, None), check.FLOATS if autocast else same, x_TD, "E, D, F"
    )
    E, _, F = down_proj.shape
    check.tensor(
        "moe_mlp", "gate_up_proj", gate_up_proj, (E, 2 * F, D), check.FLOATS if autocast else same, x_TD, "E, 2F, D"
    )
    check.positive("moe_mlp", D=D, num_experts=E, F=F)
    check.tensor(
        "moe_mlp",
        "topk_weights_TK",
        topk_weights_TK,
        (T, None),
        check.FLOATS if autocast else (*same, torch.float32),
        x_TD,
        "T, K",
    )
    K = topk_weights_TK.shape[1]
    if routing is None:
        check.tensor("moe_mlp", "topk_ids_TK", topk_ids_TK, (T, K), check.INTS, x_TD, "T, K")
        routing = build_routing(topk_ids_TK, E)
    else:
        check_routing("moe_mlp", routing, x_TD)
        check.tensor("moe_mlp", "routing.dst_row_TK", routing.dst_row_TK, (T, K), (torch.int32,), legend="T, K")
        check.tensor("moe_mlp", "routing.offsets", routing.offsets, (E + 1,), (torch.int32,), legend="E+1")
    inputs = (x_TD, topk_weights_TK, gate_up_proj, down_proj)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    y_TD, _ = _moe_mlp(x_TD, topk_weights_TK, *routing, gate_up_proj, down_proj, activation, needs_grad)
    return y_TD


def _fake(x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj, activation, save_z):
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format), x_TD.new_empty(
        (src_row_R.shape[0] if save_z else 0, gate_up_proj.shape[1])
    )


def _setup(ctx, inputs, output):
    x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj, ctx.activation, _ = inputs
    _, z_R2F = output
    ctx.mark_non_differentiable(z_R2F)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj, z_R2F)


def _backward(ctx, dy_TD, _):
    if dy_TD is None:
        return (None,) * 9
    x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj, z_R2F = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 5, 6)]
    grads = _moe_mlp_backward(
        dy_TD, x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj, z_R2F, ctx.activation, *needs
    )
    dx, dweights, dgate_up, ddown = (grad if need else None for grad, need in zip(grads, needs))
    return dx, dweights, None, None, None, dgate_up, ddown, None, None


def _fake_backward(
    dy_TD,
    x_TD,
    weights_TK,
    src_row_R,
    dst_row_TK,
    offsets,
    gate_up_proj,
    down_proj,
    z_R2F,
    activation,
    need_x,
    need_weights,
    need_gate_up,
    need_down,
):
    needed = ((x_TD, need_x), (weights_TK, need_weights), (gate_up_proj, need_gate_up), (down_proj, need_down))
    return tuple(tensor.new_empty(tensor.shape if need else (0,)) for tensor, need in needed)


def _autocast(args, dtype):
    x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj, *rest = args
    if x_TD.dtype == torch.float64:
        return args
    return (
        x_TD.to(dtype),
        weights_TK.float(),
        src_row_R,
        dst_row_TK,
        offsets,
        gate_up_proj.to(dtype),
        down_proj.to(dtype),
        *rest,
    )


_moe_mlp = define(
    "experts",
    "moe_mlp(Tensor x_TD, Tensor weights_TK, Tensor src_row_R, Tensor dst_row_TK, Tensor offsets, "
    "Tensor gate_up_proj, Tensor down_proj, str activation, bool save_z) -> (Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_autocast,
)
_moe_mlp_backward = define(
    "experts",
    "moe_mlp_backward(Tensor dy_TD, Tensor x_TD, Tensor weights_TK, Tensor src_row_R, Tensor dst_row_TK, "
    "Tensor offsets, Tensor gate_up_proj, Tensor down_proj, Tensor z_R2F, str activation, bool need_x, "
    "bool need_weights, bool need_gate_up, bool need_down) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
