"""Placement of every target on small networks, as text (regenerate: ``python -m tools.golden_placements``)."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from onnxptq.targets import TARGETS
from tests.unit.small_nets import NETS
from tools.golden_placements import GOLDEN, golden_texts


@pytest.fixture(scope="module")
def texts() -> Mapping[str, str]:
    return golden_texts()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("net", NETS)
def test_placement_is_the_reviewed_one(net: str, target: str, texts: Mapping[str, str]) -> None:
    name = f"{net}.{target}.txt"
    assert texts[name] == (GOLDEN / name).read_text(encoding="utf-8")


def test_every_golden_file_belongs_to_a_network(texts: Mapping[str, str]) -> None:
    assert {path.name for path in GOLDEN.glob("*.txt")} == set(texts)
