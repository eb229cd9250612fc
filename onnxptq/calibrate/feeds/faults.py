"""Whether it is a sample's fault or the model's that onnxruntime could not run the model.

An index beyond a table, a length beyond what positions are known for, or shapes that do not go together show only
when the float model is run. If it can be run on anything at all, the sample is to blame: on another sample, on
harmless values of the same shapes, or on such of other sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from onnxptq.calibrate.feeds.records import RecordFeeds
from onnxptq.calibrate.feeds.synthetic import harmless_values
from onnxptq.errors import FeedError
from onnxptq.runtime import Provider, RunError, Session
from onnxptq.types import Feeds, InputSpec, Progress, Sample, started

_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Open dimensions of the inputs that are tried, all of one size."""

_REMEDY = (
    "Correct or remove it: indices must exist, and lengths and shapes must be such that the model takes them."
)


@contextmanager
def blamed(
    model: Path, sources: Sequence[Feeds], provider: Provider, progress: Progress | None = None
) -> Iterator[None]:
    """Turn a failed run into an error that names the sample which the float ``model`` cannot be run on.

    Raises:
        FeedError: a sample of ``sources`` is at fault.
        RunError: the model is, or what was made of it.
    """
    try:
        yield
    except RunError as error:
        session = Session(model, provider=provider)
        for feeds in sources:
            if isinstance(feeds, RecordFeeds):
                _require_runs(session, feeds, error, progress)
        raise


def _require_runs(session: Session, feeds: RecordFeeds, error: RunError, progress: Progress | None) -> None:
    """Raise FeedError for the first sample that ``session`` cannot run although it can run something."""
    first: tuple[int, Sample, RunError] | None = None
    runs = 0
    tick = started(progress, "find what failed", len(feeds))
    for position, sample in enumerate(feeds):
        try:
            session.run(sample)
            runs += 1
        except RunError as failure:
            first = first or (position, sample, failure)
        if first and runs:
            break
        tick()
    if first is None:
        return
    position, sample, failed = first
    if runs or _runs_on_anything(session, feeds.source.inputs, sample):
        reason = failed.message.partition(": ")[2]
        raise FeedError(
            f"{feeds.place(position)}: the float model cannot be run on it: {reason}", _REMEDY
        ) from error
    raise RunError(
        failed.message, "The float model could not be run on any values that were tried."
    ) from error


def _runs_on_anything(session: Session, inputs: Sequence[InputSpec], sample: Sample) -> bool:
    shapes = [[value.shape for value in (sample[spec.name] for spec in inputs)]]
    if any(not isinstance(dim, int) for spec in inputs for dim in spec.shape[1:]):
        shapes += [
            [
                tuple(
                    dim if isinstance(dim, int) else 1 if axis == 0 else size
                    for axis, dim in enumerate(spec.shape)
                )
                for spec in inputs
            ]
            for size in _SIZES
        ]
    return any(_runs(session, inputs, tried) for tried in shapes)


def _runs(session: Session, inputs: Sequence[InputSpec], shapes: Sequence[tuple[int, ...]]) -> bool:
    rng = np.random.default_rng(0)
    try:
        session.run(
            {
                spec.name: harmless_values(rng, shape, spec.dtype)
                for spec, shape in zip(inputs, shapes, strict=True)
            }
        )
    except RunError:
        return False
    return True
