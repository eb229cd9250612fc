"""Which channels a constant may be taken from, and who makes up for it.

    x' = x - c                       written by a normalization or a layer with the bias b - c
    x' = f(x) - c                    written by a subtraction behind an activation f
    W x' + (b + W c) = W x + b       in every layer that reads it, however moved on the way
    P (V - 1 c^T) = P V - 1 c^T      where the rows of P sum to one: the values of attention

Channels are followed by labels; equal labels shift alike, and whatever else reads a channel holds it where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxptq.graph.classes import Literals
from onnxptq.graph.index import GraphIndex, is_constant
from onnxptq.graph.linear import Linear, find_linears, linear_of
from onnxptq.graph.movements import MOVEMENTS
from onnxptq.graph.tracing import ChannelTracer, Declined, Shapes
from onnxptq.types import Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Writer:
    """What decides where the channels of ``node``'s output lie along ``axis``: the bias at input ``index``, or a
    subtraction that is yet to be put behind it where that is None."""

    node: gs.Node
    index: int | None
    axis: int
    labels: Literals

    @property
    def tensor(self) -> str:
        """The output."""
        name: str = self.node.outputs[0].name
        return name


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reader:
    """A layer whose bias takes shifts up; ``labels`` are those of the channels that it reads, in order."""

    layer: Linear
    labels: Literals


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Product:
    """Attention: tensors of softmax weights and of values; ``labels`` are those of the values' channels."""

    weights: str
    values: str
    labels: Literals


class ShiftTracer(ChannelTracer):
    """What the rules find: what channels can be shifted by, the layers that read them, and products they pass."""

    def __init__(self, index: GraphIndex, shapes: Shapes, values: Mapping[str, Array]) -> None:
        super().__init__(index, shapes, values, change="shift")
        self.writers: list[Writer] = []
        self.readers: list[Reader] = []
        self.products: list[Product] = []
        layers = find_linears(index)
        self.bias_nodes = {x.bias_node.name: x for x in layers if x.bias_node is not None}

    def follow(self, rules: Mapping[str, Callable[[Any, gs.Node], None]]) -> None:
        """Label every tensor in graph order; no subtraction comes between an activation and a convolution."""
        super().follow(rules)
        convolved = [reader.labels for reader in self.readers if reader.layer.node.op == "Conv"]
        roots = {root for labels in convolved for root in self.roots(labels)}
        for writer in self.writers:
            if writer.index is None and not roots.isdisjoint(self.roots(writer.labels)):
                self.classes.pin(writer.labels, "a convolution reads it")

    def free_writers(self, *, subtracting: bool) -> list[Writer]:
        """Those with a channel that may be shifted: by subtractions, or by biases."""
        own = [writer for writer in self.writers if (writer.index is None) == subtracting]
        return [writer for writer in own if not self.classes.all_pinned(writer.labels)]

    def roots(self, labels: Literals) -> list[int]:
        """The class of every element, flat."""
        found: list[int] = self.classes.roots(labels).reshape(-1).tolist()
        return found

    def offsets_of(self, labels: Literals, offsets: Mapping[int, float]) -> npt.NDArray[np.float64]:
        """c of every element, flat, for c by class; 0 where none is given."""
        return np.asarray([offsets.get(root, 0.0) for root in self.roots(labels)])

    def read(self, node: gs.Node, i: int) -> Literals:
        """Labels of input ``i``; constants between channels stay."""
        if is_constant(node.inputs[i]):
            raise Declined("a constant is moved together with it")
        return super().read(node, i)

    def forget(self, node: gs.Node) -> None:
        """Rules record last: there is nothing to take back."""


def _same(t: ShiftTracer, node: gs.Node) -> None:
    t.write(node.outputs[0], t.read(node, 0))


def _ignore(_: ShiftTracer, __: gs.Node) -> None:
    """Shape and Size: the values do not matter."""


def _normalization(t: ShiftTracer, node: gs.Node) -> None:
    rank = len(t.shape(node.outputs[0]))
    if int(node.attrs.get("axis", -1)) % rank != rank - 1:
        raise Declined("it normalizes over more than the last axis")
    t.classes.pin(t.read(node, 0), "it is normalized")
    _begin(t, node, 2, axis=-1)


def _matrix(t: ShiftTracer, node: gs.Node) -> None:
    if node.op == "MatMul" and not any(is_constant(tensor) for tensor in node.inputs):
        _product(t, node)
        return
    layer = _layer(t, node)
    if layer.weight_index != 1 or len(layer.weight.shape) != 2 or node.attrs.get("transA", 0):
        raise Declined("its constant operand is not a matrix on the right")
    if any(float(node.attrs.get(name, 1.0)) != 1.0 for name in ("alpha", "beta")):
        raise Declined("it scales its product or its bias")
    _take(t, layer, axis=-1)


def _conv(t: ShiftTracer, node: gs.Node) -> None:
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(node.attrs.get("pads", ())):
        raise Declined("it pads with zeros")
    _take(t, _layer(t, node), axis=1)


def _layer(t: ShiftTracer, node: gs.Node) -> Linear:
    layer = linear_of(t.index, node)
    if layer is None or (layer.bias is None and node.op != "MatMul" and t.has_input(node, 2)):
        raise Declined("its weight or bias is not constant")
    t.constant(node, layer.weight_index)
    return layer


def _take(t: ShiftTracer, layer: Linear, axis: int) -> None:
    node = layer.node
    if node.op == "MatMul" and layer.bias is None:
        raise Declined("it has no bias")
    labels = t.channels_only(t.read(node, 1 - layer.weight_index), axis).reshape(-1)
    count = t.shape(layer.input)[axis]
    if layer.bias_node is node or layer.bias_node is None:
        _begin(t, node, 2, axis)
    else:
        t.write(node.outputs[0], t.classes.fixed(len(t.shape(node.outputs[0])), "its bias follows"))
    t.readers.append(Reader(layer=layer, labels=np.broadcast_to(labels, (count,))))


def _added_bias(t: ShiftTracer, node: gs.Node) -> None:
    layer = t.bias_nodes.get(node.name)
    if layer is None or layer.node is node or layer.bias_index is None:
        raise Declined("it adds two activations")
    _begin(t, node, layer.bias_index, axis=-1)


def _product(t: ShiftTracer, node: gs.Node) -> None:
    """Attention times values."""
    source = t.index.producer(node.inputs[0].name)
    rank = len(t.shape(node.inputs[0]))
    if source is None or source.op != "Softmax" or int(source.attrs.get("axis", -1)) % rank != rank - 1:
        raise Declined("it multiplies two activations")
    labels = t.read(node, 1)
    labels = t.collapse(labels, [labels.ndim - 2])
    t.write(node.outputs[0], labels)
    t.products.append(Product(weights=node.inputs[0].name, values=node.inputs[1].name, labels=labels))


def _activation(t: ShiftTracer, node: gs.Node) -> None:
    source = t.index.producer(node.inputs[0].name)
    if source is not None and source.op in ("Conv", "ConvTranspose"):
        raise Declined("the kernel of the convolution before it may fuse it")
    for tensor in node.inputs:
        if tensor.name in t.labels:
            t.classes.pin(t.labels[tensor.name], f"{node.op} reads it")
    _begin(t, node, None, axis=-1)


def _begin(t: ShiftTracer, node: gs.Node, index: int | None, axis: int) -> None:
    """New channels along ``axis`` of the output, placed by the bias at input ``index``, if there is one yet."""
    if index is not None and t.has_input(node, index):
        t.constant(node, index)
    shape = t.shape(node.outputs[0])
    if not shape:
        raise Declined("a single number has no channels")
    axis %= len(shape)
    labels = t.classes.fresh([n if a == axis else 1 for a, n in enumerate(shape)])
    t.write(node.outputs[0], labels)
    t.writers.append(Writer(node=node, index=index, axis=axis, labels=labels))


RULES: Mapping[str, Callable[[ShiftTracer, gs.Node], None]] = {
    # Padding writes zeros, which would have to shift as well.
    **{op: rule for op, rule in MOVEMENTS.items() if op != "Pad"},
    **dict.fromkeys(("Identity", "Dropout"), _same),
    **dict.fromkeys(("Shape", "Size"), _ignore),
    "LayerNormalization": _normalization,
    "Add": _added_bias,
    **dict.fromkeys(("MatMul", "Gemm"), _matrix),
    "Conv": _conv,
}

_ACTIVATIONS = (
    *(
        "Celu",
        "Clip",
        "Elu",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "LeakyRelu",
        "Mish",
        "PRelu",
        "Relu",
        "Selu",
    ),
    *("Sigmoid", "Softplus", "Swish", "ThresholdedRelu"),
    # The last operator of activations that exporters write out, and of gates.
    "Mul",
)

ACTIVATION_RULES: Mapping[str, Callable[[ShiftTracer, gs.Node], None]] = {
    **RULES,
    **dict.fromkeys(_ACTIVATIONS, _activation),
}
"""With activations, behind which a subtraction can be put: GPU runtimes run both in one pointwise kernel."""
