"""Which inner tensors of a form of a network hold other values than the user's file does under their names.

A form computes the same outputs, but on the way its channels may be rescaled, rotated or shifted, and constants
folded into the layers in front. Comparing such a tensor with the user's would tell nothing about quantization.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

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
        group_bytes: values of each of the two networks held at once.

    Raises:
        InvalidModelError, RunError: a file cannot be run with its inner tensors as outputs.
    """
    user = onnx.load(str(model.reference), load_external_data=False)
    written = {name for node in user.graph.node for name in node.output}
    ends = {*model.outputs, *model.boundary}
    tensors = [
        tensor
        for node in model.graph.nodes
        for tensor in node.outputs
        if tensor.dtype == np.float32 and tensor.name in written and tensor.name not in ends
    ]
    names = [tensor.name for tensor in tensors]
    sizes = _sizes(model, tensors, sample, provider)
    changed: list[str] = []
    with staged(model.reference, work_dir) as reference:
        for members in group_within([[name] for name in names], sizes, group_bytes):
            group = [names[i] for i in members]
            run = functools.partial(_run, group=group, sample=sample, provider=provider)
            theirs, ours = map(run, (reference, model.path))
            changed += [name for name in group if _differ(theirs[name], ours[name])]
    return tuple(changed)


def _sizes(
    model: CanonicalModel, tensors: Sequence[gs.Tensor], sample: Sample, provider: Provider
) -> Mapping[str, int]:
    """Bytes of each tensor: from the graph's shapes, or from a run where some are not known."""
    bound: dict[object, int] = {
        dim: size
        for spec in model.inputs
        for dim, size in zip(spec.shape, sample[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }
    known = {t.name: _known_shape(t, bound) for t in tensors}
    if None in known.values():
        known |= concrete_shapes(model, sample, provider)[0]
    return {t.name: 4 * math.prod(known[t.name] or ()) for t in tensors}


def _known_shape(tensor: gs.Tensor, bound: Mapping[object, int]) -> tuple[int, ...] | None:
    if tensor.shape is None:
        return None
    dims = [bound.get(dim, dim) for dim in tensor.shape]
    return tuple(dims) if all(isinstance(dim, int) for dim in dims) else None


def _run(path: Path, group: Sequence[str], sample: Sample, provider: Provider) -> Mapping[str, Array]:
    return open_exposed(path, group, provider=provider).run(sample, group)


def _differ(before: Array, after: Array) -> bool:
    if before.shape != after.shape:
        return True
    finite = np.isfinite(before)
    if not np.array_equal(finite, np.isfinite(after)):
        return True
    wanted, found = (before, after) if finite.all() else (before[finite], after[finite])
    return bool(np.abs(wanted - found).max(initial=0.0) > _CHANGED * np.abs(wanted).max(initial=0.0))


def recorded(metadata: Mapping[str, str]) -> Sequence[str]:
    """The tensors that a file itself says are changed; none where it says nothing that can be read."""
    try:
        found = json.loads(metadata.get(METADATA, "[]"))
    except json.JSONDecodeError:
        return ()
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else ()
