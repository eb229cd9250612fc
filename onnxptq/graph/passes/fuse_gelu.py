"""Decomposed GELU -> ``Gelu`` (opset >= 20).

::

    erf form    y = x/2 (1 + erf(x / sqrt(2)))
    tanh form   y = x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))        -> approximate="tanh"

Exporters place the constants in many ways, so the match is algebraic: the argument of Erf or Tanh and the
product after it are evaluated as polynomials in x (and in f, the function's output) and compared with the
formula. Declined: intermediate tensors that anything else reads, and anything but float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.surgeon import (
    is_graph_output,
    is_op,
    live_nodes,
    producer,
    replace_nodes,
    scalar_constant,
    sole_reader,
)

MIN_OPSET = 20
_RELATIVE_TOLERANCE = 1e-5  # exporters write sqrt(2) and friends with six to eight digits
_MAX_DEPTH = 8
_MAX_DEGREE = 4

Polynomial = Mapping[tuple[int, int], float]
"""Coefficients by (power of x, power of f)."""

_ERF_ARGUMENT: Polynomial = {(1, 0): 1 / math.sqrt(2)}
_TANH_ARGUMENT: Polynomial = {(1, 0): math.sqrt(2 / math.pi), (3, 0): math.sqrt(2 / math.pi) * 0.044715}
_GELU: Polynomial = {(1, 0): 0.5, (1, 1): 0.5}

NOTE = (
    "One written-out Gelu became a Gelu node.",
    "{} written-out Gelus became Gelu nodes.",
)


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many activations were fused."""
    if graph.opset < MIN_OPSET:
        return 0
    return sum(_fuse(graph, node) for node in live_nodes(graph, "Erf", "Tanh"))


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """A decomposed GELU of ``source``: ``tail`` writes it, ``inner`` are the nodes in front; ``attrs`` of a Gelu."""

    source: gs.Tensor
    tail: gs.Node
    inner: tuple[gs.Node, ...]
    attrs: Mapping[str, str]


def match_gelu(graph: gs.Graph, function: gs.Node) -> Match | None:
    """The GELU that the Erf or Tanh node ``function`` is in, if it is one and nothing reads its insides."""
    wanted = _ERF_ARGUMENT if function.op == "Erf" else _TANH_ARGUMENT
    for source in _ancestors(function.inputs[0]):
        if source.dtype != np.float32:
            continue
        reader = _Reader(source, None)
        if not _is_close(reader.polynomial(function.inputs[0]), wanted):
            continue
        tail = _tail(graph, function, reader)
        if tail is not None:
            attrs = {} if function.op == "Erf" else {"approximate": "tanh"}
            return Match(source, tail, tuple(reader.visited.values()), attrs)
    return None


def _fuse(graph: gs.Graph, function: gs.Node) -> bool:
    found = match_gelu(graph, function)
    if found is None:
        return False
    node = gs.Node(op="Gelu", name=found.tail.name, attrs=dict(found.attrs), inputs=[found.source])
    replace_nodes(graph, found.inner, found.tail, node)
    return True


@dataclass(slots=True)
class _Reader:
    """Reads tensors as polynomials in ``x`` and ``f``, and remembers the nodes it came through."""

    x: gs.Tensor
    f: gs.Tensor | None
    visited: dict[int, gs.Node] = field(default_factory=dict)

    def polynomial(self, tensor: gs.Tensor, depth: int = 0) -> Polynomial | None:
        """The polynomial that ``tensor`` is, or None if it is none."""
        if tensor is self.x:
            return {(1, 0): 1.0}
        if tensor is self.f:
            return {(0, 1): 1.0}
        value = scalar_constant(tensor)
        if value is not None:
            return {(0, 0): value}
        node = producer(tensor)
        if node is None or depth > _MAX_DEPTH or not is_op(node, "Add", "Sub", "Mul", "Div", "Pow"):
            return None
        left = self.polynomial(node.inputs[0], depth + 1)
        right = self.polynomial(node.inputs[1], depth + 1)
        if left is None or right is None:
            return None
        result = _combine(node.op, left, right)
        if result is not None:
            self.visited[id(node)] = node
        return result


def _combine(op: str, left: Polynomial, right: Polynomial) -> Polynomial | None:
    if op in ("Add", "Sub"):
        sign = 1.0 if op == "Add" else -1.0
        keys = dict.fromkeys((*left, *right))
        return {key: left.get(key, 0.0) + sign * right.get(key, 0.0) for key in keys}
    if op == "Mul":
        return _product(left, right)
    constant = right.get((0, 0)) if set(right) == {(0, 0)} else None
    if not constant:
        return None
    if op == "Div":
        return {key: value / constant for key, value in left.items()}
    if constant not in (2.0, 3.0):
        return None
    result: Polynomial | None = left
    for _ in range(int(constant) - 1):
        result = None if result is None else _product(result, left)
    return result


def _product(left: Polynomial, right: Polynomial) -> Polynomial | None:
    result: dict[tuple[int, int], float] = {}
    for (a, b), u in left.items():
        for (c, d), v in right.items():
            key = (a + c, b + d)
            if sum(key) > _MAX_DEGREE:
                return None
            result[key] = result.get(key, 0.0) + u * v
    return result


def _is_close(found: Polynomial | None, wanted: Polynomial) -> bool:
    if found is None:
        return False
    terms = {key for key, value in found.items() if value != 0.0}
    return terms == set(wanted) and all(
        math.isclose(found[key], value, rel_tol=_RELATIVE_TOLERANCE) for key, value in wanted.items()
    )


def _ancestors(tensor: gs.Tensor) -> list[gs.Tensor]:
    """Every tensor that arithmetic leads to ``tensor`` from, nearest first."""
    found: dict[int, gs.Tensor] = {}
    layer = [tensor]
    for _ in range(_MAX_DEPTH):
        following = []
        for current in layer:
            node = producer(current)
            if not is_op(node, "Add", "Sub", "Mul", "Div", "Pow"):
                continue
            assert node is not None
            for read in node.inputs:
                if isinstance(read, gs.Variable) and id(read) not in found:
                    found[id(read)] = read
                    following.append(read)
        layer = following
    return list(found.values())


def _tail(graph: gs.Graph, function: gs.Node, reader: _Reader) -> gs.Node | None:
    """The node whose output is the whole GELU, if nothing else reads what lies between."""
    reader.f = function.outputs[0]
    current = function
    for _ in range(_MAX_DEPTH):
        following = sole_reader(graph, current.outputs[0])
        if following is None:
            return None
        current = following
        if _is_close(reader.polynomial(current.outputs[0]), _GELU):
            reader.visited[id(function)] = function
            return current if _is_closed(graph, reader.visited, current) else None
    return None


def _is_closed(graph: gs.Graph, inner: Mapping[int, gs.Node], tail: gs.Node) -> bool:
    return all(
        node is tail
        or (
            not is_graph_output(graph, node.outputs[0])
            and all(id(following) in inner for following in node.outputs[0].outputs)
        )
        for node in inner.values()
    )
