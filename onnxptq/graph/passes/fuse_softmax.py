"""Softmax written out -> ``Softmax`` (opset >= 13).

::

    quotient     e / s,   e r,   with e = exp(u), s = sum(e), r = 1 / s           ->  softmax(u)
    logarithm    exp(logsoftmax(u)),   exp(u - logsumexp(u))                      ->  softmax(u)
    deferred     (e V) / s,   (V e) / s   (s along the axis that is multiplied)   ->  softmax(u) V,   V softmax(u)

with u ln b for u where e = b^u; and softmax(x - m) = softmax(x) where m is the same along the axis, as the largest x
is. Exact in real arithmetic; what overflowed without the largest x taken off no longer does. Where it is taken off, s
is at least 1, and what guards the division against 0 goes: a constant below 2^-24 that is added to s, which float32
rounds away, and a lower bound of s that is at most 1.

Where the denominator is more than s, the quotient stays; :func:`match_weights` finds it.

Whatever else reads e, s or logsoftmax(u) still does. Declined: sums over several axes, sums that do not line up with
e (without ``keepdims``, unless an Unsqueeze follows or the axes lead), products that anything but the division reads,
and anything but float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.index import is_float32
from onnxptq.graph.surgeon import (
    axes_of,
    drop_unread,
    float_constant,
    free_name,
    is_op,
    live_nodes,
    new_constant,
    producer,
    replace_nodes,
    scalar_constant,
    sole_reader,
    unique_tensor_name,
)

MIN_OPSET = 13
_LOST = 2.0**-24
"""Half the distance from 1 to the next float32."""

NOTE = (
    "One written-out softmax became a Softmax node.",
    "{} written-out softmaxes became Softmax nodes.",
)


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many were fused."""
    if graph.opset < MIN_OPSET:
        return 0
    return sum(
        _fuse(graph, node) or _bring_forward(graph, node) for node in live_nodes(graph, "Div", "Mul", "Exp")
    )


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """``source``, and the axes along which its softmax is taken, or it is reduced in another way.

    The axes are in order, and count from the front wherever the rank is known. ``rate`` is what the source is
    multiplied with in front of the softmax: ln b.
    """

    source: gs.Tensor
    axes: tuple[int, ...]
    rate: float = 1.0


def match_softmax(tail: gs.Node) -> Match | None:
    """The softmax that ``tail`` ends, if it is one."""
    if is_op(tail, "Exp"):
        return _match_logarithm(tail.inputs[0])
    for top, bottom in _quotients(tail):
        found = _match_sum(bottom)
        if found is not None and _is_exponential(top, found):
            return found
    return None


def match_weights(tail: gs.Node) -> Match | None:
    """The softmax that ``tail`` ends, or what stands for one: exponentials over their sum and what is added to it,
    or over a lower bound of it. Such weights are between 0 and 1 too, and sum to at most 1."""
    found = match_softmax(tail)
    if found is not None:
        return found
    for top, bottom in _quotients(tail):
        for part in _parts(bottom):
            found = _sum_of_exponentials(part)
            if found is not None and _is_exponential(top, found):
                return found
    return None


def _parts(bottom: gs.Tensor) -> Iterator[gs.Tensor]:
    """What ``bottom`` is at least, if that is not negative."""
    node = producer(bottom)
    if is_op(node, "Clip"):
        assert node is not None
        if len(node.inputs) < 3 or node.inputs[2].is_empty():
            yield node.inputs[0]
    elif is_op(node, "Max", "Add"):
        assert node is not None
        for i, tensor in enumerate(node.inputs):
            others = [*node.inputs[:i], *node.inputs[i + 1 :]]
            if node.op == "Max" or all(_is_not_negative(other) for other in others):
                yield tensor


def _is_not_negative(tensor: gs.Tensor) -> bool:
    value = float_constant(tensor)
    return bool(np.all(value >= 0)) if value is not None else _exponent(tensor) is not None


def _fuse(graph: gs.Graph, tail: gs.Node) -> bool:
    found = match_softmax(tail)
    if found is None or len(found.axes) != 1 or not is_float32(found.source):
        return False
    read = list(tail.inputs)
    replace_nodes(graph, (), tail, _softmax(graph, found, tail, tail.name))
    drop_unread(graph, read)
    return True


def _bring_forward(graph: gs.Graph, tail: gs.Node) -> bool:
    """Divide the weights where ``tail`` divides their product with the values."""
    for top, bottom in _quotients(tail):
        found, product = _match_sum(bottom), producer(top)
        place = None if found is None or product is None else _summed_input(product, found)
        if found is not None and place is not None and sole_reader(graph, top) is tail:
            _divide_weights(graph, found, product, place, tail)
            return True
    return False


def _divide_weights(graph: gs.Graph, found: Match, product: gs.Node, place: int, tail: gs.Node) -> None:
    exponential = product.inputs[place]
    read = [exponential, *tail.inputs]
    name = free_name(f"{product.name}/softmax", {node.name for node in graph.nodes})
    softmax = _softmax(graph, found, product, name)
    name = unique_tensor_name(graph, f"{product.name}/weights")
    softmax.outputs = [gs.Variable(name, np.float32, exponential.shape)]
    _insert(graph, softmax, product)
    product.inputs[place] = softmax.outputs[0]
    # The product is another tensor now, and has the name of the quotient.
    whole = tail.outputs[0]
    tail.inputs.clear()
    tail.outputs.clear()
    product.outputs = [whole]
    graph.nodes[:] = [node for node in graph.nodes if node is not tail]
    drop_unread(graph, read)


def _softmax(graph: gs.Graph, found: Match, place: gs.Node, name: str) -> gs.Node:
    """The node; what scales its source is put in front of ``place``."""
    (axis,) = found.axes
    source = _without_shift(found.source, axis)
    if found.rate != 1.0:
        rate = new_constant(graph, f"{name}/rate", np.asarray(found.rate, np.float32))
        scaled = gs.Variable(unique_tensor_name(graph, f"{name}/logits"), np.float32, source.shape)
        taken = {node.name for node in graph.nodes}
        scaling = gs.Node("Mul", free_name(scaled.name, taken), inputs=[source, rate], outputs=[scaled])
        _insert(graph, scaling, place)
        source = scaled
    return gs.Node("Softmax", name, attrs={"axis": axis}, inputs=[source])


def _insert(graph: gs.Graph, node: gs.Node, place: gs.Node) -> None:
    """Put ``node`` in front of ``place``."""
    graph.nodes.insert(next(i for i, other in enumerate(graph.nodes) if other is place), node)


def _quotients(node: gs.Node) -> Iterator[tuple[gs.Tensor, gs.Tensor]]:
    """Top and bottom of the fraction that ``node`` writes; the product of two reciprocals is one in both ways."""
    if is_op(node, "Div"):
        yield node.inputs[0], node.inputs[1]
    elif is_op(node, "Mul"):
        for i in (0, 1):
            inverse = producer(node.inputs[i])
            if inverse is not None and is_op(inverse, "Reciprocal"):
                yield node.inputs[1 - i], inverse.inputs[0]
            elif inverse is not None and is_op(inverse, "Div") and _number(*inverse.inputs) == 1.0:
                yield node.inputs[1 - i], inverse.inputs[1]
            elif inverse is not None and is_op(inverse, "Pow") and _number(*inverse.inputs[::-1]) == -1.0:
                yield node.inputs[1 - i], inverse.inputs[0]


def _exponent(tensor: gs.Tensor) -> tuple[gs.Tensor, float] | None:
    """u and ln b, where ``tensor`` is b^u."""
    node = producer(tensor)
    if node is not None and is_op(node, "Exp"):
        return node.inputs[0], 1.0
    base = _number(*node.inputs) if node is not None and is_op(node, "Pow") else None
    return (node.inputs[1], math.log(base)) if node is not None and base is not None and base > 0 else None


def _is_exponential(tensor: gs.Tensor, found: Match) -> bool:
    """Whether ``tensor`` is what ``found`` is a sum of."""
    exponent = _exponent(tensor)
    return exponent is not None and exponent[0] is found.source and exponent[1] == found.rate


def _number(constant: gs.Tensor, other: gs.Tensor) -> float | None:
    """The value of a ``constant`` that adds no dimensions to ``other``."""
    value = scalar_constant(constant)
    is_narrow = value is not None and len(constant.shape) <= (0 if other.shape is None else len(other.shape))
    return value if is_narrow else None


def _match_logarithm(log: gs.Tensor) -> Match | None:
    node = producer(log)
    if node is not None and is_op(node, "LogSoftmax"):
        source = node.inputs[0]
        return Match(source, _counted([int(node.attrs.get("axis", -1))], source))
    if node is not None and is_op(node, "Sub"):
        found = _reduced(node.inputs[1], "ReduceLogSumExp")
        return found if found is not None and found.source is node.inputs[0] else None
    return None


def _match_sum(bottom: gs.Tensor) -> Match | None:
    """``bottom`` as a sum of exponentials of the match's source."""
    whole = _unguarded(bottom)
    match = _sum_of_exponentials(whole)
    return match if match is None or whole is bottom or _is_at_most_zero(match) else None


def _sum_of_exponentials(tensor: gs.Tensor) -> Match | None:
    found = _reduced(tensor, "ReduceSum")
    exponent = _exponent(found.source) if found is not None else None
    return None if found is None or exponent is None else Match(exponent[0], found.axes, exponent[1])


def _unguarded(bottom: gs.Tensor) -> gs.Tensor:
    """A sum that ``bottom`` guards against 0, and is the same as where the sum is at least 1; else ``bottom``."""
    guard = producer(bottom)
    if guard is None or not is_op(guard, "Add", "Max", "Clip") or len(guard.inputs) < 2:
        return bottom
    if is_op(guard, "Clip"):
        least = scalar_constant(guard.inputs[1])
        has_end = len(guard.inputs) > 2 and not guard.inputs[2].is_empty()
        return guard.inputs[0] if least is not None and least <= 1.0 and not has_end else bottom
    first, second = guard.inputs[:2]
    for constant, other in ((first, second), (second, first)):
        value = _number(constant, other) if len(guard.inputs) == 2 else None
        if value is not None and (0.0 <= value < _LOST if is_op(guard, "Add") else value <= 1.0):
            return other
    return bottom


def _is_at_most_zero(match: Match) -> bool:
    """Whether the largest of ``match.source`` along its axes is 0, by the way it is computed."""
    shifted = producer(match.source)
    if shifted is None or not is_op(shifted, "Sub"):
        return False
    top = _reduced(shifted.inputs[1], "ReduceMax")
    return top is not None and top.source is shifted.inputs[0] and top.axes == match.axes


def _without_shift(tensor: gs.Tensor, axis: int) -> gs.Tensor:
    """x, where ``tensor`` is x - m with m the same along ``axis``; else ``tensor``."""
    shifted = producer(tensor)
    if shifted is None or not is_op(shifted, "Sub"):
        return tensor
    source, shift = shifted.inputs
    top = _reduced(shift, "ReduceMax")
    is_largest = top is not None and top.source is source and axis in top.axes
    return source if is_largest or _is_flat(shift, source, axis) else tensor


def _is_flat(shift: gs.Tensor, source: gs.Tensor, axis: int) -> bool:
    """Whether shapes prove that ``shift`` is the same along ``axis`` of ``source``, and makes it no larger."""
    if shift.shape is None or source.shape is None or len(shift.shape) > len(source.shape):
        return False
    rank = len(source.shape)
    padded = [1] * (rank - len(shift.shape)) + list(shift.shape)
    return padded[axis % rank] == 1 and all(
        ours == 1 or (bool(ours) and ours == theirs)
        for ours, theirs in zip(padded, source.shape, strict=True)
    )


def _reduced(tensor: gs.Tensor, op: str) -> Match | None:
    """What ``tensor`` reduces by ``op`` and along which axes, if it lines up with it wherever the two meet."""
    node, restored = producer(tensor), None
    if node is not None and is_op(node, "Unsqueeze"):
        restored, node = axes_of(node), producer(node.inputs[0])
        if restored is None:
            return None
    if node is None or not is_op(node, op):
        return None
    listed, source = axes_of(node), node.inputs[0]
    if not listed:
        return None
    axes, kept = _counted(listed, source), bool(node.attrs.get("keepdims", 1))
    if restored is not None:
        is_aligned = not kept and _counted(restored, source) == axes
    else:
        is_aligned = kept or axes == tuple(range(len(axes)))
    return Match(source, axes) if is_aligned else None


def _counted(axes: list[int], tensor: gs.Tensor) -> tuple[int, ...]:
    """``axes`` in order, from the front if the rank of ``tensor`` is known."""
    rank = None if tensor.shape is None else len(tensor.shape)
    return tuple(sorted(axes if rank is None else {axis % rank for axis in axes}))


def _summed_input(product: gs.Node, found: Match) -> int | None:
    """Which input of ``product`` is the exponential, if the sum is along the axis that is multiplied and summed."""
    if not is_op(product, "MatMul") or not is_float32(found.source):
        return None
    if any(tensor.shape is None or len(tensor.shape) < 2 for tensor in product.inputs):
        return None
    for i, tensor in enumerate(product.inputs):
        summed = len(tensor.shape) - (1 if i == 0 else 2)
        if _is_exponential(tensor, found) and found.axes == (summed,):
            return i
    return None
