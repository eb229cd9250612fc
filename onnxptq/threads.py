"""Work of numpy and onnxruntime in threads: both let go of the interpreter lock while they compute."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TypeVar

from threadpoolctl import threadpool_limits

T = TypeVar("T")
R = TypeVar("R")

THREADS = max(1, min(4, os.cpu_count() or 1))
"""Threads at once: one per processor, up to where memory is what they wait for."""


def in_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``function`` of every item, in their order; the calls must not depend on each other.

    Linear algebra gets one thread meanwhile: its own would wait for each other, spinning, on the same processors.
    """
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, items))


@contextmanager
def behind(
    function: Callable[[T], object], *, waits: bool = False
) -> Iterator[Callable[[Sequence[T]], None]]:
    """Lets threads call ``function`` with items while the caller prepares the next ones.

    Args:
        waits: be done with a lot of items before the caller goes on, because no two may be held at once.

    Yields:
        What hands a lot over. It waits until the last lot is done, so calls for one never meet those for another;
        within a lot they must not depend on each other. What ``function`` raises comes with the next lot, or at the
        end.
    """
    with ThreadPoolExecutor(THREADS) as pool:
        pending: list[Future[None]] = []

        def settle() -> None:
            while pending:
                pending.pop().result()

        def hand_over(items: Sequence[T]) -> None:
            settle()
            # A few long tasks: one for every item would take longer than a small item does.
            pending.extend(pool.submit(_call, function, items[start::THREADS]) for start in range(THREADS))
            if waits:
                settle()

        yield hand_over
        settle()


def import_meanwhile(*modules: str) -> None:
    """Import libraries in a thread, for a caller who will need them and has to wait for something else before.

    What fails here fails again where it is needed. The thread is no daemon: at its end the interpreter waits for it,
    which native code that is half loaded might not survive otherwise.
    """

    def load() -> None:
        for name in modules:
            with suppress(Exception):
                importlib.import_module(name)

    threading.Thread(target=load, name="import").start()


def _call(function: Callable[[T], object], items: Sequence[T]) -> None:
    for item in items:
        function(item)
