"""How factors pass each operator that computes: elementwise, weighted, reducing.

With x' = x / s_x and y' = y / s_y:

- homogeneous operators (Relu, MaxPool, Add, ReduceMean...) keep s_y = s_x along everything they mix;
- Clip does so too for the channels that stay inside its bounds;
- ``W x + b`` becomes ``(W s_x / s_y) x' + b / s_y`` for any s_x and s_y, as does ``c * x`` for a vector c;
- a normalization's scale and bias absorb 1 / s_y; its input stays (its epsilon is not scaled);
- ``A B`` of two activations keeps the rows' factors of A or the columns' of B where the other operand is
  pinned, and lets the factors along the contracted axis cancel otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.equalize.tracing import Bounds, Contraction, Rule, Tracer
from onnxptq.graph import layouts
from onnxptq.graph.classes import Literals
from onnxptq.graph.index import is_constant
from onnxptq.graph.movements import MOVEMENTS
from onnxptq.graph.tracing import Declined


def _same(t: Tracer, node: gs.Node) -> None:
    t.write(node.outputs[0], t.read(node, 0))


def _cast(t: Tracer, node: gs.Node) -> None:
    if node.outputs[0].name in t.shapes and node.inputs[0].name in t.trace.labels:
        _same(t, node)
    elif node.inputs[0].name in t.trace.labels:
        raise Declined("it is cast to another type")
    elif node.outputs[0].name in t.shapes:
        raise Declined("it is cast from another type")


def _ignore(t: Tracer, node: gs.Node) -> None:
    """Shape and Size: the values do not matter."""


def _clip(t: Tracer, node: gs.Node) -> None:
    """Finite bounds other than 0 leave limits on the factors (:mod:`onnxptq.equalize.limits`)."""
    if any(node.attrs.get(name) is not None for name in ("min", "max")):
        raise Declined("Clip has its bounds as attributes")
    low, high = (
        t.constant(node, i) if t.has_input(node, i) else np.asarray(end)
        for i, end in ((1, -np.inf), (2, np.inf))
    )
    if low.size != 1 or high.size != 1 or not low.item() <= 0 <= high.item():
        raise Declined("Clip has bounds that exclude 0")
    _same(t, node)
    if not {low.item(), high.item()} <= {0.0, np.inf, -np.inf}:
        t.trace.bounds.append(Bounds(tensor=node.outputs[0].name, low=low.item(), high=high.item()))


def _homogeneous(first: int, count: int | None = None) -> Rule:
    """Operators with f(x / s, y / s) = f(x, y) / s in the inputs from ``first`` on."""

    def rule(t: Tracer, node: gs.Node) -> None:
        inputs = range(first, len(node.inputs) if count is None else first + count)
        active = [i for i in inputs if not is_constant(node.inputs[i])]
        if not active:
            raise Declined("all its inputs are constant")
        rank = len(t.shape(node.outputs[0]))
        labels = layouts.align(t.read(node, active[0]), rank)
        for i in active[1:]:
            other = layouts.align(t.read(node, i), rank)
            t.classes.join(labels, other)
            # After joining, either names the class; the finer one covers the broadcast.
            labels = np.broadcast_arrays(labels, other)[0]
            labels = layouts.flatten_constant_axes(np.array(labels))
        for i in inputs:
            if is_constant(node.inputs[i]):
                labels = layouts.align(t.additive(node, i, labels), rank)
        t.write(node.outputs[0], labels)

    return rule


def _mul(t: Tracer, node: gs.Node) -> None:
    constants = [i for i in (0, 1) if is_constant(node.inputs[i])]
    if len(constants) == 1:
        _scale_by_constant(t, node, constants[0])
        return
    if node.inputs[0] is node.inputs[1] or constants:
        raise Declined("Mul is not linear here")
    rank = len(t.shape(node.outputs[0]))
    left, right = (layouts.align(t.read(node, i), rank) for i in (0, 1))
    if t.classes.all_pinned(left):
        t.write(node.outputs[0], right)
    elif t.classes.all_pinned(right):
        t.write(node.outputs[0], left)
    else:
        raise Declined("Mul multiplies two activations that could both be rescaled")


def _div(t: Tracer, node: gs.Node) -> None:
    if is_constant(node.inputs[1]) and not is_constant(node.inputs[0]):
        _scale_by_constant(t, node, 1)
        return
    if is_constant(node.inputs[0]) or not t.classes.all_pinned(t.read(node, 1)):
        raise Declined("Div has a divisor that could be rescaled")
    rank = len(t.shape(node.outputs[0]))
    t.write(node.outputs[0], layouts.align(t.read(node, 0), rank))


def _scale_by_constant(t: Tracer, node: gs.Node, i: int) -> None:
    value = t.constant(node, i)
    rank = len(t.shape(node.outputs[0]))
    labels = layouts.align(t.read(node, 1 - i), rank)
    if value.size == 1:
        t.write(node.outputs[0], labels)
        return
    shape = (1,) * (rank - value.ndim) + value.shape
    source = t.collapse(labels, [a for a in range(rank) if shape[a] == 1])
    target = t.classes.fresh(shape)
    if int(np.prod(shape)) > max(shape):
        # One factor per element of a table would be no channel any more.
        axis = max(range(rank), key=lambda a: (shape[a] > 1, a))
        target = t.collapse(target, [a for a in range(rank) if a != axis])
    before, after = (x.reshape(x.shape[rank - value.ndim :]) for x in (source, target))
    t.product(node, i, None, before, after)
    t.write(node.outputs[0], target)


def _conv(t: Tracer, node: gs.Node) -> None:
    weight = t.constant(node, 1)
    group = int(node.attrs.get("group", 1))
    rank = weight.ndim
    labels = t.channels_only(t.read(node, 0), 1)
    if node.op == "Conv":
        outputs, per_group = weight.shape[:2]
        read = np.broadcast_to(labels.reshape(-1), (group * per_group,)).reshape(group, 1, per_group)
        times = np.broadcast_to(read, (group, outputs // group, per_group)).reshape(outputs, per_group)
        target = t.classes.fresh((outputs,))
        over, rows = target.reshape(-1, 1), 0
    else:
        inputs, per_group = weight.shape[:2]
        times = np.broadcast_to(labels.reshape(-1), (inputs,)).reshape(-1, 1)
        target = t.classes.fresh((group * per_group,))
        over = np.repeat(target.reshape(group, per_group), inputs // group, axis=0)
        rows = 1
    tail = (1,) * (rank - 2)
    over = over.reshape(over.shape + tail)
    t.product(node, 1, rows, times.reshape(times.shape + tail), over)
    if t.has_input(node, 2):
        t.absorb(node, 2, over=target)
    t.write(node.outputs[0], target.reshape((1, -1, *tail)))


def _gemm(t: Tracer, node: gs.Node) -> None:
    if node.attrs.get("transA", 0) or is_constant(node.inputs[0]):
        raise Declined("Gemm's first operand is transposed or constant")
    weight = t.constant(node, 1)
    rows = 0 if node.attrs.get("transB", 0) else 1
    labels = np.broadcast_to(t.channels_only(t.read(node, 0), 1), (1, weight.shape[1 - rows]))
    target: Literals = t.classes.fresh((1, weight.shape[rows]))
    times, over = (labels, target.T) if rows == 0 else (labels.T, target)
    t.product(node, 1, rows, times, over)
    if t.has_input(node, 2):
        target = t.additive(node, 2, target)
    t.write(node.outputs[0], target)


def _matmul(t: Tracer, node: gs.Node) -> None:
    constants = [i for i in (0, 1) if is_constant(node.inputs[i])]
    if len(constants) == 1:
        _matmul_constant(t, node, constants[0])
    elif constants:
        raise Declined("both operands are constant")
    else:
        _matmul_activations(t, node)


def _matmul_constant(t: Tracer, node: gs.Node, i: int) -> None:
    weight = t.constant(node, i)
    shape = t.shape(node.inputs[1 - i])
    if weight.ndim < 2 or len(shape) < 2:
        raise Declined("one operand is a vector")
    rank = len(t.shape(node.outputs[0]))
    kept, contracted = (-1, -2) if i == 1 else (-2, -1)
    labels = layouts.align(t.read(node, 1 - i), rank)
    full = (1,) * (rank - weight.ndim) + weight.shape
    # The other operand's free axis is the one that the product keeps of it; batches that share a weight join.
    free = rank + contracted
    labels = t.collapse(labels, [free, *(a for a in range(rank - 2) if full[a] == 1)])
    read = labels.swapaxes(-1, -2)
    times = read.reshape(read.shape[rank - weight.ndim :])
    target_shape = list(full)
    target_shape[contracted] = 1
    target = t.classes.fresh(target_shape)
    over = target.reshape(target.shape[rank - weight.ndim :])
    t.product(node, i, weight.ndim + kept, times, over)
    t.write(node.outputs[0], target)


def _matmul_activations(t: Tracer, node: gs.Node) -> None:
    if min(len(t.shape(node.inputs[0])), len(t.shape(node.inputs[1]))) < 2:
        raise Declined("one operand is a vector")
    rank = len(t.shape(node.outputs[0]))
    left, right = (layouts.align(t.read(node, i), rank) for i in (0, 1))
    if t.classes.all_pinned(left):
        t.write(node.outputs[0], t.collapse(right, [rank - 2]))
    elif t.classes.all_pinned(right):
        t.write(node.outputs[0], t.collapse(left, [rank - 1]))
    else:
        left, right = t.collapse(left, [rank - 2]), t.collapse(right, [rank - 1])
        t.classes.join(left, right.swapaxes(-1, -2) ^ 1)
        t.trace.contractions.append(Contraction(left=node.inputs[0].name, right=node.inputs[1].name))
        t.write(node.outputs[0], t.classes.fixed(rank, "the factors of its two operands cancel"))


def _layer_norm(t: Tracer, node: gs.Node) -> None:
    rank = len(t.shape(node.outputs[0]))
    axis = int(node.attrs.get("axis", -1)) % rank
    scale = t.constant(node, 1)
    if scale.size != t.shape(node.outputs[0])[-1] or axis != rank - 1:
        raise Declined("it normalizes over more than the last axis")
    target = t.classes.fresh((1,) * (rank - 1) + (scale.size,))
    t.absorb(node, 1, over=target.reshape(scale.shape))
    if t.has_input(node, 2):
        target = t.additive(node, 2, target)
    _pin_input(t, node)
    t.write(node.outputs[0], layouts.align(target, rank))


def _channel_norm(t: Tracer, node: gs.Node) -> None:
    """InstanceNormalization and GroupNormalization with a scale per channel."""
    shape = t.shape(node.outputs[0])
    if t.constant(node, 1).shape != (shape[1],) or t.constant(node, 2).shape != (shape[1],):
        raise Declined("its scale is not per channel")
    target = t.classes.fresh((shape[1],))
    t.absorb(node, 1, over=target)
    t.absorb(node, 2, over=target)
    _pin_input(t, node)
    t.write(node.outputs[0], target.reshape((1, -1) + (1,) * (len(shape) - 2)))


def _pin_input(t: Tracer, node: gs.Node) -> None:
    t.classes.pin(t.read(node, 0), f"{node.op} reads it, whose epsilon does not scale")


def _batch_norm(t: Tracer, node: gs.Node) -> None:
    if len([tensor for tensor in node.outputs if tensor.name]) != 1:
        raise Declined("it is in training mode")
    shape = t.shape(node.outputs[0])
    labels = t.channels_only(t.read(node, 0), 1)
    source = np.broadcast_to(labels.reshape(-1), (shape[1],))
    target = t.classes.fresh((shape[1],))
    t.absorb(node, 1, times=source, over=target)
    t.absorb(node, 2, over=target)
    t.absorb(node, 3, over=source)
    t.write(node.outputs[0], target.reshape((1, -1) + (1,) * (len(shape) - 2)))


def _prelu(t: Tracer, node: gs.Node) -> None:
    t.constant(node, 1)
    _same(t, node)


def _pool(t: Tracer, node: gs.Node) -> None:
    labels = t.read(node, 0)
    t.write(node.outputs[0], t.collapse(labels, range(2, labels.ndim)))


def _reduce(t: Tracer, node: gs.Node) -> None:
    rank = len(t.shape(node.inputs[0]))
    axes = [int(a) for a in node.attrs["axes"]] if "axes" in node.attrs else t.integers(node, 1)
    if not axes:
        if node.attrs.get("noop_with_empty_axes", 0):
            raise Declined("it reduces nothing")
        axes = list(range(rank))
    axes = [a % rank for a in axes]
    labels = t.collapse(t.read(node, 0), axes)
    if not node.attrs.get("keepdims", 1):
        labels = labels.reshape([n for a, n in enumerate(labels.shape) if a not in axes])
    t.write(node.outputs[0], labels)


def _resize(t: Tracer, node: gs.Node) -> None:
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Declined("it may fill in a constant")
    before, after = t.shape(node.inputs[0]), t.shape(node.outputs[0])
    labels = t.read(node, 0)
    t.write(node.outputs[0], t.collapse(labels, [a for a in range(len(before)) if before[a] != after[a]]))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("Relu", "LeakyRelu", "Identity", "Dropout", "Neg", "Abs"), _same),
    **dict.fromkeys(("Shape", "Size"), _ignore),
    **dict.fromkeys(("Add", "Sub", "Sum", "Max", "Min", "Mean"), _homogeneous(0)),
    "Where": _homogeneous(1, 2),
    "Cast": _cast,
    "Clip": _clip,
    "PRelu": _prelu,
    "Mul": _mul,
    "Div": _div,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "InstanceNormalization": _channel_norm,
    "GroupNormalization": _channel_norm,
    "BatchNormalization": _batch_norm,
    **dict.fromkeys(("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"), _pool),
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2"), _reduce),
    "Resize": _resize,
    **MOVEMENTS,
}
"""Operators that factors can pass or end at. Every other one pins what it reads and writes."""
