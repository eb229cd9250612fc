"""How a recipe becomes the settings of the reconstruction."""

from __future__ import annotations

from typing import Any

import pytest

from onnxptq.packing import learning
from onnxptq.recipe import Recipe
from onnxptq.reconstruct.training import batch_size


@pytest.mark.parametrize("steps", [30, 600, 1_000])
@pytest.mark.parametrize("count", [9, 109, 437])
def test_more_steps_are_of_the_same_size(steps: int, count: int) -> None:
    usual, found = (learning(Recipe(method="pack-ptq", steps=n)) for n in (None, steps))
    assert found.steps == steps
    assert found.tuning_steps == min(usual.tuning_steps, steps)
    assert batch_size(found, count, found.steps) == batch_size(usual, count, usual.steps)


@pytest.mark.parametrize(
    ("values", "split"),
    [
        ({"method": "aiqvit"}, (60, 240)),
        ({"method": "aiqvit", "steps": 100}, (20, 80)),
        ({"method": "aiqvit", "effort": "paper", "steps": 800}, (200, 600)),
        ({"method": "qdrop", "steps": 100}, (0, 100)),
    ],
)
def test_a_search_for_ranks_keeps_its_share(values: dict[str, Any], split: tuple[int, int]) -> None:
    found = learning(Recipe.create(values))
    assert (found.search_steps, found.steps) == split
