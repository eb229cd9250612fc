"""Shifting what can be shifted to the middle of its range, and checking that the network still computes the same.

The grid of a tensor covers the union of what its channels cover. Behind normalizations, and between layers without a
nonlinear operator, every channel has a mean of its own; with the middle of each range at 0, only widths count. Behind
normalizations these are the zero points of RepQ-ViT (arXiv 2212.08254), whose scales per channel
:mod:`onnxptq.equalize` takes care of.

Behind an activation, a Gelu for example, all channels lie on one side of 0, and a grid that is symmetric about 0 uses
half of its points. Centred, the same range takes one bit less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxptq.graph.index import GraphIndex
from onnxptq.runtime import Provider, compare_forms, concrete_shapes, first_sample
from onnxptq.shift.apply import apply_shifts
from onnxptq.shift.attention import Grids, value_offsets
from onnxptq.shift.spans import Span, find_spans
from onnxptq.shift.tracing import ACTIVATION_RULES, RULES, ShiftTracer, Writer
from onnxptq.types import CanonicalModel, Feeds, ShiftedPlace

WORTH = 1 / 3
"""Share of the largest magnitude that a subtraction must take away."""

_GROUP_BYTES = 1 << 30

NO_GRIDS = Grids()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """What was shifted.

    Attributes:
        where: what was looked for.
        tensors: outputs of normalizations and layers, or of activations, with shifted channels, in the user's names.
        channels: how many of their channels.
        difference: of the float outputs, relative to their largest magnitude.
        reason: why nothing was shifted although it could be.
    """

    where: ShiftedPlace = "between layers"
    tensors: tuple[str, ...] = ()
    channels: int = 0
    difference: float = 0.0
    reason: str = ""

    @property
    def summary(self) -> str:
        """One line."""
        if not self.tensors:
            return f"No channels {self.where} can be shifted{self.reason and ': '}{self.reason}."
        count = len(self.tensors)
        return (
            f"Shifted {self.where}: {self.channels} channels of {count} tensor{'s' * (count > 1)}; "
            f"the float outputs differ by {self.difference:.1e}."
        )


def shift(
    model: CanonicalModel,
    feeds: Feeds,
    *,
    work_dir: Path,
    where: ShiftedPlace = "between layers",
    grids: Grids = NO_GRIDS,
    provider: Provider = "cpu",
    group_bytes: int | None = None,
) -> tuple[CanonicalModel, Shift]:
    """Shift channels to the middle of their ranges, where only layers with a bias read them.

    The result computes the same function. It is written to ``work_dir/shifted_{where}.onnx``.

    Args:
        feeds: samples that show the ranges; the first one tells shapes, and the float outputs are compared on it.
        where: ``between layers``, channels that a bias places; only constants differ then. Or ``behind activations``
            that matrix products read, one ``Sub`` each, where the largest magnitude falls by :data:`WORTH`: for
            grids that are symmetric about 0, others gain nothing. Or ``in attention``, values alone, against what
            quantized weights do to them.
        grids: of the weights and values of attention, for ``in attention``.
        group_bytes: values held at once.

    Returns:
        The new model (the old one if nothing can be shifted) and what was done.

    Raises:
        FeedError: there is no sample.
        OutputPathError: ``work_dir`` cannot be written.
    """
    sample = first_sample(feeds)
    shapes, values = concrete_shapes(model, sample, provider)
    tracer = ShiftTracer(GraphIndex(model.graph), shapes, values)
    tracer.follow(ACTIVATION_RULES if where == "behind activations" else RULES)
    free = tracer.free_writers(subtracting=where == "behind activations")
    sizes = {name: 4 * int(np.prod(shape, dtype=np.int64)) for name, shape in shapes.items()}
    limit = group_bytes or _GROUP_BYTES
    if where == "in attention":
        offsets = value_offsets(model, feeds, tracer, grids, sizes, provider=provider, group_bytes=limit)
        taken = set(offsets)
        free = [writer for writer in free if not taken.isdisjoint(tracer.roots(writer.labels))]
    elif free:
        axes = {w.tensor: w.axis for w in free}
        spans = find_spans(model, feeds, sizes, axes, provider=provider, group_bytes=limit)
        if where == "behind activations":
            for writer in free:
                if not _is_lopsided(spans[writer.tensor]):
                    tracer.classes.pin(writer.labels, "a subtraction would gain little")
            free = tracer.free_writers(subtracting=True)
        offsets = _offsets(tracer, free, spans)
    if not free:
        return model, Shift(where=where)
    result = apply_shifts(model, tracer, offsets, work_dir / f"shifted_{where.replace(' ', '_')}.onnx")
    gap, reason = compare_forms(model.path, result.path, sample, provider=provider)
    if reason:
        return model, Shift(where=where, reason=reason)
    return result, Shift(
        where=where,
        tensors=tuple(model.user_name(w.tensor) for w in free),
        channels=sum(int(np.count_nonzero(tracer.offsets_of(w.labels, offsets))) for w in free),
        difference=gap,
    )


def _is_lopsided(span: Span) -> bool:
    largest = float(np.maximum(-span.lowest, span.highest).max())
    centred = float((span.highest - span.lowest).max() / 2)
    return np.isfinite(largest) and centred <= (1 - WORTH) * largest


def _offsets(tracer: ShiftTracer, writers: Sequence[Writer], spans: Mapping[str, Span]) -> dict[int, float]:
    """c by class of channels: the mean of the middles of its members, and none for those that are held.

    Behind an activation the middle is that of the extremes: a few large values decide what a grid must reach.
    """
    members: dict[int, list[float]] = {}
    for writer in writers:
        span = spans[writer.tensor]
        middles = span.middle if writer.index is not None else (span.lowest + span.highest) / 2
        for root, value in zip(tracer.roots(writer.labels), middles.tolist(), strict=True):
            if not tracer.classes.is_pinned(root) and np.isfinite(value):
                members.setdefault(root, []).append(value)
    return {root: float(np.mean(values)) for root, values in members.items()}
