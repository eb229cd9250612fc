"""The streaming calibration run: tensors are exposed in groups that fit the memory budget, one sample at a time.

Every sample is run with the batch size that the model was given by the feeds (1 where the model allows it),
so a statistic never depends on how a user batched the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from onnxptq.calibrate.statistics import StatisticsBuilder, TensorStatistics
from onnxptq.errors import FeedError, MemoryBudgetError
from onnxptq.graph.save import exposed_copy
from onnxptq.runtime import Provider, Session
from onnxptq.types import Array, CanonicalModel, Feeds, Progress, Skip

DEFAULT_GROUP_BYTES = 1 << 30
"""Exposed activations of one sample held at once when the user states no budget."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Calibration:
    """Statistics of every calibrated tensor, by canonical tensor name.

    ``uncalibrated`` gives the reason for every tensor that has none; ``skips`` says the same in user names.
    """

    statistics: Mapping[str, TensorStatistics]
    samples: int
    skips: tuple[Skip, ...] = ()
    uncalibrated: Mapping[str, str] = field(default_factory=dict)


def calibrate(
    model: CanonicalModel,
    feeds: Feeds,
    tensors: Sequence[str],
    *,
    work_dir: Path,
    histogram: bool = True,
    provider: Provider = "cpu",
    group_bytes: int = DEFAULT_GROUP_BYTES,
    progress: Progress | None = None,
) -> Calibration:
    """Observe ``tensors`` (activations or graph inputs of ``model``) over all of ``feeds``.

    Args:
        histogram: False collects extremes only, which is all that min-max needs.
        group_bytes: largest total size of the tensors exposed in one pass over the data, in bytes.

    Returns:
        Statistics per tensor; tensors that were empty or held NaN/Inf are in ``skips`` instead.

    Raises:
        FeedError: the feeds hold no sample.
        MemoryBudgetError: one tensor alone is larger than ``group_bytes``.
    """
    if len(feeds) == 0:
        raise FeedError("There is no calibration sample.", "Point --calib at a folder with at least one sample.")
    inputs = {spec.name for spec in model.inputs}
    internal = [name for name in tensors if name not in inputs]
    groups = _group(_measure(model, feeds, internal, work_dir, provider), group_bytes, model)
    builders = {name: StatisticsBuilder(histogram=histogram) for name in tensors}
    broken: dict[str, str] = {}
    step = progress.start("calibrate", len(feeds) * max(1, len(groups))) if progress else None
    for number, group in enumerate(groups or [[]]):
        session = _open(model, group, work_dir, provider) if group else None
        for sample in feeds:
            if number == 0:
                _observe({k: v for k, v in sample.items() if k in builders}, builders, broken)
            if session is not None:
                _observe(session.run(sample, group), builders, broken)
            if step:
                step()
        del session
    return _finish(model, builders, broken, len(feeds))


def _observe(
    values: Mapping[str, Array], builders: Mapping[str, StatisticsBuilder], broken: dict[str, str]
) -> None:
    for name, value in values.items():
        if name in broken or value.size == 0:
            continue
        # The sum is finite exactly when every element is, up to an overflow that the second look clears.
        if not np.isfinite(value.sum(dtype=np.float64)) and not np.isfinite(value).all():
            broken[name] = "NaN" if np.isnan(value).any() else "Inf"
            continue
        builders[name].update(value)


def _finish(
    model: CanonicalModel, builders: Mapping[str, StatisticsBuilder], broken: Mapping[str, str], samples: int
) -> Calibration:
    statistics: dict[str, TensorStatistics] = {}
    missing: dict[str, str] = {}
    for name, builder in builders.items():
        result = builder.result()
        if name in broken:
            missing[name] = f"its values contain {broken[name]} during calibration"
        elif result is None:
            missing[name] = "it is empty in every calibration sample"
        else:
            statistics[name] = result
    return Calibration(
        statistics=statistics,
        samples=samples,
        skips=tuple(Skip(site=model.user_name(name), reason=reason) for name, reason in missing.items()),
        uncalibrated=missing,
    )


def _measure(
    model: CanonicalModel, feeds: Feeds, names: Sequence[str], work_dir: Path, provider: Provider
) -> dict[str, int]:
    """Bytes of each tensor in the first sample: from static shapes where they are known, else by running it."""
    sample = next(iter(feeds))
    tensors = model.graph.tensors()
    batch = next((v.shape[0] for v in sample.values() if v.ndim), 1)
    sizes = {}
    for name in names:
        shape = getattr(tensors.get(name), "shape", None)
        dims = [_dimension(d, batch if i == 0 else None) for i, d in enumerate(shape or ())]
        if shape is not None and all(d is not None for d in dims):
            sizes[name] = 4 * math.prod(d for d in dims if d is not None)
    unknown = [name for name in names if name not in sizes]
    for start in range(0, len(unknown), 16):
        chunk = unknown[start : start + 16]
        for name, value in _open(model, chunk, work_dir, provider).run(sample, chunk).items():
            sizes[name] = value.nbytes
    return {name: sizes[name] for name in names}


def _dimension(dim: int | str | None, batch: int | None) -> int | None:
    return dim if isinstance(dim, int) else batch


def _group(sizes: Mapping[str, int], limit: int, model: CanonicalModel) -> list[list[str]]:
    """Consecutive tensors in groups of at most ``limit`` bytes."""
    groups: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > limit:
            raise MemoryBudgetError(
                f"Tensor '{model.user_name(name)}' alone takes {size / 2**20:.0f} MiB for one sample; "
                f"the budget leaves {limit / 2**20:.0f} MiB for activations.",
                "Raise --max-memory, or use smaller inputs.",
            )
        if size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    return groups


def _open(model: CanonicalModel, names: Sequence[str], work_dir: Path, provider: Provider) -> Session:
    exposed = model.path.with_name(f"exposed_{model.path.name}")
    try:
        exposed_copy(model.path, names, exposed)
        return Session(exposed, provider=provider)
    finally:
        exposed.unlink(missing_ok=True)
