"""Hugging Face transformers v5: fastmoe as an experts implementation, by name ("fastmoe") or with `enable(model)`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fastmoe import ops
from fastmoe.ops import check
from fastmoe.ops.registry import OPS, select

try:
    from transformers.activations import ACT2FN
    from transformers.integrations.moe import ExpertsInterface, _default_apply_gate
except ImportError as error:
    raise ImportError(f"fastmoe.enable: needs transformers 5, pip install 'transformers>=5': {error}") from None

NAME = "fastmoe"
_SILU = (nn.SiLU, type(ACT2FN["silu"]))
_FLAGS = {
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
}
_FORMER = "_fastmoe_former_experts"  # on an enabled model: [(config, its former implementation)]


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


def refusal(experts: nn.Module) -> str | None:
    """Why fastmoe cannot compute this experts module, naming the flag, or None if it can."""
    for flag, served in _FLAGS.items():
        if getattr(experts, flag, served) != served:
            return f"{flag} must be {served}, got {getattr(experts, flag)}"
    if type(experts)._apply_gate is not _default_apply_gate:
        return "_apply_gate must be the default, act_fn(gate) * up; the class overrides it"
    activation = getattr(experts, "act_fn", None)
    if type(activation) not in _SILU and activation is not nn.functional.silu:
        return f"act_fn must be SiLU, got {getattr(activation, '__name__', type(activation).__name__)}"
    for name in ("gate_up_proj", "down_proj"):
        dtype = getattr(experts, name).dtype
        if dtype not in check.FLOATS:
            return f"{name} must be a float32, bfloat16, float16 or float64 tensor, got {dtype}"
    return None


def experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor, **kwargs
) -> torch.Tensor:
    """The experts function that the registry calls with a model's experts module as `self`.

    hidden_states: [T, D] (or [..., D]). top_k_index: [T, K] integer; num_experts marks a slot whose expert lives on
    another rank, it adds nothing. top_k_weights: [T, K]. Weights of `self` are used where they are: gate_up_proj
    [E, 2F, D], down_proj [E, D, F]. Returns the shape and dtype of hidden_states.

    Errors: NotImplementedError naming the flag of `self`, or the keyword, that is not served.
    """
    reason = refusal(self)
    for name, value in kwargs.items():
        if value is not None:
            reason = f"{name} must be None, got {value!r}"
    if reason:
        raise NotImplementedError(f"fastmoe.experts: {type(self).__name__}: {reason}")
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    ids_TK = top_k_index.reshape(x_TD.shape[0], -1)
    ids_TK = ids_TK.masked_fill(ids_TK == self.gate_up_proj.shape[0], -1)
    weights_TK = top_k_weights.reshape(ids_TK.shape)
    if weights_TK.dtype not in (x_TD.dtype, torch.float32):
        weights_TK = weights_TK.float()
    return ops.moe_mlp(x_TD, ids_TK, weights_TK, self.gate_up_proj, self.down_proj).view(hidden_states.shape)


def register() -> None:
    """Makes experts_implementation="fastmoe" known to transformers (from_pretrained, from_config and others)."""
    ExpertsInterface.register(NAME, experts_forward)


def enable(model: nn.Module) -> Report:
    """Switches every experts module of the model to fastmoe, in place; weights are shared, not copied.

    All of them are checked first: where one cannot be served, nothing is switched. Calling it again is harmless.

    Errors: ValueError for a model without experts modules; NotImplementedError naming module and flag.
    """
    found = {name: module for name, module in model.named_modules() if _is_experts(module)}
    if not found:
        raise ValueError(
            "fastmoe.enable: model must hold experts modules of transformers v5, "
            f"got a {type(model).__name__} with none"
        )
    for name, module in found.items():
        reason = refusal(module)
        if reason:
            raise NotImplementedError(f"fastmoe.enable: {name} ({type(module).__name__}): {reason}")
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
    for module in found.values():  # those that transformers does not reach: a bare block, a class without source text
        if module.config._experts_implementation != NAME:
            module.config._experts_implementation = {"": NAME}
    return Report(tuple(LayerReport(name, *_backend(module)) for name, module in found.items()))


def disable(model: nn.Module) -> None:
    """Restores the implementation that the model had before `enable`. ValueError where it was not enabled."""
    if not hasattr(model, _FORMER):
        raise ValueError(f"fastmoe.disable: model must have been enabled, got a {type(model).__name__} that was not")
    for config, former in getattr(model, _FORMER):
        config._experts_implementation = {"": former}  # this config alone, not its sub-configs
    delattr(model, _FORMER)


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "config") and hasattr(module, "_apply_gate") and hasattr(module, "is_concatenated")


def _backend(experts: nn.Module) -> tuple[str, str]:
    weight = experts.gate_up_proj
    return select(OPS["moe_mlp"], weight.device.type, weight.dtype == torch.float64)
