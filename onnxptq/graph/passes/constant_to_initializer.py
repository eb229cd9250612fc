"""``Constant`` nodes -> initializers.

``y = Constant(value)`` becomes an initializer named ``y``. A Constant that is itself a graph output stays a
node, because some runtimes refuse initializers as outputs. Constants in nested graphs stay as they are.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.surgeon import is_graph_output, is_op


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many nodes were replaced."""
    count = 0
    for node in list(graph.nodes):
        if not is_op(node, "Constant") or is_graph_output(graph, node.outputs[0]):
            continue
        values = _values(node)
        if values is None:
            continue
        target = node.outputs[0]
        node.outputs.clear()
        target.to_constant(values)
        graph.nodes.remove(node)
        count += 1
    return count


def _values(node: gs.Node) -> object | None:
    """The value in any of the attributes that a Constant may have; None for strings and sparse tensors."""
    if "value" in node.attrs:
        # Handed on unread, so that element types without a numpy counterpart survive.
        return node.attrs["value"]._values  # type: ignore[no-any-return]
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        if name in node.attrs:
            return np.array(node.attrs[name], dtype=dtype)
    return None
