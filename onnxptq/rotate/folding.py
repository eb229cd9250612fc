"""Moving the scale and bias of a normalization into the weighted layers that read it.

    (g * n + c) W + b = n (diag(g) W) + (c W + b)

Where a reader has no bias and no place for one, c stays behind as c / g, for the layer then reads n + c / g.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxptq.graph import layouts
from onnxptq.graph.classes import Literals
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import Linear, linear_of
from onnxptq.graph.movements import MOVEMENTS
from onnxptq.graph.normalizations import NORMALIZATIONS, Normalization, find_normalizations
from onnxptq.graph.tracing import ChannelTracer, Declined, Shapes
from onnxptq.rotate.rules import average_rule, ignore_rule, reduce_rule, same_rule
from onnxptq.types import Array

Floats = npt.NDArray[np.float64]

_LARGEST_RATIO = 8.0
"""Largest c / g that stays behind: it is added to numbers of mean square 1, which it must not drown."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reader:
    """Rows ``rows`` of the weight of ``layer`` read channels ``channels`` of a normalization."""

    layer: Linear
    axis: int
    rows: npt.NDArray[np.int64]
    channels: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Folding:
    """What becomes of one normalization: ``reason`` says why nothing can (empty if something can).

    ``node`` scales by its input ``index``. ``into_biases``: the bias goes into those of the readers; else it stays,
    divided by the scale.
    """

    node: gs.Node
    index: int
    readers: Sequence[Reader] = ()
    into_biases: bool = True
    reason: str = ""

    @property
    def scale(self) -> Floats:
        """g, one number per channel."""
        return np.asarray(self.node.inputs[self.index].values, np.float64)

    @property
    def bias(self) -> Floats:
        """c, one number per channel."""
        has_bias = len(self.node.inputs) > 2 and bool(self.node.inputs[2].name)
        return np.asarray(self.node.inputs[2].values, np.float64) if has_bias else np.zeros_like(self.scale)


@dataclass(slots=True, eq=False)
class _Read:
    layer: Linear
    axis: int
    labels: Literals


class _Tracer(ChannelTracer):
    """Follows the channels of normalizations to where they are read."""

    def __init__(self, index: GraphIndex, shapes: Shapes, values: Mapping[str, Array]) -> None:
        super().__init__(index, shapes, values, change="scaling")
        self.reads: list[_Read] = []
        self.starts: dict[str, Literals] = {}
        self.norms = {norm.node.name: norm for norm in find_normalizations(index)}

    def collapse(self, labels: Literals, axes: Sequence[int]) -> Literals:
        """Refuses to join: every channel has a scale of its own."""
        if any(labels.shape[axis] > 1 for axis in axes):
            raise Declined("its tokens are scaled differently")
        return labels


def find_foldings(index: GraphIndex, shapes: Shapes, values: Mapping[str, Array]) -> dict[str, Folding]:
    """What can become of each normalization over the last axis that scales, by the name of the node that does."""
    tracer = _Tracer(index, shapes, values)
    tracer.follow(_RULES)
    scaling = ((norm, norm.scale) for norm in tracer.norms.values())
    return {scale.name: _folding(tracer, norm, scale) for norm, scale in scaling if scale is not None}


def _folding(tracer: _Tracer, norm: Normalization, scaling: gs.Node) -> Folding:
    plain = Folding(node=scaling, index=norm.scale_index)
    if norm.node.name not in tracer.starts:
        return replace(plain, reason=tracer.declined.get(norm.node.name, "its shape is unknown"))
    if (plain.scale == 1.0).all() and not plain.bias.any():
        return plain
    labels = tracer.starts[norm.node.name]
    for label in labels.tolist():
        if tracer.classes.is_pinned(tracer.classes.find(label)):
            reason = tracer.classes.reason(tracer.classes.find(label))
            return replace(plain, reason=f"its scale cannot move into the layers behind: {reason}")
    readers = []
    for read in tracer.reads:
        rows = np.flatnonzero(np.isin(read.labels, labels))
        if rows.size:
            channels = np.searchsorted(labels, read.labels[rows])
            readers.append(Reader(layer=read.layer, axis=read.axis, rows=rows, channels=channels))
    if not plain.bias.any() or all(_takes_bias(reader.layer) for reader in readers):
        return replace(plain, readers=readers)
    scale = np.abs(plain.scale)
    if scale.min() > 0 and (np.abs(plain.bias) / scale).max() <= _LARGEST_RATIO:
        return replace(plain, readers=readers, into_biases=False)
    return replace(plain, reason="its bias cannot move into the layers behind: one of them has none")


def _takes_bias(layer: Linear) -> bool:
    node = layer.node
    if node.op == "MatMul":
        return layer.bias is not None
    if node.op == "Gemm":
        plain = all(float(node.attrs.get(name, 1.0)) == 1.0 for name in ("alpha", "beta"))
    elif node.op == "ConvTranspose":
        return False
    else:
        # Zeros around the picture are no normalized values, so the bias would not reach them.
        plain = not any(node.attrs.get("pads", ())) and node.attrs.get("auto_pad", "NOTSET") == "NOTSET"
    if len(node.inputs) < 3 or not node.inputs[2].name:
        return plain
    outputs = int(layer.weight.shape[layer.axis])
    return plain and layer.bias is not None and int(np.prod(layer.bias.shape)) == outputs


def _normalization(t: _Tracer, node: gs.Node) -> None:
    if node.name not in t.norms:
        raise Declined(f"{node.op} does not commute with a scaling of channels")
    shape = t.shape(node.outputs[0])
    if node.op not in NORMALIZATIONS:
        _begin(t, node, shape)
        return
    if int(node.attrs.get("axis", -1)) % len(shape) != len(shape) - 1:
        raise Declined("it normalizes over more than the last axis")
    for i in range(1, len(node.inputs)):
        if t.has_input(node, i) and t.constant(node, i).shape != (shape[-1],):
            raise Declined("its scale or bias is not one number per channel")
    _begin(t, node, shape)


def _begin(t: _Tracer, node: gs.Node, shape: tuple[int, ...]) -> None:
    labels = t.classes.fresh((shape[-1],))
    t.starts[node.name] = labels
    t.write(node.outputs[0], layouts.align(labels, len(shape)))


def _linear(t: _Tracer, node: gs.Node) -> None:
    layer = linear_of(t.index, node)
    if layer is None or layer.weight_index != 1 or layer.group != 1 or node.attrs.get("transA", 0):
        raise Declined("it is no plain layer with a constant weight")
    if node.op in ("Gemm", "MatMul"):
        if len(layer.weight.shape) != 2:
            raise Declined("its weight is no matrix")
        channel, axis = -1, 1 - layer.axis
    else:
        channel, axis = 1, 1 - layer.axis
    labels = t.channels_only(t.read(node, 0), channel).reshape(-1)
    t.reads.append(_Read(layer, axis, np.broadcast_to(labels, (layer.weight.shape[axis],))))
    rank = len(t.shape(node.outputs[0]))
    t.write(node.outputs[0], t.classes.fixed(rank, f"{node.op} writes it"))


def _pad(_: ChannelTracer, __: gs.Node) -> None:
    raise Declined("zeros are put around it")


_RULES: Mapping[str, Callable[[Any, gs.Node], None]] = {
    **MOVEMENTS,
    "Pad": _pad,
    **dict.fromkeys((*NORMALIZATIONS, "Mul", "Div"), _normalization),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), _linear),
    "ReduceMean": reduce_rule,
    "GlobalAveragePool": average_rule,
    **dict.fromkeys(("Identity", "Dropout"), same_rule),
    **dict.fromkeys(("Shape", "Size"), ignore_rule),
}


@dataclass(slots=True, eq=False)
class Pending:
    """New values of constants in double precision, by node name and input, until all is decided."""

    values: dict[tuple[str, int], Floats] = field(default_factory=dict)

    def get(self, node: gs.Node, i: int) -> Floats:
        """The value so far."""
        known = self.values.get((node.name, i))
        return np.asarray(node.inputs[i].values, np.float64) if known is None else known

    def find(self, node: gs.Node, i: int) -> Floats | None:
        """The value so far; None for an input that is absent and stays so."""
        is_given = i < len(node.inputs) and bool(node.inputs[i].name)
        return self.get(node, i) if is_given or (node.name, i) in self.values else None

    def set(self, node: gs.Node, i: int, value: Floats) -> None:
        """Replace a value."""
        self.values[node.name, i] = value


def fold(folding: Folding, pending: Pending) -> None:
    """Set scale to 1, and bias to 0 or what stays of it; readers take up the rest."""
    node, scale, bias = folding.node, folding.scale, folding.bias
    if folding.reason or not folding.readers:
        return
    for reader in folding.readers:
        layer = reader.layer
        weight = pending.get(layer.node, layer.weight_index).copy()
        rows = np.moveaxis(weight, reader.axis, -1)
        if folding.into_biases and bias.any():
            _shift(layer, pending, rows[..., reader.rows] @ bias[reader.channels])
        rows[..., reader.rows] *= scale[reader.channels]
        pending.set(layer.node, layer.weight_index, weight)
    pending.set(node, folding.index, np.ones_like(scale))
    if bias.any():
        pending.set(node, 2, np.zeros_like(bias) if folding.into_biases else bias / scale)


def _shift(layer: Linear, pending: Pending, moved: Floats) -> None:
    """Add ``moved``, (C_out, ...kernel), to the bias of ``layer``; a missing one is created."""
    shift = moved.reshape(moved.shape[0], -1).sum(axis=1)
    if layer.bias_node is None or layer.bias_index is None:
        pending.set(layer.node, 2, pending.values.get((layer.node.name, 2), np.zeros(shift.size)) + shift)
        return
    value = pending.get(layer.bias_node, layer.bias_index)
    pending.set(layer.bias_node, layer.bias_index, value + shift)
