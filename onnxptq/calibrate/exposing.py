"""Sessions that return inner tensors of a model, group by group, with the same values in every grouping.

onnxruntime fuses operators where nobody looks at the tensor between them, and a fused kernel rounds
differently. So a tensor that belongs to another group is still read here, by a Slice that keeps one element
per row: it has the same number of readers in every group, the optimizer decides the same, and its memory is
freed as soon as its real readers are done.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from onnxptq.graph.save import write_model
from onnxptq.runtime import Provider, Session, open_transient
from onnxptq.types import CanonicalModel, Sample

_ANCHOR = "/calibration anchor"
_SHAPE = "/calibration shape"
_SLICE = {"starts": 0, "ends": 1, "axes": -1}


def open_group(
    model: CanonicalModel, group: Sequence[str], others: Collection[str], provider: Provider, rank: int = 0
) -> Session:
    """A session that can return ``group``, float32 tensors.

    Args:
        others: float32 tensors of rank 1 or more that other groups return.
        rank: of this process among those that do the same.
    """
    proto = onnx.load(str(model.path), load_external_data=False)
    anchored = sorted(set(others) - set(group) - set(model.outputs))
    parameters = [f"{_ANCHOR} {name}" for name in _SLICE]
    for name in anchored:
        proto.graph.node.append(onnx.helper.make_node("Slice", [name, *parameters], [name + _ANCHOR]))
    if anchored:
        proto.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.asarray([value], np.int64), name)
            for name, value in zip(parameters, _SLICE.values(), strict=True)
        )
    exposed = [name for name in group if name not in model.outputs]
    _add_outputs(proto, [*exposed, *(name + _ANCHOR for name in anchored)], onnx.TensorProto.FLOAT)
    return _open(proto, model.path.with_name(f"exposed_{rank}_{model.path.name}"), provider)


def measured_shapes(
    model: CanonicalModel, names: Sequence[str], sample: Sample, provider: Provider
) -> Mapping[str, tuple[int, ...]]:
    """The shapes that ``names`` have for ``sample``; one run, in which none of them is kept."""
    if not names:
        return {}
    proto = onnx.load(str(model.path), load_external_data=False)
    proto.graph.node.extend(onnx.helper.make_node("Shape", [name], [name + _SHAPE]) for name in names)
    wanted = [name + _SHAPE for name in names]
    _add_outputs(proto, wanted, onnx.TensorProto.INT64)
    found = _open(proto, model.path.with_name(f"shapes_{model.path.name}"), provider).run(sample, wanted)
    return {name: tuple(int(d) for d in found[name + _SHAPE]) for name in names}


def _add_outputs(proto: onnx.ModelProto, names: Sequence[str], elem_type: int) -> None:
    for name in names:
        # No shape: it may differ from sample to sample.
        entry = proto.graph.output.add()
        entry.name = name
        entry.type.tensor_type.elem_type = elem_type


def _open(proto: onnx.ModelProto, path: Path, provider: Provider) -> Session:
    """A session of ``proto``, written beside the model whose external data it shares."""
    return open_transient(path, lambda place: write_model(proto, place), provider=provider)
