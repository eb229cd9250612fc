"""Handing work over to threads."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from onnxptq.threads import behind, import_meanwhile


def test_every_item_of_every_lot_is_worked_on() -> None:
    done: list[int] = []
    with behind(done.append) as hand_over:
        for start in range(0, 30, 10):
            hand_over(range(start, start + 10))
        hand_over([])
    assert sorted(done) == list(range(30))
    assert [value // 10 for value in done] == sorted(value // 10 for value in done)  # one lot after the other


def test_the_caller_goes_on_while_threads_work() -> None:
    ready, seen = threading.Event(), []
    with behind(lambda item: seen.append((item, ready.wait(60.0)))) as hand_over:
        hand_over([1])
        ready.set()
    assert seen == [(1, True)]


def test_a_lot_that_must_not_be_held_is_done_before_the_caller_goes_on() -> None:
    done: list[int] = []
    with behind(done.append, waits=True) as hand_over:
        hand_over(range(5))
        assert sorted(done) == list(range(5))


@pytest.mark.parametrize("lots", [1, 2])
def test_what_a_call_raises_comes_with_the_next_lot_or_at_the_end(lots: int) -> None:
    handed: list[int] = []

    def fail(item: int) -> None:
        raise ValueError(f"item {item}")

    def work() -> None:
        with behind(fail) as hand_over:
            for lot in range(lots):
                hand_over([lot])
                handed.append(lot)

    with pytest.raises(ValueError, match="item 0"):
        work()
    assert handed == [0]


def test_libraries_are_imported_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "library_of_this_test"
    (tmp_path / f"{name}.py").write_text("import threading\nwhere = threading.current_thread()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_meanwhile("no_such_library_of_this_test", name)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.name == "import":
            thread.join(60.0)
    assert sys.modules.pop(name).where is not threading.main_thread()
