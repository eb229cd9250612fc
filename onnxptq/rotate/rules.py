"""How rotated channels pass each operator.

- moving elements, sums, means over tokens and scaling by one number commute with any rotation;
- ``W x + b`` reads and writes rotated channels with turned weights;
- LayerNormalization without scale and bias commutes with Q if Q 1 = 1, as mean and norm stay; so does an RMS
  normalization that is written out, whose sum of squares stays;
- ``A B`` of two activations keeps rotated columns of B where A stays as it is (attention times values), and
  cancels equal rotations along the contracted axis (queries times keys).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph import layouts
from onnxptq.graph.classes import Literals
from onnxptq.graph.index import is_constant, is_float32
from onnxptq.graph.movements import MOVEMENTS
from onnxptq.graph.normalizations import NORMALIZATIONS
from onnxptq.graph.passes.fuse_rms_norm import is_square
from onnxptq.graph.surgeon import axes_of
from onnxptq.graph.tracing import ChannelTracer, Declined
from onnxptq.rotate.tracing import RotationTracer

Rule = Callable[[RotationTracer, gs.Node], None]


def same_rule(t: ChannelTracer, node: gs.Node) -> None:
    """The operator does not change what it reads, or its sign alone."""
    t.write(node.outputs[0], t.read(node, 0))


def ignore_rule(_: ChannelTracer, __: gs.Node) -> None:
    """Shape and Size: the values do not matter."""


def _add(t: RotationTracer, node: gs.Node) -> None:
    rank = len(t.shape(node.outputs[0]))
    active = [i for i in (0, 1) if not is_constant(node.inputs[i])]
    if len(active) < 2:
        if not active:
            raise Declined("both its inputs are constant")
        labels = t.added_constant(node, 1 - active[0], t.read(node, active[0]))
        t.write(node.outputs[0], layouts.align(labels, rank))
        return
    left, right = (layouts.align(t.read(node, i), rank) for i in (0, 1))
    sizes = [(1,) * (rank - len(s)) + s for s in (t.shape(tensor) for tensor in node.inputs)]
    for labels, other, size in ((left, right, sizes[1]), (right, left, sizes[0])):
        if all(size[a] == 1 for a in range(rank) if labels.shape[a] > 1) and labels.size > 1:
            # The other operand is the same for all channels: it stays, as Q keeps 1.
            t.classes.pin(other, "it is added to all channels")
            t.write(node.outputs[0], labels)
            return
    t.classes.join(left, right)
    finest = np.array(np.broadcast_arrays(left, right)[0])
    t.write(node.outputs[0], layouts.flatten_constant_axes(finest))


def _mul(t: RotationTracer, node: gs.Node) -> None:
    if is_square(node):
        _square(t, node)
        return
    constants = [i for i in (0, 1) if is_constant(node.inputs[i])]
    if len(constants) == 1 and node.name in t.scales:
        _normalizing_scale(t, node, 1 - constants[0])
        return
    if len(constants) == 1:
        _scaled(t, node, 1 - constants[0])
        return
    if constants:
        raise Declined("Mul is not linear here")
    for i in (0, 1):
        if t.classes.all_pinned(t.read(node, 1 - i)):
            _scaled(t, node, i)
            return
    raise Declined("Mul multiplies two activations that could both be rotated")


def _div(t: RotationTracer, node: gs.Node) -> None:
    divisor = node.inputs[1]
    if is_constant(node.inputs[0]) or not (is_constant(divisor) or t.classes.all_pinned(t.read(node, 1))):
        raise Declined("Div has a divisor that could be rotated")
    _scaled(t, node, 0)


def _scaled(t: RotationTracer, node: gs.Node, i: int) -> None:
    """Input ``i`` times or over the other one."""
    rank = len(t.shape(node.outputs[0]))
    labels = layouts.align(t.read(node, i), rank)
    shape = t.shape(node.inputs[1 - i])
    t.hold_apart(labels, (1,) * (rank - len(shape)) + shape)
    t.write(node.outputs[0], labels)


def _normalizing_scale(t: RotationTracer, node: gs.Node, i: int) -> None:
    """Input ``i`` times the scale of a normalization that is written out, which moves into what reads it."""
    if t.scales[node.name]:
        raise Declined(t.scales[node.name])
    labels = t.read(node, i)
    t.normalized[node.name] = labels
    t.write(node.outputs[0], labels)


def _square(t: RotationTracer, node: gs.Node) -> None:
    """Squares of which only the sum or mean over all channels is read: it stays, as norms do."""
    if not is_square(node):
        raise Declined("Pow is not linear")
    reader = t.index.sole_user(node.outputs[0].name)
    rank = len(t.shape(node.outputs[0]))
    axes = axes_of(reader) if reader is not None and reader.op in ("ReduceMean", "ReduceSum") else None
    if axes not in ([-1], [rank - 1]):
        raise Declined("it squares single channels")
    labels = t.read(node, 0)
    t.mix_along(labels, -1)
    t.normalized[node.name] = labels
    t.write(node.outputs[0], t.classes.fixed(rank, "only the sum of squares is read"))


def _conv(t: RotationTracer, node: gs.Node) -> None:
    weight = t.constant(node, 1)
    if int(node.attrs.get("group", 1)) != 1:
        raise Declined("its channels are grouped")
    read, written = (1, 0) if node.op == "Conv" else (0, 1)
    source = np.broadcast_to(t.channels_only(t.read(node, 0), 1).reshape(-1), (weight.shape[read],))
    target = t.classes.fresh((weight.shape[written],))
    for axis, labels, side in ((read, source, "reads"), (written, target, "writes")):
        shape = [-1 if a == axis else 1 for a in range(weight.ndim)]
        t.turn(node, 1, labels.reshape(shape), side)
    t.turn_bias(node, target)
    t.write(node.outputs[0], target.reshape((1, -1) + (1,) * (weight.ndim - 2)))


def _gemm(t: RotationTracer, node: gs.Node) -> None:
    if node.attrs.get("transA", 0) or is_constant(node.inputs[0]):
        raise Declined("Gemm's first operand is transposed or constant")
    target = _matrix(t, node, 1 if node.attrs.get("transB", 0) else 0)
    if t.has_input(node, 2):
        target = t.added_constant(node, 2, target)
    else:
        t.turn_bias(node, target.reshape(-1))
    t.write(node.outputs[0], target)


def _matmul(t: RotationTracer, node: gs.Node) -> None:
    constants = [is_constant(tensor) for tensor in node.inputs]
    if not any(constants):
        _contract(t, node)
        return
    if constants[0] or t.constant(node, 1).ndim != 2 or len(t.shape(node.inputs[0])) < 2:
        raise Declined("its constant operand is not a matrix on the right")
    rank = len(t.shape(node.outputs[0]))
    t.write(node.outputs[0], layouts.align(_matrix(t, node, 0), rank))


def _matrix(t: RotationTracer, node: gs.Node, read: int) -> Literals:
    """Labels, of shape (1, N), of what the matrix at input 1 writes; it is read along axis ``read``."""
    weight = t.constant(node, 1)
    labels = t.channels_only(t.read(node, 0), -1).reshape(-1)
    source = np.broadcast_to(labels, (weight.shape[read],))
    target = t.classes.fresh((weight.shape[1 - read],))
    for axis, along, side in ((read, source, "reads"), (1 - read, target, "writes")):
        t.turn(node, 1, along.reshape((-1, 1) if axis == 0 else (1, -1)), side)
    return target.reshape(1, -1)


def _contract(t: RotationTracer, node: gs.Node) -> None:
    if min(len(t.shape(tensor)) for tensor in node.inputs) < 2:
        raise Declined("one operand is a vector")
    rank = len(t.shape(node.outputs[0]))
    left, right = (layouts.align(t.read(node, i), rank) for i in (0, 1))
    if t.classes.all_pinned(left) or t.classes.all_pinned(right):
        moved, kept, contracted = (right, -1, -2) if t.classes.all_pinned(left) else (left, -2, -1)
        if moved.shape[contracted] > 1:
            raise Declined("only one of its operands could be rotated along the contracted axis")
        t.mix_along(moved, kept)
        t.write(node.outputs[0], moved)
        return
    if left.shape[-2] > 1 or right.shape[-1] > 1:
        raise Declined("both operands could be rotated along other axes than the contracted one")
    t.classes.join(left, right.swapaxes(-1, -2))
    t.mix_along(left, -1)
    t.mix_along(right, -2)
    t.contracted += [left, right]
    t.write(node.outputs[0], t.classes.fixed(rank, "the rotations of its two operands cancel"))


def _normalization(t: RotationTracer, node: gs.Node) -> None:
    rank = len(t.shape(node.outputs[0]))
    if int(node.attrs.get("axis", -1)) % rank != rank - 1:
        raise Declined("it normalizes over more than the last axis")
    if any(tensor.name for tensor in node.outputs[1:]):
        raise Declined("its mean or deviation is read")
    reason = t.scales.get(node.name, "its scale is not constant")
    if reason:
        raise Declined(reason)
    labels = t.read(node, 0)
    t.mix_along(labels, -1)
    t.normalized[node.name] = labels
    if t.has_input(node, 2):
        along = t.channels_only(labels, -1).reshape(-1)
        t.turn(node, 2, np.broadcast_to(along, t.constant(node, 2).shape))
    t.write(node.outputs[0], labels)


def reduce_rule(t: ChannelTracer, node: gs.Node) -> None:
    """A sum or mean over axes along which labels do not change."""
    rank = len(t.shape(node.inputs[0]))
    axes = [int(a) for a in node.attrs["axes"]] if "axes" in node.attrs else t.integers(node, 1)
    if not axes:
        raise Declined("it reduces everything or nothing")
    labels = t.read(node, 0)
    axes = [a % rank for a in axes]
    if any(labels.shape[a] > 1 for a in axes):
        raise Declined("it reduces channels")
    if not node.attrs.get("keepdims", 1):
        labels = labels.reshape([n for a, n in enumerate(labels.shape) if a not in axes])
    t.write(node.outputs[0], labels)


def average_rule(t: ChannelTracer, node: gs.Node) -> None:
    """An average over space."""
    labels = t.read(node, 0)
    if any(labels.shape[a] > 1 for a in range(2, labels.ndim)):
        raise Declined("its channels are not along axis 1")
    t.write(node.outputs[0], labels)


def _gather(t: RotationTracer, node: gs.Node) -> None:
    """As any movement; of a table, whole rows are taken, so its channels are along the other axes."""
    table = node.inputs[0]
    if not is_constant(table) or not is_float32(table):
        MOVEMENTS["Gather"](t, node)
        return
    shape = t.shape(table)
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    labels = t.classes.fresh([1 if a == axis else size for a, size in enumerate(shape)])
    t.turn(node, 0, labels, "writes")
    size = (1,) * (len(t.shape(node.outputs[0])) - len(shape) + 1)
    t.write(node.outputs[0], labels.reshape(labels.shape[:axis] + size + labels.shape[axis + 1 :]))


def _gather_elements(t: RotationTracer, node: gs.Node) -> None:
    """As any movement, where the same positions are taken for all channels."""
    labels = t.read(node, 0)
    axis = int(node.attrs.get("axis", 0)) % labels.ndim
    if any(size > 1 and a != axis and not _is_repeated(t, node, a) for a, size in enumerate(labels.shape)):
        raise Declined("it may take other positions for each channel")
    MOVEMENTS["GatherElements"](t, node)


def _is_repeated(t: RotationTracer, node: gs.Node, axis: int) -> bool:
    """Whether the positions that a GatherElements takes are the same all along ``axis``."""
    positions = node.inputs[1]
    if is_constant(positions):
        return bool((positions.values == positions.values.take([0], axis)).all())
    producer = t.index.producer(positions.name)
    shape = producer.inputs[0].shape if producer is not None and producer.op == "Expand" else None
    if shape is None:
        return False
    place = axis - len(t.shape(node.outputs[0])) + len(shape)
    return place < 0 or bool(shape[place] == 1)


def _concat(t: RotationTracer, node: gs.Node) -> None:
    """Tokens put beside tokens have the same channels; otherwise as any movement."""
    rank = len(t.shape(node.outputs[0]))
    axis = int(node.attrs["axis"]) % rank
    active = [t.read(node, i) for i, tensor in enumerate(node.inputs) if not is_constant(tensor)]
    if not active or any(labels.shape[axis] > 1 for labels in active) or all(x.size == 1 for x in active):
        MOVEMENTS["Concat"](t, node)
        return
    labels = max(active, key=lambda part: part.size)
    for i in range(len(node.inputs)):
        t.classes.join(labels, t.collapse(t.read(node, i), [axis]))
    t.write(node.outputs[0], labels)


RULES: Mapping[str, Rule] = {
    **MOVEMENTS,
    **dict.fromkeys(("Identity", "Dropout", "Neg"), same_rule),
    **dict.fromkeys(("Shape", "Size"), ignore_rule),
    **dict.fromkeys(("Add", "Sub"), _add),
    "Mul": _mul,
    "Div": _div,
    "Pow": _square,
    **dict.fromkeys(("Conv", "ConvTranspose"), _conv),
    "Gemm": _gemm,
    "MatMul": _matmul,
    **dict.fromkeys(NORMALIZATIONS, _normalization),
    **dict.fromkeys(("ReduceMean", "ReduceSum"), reduce_rule),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool"), average_rule),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "Concat": _concat,
}
"""Operators that rotated channels can pass or end at. Every other one pins what it reads and writes."""
