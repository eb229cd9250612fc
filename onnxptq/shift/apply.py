"""Writing shifts into a copy of the graph: values of biases, and subtractions behind activations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.forms import write_form
from onnxptq.graph.linear import Linear
from onnxptq.graph.surgeon import free_name, new_constant, redirect, set_constant, unique_tensor_name
from onnxptq.shift.spans import Floats
from onnxptq.shift.tracing import ShiftTracer
from onnxptq.types import CanonicalModel


def apply_shifts(
    model: CanonicalModel, tracer: ShiftTracer, offsets: Mapping[int, float], path: Path
) -> CanonicalModel:
    """The model without c in the channels of every class in ``offsets``, written to ``path``.

    What a subtraction leaves of a tensor is still that tensor in the user's names.
    """
    graph = model.graph.copy()
    nodes = {node.name: node for node in graph.nodes}
    names, taken = set(nodes), {}
    for writer in tracer.writers:
        value = tracer.offsets_of(writer.labels, offsets)
        if not value.any():
            continue
        node = nodes[writer.node.name]
        if writer.index is None:
            taken[_subtract(graph, node, value, names)] = model.user_name(writer.tensor)
        else:
            _add(graph, node, writer.index, -value)
    for reader in tracer.readers:
        layer = reader.layer
        moved = _moved(layer, tracer.offsets_of(reader.labels, offsets))
        if moved.any():
            node, i = (layer.node, 2) if layer.bias_node is None else (layer.bias_node, layer.bias_index or 0)
            _add(graph, nodes[node.name], i, moved)
    written = write_form(model, graph, path, f"shifted {sorted(offsets.items())}")
    return replace(written, user_names={**model.user_names, **taken})


def _moved(layer: Linear, taken: Floats) -> Floats:
    """W c per output channel."""
    weight = np.asarray(layer.weight.values, np.float64)
    if layer.node.op != "Conv":
        return np.asarray(weight.T @ taken if layer.axis % 2 else weight @ taken)
    parts = weight.reshape(layer.group, weight.shape[0] // layer.group, weight.shape[1], -1).sum(axis=3)
    moved: Floats = np.einsum("goi,gi->go", parts, taken.reshape(layer.group, -1)).reshape(-1)
    return moved


def _add(graph: gs.Graph, node: gs.Node, i: int, value: Floats) -> None:
    """Add to constant input ``i``, which is made where it is absent."""
    has_input = i < len(node.inputs) and bool(node.inputs[i].name)
    old = np.asarray(node.inputs[i].values, np.float64) if has_input else 0.0
    set_constant(graph, node, i, (old + value).astype(np.float32))


def _subtract(graph: gs.Graph, node: gs.Node, value: Floats, names: set[str]) -> str:
    """Let the readers of ``node`` read what is left without ``value`` along the last axis, and return its name."""
    whole = node.outputs[0]
    name = unique_tensor_name(graph, f"{whole.name}_shifted")
    rest = gs.Variable(name, dtype=whole.dtype, shape=whole.shape)
    redirect(whole, rest)
    constant = new_constant(graph, f"{whole.name}_shift", value.astype(np.float32))
    taking = gs.Node("Sub", free_name(f"{whole.name}_Sub", names), inputs=[whole, constant], outputs=[rest])
    graph.nodes.insert(next(i for i, other in enumerate(graph.nodes) if other is node) + 1, taking)
    return name
