"""Names in messages: a few of them, and how many more there are."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 4


def listed(items: Sequence[str], most: int = SHOWN) -> str:
    """The first few of ``items``, comma separated, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
