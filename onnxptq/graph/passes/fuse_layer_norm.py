"""Decomposed layer normalization -> ``LayerNormalization`` (opset >= 17).

::

    d = x - mean(x),   v = mean(d d),   y = d / sqrt(v + epsilon) [* gamma] [+ beta]

with the mean over the last k axes. ``d d`` may be ``Pow(d, 2)`` or ``Mul(d, d)``, the quotient ``Div`` or
``Mul`` by ``Reciprocal``, and ``x - mean(x)`` may be computed more than once. Declined: axes that are not the
last ones, an unknown rank, intermediate tensors that anything else reads, and anything but float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.surgeon import (
    axes_of,
    float_constant,
    is_graph_output,
    is_op,
    live_nodes,
    new_constant,
    producer,
    replace_nodes,
    scalar_constant,
    sole_reader,
)

MIN_OPSET = 17

NOTE = (
    "One written-out layer normalization became a LayerNormalization node.",
    "{} written-out layer normalizations became LayerNormalization nodes.",
)


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many normalizations were fused."""
    if graph.opset < MIN_OPSET:
        return 0
    return sum(_fuse(graph, node) for node in live_nodes(graph, "Div", "Mul"))


@dataclass(slots=True)
class _Match:
    """A normalization without its affine part."""

    source: gs.Tensor
    axes: tuple[int, ...]
    epsilon: float
    inner: list[gs.Node] = field(default_factory=list)


def _fuse(graph: gs.Graph, quotient: gs.Node) -> bool:
    match = _match(quotient)
    if match is None or not _is_closed(graph, match, quotient):
        return False
    normalized = _normalized_dims(match)
    if normalized is None:
        return False
    chain, gamma, beta = _affine(graph, quotient, normalized)
    if gamma is None:
        sizes = [dim for dim in normalized if isinstance(dim, int)]
        if len(sizes) != len(normalized):
            return False
        gamma = new_constant(graph, f"{quotient.name}_gamma", np.ones(sizes, np.float32))
    node = gs.Node(
        op="LayerNormalization",
        name=chain[-1].name,
        attrs={"axis": -len(normalized), "epsilon": match.epsilon},
        inputs=[match.source, gamma] + ([beta] if beta is not None else []),
    )
    replace_nodes(graph, (*match.inner, *chain), chain[-1], node)
    return True


def _match(quotient: gs.Node) -> _Match | None:
    """Match from the node that divides ``d`` by the standard deviation."""
    inner: list[gs.Node] = []
    if quotient.op == "Div":
        pairs = [(quotient.inputs[0], quotient.inputs[1])]
    else:
        pairs = []
        for i in (0, 1):
            inverse = producer(quotient.inputs[i])
            if is_op(inverse, "Reciprocal"):
                assert inverse is not None
                inner.append(inverse)
                pairs.append((quotient.inputs[1 - i], inverse.inputs[0]))
    for centred, deviation in pairs:
        root, shift = producer(deviation), None
        if is_op(root, "Sqrt"):
            assert root is not None
            shift = producer(root.inputs[0])
        if root is None or shift is None or not is_op(shift, "Add"):
            continue
        for i in (0, 1):
            epsilon = scalar_constant(shift.inputs[i])
            if epsilon is None or epsilon < 0 or shift.inputs[i].dtype != np.float32:
                continue
            found = _match_variance(shift.inputs[1 - i], centred)
            if found is not None:
                found.epsilon = epsilon
                found.inner += [*inner, root, shift]
                return found
    return None


def _match_variance(variance: gs.Tensor, centred: gs.Tensor) -> _Match | None:
    mean = producer(variance)
    square = producer(mean.inputs[0]) if mean is not None and is_op(mean, "ReduceMean") else None
    if mean is None or square is None or not mean.attrs.get("keepdims", 1):
        return None
    is_power = is_op(square, "Pow") and scalar_constant(square.inputs[1]) == 2.0
    is_product = is_op(square, "Mul") and square.inputs[0] is square.inputs[1]
    if not is_power and not is_product:
        return None
    base = square.inputs[0]
    axes = axes_of(mean)
    first, second = _centring(base), _centring(centred)
    if axes is None or first is None or second is None or first[0] is not second[0]:
        return None
    source = first[0]
    if not _same_axes(axes, first[1], source) or not _same_axes(axes, second[1], source):
        return None
    inner = {id(node): node for node in (mean, square, *first[2], *second[2])}
    return _Match(source, tuple(axes), 0.0, list(inner.values()))


def _centring(tensor: gs.Tensor) -> tuple[gs.Tensor, list[int], list[gs.Node]] | None:
    """If ``tensor`` is ``x - mean(x)``: x, the axes, and the two nodes."""
    difference = producer(tensor)
    if difference is None or not is_op(difference, "Sub"):
        return None
    mean = producer(difference.inputs[1])
    if mean is None or not is_op(mean, "ReduceMean") or not mean.attrs.get("keepdims", 1):
        return None
    axes = axes_of(mean)
    if axes is None or mean.inputs[0] is not difference.inputs[0]:
        return None
    return mean.inputs[0], axes, [difference, mean]


def _same_axes(first: list[int], second: list[int], source: gs.Tensor) -> bool:
    if sorted(first) == sorted(second):
        return True
    if source.shape is None:
        return False
    rank = len(source.shape)
    return sorted(a % rank for a in first) == sorted(a % rank for a in second)


def _normalized_dims(match: _Match) -> list[int | str | None] | None:
    """The last k dimensions of x if the axes are exactly those."""
    shape = match.source.shape
    if shape is None or match.source.dtype != np.float32 or not match.axes:
        return None
    rank = len(shape)
    axes = sorted(axis % rank for axis in match.axes)
    if axes != list(range(rank - len(axes), rank)):
        return None
    return list(shape[rank - len(axes) :])


def _is_closed(graph: gs.Graph, match: _Match, quotient: gs.Node) -> bool:
    """Whether nothing outside of the pattern reads a tensor inside of it."""
    inside = {id(node) for node in (*match.inner, quotient)}
    for node in match.inner:
        for tensor in node.outputs:
            if is_graph_output(graph, tensor) or any(id(reader) not in inside for reader in tensor.outputs):
                return False
    return True


def _affine(
    graph: gs.Graph, quotient: gs.Node, normalized: list[int | str | None]
) -> tuple[list[gs.Node], gs.Tensor | None, gs.Tensor | None]:
    """The nodes from the quotient to the end of the pattern, gamma and beta, where constant ones follow."""
    gamma, scaled = _parameter(graph, quotient, "Mul", normalized)
    if gamma is None or scaled is None:
        return [quotient], None, None
    beta, shifted = _parameter(graph, scaled, "Add", normalized)
    return [quotient, scaled] + ([shifted] if shifted is not None else []), gamma, beta


def _parameter(
    graph: gs.Graph, previous: gs.Node, op: str, normalized: list[int | str | None]
) -> tuple[gs.Tensor, gs.Node] | tuple[None, None]:
    """The constant of the normalized shape in the ``op`` that alone reads ``previous``, and that ``op``."""
    node = sole_reader(graph, previous.outputs[0])
    if node is None or not is_op(node, op):
        return None, None
    other = node.inputs[1] if node.inputs[0] is previous.outputs[0] else node.inputs[0]
    value = float_constant(other)
    return (other, node) if value is not None and list(value.shape) == normalized else (None, None)
