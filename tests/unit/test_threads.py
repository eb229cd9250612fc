"""Handing work over to threads."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from onnxptq.threads import at_once, import_meanwhile, use_each


@pytest.mark.parametrize("count", [1, 2, 5])
def test_results_come_in_the_order_of_the_items(count: int) -> None:
    assert list(at_once(lambda item: 10 * item, range(7), count)) == [10 * item for item in range(7)]
    assert list(at_once(str, [], count)) == []


def test_two_calls_are_at_work_and_no_more() -> None:
    both, lock, now, most = threading.Barrier(2), threading.Lock(), 0, 0

    def call(item: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        both.wait(60.0)
        with lock:
            now -= 1
        return item

    assert list(at_once(call, range(6))) == list(range(6))
    assert most == 2


def test_the_first_item_that_fails_is_the_one_that_is_told() -> None:
    def call(item: int) -> int:
        if item in (2, 3):
            raise ValueError(f"item {item}")
        return item

    results = at_once(call, range(6))
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="item 2"):
        next(results)


def test_what_is_made_of_every_item_is_used_item_by_item() -> None:
    used: list[int] = []
    count = sum(1 for _ in use_each(lambda item: range(10 * item, 10 * item + 10), used.append, range(6)))
    assert count == 6
    assert sorted(used) == list(range(60))
    items = [value // 10 for value in used]
    assert [item for i, item in enumerate(items) if item not in items[:i]] == items[
        ::10
    ]  # none of them torn apart


def test_another_item_is_made_while_one_is_used() -> None:
    made, seen = [threading.Event(), threading.Event()], []

    def make(item: int) -> list[int]:
        made[item].set()
        return [item]

    for _ in use_each(make, lambda item: seen.append(made[1 - item].wait(60.0)), range(2)):
        pass
    assert seen == [True, True]


def test_one_at_a_time_is_used_before_the_next_one_is_made() -> None:
    told: list[str] = []

    def make(item: int) -> list[int]:
        told.append(f"make {item}")
        return [item]

    for _ in use_each(make, lambda item: told.append(f"use {item}"), range(2), 1):
        pass
    assert told == ["make 0", "use 0", "make 1", "use 1"]


def test_what_a_use_raises_is_told() -> None:
    def fail(thing: int) -> None:
        raise ValueError(f"thing {thing}")

    with pytest.raises(ValueError, match="thing 1"):
        list(use_each(lambda item: [item], fail, [1]))


def test_libraries_are_imported_in_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "library_of_this_test"
    (tmp_path / f"{name}.py").write_text("import threading\nwhere = threading.current_thread()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import_meanwhile("no_such_library_of_this_test", name)
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and thread.name == "import":
            thread.join(60.0)
    assert sys.modules.pop(name).where is not threading.main_thread()
