"""The streaming calibration run: one sample at a time, tensors exposed in groups that fit the memory budget.

Every sample is run with the batch size that the model was given by the feeds (1 where the model allows it),
so a statistic never depends on how a user batched the data. Statistics of parts of the data merge exactly, so it
does not depend either on how many processes share the samples.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from onnxptq.calibrate.exposing import measured_shapes, open_group
from onnxptq.calibrate.statistics import StatisticsBuilder, TensorStatistics
from onnxptq.errors import MemoryBudgetError
from onnxptq.ranks import ALONE, Ranks
from onnxptq.runtime import Provider, Session, first_sample, group_within
from onnxptq.threads import use_each
from onnxptq.types import Array, CanonicalModel, Feeds, Progress, Sample, Skip, started

DEFAULT_GROUP_BYTES = 1 << 30
"""Exposed activations of one sample held at once when the user states no budget."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Statistics of every calibrated tensor, by canonical tensor name.

    ``fitting`` holds the statistics without the samples set apart, on which alternatives can be compared as
    on unseen data; they are those of all samples where none were set apart. ``uncalibrated`` gives the
    reason for every tensor that has none; ``skips`` says the same in user names.
    """

    statistics: Mapping[str, TensorStatistics]
    samples: int
    fitting: Mapping[str, TensorStatistics] = field(default_factory=dict)
    skips: tuple[Skip, ...] = ()
    uncalibrated: Mapping[str, str] = field(default_factory=dict)

    @property
    def elements(self) -> Mapping[str, int]:
        """How many elements each tensor has in a sample, on average."""
        return {name: -(-found.elements // self.samples) for name, found in self.statistics.items()}


def calibrate(
    model: CanonicalModel,
    feeds: Feeds,
    tensors: Sequence[str],
    *,
    histogram: bool = True,
    apart: Collection[int] = (),
    provider: Provider = "cpu",
    group_bytes: int = DEFAULT_GROUP_BYTES,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Calibration:
    """Observe ``tensors`` (activations or graph inputs of ``model``) over all of ``feeds``.

    Args:
        histogram: False collects extremes only, which is all that min-max needs.
        apart: positions of samples that do not enter ``fitting``.
        group_bytes: largest total size of the tensors exposed in one pass over the data, in bytes.
        ranks: processes that run samples; ``feeds`` are read here alone.

    Returns:
        Statistics per tensor; tensors that were empty or held NaN/Inf are in ``skips`` instead.

    Raises:
        FeedError: the feeds hold no sample.
        MemoryBudgetError: one tensor alone is larger than ``group_bytes``.
    """
    sample = first_sample(feeds)
    inputs = {spec.name for spec in model.inputs}
    internal = [name for name in tensors if name not in inputs]
    shapes = _shapes(model, sample, internal, provider)
    sizes = {name: 4 * math.prod(shape) for name, shape in shapes.items()}
    groups = _group(sizes, group_bytes, model)
    largest = max((sum(sizes[name] for name in group) for group in groups), default=0)
    anchored = [name for name, shape in shapes.items() if shape]
    seen = ranks.run(
        _observed,
        model,
        tensors,
        groups or [[]],
        anchored,
        histogram,
        frozenset(apart),
        2 if 2 * largest <= group_bytes else 1,
        provider,
        feeds=feeds,
        progress=progress,
    )
    fitting = {
        name: found for name, builder in seen.builders.items() if (found := builder.result()) is not None
    }
    for name, builder in seen.builders.items():
        builder.merge(seen.others[name])
    return _finish(model, seen.builders, fitting, seen.broken, len(feeds))


@dataclass(slots=True)
class _Seen:
    """What samples have shown: ``others`` are those at the positions ``apart``; ``broken`` says what is wrong with a
    tensor, and at which position first."""

    builders: dict[str, StatisticsBuilder]
    others: dict[str, StatisticsBuilder]
    apart: Collection[int]
    broken: dict[str, tuple[int, str]] = field(default_factory=dict)

    def observe(self, found: tuple[int, str, Array]) -> None:
        """Add the values of one tensor at one position."""
        position, name, values = found
        # Samples come in any order, and the first that is broken is told.
        if name in self.broken and self.broken[name][0] < position:
            return
        try:
            (self.others if position in self.apart else self.builders)[name].update(values)
        except ValueError as error:
            self.broken[name] = position, str(error)

    def merge(self, other: _Seen) -> None:
        for mine, theirs in ((self.builders, other.builders), (self.others, other.others)):
            for name, builder in mine.items():
                builder.merge(theirs[name])
        for name, what in other.broken.items():
            self.broken[name] = min(what, self.broken.get(name, what))


def _observed(
    ranks: Ranks,
    model: CanonicalModel,
    tensors: Sequence[str],
    groups: Sequence[Sequence[str]],
    anchored: Sequence[str],
    histogram: bool,
    apart: Collection[int],
    at_a_time: int,
    provider: Provider,
    *,
    feeds: Feeds | None = None,
    progress: Progress | None = None,
) -> _Seen:
    """All samples of ``feeds``, which rank 0 has, dealt among ``ranks`` and run ``at_a_time``."""
    seen = _Seen(
        builders={name: StatisticsBuilder(histogram=histogram) for name in tensors},
        others={name: StatisticsBuilder(histogram=histogram) for name in tensors},
        apart=apart,
    )
    tick = started(progress, "calibrate", len(feeds) * len(groups) if feeds else 0)
    for number, group in enumerate(groups):
        session = open_group(model, group, anchored, provider, ranks.rank) if group else None
        run = functools.partial(_run, session, group, frozenset(tensors if number == 0 else ()))
        dealt = ranks.deal(None if feeds is None else _told(feeds, tick))
        for _ in use_each(run, seen.observe, dealt, at_a_time):
            pass
    for other in ranks.gather(seen)[1:]:
        seen.merge(other)
    return seen


def _run(
    session: Session | None, group: Sequence[str], direct: Collection[str], dealt: tuple[int, Sample]
) -> list[tuple[int, str, Array]]:
    """Values of ``group`` and of those inputs that are in ``direct``, each with the position of the sample."""
    position, sample = dealt
    values = {} if session is None else session.run(sample, group)
    values |= {name: value for name, value in sample.items() if name in direct}
    return [(position, name, value) for name, value in values.items()]


def _told(feeds: Feeds, tick: Callable[[], None]) -> Iterator[Sample]:
    for sample in feeds:
        yield sample
        tick()


def _finish(
    model: CanonicalModel,
    builders: Mapping[str, StatisticsBuilder],
    fitting: Mapping[str, TensorStatistics],
    broken: Mapping[str, tuple[int, str]],
    samples: int,
) -> Calibration:
    statistics: dict[str, TensorStatistics] = {}
    missing: dict[str, str] = {}
    for name, builder in builders.items():
        result = builder.result()
        if name in broken:
            missing[name] = f"its values contain {broken[name][1]} during calibration"
        elif result is None:
            missing[name] = "it is empty in every calibration sample"
        else:
            statistics[name] = result
    return Calibration(
        statistics=statistics,
        samples=samples,
        # A tensor that only the samples set apart have shown is fitted on them.
        fitting={name: fitting.get(name, found) for name, found in statistics.items()},
        skips=tuple(Skip(site=model.user_name(name), reason=reason) for name, reason in missing.items()),
        uncalibrated=missing,
    )


def _shapes(
    model: CanonicalModel, sample: Sample, names: Sequence[str], provider: Provider
) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor with ``sample``: from the graph where it is known, else by running it."""
    tensors = model.graph.tensors()
    bound = {
        dim: value.shape[i]
        for spec in model.inputs
        if (value := sample.get(spec.name)) is not None
        for i, dim in enumerate(spec.shape)
        if isinstance(dim, str) and i < value.ndim
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name in names:
        shape = getattr(tensors.get(name), "shape", None)
        if shape is None:
            continue
        dims = [bound.get(d, d) if isinstance(d, str) else d for d in shape]
        if all(isinstance(d, int) and d >= 0 for d in dims):
            shapes[name] = tuple(dims)
    unknown = [name for name in names if name not in shapes]
    return {**shapes, **measured_shapes(model, unknown, sample, provider)}


def _group(sizes: Mapping[str, int], limit: int, model: CanonicalModel) -> list[list[str]]:
    """Consecutive tensors in groups of at most ``limit`` bytes."""
    names = list(sizes)
    for name, size in sizes.items():
        if size > limit:
            raise MemoryBudgetError(
                f"Tensor '{model.user_name(name)}' alone takes {size / 2**20:.0f} MiB for one sample; "
                f"the budget leaves {limit / 2**20:.0f} MiB for activations.",
                "Raise --max-memory, or use smaller inputs.",
            )
    return [[names[i] for i in members] for members in group_within([[name] for name in names], sizes, limit)]
