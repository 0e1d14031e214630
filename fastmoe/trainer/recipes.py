"""Named configurations: a recipe is a function that returns a Config."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from fastmoe.config import Config, ModelConfig, OptimConfig, RunConfig, TrainConfig


def tiny() -> Config:
    """3.5 M parameters, 8 experts, 2 of them a token: a minute or three on two CPU cores."""
    return Config(
        model=ModelConfig(init_std=0.06),
        optim=OptimConfig(lr=2e-3, beta2=0.98),
        train=TrainConfig(steps=600, batch_size=8),
        run=RunConfig(dir="runs/tiny"),
    )


RECIPES: dict[str, Callable[[], Config]] = {"tiny": tiny}


def recipe(name: str) -> Config:
    """The Config of a recipe. ValueError suggests the nearest name."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"fastmoe.train: the recipe must be one of {', '.join(RECIPES)}, got {name!r}{hint}")
    return RECIPES[name]()
