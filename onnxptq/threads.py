"""Work of numpy in threads: it lets go of the interpreter lock while it reads an array."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
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
