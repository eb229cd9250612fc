"""From labels to spaces: the largest sets of channels that every operator treats alike, so that they may be mixed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxptq.graph.classes import Literals
from onnxptq.rotate.tracing import RotationTracer

FEWEST_CHANNELS = 6
"""Smaller spaces stay: there is hardly anything over which to spread an outlier."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Space:
    """Channels that are rotated together.

    ``roots``: their labels' representatives, in the order in which the rotation counts them;
    ``is_stream``: whether a normalization reads them.
    """

    roots: npt.NDArray[np.int64]
    is_stream: bool


def find_spaces(tracer: RotationTracer) -> tuple[Space, ...]:
    """Every space that weights write, that weights or a contraction read, and that is pinned nowhere.

    They come in the order of the first write.

    Two channels are in one space if all tensors, weights and operators that have one of them have the other as
    often, and if every operator that may not mix some of its elements has both in the same of its sets.
    """
    signatures = _signatures(tracer)
    sides: dict[str, set[int]] = {"reads": set(), "writes": set()}
    ordered: dict[int, None] = {}
    for turn in tracer.turns:
        roots = dict.fromkeys(tracer.classes.roots(turn.labels).reshape(-1).tolist())
        if turn.side:
            sides[turn.side].update(roots)
        if turn.side == "writes":
            ordered |= roots
    for labels in tracer.contracted:
        sides["reads"].update(tracer.classes.roots(labels).reshape(-1).tolist())
    groups: dict[int, list[int]] = {}
    for root in ordered:
        if root in sides["reads"] and not tracer.classes.is_pinned(root):
            groups.setdefault(signatures[root], []).append(root)
    normalized = {
        root
        for labels in tracer.normalized.values()
        for root in tracer.classes.roots(labels).reshape(-1).tolist()
    }
    return tuple(
        Space(roots=np.array(roots, dtype=np.int64), is_stream=roots[0] in normalized)
        for roots in groups.values()
        if len(roots) >= FEWEST_CHANNELS
    )


def _signatures(tracer: RotationTracer) -> Mapping[int, int]:
    """A number per root; equal ones may be mixed."""
    found: dict[int, int] = {}
    seen: set[tuple[bytes, bytes, tuple[int, ...]]] = set()
    for labels, keys in _constraints(tracer):
        roots = tracer.classes.roots(labels)
        mark = (roots.tobytes(), keys.tobytes(), roots.shape)
        if mark in seen:
            continue
        seen.add(mark)
        pairs, counts = np.unique(
            np.stack([roots.reshape(-1), keys.reshape(-1)], axis=1), axis=0, return_counts=True
        )
        places: dict[int, list[tuple[int, int]]] = {}
        for (root, key), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            places.setdefault(root, []).append((key, count))
        numbers: dict[tuple[int, tuple[tuple[int, int], ...]], int] = {}
        base = max(found.values(), default=0) + 1
        for root, place in places.items():
            known = (found.get(root, 0), tuple(place))
            found[root] = numbers.setdefault(known, base + len(numbers))
    return found


def _constraints(tracer: RotationTracer) -> Iterable[tuple[Literals, npt.NDArray[np.int64]]]:
    for labels in tracer.labels.values():
        yield labels, np.zeros(labels.shape, dtype=np.int64)
    for turn in tracer.turns:
        yield turn.labels, np.zeros(turn.labels.shape, dtype=np.int64)
    for fibres in tracer.fibres:
        yield fibres.labels, fibres.keys
