"""Named configurations: a recipe is a function that returns a Config."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from fastmoe.config import Config


def tiny() -> Config:
    """3.5 M parameters, 8 experts, 2 of them a token: a few minutes on two CPU cores."""
    return Config()


RECIPES: dict[str, Callable[[], Config]] = {"tiny": tiny}


def recipe(name: str) -> Config:
    """The Config of a recipe. ValueError suggests the nearest name."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"fastmoe.train: the recipe must be one of {', '.join(RECIPES)}, got {name!r}{hint}")
    return RECIPES[name]()
