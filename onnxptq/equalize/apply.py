"""Writing factors into a copy of the graph, and checking that it still computes the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.equalize.tracing import Edit, Trace
from onnxptq.graph.forms import write_form
from onnxptq.graph.surgeon import set_constant
from onnxptq.types import CanonicalModel


def apply_factors(
    model: CanonicalModel, trace: Trace, factors: Mapping[int, float], path: Path
) -> CanonicalModel:
    """The model with every constant rescaled, written to ``path``. ``factors``: ln s by variable."""
    graph = rescaled_graph(model, trace, factors)
    scales = " ".join(f"{variable} {value.hex()}" for variable, value in sorted(factors.items()))
    return write_form(model, graph, path, f"rescaled {scales}")


def rescaled_graph(model: CanonicalModel, trace: Trace, factors: Mapping[int, float]) -> gs.Graph:
    """A copy of the model's graph with every constant rescaled."""
    graph = model.graph.copy()
    nodes = {node.name: node for node in graph.nodes}
    done: set[str] = set()
    for edit in trace.edits:
        name = edit.node.inputs[edit.index].name
        if name in trace.shared:
            if name in done:
                continue
            done.add(name)
        _rescale(graph, nodes[edit.node.name], edit, trace, factors)
    return graph


def _rescale(graph: gs.Graph, node: gs.Node, edit: Edit, trace: Trace, factors: Mapping[int, float]) -> None:
    classes = trace.classes
    scale = np.ones(())
    if edit.times is not None:
        scale = scale * classes.factors(edit.times, factors)
    if edit.over is not None:
        scale = scale / classes.factors(edit.over, factors)
    if (scale == 1.0).all():
        return
    old = node.inputs[edit.index]
    values = (old.values * scale).astype(np.float32)
    if old.name in trace.shared:
        old.values, old.data_location = values, None
    else:
        set_constant(graph, node, edit.index, values)
