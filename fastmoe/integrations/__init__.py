"""fastmoe inside other libraries. Each is imported when it is first asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from fastmoe.integrations.transformers import Report


def enable(model: torch.nn.Module, save: str = "z") -> Report:
    """Computes every expert layer of a transformers model with fastmoe, as integrations.transformers.enable says.

    save: what the layers keep for backward, "z", "z8" or "x" as in ops.moe_mlp.
    """
    from fastmoe.integrations import transformers

    return transformers.enable(model, save)


def disable(model: torch.nn.Module) -> None:
    """Restores the experts implementation that `enable` found."""
    from fastmoe.integrations import transformers

    transformers.disable(model)


__all__ = ["disable", "enable"]
