"""Which inner tensors of a form of a network hold other values than the user's file does under their names.

A form computes the same outputs, but on the way its channels may be rescaled, rotated or shifted, and constants
folded into the layers in front. Comparing such a tensor with the user's would tell nothing about quantization.

Both networks run on one sample, and of every tensor x three numbers are compared:

    sum_i x_i,    sum_i |x_i|,    sqrt(sum_i x_i^2)

A rotation keeps the last of them and a permutation of channels all three; the first two change with any other form.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from onnxptq.runtime import Provider, open_transient
from onnxptq.threads import in_threads
from onnxptq.types import CanonicalModel, Sample
from onnxptq.validate.exposure import staged

METADATA = "onnxptq.changed_tensors"
"""Key of the list in a written file, as JSON."""

_SUMS = ("ReduceSum", "ReduceL1", "ReduceL2")

_ROUNDING = 2e-3
"""Relative difference of two sums that are the same: a hundred times what single precision makes of large ones."""

_HALF_ROUNDING = 2e-2
"""The same where the user's network computes in half precision."""

Sums = npt.NDArray[np.float64]


def changed_tensors(
    model: CanonicalModel, sample: Sample, *, work_dir: Path, provider: Provider = "cpu"
) -> tuple[str, ...]:
    """Float tensors of ``model`` whose values on ``sample`` are not those of the user's file, in order.

    Args:
        work_dir: an existing folder for temporary files.

    Raises:
        InvalidModelError, RunError: a file cannot be run with sums of its inner tensors as outputs.
    """
    written = {name for node in model.user_nodes for name in node.outputs}
    ends = {*model.outputs, *model.boundary}
    names = [
        tensor.name
        for node in model.graph.nodes
        for tensor in node.outputs
        if tensor.dtype == np.float32 and tensor.name in written and tensor.name not in ends
    ]
    with staged(model.reference, work_dir) as reference:
        # Most of the time goes into opening the sessions, which one processor does.
        theirs, ours = in_threads(lambda path: _sums(path, names, sample, provider), (reference, model.path))
    allowed = _HALF_ROUNDING if model.half_bytes else _ROUNDING
    return tuple(name for name in names if _differ(theirs[name], ours[name], allowed))


def _sums(path: Path, names: Sequence[str], sample: Sample, provider: Provider) -> Mapping[str, Sums]:
    """The three sums of every tensor."""
    if not names:
        return {}
    write = functools.partial(_write_sums, path, names)
    # As written: three more readers of every tensor would keep the optimizer busy, for one run.
    session = open_transient(path.with_name(f"sums_{path.name}"), write, provider=provider, exact=True)
    found = session.run(sample, [_output(name, op) for name in names for op in _SUMS])
    return {name: np.array([float(found[_output(name, op)]) for op in _SUMS]) for name in names}


def _write_sums(path: Path, names: Sequence[str], place: Path) -> None:
    """A copy of ``path`` that writes the sums too.

    A message of protobuf takes in another one of its type that stands behind it, so weights need not be read.
    """
    more = onnx.GraphProto()
    for name in names:
        wide = f"{name}/float32"
        more.node.append(onnx.helper.make_node("Cast", [name], [wide], to=onnx.TensorProto.FLOAT))
        for op in _SUMS:
            more.node.append(onnx.helper.make_node(op, [wide], [_output(name, op)], keepdims=0))
            more.output.append(
                onnx.helper.make_tensor_value_info(_output(name, op), onnx.TensorProto.FLOAT, [])
            )
    shutil.copyfile(path, place)
    with place.open("ab") as file:
        file.write(onnx.ModelProto(graph=more).SerializeToString())


def _output(tensor: str, op: str) -> str:
    return f"{tensor}/{op}"


def _differ(before: Sums, after: Sums, allowed: float) -> bool:
    # A sum of terms that cancel is held against that of their magnitudes.
    scale = np.array([before[1], before[1], before[2]])
    with np.errstate(invalid="ignore"):
        is_same = (np.abs(before - after) <= allowed * scale) | (before == after)
    # Where masks make sums infinite or NaN nothing can be told, and nothing is held against the tensor.
    return not bool((is_same | ~np.isfinite(before)).all())


def recorded(metadata: Mapping[str, str]) -> Sequence[str]:
    """The tensors that a file itself says are changed; none where it says nothing that can be read."""
    try:
        found = json.loads(metadata.get(METADATA, "[]"))
    except json.JSONDecodeError:
        return ()
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else ()
