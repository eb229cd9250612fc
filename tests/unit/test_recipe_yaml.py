"""A recipe that is written and read again is the same recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxptq.errors import RecipeError
from onnxptq.recipe import Recipe

RECIPES = {
    "defaults": Recipe(),
    "everything": Recipe.create(
        {
            "target": "simulate",
            "method": "rtn",
            "weight_bits": 3,
            "activation_bits": 5,
            "observer": "percentile",
            "percentile": 99.9,
            "include": ["Conv", "re:a|b"],
            "exclude": ["*/head/*"],
            "rules": [{"match": "Conv", "weight_bits": 4}, {"match": "x", "observer": "minmax"}],
            "equalize": False,
            "holdout": 0.0,
            "opset": 21,
            "max_memory": 64,
            "preprocess": {"size": [8, 8], "mean": [0.5, 0.5, 0.5], "color": "BGR"},
            "min_sqnr": 12.5,
            "seed": 7,
        }
    ),
    "no floor": Recipe(floor=None),
    "few bits": Recipe(target="simulate", weight_bits=4),
    "few bits with a floor": Recipe(target="simulate", weight_bits=4, floor=15.0),
    "an average": Recipe(target="simulate", average_bits=3.4),
    "learnt": Recipe(target="simulate", weight_bits=3, activation_bits=3, effort="balanced"),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_written_recipe_reads_as_itself(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    read = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert read == recipe
    assert read.to_yaml() == recipe.to_yaml()
    # What follows from the fields must not depend on whether they were given.
    derived = [name for name, value in vars(Recipe).items() if isinstance(value, property)]
    assert "least_db" in derived
    assert {name: getattr(read, name) for name in derived} == {
        name: getattr(recipe, name) for name in derived
    }


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_no_nulls_but_where_they_mean_something(recipe: Recipe) -> None:
    nulls = [line for line in recipe.to_yaml().splitlines() if line.endswith("null")]
    assert nulls == (["floor: null"] if recipe.floor is None else [])


def test_a_value_of_no_type_that_a_field_may_have_is_told_once() -> None:
    with pytest.raises(RecipeError, match=r"'floor': .* number, .*, or .* 'auto' \(got 'high'\)"):
        Recipe.create({"floor": "high"})


def test_one_selector_needs_no_list(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("exclude: Gemm\ninclude: '*/head/*'\n")
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe == Recipe(exclude=("Gemm",), include=("*/head/*",))
    (tmp_path / "recipe.yaml").write_text("exclude: 3\n")
    with pytest.raises(RecipeError, match=r"'exclude'.*list"):
        Recipe.from_yaml(tmp_path / "recipe.yaml")
