"""``Constant`` nodes -> initializers.

``y = Constant(value)`` becomes an initializer named ``y``. A Constant that is itself a graph output stays a
node, because some runtimes refuse initializers as outputs. Constants in nested graphs stay as they are.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxptq.graph.surgeon import constant_node_value, is_graph_output, is_op

NOTE = (
    "One Constant node became an initializer.",
    "{} Constant nodes became initializers.",
)


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many nodes were replaced."""
    count = 0
    for node in list(graph.nodes):
        if not is_op(node, "Constant") or is_graph_output(graph, node.outputs[0]):
            continue
        value = constant_node_value(node)
        if value is None:
            continue
        target = node.outputs[0]
        node.outputs.clear()
        # Handed on unread, so that element types without a numpy counterpart survive.
        target.to_constant(value._values)
        graph.nodes.remove(node)
        count += 1
    return count
