"""RMS normalization written out -> ``RMSNormalization`` (opset >= 23).

::

    y = x r,   x r * gamma,   (x * gamma) r,     with r = (mean(x x) + epsilon)^(-1/2)

and the mean over the last axis. ``x x`` may be ``Pow(x, 2)`` or ``Mul(x, x)``; the power any chain of ``Sqrt``,
``Reciprocal``, ``Pow`` and ``1 / .`` that comes to it, and ``x r`` a quotient. Exact in real arithmetic. Before opset
23 there is no such operator: the pattern stays, and :mod:`onnxptq.graph.normalizations` finds it there. Declined: a
mean over other axes, an unknown number of channels, intermediate tensors that anything else reads, and anything but
float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.index import is_float32
from onnxptq.graph.surgeon import (
    axes_of,
    float_constant,
    is_op,
    live_nodes,
    new_constant,
    producer,
    replace_nodes,
    scalar_constant,
    sole_reader,
)

MIN_OPSET = 23

NOTE = (
    "One written-out RMS normalization became an RMSNormalization node.",
    "{} written-out RMS normalizations became RMSNormalization nodes.",
)


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many normalizations were fused."""
    if graph.opset < MIN_OPSET:
        return 0
    return sum(_fuse(graph, node) for node in live_nodes(graph, "ReduceMean"))


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A normalization of ``source``: ``tail`` writes it, ``inner`` are the other nodes.

    ``scale`` is the node that multiplies with gamma, its input ``gamma_index``; None where there is no gamma.
    """

    source: gs.Tensor
    epsilon: float
    tail: gs.Node
    inner: tuple[gs.Node, ...]
    scale: gs.Node | None
    gamma_index: int = 1


def match_rms_norm(graph: gs.Graph, mean: gs.Node) -> Match | None:
    """The RMS normalization that the ReduceMean node ``mean`` is in, if nothing else reads its insides."""
    square, average = producer(mean.inputs[0]), mean.outputs[0]
    if square is None or not is_square(square) or sole_reader(graph, square.outputs[0]) is not mean:
        return None
    source = square.inputs[0]
    shift = sole_reader(graph, average)
    epsilon = None if shift is None else _added(shift, average)
    if shift is None or epsilon is None or not _is_over_channels(mean, source):
        return None
    inner, power = [square, mean, shift], 1.0
    product = sole_reader(graph, shift.outputs[0])
    while product is not None and (exponent := _exponent(product, inner[-1].outputs[0])) is not None:
        inner.append(product)
        power *= exponent
        product = sole_reader(graph, product.outputs[0])
    other = None if product is None else _multiplied(product, inner[-1].outputs[0], power)
    if product is None or other is None:
        return None
    if other is source:
        return _scaled_after(graph, Match(source, epsilon, product, tuple(inner), None))
    scale = producer(other)
    place = None if scale is None else _gamma_index(scale, source, source)
    if scale is None or place is None or sole_reader(graph, other) is not product:
        return None
    return Match(source, epsilon, product, (*inner, scale), scale, place)


def _scaled_after(graph: gs.Graph, found: Match) -> Match:
    """The match with the scale behind it, if there is one."""
    normalized = found.tail.outputs[0]
    scale = sole_reader(graph, normalized)
    place = None if scale is None else _gamma_index(scale, normalized, found.source)
    if scale is None or place is None:
        return found
    return Match(found.source, found.epsilon, scale, (*found.inner, found.tail), scale, place)


def is_square(node: gs.Node) -> bool:
    """Whether ``node`` writes the square of its first input."""
    return (is_op(node, "Pow") and _number(node.inputs[1]) == 2.0) or (
        is_op(node, "Mul") and node.inputs[0] is node.inputs[1]
    )


def _fuse(graph: gs.Graph, mean: gs.Node) -> bool:
    found = match_rms_norm(graph, mean)
    if found is None:
        return False
    if found.scale is None:
        gamma = new_constant(graph, f"{found.tail.name}_gamma", np.ones(found.source.shape[-1], np.float32))
    else:
        gamma = found.scale.inputs[found.gamma_index]
    node = gs.Node(
        op="RMSNormalization",
        name=found.tail.name,
        attrs={"axis": -1, "epsilon": found.epsilon},
        inputs=[found.source, gamma],
    )
    replace_nodes(graph, found.inner, found.tail, node)
    return True


def _is_over_channels(mean: gs.Node, source: gs.Tensor) -> bool:
    """Whether the mean is over the last axis, of known size, and stays beside what it was taken of."""
    axes, shape = axes_of(mean), source.shape
    if not shape or not isinstance(shape[-1], int) or not is_float32(source):
        return False
    return bool(mean.attrs.get("keepdims", 1)) and axes in ([-1], [len(shape) - 1])


def _number(constant: gs.Tensor) -> float | None:
    """The value of a constant that adds no dimensions to what has channels."""
    value = scalar_constant(constant)
    return value if value is not None and len(constant.shape) <= 1 else None


def _added(node: gs.Node, tensor: gs.Tensor) -> float | None:
    """The number that ``node`` adds to ``tensor``, if it is not negative."""
    if not is_op(node, "Add"):
        return None
    value = _number(node.inputs[1] if node.inputs[0] is tensor else node.inputs[0])
    return value if value is not None and value >= 0 else None


def _exponent(node: gs.Node, tensor: gs.Tensor) -> float | None:
    """The power of ``tensor`` that ``node`` is, if it is one."""
    if is_op(node, "Sqrt"):
        return 0.5
    if is_op(node, "Reciprocal"):
        return -1.0
    if is_op(node, "Div") and node.inputs[1] is tensor and _number(node.inputs[0]) == 1.0:
        return -1.0
    return _number(node.inputs[1]) if is_op(node, "Pow") and node.inputs[0] is tensor else None


def _multiplied(node: gs.Node, tensor: gs.Tensor, power: float) -> gs.Tensor | None:
    """What ``node`` multiplies with s^(-1/2) or divides by s^(1/2), where ``tensor`` is s^``power``."""
    if is_op(node, "Mul") and math.isclose(power, -0.5):
        return node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
    return node.inputs[0] if is_op(node, "Div") and power == 0.5 and node.inputs[1] is tensor else None


def _gamma_index(node: gs.Node, tensor: gs.Tensor, source: gs.Tensor) -> int | None:
    """Which input of ``node`` is a constant per channel of ``source``, if the other is ``tensor`` and they are
    multiplied."""
    for i in (0, 1) if is_op(node, "Mul") else ():
        value = float_constant(node.inputs[i])
        if value is not None and node.inputs[1 - i] is tensor and value.shape == (source.shape[-1],):
            return i
    return None
