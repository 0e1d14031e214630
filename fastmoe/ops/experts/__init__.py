"""Experts: the whole expert layer as one op, from token rows to the weighted sum of what their experts say."""

from __future__ import annotations

import torch

from fastmoe.ops import check
from fastmoe.ops.permutation import Routing, build_routing, check_routing
from fastmoe.ops.registry import define

GATED = ("swiglu", "geglu", "geglu_tanh", "clamped_swiglu")  # act(gate) * up: gate_up_proj holds two halves
PLAIN = ("gelu", "gelu_tanh", "relu", "relu2")  # act(up): gate_up_proj holds F rows
ACTIVATIONS = GATED + PLAIN
SAVES = ("z", "z8", "x")
Z8_BLOCK = 64  # columns of F that share a scale


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
    alpha: float = 1.702,
    limit: float = 7.0,
    save: str = "z",
    sparse_grads: bool = False,
) -> torch.Tensor:
    """y_t = sum_k weight[t, k] * (act(x_t @ gate_up_e.T + gate_up_bias_e) @ down_e.T + down_bias_e), e = ids[t, k].

    x_TD: [T, D] float32, bfloat16 or float16 (float64 on the reference). topk_ids_TK: [T, K] int32 or int64, -1 adds
    nothing; unused (None) when `routing` is given. topk_weights_TK: [T, K] in x's dtype or float32. gate_up_proj: [E,
    2F, D], gate rows first. down_proj: [E, D, F]. Both in x's dtype, the layout of Hugging Face transformers. routing:
    a Routing of these tokens, built once by the caller (with a capacity, or from experts). Products accumulate in
    float32.

    activation: "swiglu" silu(gate) * up, "geglu" gelu(gate) * up (erf; "geglu_tanh" its approximation),
    "clamped_swiglu" g * sigmoid(alpha * g) * (u + 1) with g = min(gate, limit), u = up within +-limit (gpt-oss); or
    without a gate, gate_up_proj [E, F, D]: "gelu", "gelu_tanh", "relu", "relu2". gate_up_bias: [E, 2F] (or [E, F]),
    down_bias: [E, D], in x's dtype. interleaved: gate and up rows alternate. transposed: gate_up_proj is [E, D, 2F],
    down_proj [E, F, D].

    save, what is kept for backward besides x, the weights and the routing: "z" the pre-activation [R, 2F] in x's
    dtype; "z8" the same as int8 with one bfloat16 scale for every 64 columns; "x" nothing, z is computed again. The
    result does not depend on it. sparse_grads: the projections' gradients are sparse COO tensors that hold the experts
    with tokens (as nn.Embedding(sparse=True) does; on a GPU this waits for the device); not under torch.compile.

    Returns y_TD [T, D] in x's dtype; differentiable in x, the weights, both projections and biases. A frozen input
    costs no gradient work; without gradients nothing is saved. Experts without tokens get a gradient of exactly zero.

    Errors: ValueError or TypeError naming the argument for shapes, dtypes, devices and options that do not fit;
    ValueError for ids outside -1..E-1 on the CPU. Source: SonicMoE (Guo et al., arXiv 2512.14080) for what is saved.
    """
    op = "moe_mlp"
    check.tensor(op, "x_TD", x_TD, (None, None), legend="T, D")
    check.option(op, "activation", activation, ACTIVATIONS)
    check.option(op, "save", save, SAVES)
    for name, value in (("alpha", alpha), ("limit", limit)):
        if not value > 0:
            check.fail(op, name, "above 0", value)
    if sparse_grads and torch.compiler.is_compiling():
        check.fail(op, "sparse_grads", "False under torch.compile", sparse_grads)
    gated = activation in GATED
    if interleaved and not gated:
        check.fail(op, "interleaved", f"False for {activation!r}, which has no gate", interleaved)
    T, D = x_TD.shape
    dtypes = check.FLOATS if torch.is_autocast_enabled(x_TD.device.type) else (x_TD.dtype,)
    shape, legend = ((None, None, D), "E, F, D") if transposed else ((None, D, None), "E, D, F")
    check.tensor(op, "down_proj", down_proj, shape, dtypes, x_TD, legend)
    E, F = down_proj.shape[0], down_proj.shape[1 if transposed else 2]
    Z = 2 * F if gated else F
    legend = "2F" if gated else "F"
    shape, order = ((E, D, Z), f"E, D, {legend}") if transposed else ((E, Z, D), f"E, {legend}, D")
    check.tensor(op, "gate_up_proj", gate_up_proj, shape, dtypes, x_TD, order)
    check.positive(op, D=D, num_experts=E, F=F)
    if gate_up_bias is not None:
        check.tensor(op, "gate_up_bias", gate_up_bias, (E, Z), dtypes, x_TD, f"E, {legend}")
    if down_bias is not None:
        check.tensor(op, "down_bias", down_bias, (E, D), dtypes, x_TD, "E, D")
    check.tensor(op, "topk_weights_TK", topk_weights_TK, (T, None), (*dtypes, torch.float32), x_TD, "T, K")
    K = topk_weights_TK.shape[1]
    if routing is None:
        check.tensor(op, "topk_ids_TK", topk_ids_TK, (T, K), check.INTS, x_TD, "T, K")
        routing = build_routing(topk_ids_TK, E)
    else:
        check_routing(op, routing, x_TD)
        check.tensor(op, "routing.dst_row_TK", routing.dst_row_TK, (T, K), (torch.int32,), legend="T, K")
        check.tensor(op, "routing.offsets", routing.offsets, (E + 1,), (torch.int32,), legend="E+1")
    tensors = (x_TD, topk_weights_TK, *routing, gate_up_proj, down_proj, gate_up_bias, down_bias)
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    layer = (activation, interleaved, transposed, alpha, limit)
    return _moe_mlp(*tensors, *layer, save if needs_grad else "none", sparse_grads)[0]


def z_shape(R: int, F: int, activation: str, save: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shapes of z and of its scales: [R, 2F or F], and for "z8" [R, (2 or 1) * ceil(F / 64)], gate's first."""
    halves = 2 if activation in GATED else 1
    scales = halves * -(-F // Z8_BLOCK)
    return (R if save in ("z", "z8") else 0, halves * F), (R if save == "z8" else 0, scales)


def _fake(x_TD, weights_TK, src_row_R, dst_row_TK, offsets, gate_up_proj, down_proj, gate_up_bias, down_bias, *layer):
    activation, _, transposed, _, _, save, _ = layer
    z, scale = z_shape(src_row_R.shape[0], down_proj.shape[1 if transposed else 2], activation, save)
    return (
        torch.empty_like(x_TD, memory_format=torch.contiguous_format),
        x_TD.new_empty(z, dtype=torch.int8 if save == "z8" else x_TD.dtype),
        x_TD.new_empty(scale, dtype=torch.bfloat16),
    )


def _setup(ctx, inputs, output):
    _, z_RZ, z_scale = output
    ctx.mark_non_differentiable(z_RZ, z_scale)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:9], z_RZ, z_scale)
    ctx.layer = inputs[9:]


def _backward(ctx, dy_TD, *_):
    grads = [None] * 16
    if dy_TD is None:
        return tuple(grads)
    *inputs, z_RZ, z_scale = ctx.saved_tensors
    *layer, sparse = ctx.layer
    places = (0, 1, 5, 6, 7, 8)  # x, weights, projections, biases
    needs = [ctx.needs_input_grad[i] for i in places]
    results = _moe_mlp_backward(dy_TD, *inputs, z_RZ, z_scale, *layer, *needs, sparse)
    for place, need, grad in zip(places, needs, results):
        if need:
            grads[place] = _sparse(grad, inputs[4], inputs[place]) if sparse and place in (5, 6) else grad
    return tuple(grads)


def _sparse(values, offsets, like):
    """The gradient of a projection from the rows of its experts with tokens."""
    touched = (offsets[1:] > offsets[:-1]).nonzero().view(1, -1)
    return torch.sparse_coo_tensor(touched, values, like.shape, is_coalesced=True, check_invariants=False)


def _fake_backward(dy_TD, *args):
    x_TD, weights_TK, _, _, _, gate_up_proj, down_proj, gate_up_bias, down_bias = args[:9]
    *needs, sparse = args[-7:]
    experts = (torch.library.get_ctx().new_dynamic_size(),) if sparse else (down_proj.shape[0],)
    shapes = (
        x_TD.shape,
        weights_TK.shape,
        (*experts, *gate_up_proj.shape[1:]),
        (*experts, *down_proj.shape[1:]),
        gate_up_bias.shape if gate_up_bias is not None else (0,),
        down_bias.shape if down_bias is not None else (0,),
    )
    like = (x_TD, weights_TK, gate_up_proj, down_proj, x_TD, x_TD)
    return tuple(t.new_empty(shape if need else (0,)) for t, shape, need in zip(like, shapes, needs))


def _autocast(args, dtype):
    x_TD, weights_TK, src_row_R, dst_row_TK, offsets, *projections = args[:9]
    if x_TD.dtype == torch.float64:
        return args
    lower = [None if tensor is None else tensor.to(dtype) for tensor in projections]
    return x_TD.to(dtype), weights_TK.float(), src_row_R, dst_row_TK, offsets, *lower, *args[9:]


_INPUTS = (
    "Tensor x_TD, Tensor weights_TK, Tensor src_row_R, Tensor dst_row_TK, Tensor offsets, Tensor gate_up_proj, "
    "Tensor down_proj, Tensor? gate_up_bias, Tensor? down_bias"
)
_LAYER = "str activation, bool interleaved, bool transposed, float alpha, float limit, str save"
_moe_mlp = define(
    "experts",
    f"moe_mlp({_INPUTS}, {_LAYER}, bool sparse_grads) -> (Tensor, Tensor, Tensor)",
    fake=_fake,
    setup_context=_setup,
    backward=_backward,
    autocast=_autocast,
)
_moe_mlp_backward = define(
    "experts",
    f"moe_mlp_backward(Tensor dy_TD, {_INPUTS}, Tensor z_RZ, Tensor z_scale, {_LAYER}, bool need_x, bool need_weights, "
    "bool need_gate_up, bool need_down, bool need_gate_up_bias, bool need_down_bias, bool sparse_grads) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
)
