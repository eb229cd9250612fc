"""Raises half-precision models to float32, leaving the graph's inputs and outputs as they are.

Every FLOAT16 and BFLOAT16 tensor becomes FLOAT; ``Cast`` nodes at the graph's inputs and outputs keep the
caller's types. The result computes in float32 what the original computes with rounding to half precision
after each node, so outputs agree to half precision only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto

from onnxptq.graph import proto

HALF_TYPES = frozenset({TensorProto.FLOAT16, TensorProto.BFLOAT16})
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_datatype", "softmax_precision", "stash_type"})
_SUFFIX = "_as_float"


def uses_half(model: onnx.ModelProto) -> bool:
    """Whether any initializer, attribute or graph input or output is half precision."""
    if any(tensor.data_type in HALF_TYPES for tensor in proto.walk_tensors(model)):
        return True
    if any(_elem_type(entry) in HALF_TYPES for entry in (*model.graph.input, *model.graph.output)):
        return True
    return any(
        attribute.name in _TYPE_ATTRIBUTES and attribute.i in HALF_TYPES
        for node in proto.walk_nodes(model)
        for attribute in node.attribute
    )


def raise_half(model: onnx.ModelProto) -> Mapping[str, str]:
    """Edit ``model`` in place; returns the caller's name for each tensor that was renamed.

    External tensors are left alone: large weights are detached before and converted when they are attached
    again (``weights.attach``). Functions must have been inlined.
    """
    renamed = _cast_inputs(model.graph) | _cast_outputs(model.graph)
    for tensor in proto.walk_tensors(model):
        if tensor.data_type in HALF_TYPES and not proto.is_external(tensor):
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for node in proto.walk_nodes(model):
        for attribute in node.attribute:
            is_type = attribute.type == AttributeProto.INT and attribute.name in _TYPE_ATTRIBUTES
            if is_type and attribute.i in HALF_TYPES and not _is_boundary_cast(node, renamed):
                attribute.i = TensorProto.FLOAT
    for graph in proto.walk_graphs(model.graph):
        entries = [*graph.value_info]
        if graph is not model.graph:
            entries += [*graph.input, *graph.output]
        for entry in entries:
            if _elem_type(entry) in HALF_TYPES:
                entry.type.tensor_type.elem_type = TensorProto.FLOAT
    return renamed


def _elem_type(entry: onnx.ValueInfoProto) -> int:
    return entry.type.tensor_type.elem_type


def _is_boundary_cast(node: onnx.NodeProto, renamed: Mapping[str, str]) -> bool:
    return node.op_type == "Cast" and renamed.get(node.input[0]) == node.output[0]


def _cast_inputs(graph: onnx.GraphProto) -> dict[str, str]:
    renamed: dict[str, str] = {}
    outputs = {entry.name for entry in graph.output}
    casts = []
    for entry in graph.input:
        if _elem_type(entry) not in HALF_TYPES or entry.name in outputs:
            continue
        inner = _free_name(graph, entry.name)
        casts.append(_cast(graph, entry.name, inner, TensorProto.FLOAT))
        _rename_reads(graph, entry.name, inner)
        renamed[inner] = entry.name
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return renamed


def _cast_outputs(graph: onnx.GraphProto) -> dict[str, str]:
    renamed: dict[str, str] = {}
    inputs = {entry.name for entry in graph.input}
    for entry in graph.output:
        if _elem_type(entry) not in HALF_TYPES or entry.name in inputs:
            continue
        inner = _free_name(graph, entry.name)
        for node in graph.node:
            for i, name in enumerate(node.output):
                if name == entry.name:
                    node.output[i] = inner
        for tensor in graph.initializer:
            if tensor.name == entry.name:
                tensor.name = inner
        _rename_reads(graph, entry.name, inner)
        graph.node.append(_cast(graph, inner, entry.name, _elem_type(entry)))
        renamed[inner] = entry.name
    return renamed


def _cast(graph: onnx.GraphProto, source: str, target: str, data_type: int) -> onnx.NodeProto:
    taken = {node.name for node in graph.node}
    name = f"{target}_Cast"
    while name in taken:
        name += "_"
    return onnx.helper.make_node("Cast", [source], [target], name, to=data_type)


def _rename_reads(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Rename every read of ``old``, in nested graphs too unless they define that name themselves."""
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new
        for nested in proto.subgraphs_of(node):
            defined = {e.name for e in nested.input} | {t.name for t in nested.initializer}
            defined |= {name for inner in nested.node for name in inner.output}
            if old not in defined:
                _rename_reads(nested, old, new)
                for entry in nested.output:
                    if entry.name == old:
                        entry.name = new


def _free_name(graph: onnx.GraphProto, name: str) -> str:
    taken = {t.name for t in graph.initializer} | {e.name for e in graph.input}
    taken |= {output for node in graph.node for output in node.output}
    candidate = name + _SUFFIX
    while candidate in taken:
        candidate += "_"
    return candidate
