"""Processes of one run: exchanges between them, and errors of one that end all."""

from __future__ import annotations

import numpy as np
import pytest

from onnxptq.errors import MemoryBudgetError, OutputPathError
from onnxptq.ranks import ALONE, Ranks
from tests.unit import rank_work


def test_exchanges_between_two(ranks: Ranks) -> None:
    found = ranks.run(rank_work.exchange, 11, words=["a", "b", "c"])
    assert found["own"] == [[0, 1, 2, 3, 8, 9, 10], [4, 5, 6, 7]]
    for total in found["sum"]:  # type: ignore[attr-defined]
        np.testing.assert_array_equal(total, np.full((3, 4), 2.0**50 + 1.0))
    np.testing.assert_array_equal(found["counts"], [3, 11])
    assert float(found["scalar"]) == 1.0  # type: ignore[arg-type]
    for weight, bias in found["gradients"]:  # type: ignore[attr-defined]
        np.testing.assert_array_equal(weight, np.full((2, 2), 3.0))
        np.testing.assert_array_equal(bias, np.full(3, 3.0))
    assert found["broadcast"] == [["a", "b", "c"]] * 2
    assert found["scatter"] == [3, ["a", "b", "c"]]
    assert found["dealt"] == [[(0, "a"), (2, "c")], [(1, "b")]]
    assert found["nothing dealt"] == [[], []]


def test_one_process_gives_itself_everything() -> None:
    found = ALONE.run(rank_work.exchange, 11, words=["a"])
    assert found["own"] == [list(range(11))]
    assert found["dealt"] == [[(0, "a")]]
    assert found["scatter"] == [1]
    assert Ranks.join() is ALONE


@pytest.mark.parametrize("when", ["before an exchange", "while cards are dealt", "at the end"])
@pytest.mark.parametrize("where", [0, 1])
def test_the_error_of_one_is_the_error_of_all(where: int, when: str, ranks: Ranks) -> None:
    with pytest.raises(MemoryBudgetError, match="too much") as raised:
        ranks.run(rank_work.fail, where, when)
    assert raised.value.remedy == "less"
    assert any("rank_work.py" in note for note in raised.value.__notes__)
    # And both are ready for more.
    assert ranks.run(rank_work.fail, 7, when) == "done"


def test_what_cannot_be_packed_or_unpacked_is_an_error(ranks: Ranks) -> None:
    with pytest.raises((AttributeError, TypeError), match=r"local|lambda|pickle"):
        ranks.run(rank_work.fail, 7, lambda: None)  # type: ignore[arg-type]
    with pytest.raises(OutputPathError, match="gone"):
        ranks.run(rank_work.fail, 7, rank_work.Unreadable())  # type: ignore[arg-type]
    with pytest.raises((AttributeError, TypeError), match=r"local|lambda|pickle"):
        ranks.run(rank_work.hand_over, 0)
    with pytest.raises((AttributeError, TypeError), match=r"local|lambda|pickle"):
        ranks.run(rank_work.hand_over, 1)
    assert ranks.run(rank_work.fail, 7, "") == "done"


def test_an_error_that_cannot_be_sent_is_described(ranks: Ranks) -> None:
    with pytest.raises(RuntimeError, match="_Unspeakable: 1 and 2"):
        ranks.run(rank_work.fail_oddly)
