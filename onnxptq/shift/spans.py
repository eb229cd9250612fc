"""Where the channels of tensors lie: one pass over the samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxptq.runtime import Provider, group_within, open_exposed
from onnxptq.types import CanonicalModel, Feeds

TAIL = 1e-3
"""Share of a channel's values that may lie beyond either end of its range."""

_ROWS = 8192
"""Most rows of a tensor that are kept for quantiles."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Span:
    """Per channel: the middle between the quantiles :data:`TAIL` and 1 - :data:`TAIL`, and both extremes."""

    middle: Floats
    lowest: Floats
    highest: Floats


def find_spans(
    model: CanonicalModel,
    feeds: Feeds,
    sizes: Mapping[str, int],
    axes: Mapping[str, int],
    *,
    provider: Provider,
    group_bytes: int,
) -> dict[str, Span]:
    """Spans of the tensors in ``axes``, along which their channels lie; ``sizes`` are bytes per sample."""
    names, found = list(axes), {}
    most = -(-_ROWS // len(feeds))
    for members in group_within([[name] for name in names], sizes, group_bytes):
        group = [names[i] for i in members]
        session = open_exposed(model.path, group, provider=provider)
        rows: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in group}
        ends: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in group}
        for sample in feeds:
            for name, value in session.run(sample, group).items():
                moved = np.moveaxis(value, axes[name], -1)
                flat = moved.reshape(-1, moved.shape[-1])
                ends[name] += [flat.min(axis=0), flat.max(axis=0)]
                rows[name].append(flat[:: -(-len(flat) // most)].copy())
        for name in group:
            kept = np.concatenate(rows[name]).astype(np.float64)
            found[name] = Span(
                middle=np.quantile(kept, [TAIL, 1 - TAIL], axis=0).mean(axis=0),
                lowest=np.min(ends[name], axis=0).astype(np.float64),
                highest=np.max(ends[name], axis=0).astype(np.float64),
            )
    return found
