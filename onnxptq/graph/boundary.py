"""Where networks are compared whose outputs lie behind a selection.

NonMaxSuppression and its like write as many rows as they find, so the outputs of two networks that differ a little do
not belong together row by row. What the part behind a selection reads of the part in front does: all boxes, and all
scores. A selection among what quantization does not touch, such as masked positions of the inputs, changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxptq.graph import proto
from onnxptq.graph.index import GraphIndex, computed_from, read_tensors
from onnxptq.graph.linear import find_linears
from onnxptq.graph.names import name_nodes
from onnxptq.graph.surgeon import quiet_surgeon

SELECTING = frozenset({"Compress", "NonMaxSuppression", "NonZero", "Unique"})
"""Operators whose number of results depends on values."""

_MOVING = frozenset(
    {"Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The part of a graph behind selections among what layers have computed; all empty where there is none.

    Attributes:
        nodes: names of the selections and of all nodes that depend on them.
        layers: names of the layers with weights among them.
        outputs: the graph outputs that they write.
        boundary: the float tensors that they read of the part in front; of parts of one tensor (one per class, for
            instance) that tensor. Without inputs and outputs of the graph.
    """

    nodes: frozenset[str] = frozenset()
    layers: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    boundary: tuple[gs.Variable, ...] = ()


def find_selection(graph: gs.Graph) -> Selection:
    """The part behind selections in a sorted graph. Tensors of unknown type are taken for others than floats."""
    if not any(map(_selects, graph.nodes)):
        return Selection()
    layers = {layer.node.name for layer in find_linears(GraphIndex(graph))}
    computed = computed_from(graph.nodes, layers)
    selecting = {node.name for node in graph.nodes if _selects(node) and _reads(node, computed)}
    behind = _behind(graph, selecting)
    ranking = _ranking(graph, layers, computed, {node.name for node in behind})
    if ranking:
        behind = _behind(graph, selecting | ranking)
    written = {t.name for node in behind for t in node.outputs if t.name}
    ends = {t.name for t in (*graph.inputs, *graph.outputs)} | written
    read = [t for node in behind for t in read_tensors(node) if t.name in computed and t.name not in ends]
    parts: dict[str, dict[str, gs.Tensor]] = {}
    for tensor in read:
        parts.setdefault(_unmoved(tensor, computed).name, {})[tensor.name] = tensor
    entering = [
        next(iter(own.values())) if len(own) == 1 else _unmoved(next(iter(own.values())), computed)
        for own in parts.values()
    ]
    return Selection(
        nodes=frozenset(node.name for node in behind),
        layers=tuple(node.name for node in behind if node.name in layers),
        outputs=tuple(t.name for t in graph.outputs if t.name in written),
        boundary=tuple(t for t in entering if t.dtype == np.float32 and t.name not in ends),
    )


def _selects(node: gs.Node) -> bool:
    """Whether ``node``, or one inside its subgraphs, is a selection."""
    inner = (a.nodes for a in node.attrs.values() if isinstance(a, gs.Graph))
    return node.op in SELECTING or any(_selects(own) for nodes in inner for own in nodes)


def _reads(node: gs.Node, tensors: Collection[str]) -> bool:
    return any(t.name in tensors for t in read_tensors(node))


def _behind(graph: gs.Graph, starts: Collection[str]) -> Sequence[gs.Node]:
    """The nodes of these names and all that depend on them, in the order of the graph."""
    written: set[str] = set()
    found = []
    for node in graph.nodes:
        if node.name in starts or _reads(node, written):
            found.append(node)
            written.update(t.name for t in node.outputs if t.name)
    return found


def _ranking(graph: gs.Graph, layers: set[str], computed: set[str], behind: set[str]) -> set[str]:
    """The TopK that sort what a selection behind them takes, with no layer between: the order is part of it."""
    found = set()
    for node in graph.nodes:
        if node.op == "TopK" and node.name not in behind and _reads(node, computed):
            after = {other.name for other in _behind(graph, {node.name})}
            if after & behind and not (after - behind) & layers:
                found.add(node.name)
    return found


def _unmoved(tensor: gs.Tensor, computed: set[str]) -> gs.Tensor:
    """What ``tensor`` was before nodes that only move values."""
    while tensor.inputs and tensor.inputs[0].op in _MOVING and tensor.inputs[0].inputs[0].name in computed:
        tensor = tensor.inputs[0].inputs[0]
    return tensor


def selected_within(index: GraphIndex, nodes: Sequence[str], selection: Selection) -> frozenset[str]:
    """What ``nodes``, in running order, write behind a selection that is one of them."""
    written: set[str] = set()
    for node in (index.by_name[name] for name in nodes):
        is_selecting = _selects(node) and node.name in selection.nodes
        if is_selecting or any(t.name in written for t in read_tensors(node)):
            written.update(t.name for t in node.outputs if t.name)
    return frozenset(written)


def without_boundary(graph: gs.Graph, outputs: Sequence[str]) -> gs.Graph:
    """``graph``, edited so that only ``outputs`` are left of its outputs."""
    graph.outputs = [tensor for tensor in graph.outputs if tensor.name in outputs]
    return graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """What two files of one network are compared by: ``inner`` tensors in the place of the ``selected`` outputs. Both
    are empty where no output lies behind a selection."""

    inner: tuple[str, ...] = ()
    selected: tuple[str, ...] = ()


def ends_of(reference: Path, quantized: Path) -> Ends:
    """The ends of the network of two files, as far as both name its tensors."""
    model = onnx.load(str(reference), load_external_data=False)
    if not any(node.op_type in SELECTING for node in proto.walk_nodes(model)):
        return Ends()
    name_nodes(model.graph)
    with quiet_surgeon():
        selection = find_selection(gs.import_onnx(onnx.shape_inference.infer_shapes(model)))
    other = onnx.load(str(quantized), load_external_data=False)
    known = {name for node in other.graph.node for name in node.output}
    inner = tuple(tensor.name for tensor in selection.boundary if tensor.name in known)
    return Ends(inner=inner, selected=selection.outputs)
