"""Rotating what can be rotated, and checking that the network still computes the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.normalizations import find_normalizations
from onnxptq.rotate.apply import apply_rotations
from onnxptq.rotate.folding import find_foldings
from onnxptq.rotate.rules import RULES
from onnxptq.rotate.spaces import Space, find_spaces
from onnxptq.rotate.tracing import RotationTracer
from onnxptq.runtime import Provider, compare_forms, concrete_shapes, first_sample
from onnxptq.types import CanonicalModel, Feeds, Skip

_TOLD = 3
"""Streams that a summary tells reasons of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotation:
    """What was rotated.

    Attributes:
        streams: numbers of channels of the rotated spaces that normalizations read.
        heads: numbers of channels of the other rotated spaces (queries with keys, values).
        skips: normalizations whose input stays, with reasons.
        difference: of the float outputs, relative to their largest magnitude.
    """

    streams: tuple[int, ...] = ()
    heads: tuple[int, ...] = ()
    skips: tuple[Skip, ...] = ()
    difference: float = 0.0

    @property
    def summary(self) -> str:
        """One line."""
        parts = [
            f"{len(sizes)} {one if len(sizes) == 1 else many} of "
            f"{' or '.join(str(n) for n in sorted(set(sizes)))} channels"
            for one, many, sizes in (
                ("residual stream", "residual streams", self.streams),
                ("space between two layers", "spaces between two layers", self.heads),
            )
            if sizes
        ]
        if parts:
            text = f"Rotated: {', '.join(parts)}; the float outputs differ by {self.difference:.1e}"
        elif self.skips:
            text = "No channels can be rotated"
        else:
            text = "No channels can be rotated: nonlinear operators or the caller read or write all of them"
        left = "; ".join(f"{skip.site} {skip.reason}" for skip in self.skips[:_TOLD])
        return f"{text}. Left: {left}." if left else f"{text}."


def rotate(
    model: CanonicalModel, feeds: Feeds, *, work_dir: Path, seed: int = 0, provider: Provider = "cpu"
) -> tuple[CanonicalModel, Rotation]:
    """Rotate the channels of residual streams, and of spaces between two layers, by random orthogonal matrices.

    The result computes the same function with the same nodes; only constants differ. It is written to
    ``work_dir/rotated.onnx``.

    Args:
        feeds: the first sample tells shapes, and the float outputs are compared on it.
        seed: chooses the matrices.

    Returns:
        The new model (the old one if nothing can be rotated) and what was done.

    Raises:
        FeedError: there is no sample.
        OutputPathError: ``work_dir`` cannot be written.
    """
    sample = first_sample(feeds)
    shapes, values = concrete_shapes(model, sample, provider)
    index = GraphIndex(model.graph)
    foldings = find_foldings(index, shapes, values)
    tracer = RotationTracer(index, shapes, values, {name: f.reason for name, f in foldings.items()})
    tracer.follow(RULES)
    spaces = find_spaces(tracer)
    skips = _skips(model, index, tracer, spaces)
    if not spaces:
        return model, Rotation(skips=skips)
    result = apply_rotations(model, tracer, foldings, spaces, work_dir / "rotated.onnx", seed=seed)
    gap, reason = compare_forms(model.path, result.path, sample, provider=provider)
    if reason:
        skip = Skip(site=model.user_name(model.outputs[0]), reason=f"not rotated: {reason}")
        return model, Rotation(skips=(*skips, skip))
    return result, Rotation(
        streams=tuple(space.roots.size for space in spaces if space.is_stream),
        heads=tuple(space.roots.size for space in spaces if not space.is_stream),
        skips=skips,
        difference=gap,
    )


def _skips(
    model: CanonicalModel, index: GraphIndex, tracer: RotationTracer, spaces: tuple[Space, ...]
) -> tuple[Skip, ...]:
    """One for each stream that a normalization reads and that stays."""
    rotated = np.concatenate([np.zeros(0, np.int64), *(space.roots for space in spaces)])
    found: dict[bytes, Skip] = {}
    for norm in find_normalizations(index):
        labels = tracer.labels.get(norm.source)
        if labels is None:
            continue
        roots = tracer.classes.roots(labels)
        if np.isin(roots, rotated).any():
            continue
        reasons = [tracer.classes.reason(root) for root in np.unique(roots).tolist()]
        reason = next((text for text in reasons if text), "its channels cannot be mixed, or are too few")
        site = model.user_name(norm.source)
        found.setdefault(np.unique(roots).tobytes(), Skip(site=site, reason=f"not rotated: {reason}"))
    return tuple(found.values())
