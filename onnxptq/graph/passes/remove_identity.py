"""Removes nodes that hand their input on unchanged.

``Identity``; ``Dropout`` at inference; ``Cast`` to the type the tensor has; ``Transpose`` by the identity;
``Reshape`` to the shape the tensor has, where inference proves it. A node between a graph input and a graph
output stays, because neither name may change.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

from onnxptq.graph.surgeon import bypass, is_graph_output, is_op

NOTE = (
    "One node that hands its input on unchanged was removed.",
    "{} nodes that hand their input on unchanged were removed.",
)


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many nodes were removed."""
    count = 0
    for node in list(graph.nodes):
        if _is_idle(graph, node) and bypass(graph, node):
            count += 1
    return count


def _is_idle(graph: gs.Graph, node: gs.Node) -> bool:
    if is_op(node, "Identity"):
        # Sequences and optionals would change the kind of value that the reader sees.
        return isinstance(node.inputs[0], gs.Constant) or node.inputs[0].type == "tensor_type"
    if is_op(node, "Dropout"):
        return _is_idle_dropout(graph, node)
    if is_op(node, "Cast"):
        return _is_same_type(node.inputs[0], node.attrs.get("to"))
    if is_op(node, "Transpose"):
        perm = node.attrs.get("perm")
        return perm is not None and list(perm) == list(range(len(perm)))
    if is_op(node, "Reshape"):
        return _is_same_shape(node.inputs[0], node.outputs[0])
    return False


def _is_idle_dropout(graph: gs.Graph, node: gs.Node) -> bool:
    if len(node.outputs) > 1:
        mask = node.outputs[1]
        if mask.outputs or is_graph_output(graph, mask):
            return False
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return True
    training = node.inputs[2]
    return isinstance(training, gs.Constant) and not bool(np.asarray(training.values).any())


def _is_same_type(tensor: gs.Tensor, target: object) -> bool:
    if tensor.dtype is None or target is None:
        return False
    return bool(dtype_to_onnx(tensor.dtype) == dtype_to_onnx(target))


def _is_same_shape(source: gs.Tensor, target: gs.Tensor) -> bool:
    """Whether both shapes are known and equal; one unnamed dimension is fixed by the element count."""
    if source.shape is None or target.shape is None or len(source.shape) != len(target.shape):
        return False
    open_dims = 0
    for ours, theirs in zip(source.shape, target.shape, strict=True):
        if isinstance(ours, int) and isinstance(theirs, int):
            if ours != theirs or ours == 0:
                return False
        elif isinstance(ours, int) or isinstance(theirs, int) or not ours or ours != theirs:
            open_dims += 1
    return open_dims <= 1
