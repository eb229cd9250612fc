"""Work of numpy and onnxruntime in threads: both let go of the interpreter lock while they compute."""

from __future__ import annotations

import importlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from threadpoolctl import threadpool_limits

from onnxptq.memory import return_memory

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


def at_once(function: Callable[[T], R], items: Iterable[T], count: int = 2) -> Iterator[R]:
    """``function`` of every item, in their order, with ``count`` calls at work at a time.

    Two runs of a network fill the processors where one alone leaves gaps, between operators and within those that are
    too small to divide.
    """
    with ThreadPoolExecutor(count) as pool:
        working: deque[Future[R]] = deque()
        for item in items:
            working.append(pool.submit(function, item))
            if len(working) == count:
                yield working.popleft().result()
        while working:
            yield working.popleft().result()


def use_each(
    make: Callable[[T], Sequence[R]], use: Callable[[R], object], items: Iterable[T], count: int = 2
) -> Iterator[None]:
    """``make`` things of every item, ``count`` items at a time, and ``use`` them, those of one item at a time.

    What was made of no more than ``count`` items is held. Items may be done in any order; calls of ``use`` for the
    things of one item must not depend on each other. Yields once per item.
    """
    turn = threading.Lock()
    with ThreadPoolExecutor(THREADS) as users:

        def work(item: T) -> None:
            made = make(item)
            # A few long tasks: one for every small thing would take longer than the thing itself.
            parts = [made[start::THREADS] for start in range(THREADS)]
            with turn:
                list(users.map(lambda part: [use(thing) for thing in part], parts))

        yield from at_once(work, items, count)
    # Every thread has its own heap, and glibc would keep what passed through it.
    return_memory()


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
