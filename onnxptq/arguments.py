"""What callers of the Python functions give, as the code works with it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxptq.errors import RecipeError, UsageError
from onnxptq.recipe import Recipe


def model_path(model: object) -> Path:
    """The path of a model.

    Raises:
        UsageError: it is something else, such as a model in memory.
    """
    if isinstance(model, str | os.PathLike):
        return Path(model)
    raise UsageError(
        f"The model is given as a {type(model).__name__}, not as a path.",
        "Save it, for example with onnx.save(model, 'model.onnx'), and give that path.",
    )


def as_recipe(recipe: Recipe | Mapping[str, Any] | None, default: Recipe | None = None) -> Recipe:
    """A recipe, or one from a mapping of its fields; ``default``, or the defaults, for None.

    Raises:
        RecipeError: unknown keys, illegal values, or neither a recipe nor a mapping.
    """
    if recipe is None:
        return default or Recipe()
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return Recipe.create(dict(recipe))
    raise RecipeError(
        f"The recipe is a {type(recipe).__name__}.",
        "Give an onnxptq.Recipe, a dict of its fields, or Recipe.from_yaml(path).",
    )


def require_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise UsageError unless ``value`` of the parameter ``name`` is one of ``allowed``."""
    if value not in allowed:
        raise UsageError(f"{name} is {value!r}.", f"Choose one of {', '.join(allowed)}.")


def require_share(name: str, value: object) -> None:
    """Raise UsageError unless ``value`` of the parameter ``name`` is None or a share."""
    if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
        raise UsageError(f"{name} is {value!r}.", "Give a share from 0 to 1.")
