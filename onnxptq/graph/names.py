"""Stable names for nodes, and the way back from canonical tensors to the user's own names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs


def name_nodes(graph: onnx.GraphProto, *, unnamed: bool = True) -> list[str]:
    """Give every node of ``graph`` a unique name, in place; returns the names that were repeated.

    Unnamed nodes become ``<OpType>_<k>``, counted per operator in the order of the file, unless ``unnamed`` is
    False; a repeated name gets the first free ``_<k>``. Names that are unique already stay.
    """
    repeated: dict[str, None] = {}
    taken = {node.name for node in graph.node if node.name}
    counts: dict[str, int] = defaultdict(int)
    seen: set[str] = set()
    for node in graph.node:
        if node.name and node.name not in seen:
            seen.add(node.name)
            continue
        if node.name:
            repeated[node.name] = None
        elif not unnamed:
            continue
        stem = node.name or node.op_type
        while True:
            candidate = f"{stem}_{counts[stem]}"
            counts[stem] += 1
            if candidate not in taken:
                break
        node.name = candidate
        taken.add(candidate)
        seen.add(candidate)
    return list(repeated)


@dataclass(slots=True)
class _Reference:
    """The user's graph, indexed."""

    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    constants: set[str] = field(default_factory=set)
    by_read: dict[tuple[str, str], list[onnx.NodeProto]] = field(default_factory=lambda: defaultdict(list))


def user_names(reference: onnx.ModelProto, graph: gs.Graph, renamed: Mapping[str, str]) -> dict[str, str]:
    """Map the tensors of ``graph`` whose name the user's file does not know to the name it has there.

    A tensor keeps its own name where the file has it. Otherwise its counterpart is sought by structure:
    an operator of the same type and attributes that reads counterparts of the same inputs, if there is just
    one; and else what the counterpart of a reading node reads at the same place, if that tensor has no other
    counterpart. So the output of a fused operator gets the name of the last tensor that was fused.

    Args:
        reference: the user's graph (``weights.structure_only``), nodes named.
        graph: the canonical graph.
        renamed: counterparts known from rewriting.
    """
    index = _index(reference)
    found: dict[str, str] = dict(renamed)

    def counterpart(name: str) -> str | None:
        return name if name in index.names else found.get(name)

    for node in graph.nodes:
        origin = _origin(node, index, counterpart)
        if origin is None:
            continue
        for ours, theirs in zip(node.outputs, origin.output, strict=False):
            if ours.name and theirs and counterpart(ours.name) is None:
                found[ours.name] = theirs
        for ours, theirs in zip(node.inputs, origin.input, strict=False):
            is_weight = isinstance(ours, gs.Constant) and theirs in index.constants
            if is_weight and counterpart(ours.name) is None:
                found[ours.name] = theirs
    taken = set(graph.tensors()) | set(found.values())
    for node in reversed(graph.nodes):
        origin = _origin(node, index, counterpart)
        if origin is None or len(origin.input) != len(node.inputs):
            continue
        for ours, theirs in zip(node.inputs, origin.input, strict=True):
            is_free = theirs in index.producers and theirs not in taken and theirs not in index.constants
            if ours.name and isinstance(ours, gs.Variable) and is_free and counterpart(ours.name) is None:
                found[ours.name] = theirs
                taken.add(theirs)
    return found


def _index(reference: onnx.ModelProto) -> _Reference:
    index = _Reference()
    index.constants.update(tensor.name for tensor in reference.graph.initializer)
    index.names.update(entry.name for entry in reference.graph.input)
    for node in reference.graph.node:
        index.producers.update(dict.fromkeys(node.output, node))
        index.names.update(name for name in node.output if name)
        if node.op_type == "Constant":
            index.constants.update(node.output)
        for name in dict.fromkeys(node.input):
            index.by_read[node.op_type, name].append(node)
    index.names |= index.constants
    return index


def _origin(node: gs.Node, index: _Reference, counterpart: Any) -> onnx.NodeProto | None:
    """The user's node that ``node`` stands for."""
    for tensor in node.outputs:
        theirs = counterpart(tensor.name)
        origin = index.producers.get(theirs) if theirs else None
        if origin is not None:
            return origin if origin.op_type == node.op else None
    reads = [counterpart(tensor.name) for tensor in node.inputs]
    data = [(i, name) for i, name in enumerate(reads) if name and name not in index.constants]
    if not data:
        return None
    candidates = [
        origin
        for origin in index.by_read[node.op, data[0][1]]
        if all(i < len(origin.input) and origin.input[i] == name for i, name in data)
        and _same_attributes(node, origin)
    ]
    return candidates[0] if len(candidates) == 1 else None


def _same_attributes(node: gs.Node, origin: onnx.NodeProto) -> bool:
    theirs = {a.name: onnx.helper.get_attribute_value(a) for a in origin.attribute}
    if theirs.keys() != node.attrs.keys():
        return False
    return all(_same(value, theirs[key]) for key, value in node.attrs.items())


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, gs.Tensor | gs.Graph):
        return False
    if isinstance(theirs, bytes):
        theirs = theirs.decode(errors="replace")
    return bool(np.array_equal(ours, theirs))
