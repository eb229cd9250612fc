"""What one pass over a few samples tells: concrete shapes, and the spread of every class of channels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import numpy.typing as npt

from onnxptq.graph.classes import Classes, Literals
from onnxptq.runtime import Provider, Session, group_within, open_exposed
from onnxptq.threads import use_each
from onnxptq.types import Array, CanonicalModel, Feeds, Sample

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spread:
    """Statistics of one tensor by class; all arrays have one entry per class in ``roots``.

    ``low``, ``high``: extremes over all elements of the class; ``energy``: mean square;
    ``share``: the fraction of the tensor's elements that belong to the class; ``density``: the fraction of
    the class's elements that are not 0, which every grid represents exactly. ``tail_low``, ``tail_high``:
    how far a new sample's extreme may typically lie beyond the old ones if it does (the scale of an
    exponential tail); ``rarity``: 1 / (samples * elements of the class per sample).
    """

    roots: npt.NDArray[np.int64]
    low: Floats
    high: Floats
    energy: Floats
    share: Floats
    density: Floats
    tail_low: Floats
    tail_high: Floats
    rarity: Floats

    @property
    def absmax(self) -> Floats:
        """Largest magnitude per class."""
        return np.maximum(self.high, -self.low)


def drawn(feeds: Feeds, positions: Collection[int]) -> Iterator[Sample]:
    """The feeds at ``positions``, in their order."""
    return compress(feeds, (i in positions for i in range(len(feeds))))


def observe(
    model: CanonicalModel,
    feeds: Feeds,
    labels: Mapping[str, Literals],
    classes: Classes,
    *,
    sizes: Mapping[str, tuple[int, ...]],
    positions: Collection[int],
    provider: Provider,
    group_bytes: int,
    tick: Callable[[], None],
) -> dict[str, Spread]:
    """Spread of every tensor in ``labels`` over the feeds at ``positions``.

    Tensors that are empty or not finite are left out.

    The result depends on the set of samples, not on their order: sums are added in sorted order.
    """
    builders = {name: _Builder(labels[name]) for name in labels}
    inputs = {spec.name for spec in model.inputs}
    groups = _groups([name for name in labels if name not in inputs], sizes, group_bytes)

    def update(found: tuple[str, Array]) -> None:
        name, value = found
        builders[name].update(value)

    largest = max((sum(_bytes(group, sizes).values()) for group in groups), default=0)
    for number, group in enumerate(groups or [[]]):
        run = functools.partial(
            _run, _opened(model, group, provider), group, frozenset() if number else builders.keys()
        )
        for _ in use_each(run, update, drawn(feeds, positions), 2 if 2 * largest <= group_bytes else 1):
            tick()
    spreads = {name: builder.result(classes) for name, builder in builders.items()}
    return {name: spread for name, spread in spreads.items() if spread is not None}


def _run(
    session: Session | None, group: Sequence[str], direct: Collection[str], sample: Sample
) -> list[tuple[str, Array]]:
    """Values of ``group``, and of those inputs that are in ``direct``."""
    values = {} if session is None else session.run(sample, group)
    return [*values.items(), *((name, value) for name, value in sample.items() if name in direct)]


def group_count(names: Collection[str], sizes: Mapping[str, tuple[int, ...]], group_bytes: int) -> int:
    """How often the samples are run for ``names``."""
    return max(1, len(_groups(list(names), sizes, group_bytes)))


def _groups(names: Sequence[str], sizes: Mapping[str, tuple[int, ...]], limit: int) -> list[list[str]]:
    units = [[name] for name in names]
    return [[names[i] for i in members] for members in group_within(units, _bytes(names, sizes), limit)]


def _bytes(names: Sequence[str], sizes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """What tensors take in float32."""
    return {name: 4 * math.prod(sizes[name]) for name in names}


def _opened(model: CanonicalModel, names: Sequence[str], provider: Provider) -> Session | None:
    if not names:
        return None
    return open_exposed(model.path, names, provider=provider)


class _Builder:
    """Accumulates extremes and sums of squares of one tensor at the resolution of its labels."""

    def __init__(self, labels: Literals) -> None:
        self._labels = labels
        self._axes = tuple(a for a in range(labels.ndim) if labels.shape[a] == 1)
        self._lows: list[Floats] = []
        self._highs: list[Floats] = []
        self._sums: list[Floats] = []
        self._counts: list[int] = []
        self._nonzero = np.zeros(labels.shape, dtype=np.int64)
        self._broken = False

    def update(self, value: Array) -> None:
        if value.size == 0 or self._broken or value.ndim != self._labels.ndim:
            return
        low = value.min(axis=self._axes, keepdims=True).astype(np.float64)
        high = value.max(axis=self._axes, keepdims=True).astype(np.float64)
        if low.shape != self._labels.shape or not (np.isfinite(low).all() and np.isfinite(high).all()):
            self._broken = True
            return
        self._lows.append(low)
        self._highs.append(high)
        self._sums.append(np.square(value, dtype=np.float64).sum(axis=self._axes, keepdims=True))
        self._counts.append(value.size // low.size)
        self._nonzero += np.count_nonzero(value, axis=self._axes, keepdims=True)

    def result(self, classes: Classes) -> Spread | None:
        if self._broken or not self._sums:
            return None
        roots, inverse, counts = np.unique(
            classes.roots(self._labels), return_inverse=True, return_counts=True
        )
        where = inverse.reshape(-1)
        elements = sum(self._counts)

        def mean(values: Array) -> Floats:
            weights = values.reshape(-1).astype(np.float64)
            return np.bincount(where, weights=weights, minlength=roots.size) / counts

        def peak(values: Floats) -> Floats:
            result = np.full(roots.size, -np.inf)
            np.maximum.at(result, where, values.reshape(-1))
            return result

        return Spread(
            roots=roots,
            low=-peak(-np.stack(self._lows).min(axis=0)),
            high=peak(np.stack(self._highs).max(axis=0)),
            energy=mean(np.sort(np.stack(self._sums), axis=0).sum(axis=0) / elements),
            share=counts / counts.sum(),
            density=mean(self._nonzero / elements),
            tail_low=peak(_tail([np.maximum(-low, 0.0) for low in self._lows])),
            tail_high=peak(_tail([np.maximum(high, 0.0) for high in self._highs])),
            rarity=1.0 / (counts * elements),
        )


def _tail(extremes: Sequence[Floats]) -> Floats:
    """Scale of an exponential tail of the samples' extremes: the mean excess of the largest sqrt(n) of them.

    Extremes are magnitudes on one side of 0, 0 where there is nothing on that side. A channel that was quiet
    in all of n samples may still wake: it gets 1 / n of the typical scale.
    """
    ordered = np.sort(np.stack(extremes), axis=0)[::-1]
    count = min(round(len(extremes) ** 0.5), len(extremes) - 1)
    if count == 0:
        return np.zeros_like(ordered[0])
    excess = (ordered[:count] - ordered[count]).mean(axis=0)
    result: Floats = excess + np.median(excess) / len(extremes)
    return result
