"""Which options of a recipe go together, and what follows from a method where nothing is said."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from onnxptq.errors import RecipeError
from onnxptq.recipe import Recipe

NOTHING_LEARNT: list[dict[str, Any]] = [
    {},
    {"weight_bits": 4},
    {"method": "rtn"},
    {"method": "pack-ptq", "effort": "fast"},
]

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "rtn", "effort": "fast"}, "no effort"),
    *(({"method": "rtn", option: True}, f"takes no {option}") for option in ("rotate", "shift", "compensate")),
    *(
        ({option: False, **values}, f"{option} cannot be left out where packs are solved in closed form")
        for option in ("compensate", "correct_bias")
        for values in ({"weight_bits": 4}, {"method": "pack-ptq"}, {"effort": "fast"})
    ),
    *(
        ({"method": method, "effort": "fast"}, f"method {method} is learnt: it needs effort balanced or paper")
        for method in ("brecq", "qdrop", "adaround", "aiqvit")
    ),
    *(({"low_rank": "merge", **values}, "effort balanced or paper") for values in NOTHING_LEARNT),
    *(
        ({"low_rank": "merge", "method": method}, f"{method} learns roundings")
        for method in ("brecq", "qdrop", "adaround")
    ),
    *(({option: True, "weight_bits": 4}, "effort balanced or paper") for option in ("easy_first", "focus", "tune")),
    *(
        ({"low_rank": "branch", **values}, "low_rank branch needs method auto or pack-ptq, effort fast")
        for values in ({}, {"method": "rtn"}, {"method": "brecq"}, {"method": "pack-ptq", "effort": "paper"})
    ),
    *(
        ({"low_rank": "auto", **values}, "low_rank auto needs")
        for values in ({}, {"method": "rtn"}, {"method": "brecq"}, {"method": "aiqvit", "effort": "fast"})
    ),
    ({"low_rank_candidates": (4,)}, "are ranks of low_rank merge"),
    ({"low_rank_candidates": (), "method": "aiqvit"}, "holds no rank"),
    ({"low_rank_candidates": "4,0", "method": "aiqvit"}, "greater than or equal to 1"),
    *(({"steps": 600, **values}, "steps are gradient steps") for values in NOTHING_LEARNT),
    ({"steps": 0, "method": "pack-ptq"}, "greater than or equal to 1"),
    *(({"loss": "fisher", **values}, "loss fisher is made small by gradient steps") for values in NOTHING_LEARNT),
    (
        {"allocator": "greedy", "average_bits": 4.0, "average_activation_bits": 6.0},
        "takes no average_activation_bits",
    ),
    ({"softmax_root": 2}, "softmax_root is for target simulate"),
]  # fmt: skip


@pytest.mark.parametrize(("values", "said"), REFUSED, ids=[str(values) for values, _ in REFUSED])
def test_options_that_do_not_go_together(values: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.create(values)


def test_the_baseline_does_what_is_asked_for() -> None:
    plain = Recipe(method="rtn")
    tried = (plain.tries_rescaling, plain.corrects_biases, plain.compensates, plain.tries_rotation)
    assert not any(tried)
    asked = Recipe(method="rtn", equalize=True, correct_bias=True)
    assert asked.tries_rescaling
    assert asked.corrects_biases
    assert Recipe.create(yaml.safe_load(asked.to_yaml())) == asked
    assert Recipe.create(yaml.safe_load(plain.to_yaml())) == plain
    usual = Recipe()
    assert usual.tries_rescaling
    assert usual.corrects_biases
    assert usual.compensates
    Recipe(method="adaround", correct_bias=False)


def test_what_is_solved_by_packs() -> None:
    assert [Recipe(method=m).is_solved_by_packs for m in ("auto", "rtn", "qdrop")] == [False, False, True]
    assert Recipe(weight_bits=7).is_solved_by_packs
    assert not Recipe(method="rtn", weight_bits=4).is_solved_by_packs


def test_the_floor_is_for_8_bits() -> None:
    assert Recipe().least_db == 20.0
    assert Recipe(weight_bits=4).least_db is None
    assert Recipe(rules=[{"match": "x", "activation_bits": 4}]).least_db is None
    assert Recipe(weight_bits=4, floor=15.0).least_db == 15.0


def test_what_is_tuned_on_the_outputs() -> None:
    assert not Recipe(weight_bits=4).tunes
    assert Recipe(weight_bits=4, effort="balanced").tunes
    assert not Recipe(weight_bits=4, effort="balanced", tune=False).tunes
    assert [Recipe(method=m).tunes for m in ("pack-ptq", "aiqvit", "qdrop")] == [False] * 3
    assert Recipe(method="qdrop", tune=True).tunes


def test_what_focuses_and_begins_with_easy_samples() -> None:
    assert [Recipe(method=m).learns_focus for m in ("aiqvit", "pack-ptq", "auto")] == [True, False, False]
    assert Recipe(method="pack-ptq", focus=True).learns_focus
    assert Recipe(method="aiqvit").is_easy_first
    assert not Recipe(method="aiqvit", easy_first=False).is_easy_first
    assert not Recipe(method="pack-ptq").is_easy_first


@pytest.mark.parametrize(
    ("values", "choices"),
    [
        ({"weight_bits": 4}, ("off", "branch")),
        ({"effort": "fast"}, ("off", "branch")),
        ({"method": "pack-ptq"}, ("off", "merge", "branch")),
        ({"method": "pack-ptq", "effort": "paper"}, ("off", "merge")),
        ({"method": "aiqvit"}, ("off", "merge")),
    ],
    ids=str,
)
def test_uses_of_low_rank_to_choose_from(values: dict[str, Any], choices: tuple[str, ...]) -> None:
    assert Recipe.create({"low_rank": "auto", **values}).low_rank_choices == choices


def test_one_use_of_low_rank() -> None:
    assert Recipe(weight_bits=4, low_rank="branch").low_rank_choices == ("branch",)
    chosen = [{"method": "aiqvit"}, {"method": "aiqvit", "low_rank": "off"}, {"method": "pack-ptq"}, {}]
    assert [Recipe.create(values).merges_low_rank for values in chosen] == [True, False, False, False]
    assert Recipe.create({"method": "aiqvit", "low_rank_candidates": "2,5"}).low_rank_candidates == (2, 5)


def test_roots_are_tried_where_nothing_else_is_said() -> None:
    named = [{"softmax_root": 1}, {"method": "rtn"}, {"method": "pack-ptq"}, {"target": "ort-cpu"}]
    assert not any(Recipe.create({"target": "simulate", **values}).tries_roots for values in named)
