"""Giving freed memory back to the system."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable
from pathlib import Path

SLACK = 64 << 20
"""Bytes of freed memory that are not worth giving back."""


def return_memory(slack: int = 0) -> None:
    """Give back to the system what was freed, once the process has grown by ``slack`` bytes since the last time.

    Between the values that stay, glibc keeps what passes used: up to a gigabyte over a few dozen of them.
    """
    global _after_last
    trim = _trim()
    if trim is not None and (slack == 0 or _resident() > _after_last + slack):
        trim(0)
        _after_last = _resident()


_after_last = 0


def _resident() -> int:
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * mmap.PAGESIZE


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        # Other libraries return memory on their own terms.
        return None
