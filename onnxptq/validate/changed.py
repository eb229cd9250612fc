"""Which inner tensors of a form of a network hold other values than the user's file does under their names.

A form computes the same outputs, but on the way its channels may be rescaled, rotated or shifted, and constants
folded into the layers in front. Comparing such a tensor with the user's would tell nothing about quantization.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnxptq.runtime import Provider, concrete_shapes, group_within, open_exposed
from onnxptq.types import Array, CanonicalModel, Sample
from onnxptq.validate.exposure import DEFAULT_GROUP_BYTES, staged

METADATA = "onnxptq.changed_tensors"
"""Key of the list in a written file, as JSON."""

_CHANGED = 1e-2
"""Difference over the largest magnitude: half precision that was raised to float32 makes a tenth of it."""


def changed_tensors(
    model: CanonicalModel,
    sample: Sample,
    *,
    work_dir: Path,
    provider: Provider = "cpu",
    group_bytes: int = DEFAULT_GROUP_BYTES,
) -> tuple[str, ...]:
    """Float tensors of ``model`` whose values on ``sample`` are not those of the user's file, in order.

    Args:
        work_dir: an existing folder for temporary files.
        group_bytes: values of one of the two networks held at once.

    Raises:
        InvalidModelError, RunError: a file cannot be run with its inner tensors as outputs.
    """
    user = onnx.load(str(model.reference), load_external_data=False)
    written = {name for node in user.graph.node for name in node.output}
    ends = {*model.outputs, *model.boundary}
    names = [
        tensor.name
        for node in model.graph.nodes
        for tensor in node.outputs
        if tensor.dtype == np.float32 and tensor.name in written and tensor.name not in ends
    ]
    shapes, _ = concrete_shapes(model, sample, provider)
    sizes = {name: 4 * math.prod(shapes[name]) for name in names}
    changed: list[str] = []
    with staged(model.reference, work_dir) as reference:
        for members in group_within([[name] for name in names], sizes, group_bytes):
            group = [names[i] for i in members]
            theirs, ours = (
                open_exposed(path, group, provider=provider).run(sample, group)
                for path in (reference, model.path)
            )
            changed += [name for name in group if _differ(theirs[name], ours[name])]
    return tuple(changed)


def _differ(before: Array, after: Array) -> bool:
    if before.shape != after.shape:
        return True
    finite = np.isfinite(before)
    if not np.array_equal(finite, np.isfinite(after)):
        return True
    wanted, found = before[finite].astype(np.float64), after[finite].astype(np.float64)
    return bool(np.abs(wanted - found).max(initial=0.0) > _CHANGED * np.abs(wanted).max(initial=0.0))


def recorded(metadata: Mapping[str, str]) -> Sequence[str]:
    """The tensors that a file itself says are changed; none where it says nothing that can be read."""
    try:
        found = json.loads(metadata.get(METADATA, "[]"))
    except json.JSONDecodeError:
        return ()
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else ()
