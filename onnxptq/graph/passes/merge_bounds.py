"""``Max`` and ``Min`` with a constant, as converters write them -> ``Clip``; bounds in a row -> one ``Clip``.

::

    max(x, a) = clip(x, a, .)        min(x, b) = clip(x, ., b)        relu(x) = clip(x, 0, .)
    clip(clip(x, a, b), c, d) = clip(x, min(max(a, c), d), min(max(b, c), d))        for a <= b, c <= d

Kernels take in a Relu or one Clip behind a linear layer, and only of these is the range known beforehand. A Relu
alone stays what it is. Declined: constants with an entry per channel, or of more dimensions than x, other types,
bounds that are infinite or out of order, and for merging what somebody else reads too.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.index import is_float32
from onnxptq.graph.surgeon import (
    bypass,
    float_constant,
    is_op,
    live_nodes,
    new_constant,
    producer,
    sole_reader,
)

NOTE = (
    "One bound on values became a Clip or part of one.",
    "{} bounds on values became Clips or parts of them.",
)

Bounds = tuple[float, float]


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many nodes became Clips or went into others."""
    return sum(_as_clip(graph, node) for node in live_nodes(graph, "Max", "Min")) + sum(
        _merged(graph, node) for node in live_nodes(graph, "Clip", "Relu")
    )


def _as_clip(graph: gs.Graph, node: gs.Node) -> bool:
    if len(node.inputs) != 2:
        return False
    for source, other in (node.inputs, node.inputs[::-1]):
        bound = _scalar(other, source)
        if bound is not None:
            _write(graph, node, source, (bound, math.inf) if node.op == "Max" else (-math.inf, bound))
            return True
    return False


def _scalar(tensor: gs.Tensor, source: gs.Tensor) -> float | None:
    """The bound that ``tensor`` puts on ``source`` and that changes no shape."""
    if not is_float32(source) or isinstance(source, gs.Constant):
        return None
    bound = _number(tensor)
    if bound is None:
        return None
    rank = len(tensor.shape)
    return None if rank and (source.shape is None or rank > len(source.shape)) else bound


def _number(tensor: gs.Tensor) -> float | None:
    """The one finite number that a constant holds."""
    value = float_constant(tensor)
    if value is None or value.size != 1 or not np.isfinite(value).all():
        return None
    return float(value.reshape(-1)[0])


def _merged(graph: gs.Graph, node: gs.Node) -> bool:
    """Take the bounds in front of ``node`` into it."""
    inner = producer(node.inputs[0])
    if inner is None or not is_op(inner, "Clip", "Relu") or sole_reader(graph, node.inputs[0]) is None:
        return False
    first, second = _bounds(inner), _bounds(node)
    if first is None or second is None or not is_float32(node.inputs[0]):
        return False
    low, high = (min(max(bound, second[0]), second[1]) for bound in first)
    if not bypass(graph, inner):
        return False
    _write(graph, node, node.inputs[0], (low, high))
    return True


def _bounds(node: gs.Node) -> Bounds | None:
    """The bounds of a Relu or Clip; None where they are no constants or out of order."""
    if node.op == "Relu":
        return 0.0, math.inf
    if node.attrs:
        return None
    found = []
    for i, absent in ((1, -math.inf), (2, math.inf)):
        if len(node.inputs) <= i or node.inputs[i].is_empty():
            found.append(absent)
            continue
        bound = _number(node.inputs[i])
        if bound is None:
            return None
        found.append(bound)
    low, high = found
    return (low, high) if low <= high else None


def _write(graph: gs.Graph, node: gs.Node, source: gs.Tensor, bounds: Bounds) -> None:
    """Make ``node`` the Clip of ``source``; a Relu where that is all."""
    is_relu = bounds == (0.0, math.inf)
    node.op = "Relu" if is_relu else "Clip"
    inputs = [source]
    for end, bound in zip(("min", "max"), bounds, strict=True) if not is_relu else ():
        inputs.append(
            new_constant(graph, f"{node.name}/{end}", np.array(bound, np.float32))
            if math.isfinite(bound)
            else gs.Variable.empty()
        )
    if inputs[-1].is_empty():
        inputs.pop()
    node.inputs = inputs
