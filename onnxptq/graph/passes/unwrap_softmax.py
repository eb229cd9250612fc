"""``Flatten -> Softmax -> Reshape`` over the last axis -> ``Softmax -> Reshape``.

Before opset 13 Softmax worked on a matrix, and the conversion of older models wraps it so where it does not
know the rank. With the rows along the last axis of x nothing is gained by the matrix form::

    Reshape(softmax(Flatten(x, rank - 1)), t) = Reshape(softmax(x, axis=-1), t)

Where t is the shape of x, ``remove_identity`` then drops the Reshape. Declined: a Flatten at another axis,
other readers, and a target that copies dimensions of the matrix.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from onnxptq.graph.surgeon import bypass, int_constants, is_op, live_nodes, producer, sole_reader

MIN_OPSET = 13

NOTE = (
    "One Softmax over rows of a matrix became one over the last axis.",
    "{} Softmax nodes over rows of a matrix became ones over the last axis.",
)


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many were unwrapped."""
    if graph.opset < MIN_OPSET:
        return 0
    return sum(_unwrap(graph, node) for node in live_nodes(graph, "Softmax", "LogSoftmax"))


def _unwrap(graph: gs.Graph, softmax: gs.Node) -> bool:
    flatten = producer(softmax.inputs[0])
    reshape = sole_reader(graph, softmax.outputs[0])
    if flatten is None or reshape is None:
        return False
    if not is_op(flatten, "Flatten") or not is_op(reshape, "Reshape"):
        return False
    shape = flatten.inputs[0].shape
    target = int_constants(reshape.inputs[1])
    if shape is None or target is None or 0 in target or reshape.inputs[0] is not softmax.outputs[0]:
        return False
    rank = len(shape)
    if rank < 2 or flatten.attrs.get("axis", 1) % rank != rank - 1:
        return False
    if softmax.attrs.get("axis", -1) not in (-1, 1):
        return False
    if sole_reader(graph, flatten.outputs[0]) is None:
        return False
    softmax.attrs["axis"] = -1
    softmax.outputs[0].shape = list(shape)
    return bypass(graph, flatten)
