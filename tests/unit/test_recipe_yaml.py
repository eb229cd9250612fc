"""A recipe that is written and read again is the same recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

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
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_written_recipe_reads_as_itself(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    read = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert read == recipe
    assert read.to_yaml() == recipe.to_yaml()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_no_nulls_but_where_they_mean_something(recipe: Recipe) -> None:
    nulls = [line for line in recipe.to_yaml().splitlines() if line.endswith("null")]
    assert nulls == (["floor: null"] if recipe.floor is None else [])
