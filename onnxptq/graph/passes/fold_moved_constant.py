"""``Transpose``, ``Reshape``, ``Flatten``, ``Squeeze``, ``Unsqueeze`` and ``Cast`` of initializers -> initializers.

``y = op(W)`` becomes an initializer named ``y`` with the same elements in their new order or shape; nothing is
computed, so the result is exact. ``Cast`` is to float32, from float16 or float64, and rounds as the operator does.
Layers whose weight an exporter has left behind such a node have a constant operand from then on.

A transposed memory map stays a view of its file until the graph is written, one weight at a time. Equal nodes that
read the same initializer share one result, as they shared the weight.

Declined: results that the caller or a nested graph reads; shapes and axes that are not constant; element types that
numpy does not have; and initializers that something else reads as well, which would be stored twice, unless the
result is the operand of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.exporters.onnx_exporter import dtype_to_onnx

from onnxptq.graph.surgeon import axes_of, int_constants, is_graph_output, is_op, live_nodes, redirect
from onnxptq.types import Array

_MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Cast")
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")

NOTE = (
    "One node that only moves or casts a constant was replaced by its result.",
    "{} nodes that only move or cast constants were replaced by their results.",
)


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many nodes were replaced."""
    done: dict[tuple[object, ...], gs.Constant] = {}
    own = {id(node) for node in graph.nodes}
    dead: list[gs.Node] = []
    # Nodes come in topological order, so a chain is folded from its constant on.
    for node in live_nodes(graph, *_MOVES):
        source, target = node.inputs[0], node.outputs[0]
        if not _is_plain(source) or is_graph_output(graph, target):
            continue
        is_shared = len(source.outputs) > 1 or is_graph_output(graph, source)
        if any(id(reader) not in own for reader in target.outputs) or (is_shared and not _is_operand(target)):
            continue
        values = _moved(node, source)
        if values is None:
            continue
        node.outputs.clear()
        key = (source.name, node.op, values.shape, tuple(node.attrs.get("perm", ())))
        if key in done:
            redirect(target, done[key])
        else:
            done[key] = target.to_constant(values)
        dead.append(node)
    # Only now, so that a shared initializer stays one until all its readers have been looked at.
    gone = {id(node) for node in dead}
    for node in dead:
        node.inputs.clear()
    graph.nodes[:] = [node for node in graph.nodes if id(node) not in gone]
    return len(dead)


def _is_plain(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is an initializer of an element type that numpy has, and not empty."""
    return isinstance(tensor, gs.Constant) and not isinstance(tensor.dtype, int) and 0 not in tensor.shape


def _is_operand(tensor: gs.Tensor) -> bool:
    """Whether a layer reads ``tensor``, or what these operators make of it."""
    return any(
        is_op(reader, *_LAYERS)
        or (is_op(reader, *_MOVES) and reader.inputs[0] is tensor and _is_operand(reader.outputs[0]))
        for reader in tensor.outputs
    )


def _moved(node: gs.Node, source: gs.Constant) -> Array | None:
    """What ``node`` makes of the elements of ``source``; a view of them wherever numpy can."""
    values: Array = source.values
    if node.op == "Transpose":
        return values.transpose(node.attrs.get("perm"))
    if node.op == "Cast":
        wanted = dtype_to_onnx(node.attrs["to"])
        if wanted != TensorProto.FLOAT or values.dtype not in (np.float16, np.float64):
            return None
        with np.errstate(over="ignore"):
            return values.astype(np.float32)
    shape = _new_shape(node, values.shape)
    return None if shape is None else values.reshape(shape)


def _new_shape(node: gs.Node, old: Sequence[int]) -> list[int] | None:
    if node.op == "Reshape":
        wanted = int_constants(node.inputs[1])
        if wanted is None or node.attrs.get("allowzero", 0):
            return None
        return [old[i] if dim == 0 else dim for i, dim in enumerate(wanted)]
    if node.op == "Flatten":
        axis = int(node.attrs.get("axis", 1))
        axis += len(old) if axis < 0 else 0
        return [math.prod(old[:axis]), math.prod(old[axis:])]
    axes = axes_of(node)
    if node.op == "Unsqueeze":
        if axes is None:
            return None
        rank = len(old) + len(axes)
        new = {axis % rank for axis in axes}
        rest = iter(old)
        return [1 if axis in new else next(rest) for axis in range(rank)]
    if axes is None:
        # An axes input that is not constant is not the same as none.
        return [dim for dim in old if dim != 1] if len(node.inputs) < 2 else None
    gone = {axis % len(old) for axis in axes}
    return [dim for axis, dim in enumerate(old) if axis not in gone]
