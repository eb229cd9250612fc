"""What one forward pass tells about a graph: concrete shapes, and values that shapes are made of.

Values that depend on those of a graph input differ from sample to sample, so one pass tells nothing about them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxptq.errors import FeedError
from onnxptq.graph.index import SHAPE_READERS, is_constant, is_float32
from onnxptq.graph.save import exposed_copy, write_model
from onnxptq.runtime.session import Provider
from onnxptq.runtime.transient import open_transient
from onnxptq.types import Array, CanonicalModel, Feeds, Sample

_PARAMETER_OPS = frozenset(
    {"Slice", "Gather", "Tile", "Pad", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"}
)
_SHAPE_SUFFIX = "/concrete shape"


def first_sample(feeds: Feeds) -> Sample:
    """The sample by which a stage learns what a graph does.

    Raises:
        FeedError: there is none.
    """
    sample = next(iter(feeds), None)
    if sample is None:
        raise FeedError(
            "There is no calibration sample.", "Point --calib at a folder with at least one sample."
        )
    return sample


def concrete_shapes(
    model: CanonicalModel, sample: Sample, provider: Provider
) -> tuple[dict[str, tuple[int, ...]], dict[str, Array]]:
    """Shapes of all float32 tensors, and values of the integers that movement operators are given, for a sample.

    Of the latter only those that follow from shapes, or that the caller gives.
    """
    graph = model.graph
    varying = _varying(graph)
    names = [t.name for n in graph.nodes for t in n.outputs if t.name and is_float32(t)]
    shapes = {name: value.shape for name, value in sample.items() if value.dtype == np.float32}
    parameters = sorted(
        {
            t.name
            for node in graph.nodes
            if node.op in _PARAMETER_OPS
            for t in node.inputs[1:]
            if t.name and not is_constant(t) and not is_float32(t) and t.name not in varying
        }
    )

    def write(exposed: Path) -> None:
        exposed_copy(model.path, parameters, exposed)
        proto = onnx.load(str(exposed), load_external_data=False)
        for name in names:
            proto.graph.node.append(onnx.helper.make_node("Shape", [name], [name + _SHAPE_SUFFIX]))
            proto.graph.output.append(
                onnx.helper.make_tensor_value_info(name + _SHAPE_SUFFIX, onnx.TensorProto.INT64, None)
            )
        write_model(proto, exposed)

    session = open_transient(model.path.with_name(f"shapes_{model.path.name}"), write, provider=provider)
    wanted = [name + _SHAPE_SUFFIX for name in names]
    found = session.run(sample, [*wanted, *parameters])
    for name in names:
        shapes[name] = tuple(int(d) for d in found[name + _SHAPE_SUFFIX])
    values = {name: found[name] for name in parameters} | {
        name: value for name, value in sample.items() if np.issubdtype(value.dtype, np.integer)
    }
    return shapes, values


def _varying(graph: gs.Graph) -> frozenset[str]:
    """Tensors that depend on the values of a graph input."""
    names = {t.name for t in graph.inputs}
    for node in graph.nodes:
        if node.op not in SHAPE_READERS and any(t.name in names for t in node.inputs):
            names.update(t.name for t in node.outputs if t.name)
    return frozenset(names)
