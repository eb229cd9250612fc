"""Sessions of models that exist only to be run once, and how many tensors such a run may return at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxptq.graph.save import exposed_copy
from onnxptq.runtime.session import Provider, Session


def open_transient(path: Path, write: Callable[[Path], object], **options: Any) -> Session:
    """A session of what ``write`` puts at ``path``; the file and its own external data are gone afterwards.

    Args:
        path: beside the model whose external data the file shares, where it shares any.
        options: as :class:`~onnxptq.runtime.session.Session`.
    """
    try:
        write(path)
        return Session(path, **options)
    finally:
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".data").unlink(missing_ok=True)


def open_exposed(
    path: Path,
    tensors: Sequence[str],
    *,
    provider: Provider = "cpu",
    exact: bool = False,
    fused: bool = False,
) -> Session:
    """A session of the model at ``path`` that can return ``tensors`` besides the graph outputs."""
    return open_transient(
        path.with_name(f"exposed_{path.name}"),
        lambda variant: exposed_copy(path, tensors, variant),
        provider=provider,
        exact=exact,
        fused=fused,
    )


def group_within(units: Sequence[Sequence[str]], sizes: Mapping[str, int], limit: int) -> list[list[int]]:
    """Indices of consecutive ``units`` in groups whose tensors take at most ``limit`` bytes together.

    A unit larger than the limit gets a group of its own: it cannot be split.
    """
    groups: list[list[int]] = []
    present: set[str] = set()
    used = 0
    for i, unit in enumerate(units):
        extra = sum(sizes[name] for name in set(unit) - present)
        if not groups or used + extra > limit:
            groups.append([])
            present, used = set(), 0
            extra = sum(sizes[name] for name in set(unit))
        groups[-1].append(i)
        present |= set(unit)
        used += extra
    return groups
