"""Keeping large weights out of the way while native code looks at the structure of a model.

``detach`` turns large initializers into graph inputs of the same type and shape, which is all that version
conversion, shape inference and structural cleaning need; ``attach`` puts those back that are still used.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxptq.errors import UnsupportedModelError
from onnxptq.graph import proto
from onnxptq.graph.half import HALF_TYPES
from onnxptq.types import Array

_KEPT_BYTES = 4096
_CHUNK_ELEMENTS = 1 << 22


def total_weight_bytes(model: onnx.ModelProto, *, as_float: bool) -> int:
    """Bytes of all tensors of the model; half-precision ones counted as float32 if ``as_float``."""
    total = 0
    for tensor in proto.walk_tensors(model):
        factor = 2 if as_float and tensor.data_type in HALF_TYPES else 1
        total += factor * proto.stored_bytes(tensor)
    return total


def half_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the tensors of half precision."""
    return sum(proto.stored_bytes(t) for t in proto.walk_tensors(model) if t.data_type in HALF_TYPES)


def load_inline(model: onnx.ModelProto, folder: Path) -> None:
    """Read all external data into the model, in place."""
    for tensor in proto.walk_tensors(model):
        if proto.is_external(tensor):
            _read_into(tensor, folder)


def _read_into(tensor: TensorProto, folder: Path) -> None:
    ref = proto.external_ref(tensor)
    with (folder / ref.location).open("rb") as file:
        file.seek(ref.offset)
        tensor.raw_data = file.read(proto.stored_bytes(tensor))
    del tensor.external_data[:]
    tensor.data_location = TensorProto.DEFAULT


def detach(model: onnx.ModelProto, folder: Path) -> Mapping[str, TensorProto]:
    """Replace the main graph's large initializers by graph inputs, in place; returns them by name.

    Large ``Constant`` nodes of the main graph become initializers first. Large tensors of nested graphs
    are read into the model.
    """
    _lift_constants(model.graph)
    taken = proto.take_initializers(
        model, lambda tensor: proto.is_external(tensor) or proto.stored_bytes(tensor) > _KEPT_BYTES
    )
    load_inline(model, folder)
    return {tensor.name: tensor for tensor in taken}


def _lift_constants(graph: onnx.GraphProto) -> None:
    nodes = []
    for node in graph.node:
        tensor = next(proto.attribute_tensors(node), None)
        if node.op_type == "Constant" and tensor is not None and proto.stored_bytes(tensor) > _KEPT_BYTES:
            graph.initializer.append(tensor)
            graph.initializer[-1].name = node.output[0]
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def declare_float(detached: Mapping[str, TensorProto], model: onnx.ModelProto) -> None:
    """Declare the inputs that stand for detached half-precision weights as FLOAT, in place."""
    for entry in model.graph.input:
        if entry.name in detached and entry.type.tensor_type.elem_type in HALF_TYPES:
            entry.type.tensor_type.elem_type = TensorProto.FLOAT


def attach(graph: gs.Graph, detached: Mapping[str, TensorProto], folder: Path, scratch: Path) -> None:
    """Turn the graph inputs that stand for ``detached`` back into constants, in place.

    External tensors become read-only memory maps; half-precision ones are converted to float32 through
    files in ``scratch``, a few megabytes at a time.
    """
    standins = [tensor for tensor in graph.inputs if tensor.name in detached]
    outputs = {id(tensor) for tensor in graph.outputs}
    for tensor in standins:
        values = _values(detached[tensor.name], folder, scratch)
        graph.inputs.remove(tensor)
        if id(tensor) in outputs:
            raise UnsupportedModelError(f"the large initializer {tensor.name!r} is itself a graph output.")
        tensor.to_constant(values)


def _values(tensor: TensorProto, folder: Path, scratch: Path) -> Array:
    if not proto.is_external(tensor):
        array: Array = onnx.numpy_helper.to_array(tensor)
        return array.astype(np.float32) if tensor.data_type in HALF_TYPES else array
    source = proto.map_external(tensor, folder)
    return _as_float32(source, scratch) if tensor.data_type in HALF_TYPES else source


def _as_float32(source: Array, scratch: Path) -> Array:
    number = sum(1 for _ in scratch.glob("raised-*.bin"))
    target = np.memmap(scratch / f"raised-{number}.bin", dtype=np.float32, mode="w+", shape=source.shape)
    flat_in, flat_out = source.reshape(-1), target.reshape(-1)
    for start in range(0, flat_in.size, _CHUNK_ELEMENTS):
        part = slice(start, start + _CHUNK_ELEMENTS)
        flat_out[part] = flat_in[part].astype(np.float32)
        proto.release_pages(source)
        proto.release_pages(target)
    target.flush()
    return target


def structure_only(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model without the elements of large initializers: enough to look names up in."""
    large = {t.name: t for t in model.graph.initializer if proto.stored_bytes(t) > _KEPT_BYTES}
    result = onnx.ModelProto()
    result.graph.node.extend(model.graph.node)
    result.graph.input.extend(model.graph.input)
    result.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if tensor.name not in large:
            result.graph.initializer.append(tensor)
        else:
            result.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    return result
