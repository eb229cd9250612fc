"""Recipes: YAML both ways, and refusals that name the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from onnxptq.errors import RecipeError
from onnxptq.recipe import Recipe, TensorRule, read_yaml_mapping

RECIPES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        "target": "simulate",
        "weight_bits": 4,
        "activation_bits": 6,
        "observer": "percentile",
        "percentile": 99.9,
        "include": ("Conv", "*/head/*"),
        "exclude": ("re:x[0-9]",),
        "rules": (
            {"match": "Conv_1", "weight_bits": 8},
            {"match": "logits", "observer": "minmax", "activation_bits": 8},
        ),
        "method": "rtn",
        "equalize": False,
        "correct_bias": True,
        "samples": 10,
        "holdout": 0.0,
        "opset": 21,
        "simplify": False,
        "max_memory": 512,
        "preprocess": {"size": 224, "mean": [0.5, 0.5, 0.5]},
        "min_sqnr": 20.5,
        "min_agreement": 0.98,
        "seed": 7,
    },
    "without_floor": {"floor": None},
    "baseline": {"method": "rtn"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_yaml_both_ways(name: str, tmp_path: Path) -> None:
    recipe = Recipe.create(RECIPES[name])
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.from_yaml(path) == recipe
    assert Recipe.from_yaml(str(path)) == recipe


def test_yaml_holds_what_is_absent_only_where_that_means_something() -> None:
    values = yaml.safe_load(Recipe(floor=None, rules=(TensorRule(match="a", weight_bits=4),)).to_yaml())
    assert values["floor"] is None
    assert "min_sqnr" not in values
    assert values["rules"] == [{"match": "a", "weight_bits": 4}]


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("# nothing\n")
    assert Recipe.from_yaml(path) == Recipe()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"weigth_bits": 4}, ["unknown key 'weigth_bits'", "weight_bits"]),
        ({"nonsense": 1}, ["unknown key 'nonsense'"]),
        ({"weight_bits": 1}, ["'weight_bits'", "got 1"]),
        ({"weight_bits": 9}, ["'weight_bits'"]),
        ({"activation_bits": "many"}, ["'activation_bits'", "'many'"]),
        ({"target": "tpu"}, ["'target'", "'tpu'"]),
        ({"observer": "best"}, ["'observer'"]),
        ({"percentile": 10}, ["'percentile'"]),
        ({"holdout": 1.0}, ["'holdout'"]),
        ({"samples": 0}, ["'samples'"]),
        ({"opset": 10}, ["'opset'"]),
        ({"min_agreement": 98}, ["'min_agreement'"]),
        ({"rules": [{"match": "x", "bits": 4}]}, ["rules.0.bits"]),
        ({"rules": [{"weight_bits": 4}]}, ["rules.0.match"]),
        ({"rules": [{"match": ""}]}, ["rules.0.match"]),
        ({"weight_bits": 1, "nope": 2}, ["weight_bits", "nope"]),
    ],
)
def test_illegal_recipes_name_every_key(values: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.create(values, where="my.yaml")
    assert "my.yaml" in caught.value.message
    for word in words:
        assert word in caught.value.message


@pytest.mark.parametrize(
    ("text", "word"),
    [("a: [", "not valid YAML"), ("- 1\n- 2\n", "must hold a mapping"), ("just text", "must hold a mapping")],
)
def test_files_that_are_no_recipe(text: str, word: str, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=word) as caught:
        Recipe.from_yaml(path)
    assert "r.yaml" in caught.value.message


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(RecipeError, match="not valid YAML"):
        read_yaml_mapping(path)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="Cannot read"):
        Recipe.from_yaml(tmp_path / "absent.yaml")


def test_recipes_cannot_be_changed_only_copied() -> None:
    recipe = Recipe()
    with pytest.raises(pydantic.ValidationError):
        recipe.weight_bits = 4  # type: ignore[misc]
    assert recipe.updated(weight_bits=4).weight_bits == 4
    assert recipe.weight_bits == 8
    with pytest.raises(RecipeError):
        recipe.updated(weight_bits=40)


def test_the_baseline_has_one_plain_observer() -> None:
    assert Recipe(method="rtn").observer == "mse"
    assert Recipe(method="rtn", observer="minmax").observer == "minmax"
    assert Recipe().updated(method="rtn").observer == "mse"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"wight_bits": 4}, "unknown key 'wight_bits'; did you mean weight_bits"),
        ({"weight_bits": "a"}, "'weight_bits': .*got 'a'"),
        ({"method": "rtn", "effort": "fast"}, "method rtn learns nothing"),
        ({"rules": [{"match": "a", "bits": 4}]}, "unknown key 'rules.0.bits'"),
    ],
)
def test_calling_the_class_refuses_alike(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as called:
        Recipe(**values)
    with pytest.raises(RecipeError) as created:
        Recipe.create(values)
    assert str(called.value) == str(created.value)


def test_unknown_keys_of_rules_are_held_against_those_of_rules() -> None:
    with pytest.raises(RecipeError, match=r"'rules\.1\.weight_bit'; did you mean weight_bits") as caught:
        Recipe.create({"rules": [{"match": "a"}, {"match": "b", "weight_bit": 4}]})
    assert "match, observer, weight_bits, activation_bits" in caught.value.remedy
    assert "docs/recipes.md#rules" in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "key"),
    [("seed: 1\nseed: 2\n", "seed"), ("rules:\n- match: a\n  observer: mse\n  match: b\n", "match")],
)
def test_a_key_that_is_there_twice(tmp_path: Path, text: str, key: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=rf"recipe\.yaml.*the key '{key}' is there twice.*line"):
        Recipe.from_yaml(path)


def test_keys_may_be_merged_and_overridden(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("rules:\n- &first {match: a, weight_bits: 4}\n- {<<: *first, match: b}\n")
    assert [(rule.match, rule.weight_bits) for rule in Recipe.from_yaml(path).rules] == [("a", 4), ("b", 4)]
