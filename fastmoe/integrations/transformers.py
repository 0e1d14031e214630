"""Hugging Face transformers v5: fastmoe as an experts implementation, by name ("fastmoe") or with `enable(model)`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fastmoe import ops
from fastmoe.ops import check
from fastmoe.ops.experts import SAVES
from fastmoe.ops.registry import OPS, select

try:
    from transformers import activations
    from transformers.integrations.moe import ExpertsInterface, _default_apply_gate
except ImportError as error:
    raise ImportError(f"fastmoe.enable: needs transformers 5, pip install 'transformers>=5': {error}") from None

NAME = "fastmoe"
_FORMER = "_fastmoe_former_experts"  # on an enabled model: [(config, its former implementation)]
_SAVE = "_fastmoe_save"  # on its experts modules: what they keep for backward

_GELU, _GELU_TANH = ("geglu", "gelu"), ("geglu_tanh", "gelu_tanh")
_ACTIVATIONS = {  # act_fn, by its type or itself: what the op calls it (with a gate, without)
    nn.SiLU: ("swiglu", None),
    activations.SiLUActivation: ("swiglu", None),
    F.silu: ("swiglu", None),
    activations.GELUActivation: _GELU,
    F.gelu: _GELU,
    activations.GELUTanh: _GELU_TANH,
    activations.NewGELUActivation: _GELU_TANH,
    activations.FastGELUActivation: _GELU_TANH,
    activations.AccurateGELUActivation: _GELU_TANH,
    nn.ReLU: (None, "relu"),
    F.relu: (None, "relu"),
    activations.ReLUSquaredActivation: (None, "relu2"),
}
_CLAMPED = {  # modules whose _apply_gate is clamped_swiglu: where alpha and limit are, and whether rows alternate
    "transformers.models.gpt_oss.modeling_gpt_oss": ("alpha", "limit", True),
    "transformers.models.minimax_m3_vl.modeling_minimax_m3_vl": ("swiglu_alpha", "swiglu_limit", False),
}


@dataclass(frozen=True)
class LayerReport:
    """One experts module: its name in the model, the backend its op takes, and why."""

    name: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What `enable` did. A table when printed."""

    layers: tuple[LayerReport, ...]

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        return "\n".join(f"{layer.name:<{width}}  {layer.backend}  {layer.reason}" for layer in self.layers)


def experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, **kwargs
) -> torch.Tensor:
    """The experts function that the registry calls with a model's experts module as `self`.

    hidden_states: [T, D] (or [..., D]). top_k_index: [T, K] integer; the number of experts marks a slot whose expert
    lives on another rank, it adds nothing and takes no gradient. top_k_weights: [T, K]. Weights and biases of `self`
    are used where they are, in the layout that its flags tell: gate_up_proj [E, 2F, D] or up_proj [E, F, D], down_proj
    [E, D, F]. Returns the shape and dtype of hidden_states.

    Errors: NotImplementedError naming the flag of `self`, or the keyword, that is not served.
    """
    where = f"experts: {type(self).__name__}"
    layer = _layer(where, self)
    for name, value in kwargs.items():
        if value is not None:
            _refuse(where, name, None, repr(value))
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids_TK = top_k_index.reshape(-1, top_k_index.shape[-1])
    ids_TK = ids_TK.masked_fill(ids_TK == self.down_proj.shape[0], -1)
    weights_TK = top_k_weights.reshape(ids_TK.shape)
    if weights_TK.dtype not in (x_TD.dtype, torch.float32):
        weights_TK = weights_TK.float()
    return ops.moe_mlp(x_TD, ids_TK, weights_TK, **layer).view(hidden_states.shape)


def register() -> None:
    """Makes experts_implementation="fastmoe" known to transformers (from_pretrained, from_config and others).

    A model whose experts class another library has replaced (Liger) never asks for it; `enable` says so.
    """
    ExpertsInterface.register(NAME, experts_forward)


def enable(model: nn.Module, save: str = "z") -> Report:
    """Switches every experts module of the model to fastmoe, in place; weights are shared, not copied.

    save: what the layers keep for backward, as in ops.moe_mlp ("z", "z8" or "x"). All modules are checked first: where
    one cannot be served, nothing is switched. Calling it again is harmless and may change `save`. Modules whose forward
    another library has replaced (Liger) would not ask transformers for an implementation: they are refused.

    Errors: ValueError for a model without experts modules or an unknown `save`; NotImplementedError naming the module
    and the flag of it that is not served.
    """
    check.option("enable", "save", save, SAVES)
    found = {name: module for name, module in model.named_modules() if _is_experts(name, module)}
    if not found:
        raise ValueError(
            "fastmoe.enable: model must hold experts modules of transformers v5, "
            f"got a {type(model).__name__} with none"
        )
    for name, module in found.items():
        where = f"enable: {name} ({type(module).__name__})"
        replaced = _replaced(module)
        if replaced:
            _refuse(where, "forward", "the one that asks transformers for an experts implementation", replaced)
        _layer(where, module)
    register()
    if not hasattr(model, _FORMER):
        configs = {
            id(module.config): module.config
            for module in model.modules()
            if hasattr(getattr(module, "config", None), "_experts_implementation")
        }
        setattr(model, _FORMER, [(config, config._experts_implementation) for config in configs.values()])
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(NAME)
    for module in found.values():
        setattr(module, _SAVE, save)
        if module.config._experts_implementation != NAME:  # out of transformers' reach: a bare block, no source text
            module.config._experts_implementation = {"": NAME}
    return Report(tuple(LayerReport(name, *_backend(module)) for name, module in found.items()))


def disable(model: nn.Module) -> None:
    """Restores the implementation that the model had before `enable`. ValueError where it was not enabled."""
    if not hasattr(model, _FORMER):
        raise ValueError(f"fastmoe.disable: model must have been enabled, got a {type(model).__name__} that was not")
    for config, former in getattr(model, _FORMER):
        config._experts_implementation = {"": former}  # this config alone, not its sub-configs
    for module in model.modules():
        module.__dict__.pop(_SAVE, None)
    delattr(model, _FORMER)


def _layer(where: str, experts: nn.Module) -> dict[str, object]:
    """What moe_mlp is told beside tokens and their routing, weights included; refuses what it cannot honour."""
    if getattr(experts, "has_post_expert_norm", False):
        _refuse(where, "has_post_expert_norm", False, True)
    layer = {"transposed": experts.is_transposed, "save": getattr(experts, _SAVE, "z")}
    gate = type(experts)._apply_gate
    clamped = _CLAMPED.get(gate.__module__)
    if experts.has_gate and clamped is not None:
        *names, interleaved = clamped
        if experts.is_concatenated is interleaved:
            _refuse(where, "is_concatenated", not interleaved, interleaved)
        for argument, name in zip(("alpha", "limit"), names):
            value = getattr(experts, name, None)
            if not isinstance(value, int | float) or value <= 0:
                _refuse(where, name, "a positive number", value)
            layer[argument] = float(value)
        layer |= {"activation": "clamped_swiglu", "interleaved": interleaved}
    else:
        if experts.has_gate and gate is not _default_apply_gate:
            _refuse(where, "_apply_gate", "the default, act_fn(gate) * up, or one known here", f"{gate.__module__}'s")
        if experts.has_gate and not experts.is_concatenated:
            _refuse(where, "is_concatenated", "True with the default _apply_gate", False)
        layer["activation"] = _activation(where, experts)
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    names = {"gate_up_proj": up, "down_proj": "down_proj"}
    if experts.has_bias:
        names |= {"gate_up_bias": up + "_bias", "down_bias": "down_proj_bias"}
    for argument, name in names.items():
        layer[argument] = getattr(experts, name)
        if layer[argument].dtype not in check.FLOATS:
            _refuse(where, name, "a float32, bfloat16, float16 or float64 tensor", layer[argument].dtype)
    return layer


def _activation(where: str, experts: nn.Module) -> str:
    """The op's name for act_fn, with a gate or without."""
    act = getattr(experts, "act_fn", None)
    if isinstance(act, nn.GELU):
        names = {"none": _GELU, "tanh": _GELU_TANH}[act.approximate]
    else:
        names = _ACTIVATIONS.get(type(act) if isinstance(act, nn.Module) else act, (None, None))
    name = names[0 if experts.has_gate else 1]
    if name is None:
        wanted = "SiLU or GELU with a gate" if experts.has_gate else "GELU, ReLU or ReLU squared without a gate"
        _refuse(where, "act_fn", wanted, getattr(act, "__name__", type(act).__name__))
    return name


def _refuse(where: str, name: str, wanted: object, got: object) -> None:
    raise NotImplementedError(f"fastmoe.{where}: {name} must be {wanted}, got {got}")


def _of(function: object) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _is_experts(name: str, module: nn.Module) -> bool:
    """Whether it has the flags of transformers' decorator, or, without them, the place and weights of experts."""
    if hasattr(module, "_apply_gate") and hasattr(module, "is_concatenated"):
        return True
    return name.rpartition(".")[2] == "experts" and isinstance(getattr(module, "down_proj", None), torch.Tensor)


def _replaced(experts: nn.Module) -> str | None:
    """Where this module's forward comes from, if it does not ask transformers' registry, with what to do about it."""
    forward = vars(experts).get("forward", type(experts).forward)
    function = getattr(forward, "__func__", forward)
    if function.__module__.startswith("liger_kernel"):
        return f"{_of(function)}: Liger computes this layer; apply it with swiglu=False to leave the layer to fastmoe"
    if not hasattr(experts, "is_concatenated") or not hasattr(type(experts).forward, "__wrapped__"):
        return _of(function)
    return None


def _backend(experts: nn.Module) -> tuple[str, str]:
    weight = experts.down_proj
    return select(OPS["moe_mlp"], weight.device.type, weight.dtype == torch.float64)
