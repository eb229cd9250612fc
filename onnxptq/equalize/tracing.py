"""Following factors through a graph: which channels share one, and which weights absorb them.

Every float tensor ``T`` is to become ``T / s``. A rule per operator (``rules``) says how the labels of its
outputs follow from those of its inputs, and records an :class:`Edit` for each constant that takes up the
difference. What no rule covers keeps its inputs and outputs as they are: their factors are pinned to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.equalize import layouts
from onnxptq.equalize.classes import Classes, Literals
from onnxptq.graph.index import GraphIndex, is_constant, is_float32
from onnxptq.graph.proto import ONNX_DOMAINS
from onnxptq.types import Array

_CONSTANT_ELEMENTS = 1 << 16


class Declined(Exception):  # noqa: N818 - a decision, not an error
    """A rule's reason to leave a node as it is."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edit:
    """Input ``index`` of ``node`` becomes ``constant * s[times] / s[over]``; labels broadcast to the constant."""

    node: gs.Node
    index: int
    times: Literals | None = None
    over: Literals | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Product:
    """A weighted operator between two tensors, as its noise needs it.

    ``rows`` is the weight's axis of output channels, None for an elementwise Mul or Div; ``times`` labels its
    elements as they are read (input channels), ``over`` its output channels; both broadcast to it.
    """

    node: gs.Node
    index: int
    source: str
    target: str
    rows: int | None
    times: Literals
    over: Literals


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contraction:
    """A MatMul of two activations along a shared axis whose factors cancel: ``left`` has s, ``right`` 1 / s."""

    left: str
    right: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """A Clip to [``low``, ``high``], low <= 0 <= high, whose output ``tensor`` passes factors while it stays inside.

    A bound that is 0 or infinite scales with any factor.
    """

    tensor: str
    low: float
    high: float


Shapes = Mapping[str, tuple[int, ...]]
Rule = Callable[["Tracer", gs.Node], None]


@dataclass(slots=True, eq=False)
class Trace:
    """The outcome: labels of every float tensor, the edits, and the records that the noise model reads."""

    classes: Classes
    labels: dict[str, Literals] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    bounds: list[Bounds] = field(default_factory=list)
    declined: dict[str, str] = field(default_factory=dict)


class Tracer:
    """What rules work with.

    Args:
        index: the graph.
        shapes: concrete shapes of float tensors in one forward pass.
        values: concrete values of the integer tensors that movement operators read as parameters.
    """

    def __init__(self, index: GraphIndex, shapes: Shapes, values: Mapping[str, Array]) -> None:
        self.index = index
        self.shapes = shapes
        self.trace = Trace(classes=Classes())
        self.classes = self.trace.classes
        self._values = values
        self._captured = _captured_names(index.graph)

    def run(self, rules: Mapping[str, Rule]) -> Trace:
        """Label every tensor in graph order."""
        for tensor in self.index.graph.inputs:
            if tensor.name in self.shapes:
                self.write(tensor, self.classes.fixed(len(self.shapes[tensor.name]), "it is a graph input"))
        for node in self.index.nodes:
            rule = rules.get(node.op) if (node.domain or "") in ONNX_DOMAINS else None
            try:
                if rule is None:
                    raise Declined(f"{node.op} does not commute with a rescaling of channels")
                rule(self, node)
            except Declined as reason:
                self._decline(node, str(reason))
        for tensor in self.index.graph.outputs:
            if tensor.name in self.trace.labels:
                self.classes.pin(self.trace.labels[tensor.name], "it is a graph output")
        for name in self._captured & self.trace.labels.keys():
            self.classes.pin(self.trace.labels[name], "a nested graph reads it")
        return self.trace

    def _decline(self, node: gs.Node, reason: str) -> None:
        if any(t.name in self.shapes for t in (*node.inputs, *node.outputs)):
            self.trace.declined[node.name] = reason
        # A rule may have recorded constants before it gave up.
        self.trace.edits = [edit for edit in self.trace.edits if edit.node is not node]
        self.trace.products = [product for product in self.trace.products if product.node is not node]
        for tensor in node.inputs:
            if tensor.name in self.trace.labels:
                self.classes.pin(self.trace.labels[tensor.name], f"{reason} ({node.op} reads it)")
        for tensor in node.outputs:
            if tensor.name in self.shapes:
                fixed = self.classes.fixed(len(self.shapes[tensor.name]), f"{node.op} writes it")
                self.trace.labels[tensor.name] = fixed

    # ---- tensors ------------------------------------------------------------------------------

    def shape(self, tensor: gs.Tensor) -> tuple[int, ...]:
        """The concrete shape of a tensor or constant."""
        if is_constant(tensor):
            return tuple(int(d) for d in tensor.shape)
        if tensor.name not in self.shapes:
            raise Declined(f"the shape of '{tensor.name}' is unknown")
        return self.shapes[tensor.name]

    def read(self, node: gs.Node, i: int) -> Literals:
        """Labels of input ``i``; a small float constant gets free ones, which it absorbs itself."""
        tensor = node.inputs[i]
        if tensor.name in self.trace.labels:
            return self.trace.labels[tensor.name]
        shape = self.shape(tensor)
        if is_constant(tensor) and is_float32(tensor):
            if int(np.prod(shape)) > _CONSTANT_ELEMENTS:
                raise Declined("it moves a large constant")
            labels = self.classes.fresh(shape)
            self.trace.edits.append(Edit(node=node, index=i, over=labels))
            return labels
        return self.classes.fixed(len(shape), "it is not float32")

    def write(self, tensor: gs.Tensor, labels: Literals) -> None:
        """Set the labels of an output."""
        if not tensor.name:
            return
        shape = self.shape(tensor)
        if labels.ndim != len(shape) or any(
            a not in (1, b) for a, b in zip(labels.shape, shape, strict=True)
        ):
            raise Declined("its output has an unexpected shape")
        self.trace.labels[tensor.name] = labels

    def collapse(self, labels: Literals, axes: Sequence[int]) -> Literals:
        """Join the labels along ``axes``, which become flat."""
        for axis in axes:
            if labels.shape[axis] > 1:
                first = labels.take([0], axis=axis)
                self.classes.join(labels, first)
                labels = first
        return labels

    def channels_only(self, labels: Literals, axis: int) -> Literals:
        """Join along every axis but ``axis``, and give ``axis`` its full size by the caller's broadcast."""
        axis %= labels.ndim
        return self.collapse(labels, [a for a in range(labels.ndim) if a != axis])

    # ---- constants ----------------------------------------------------------------------------

    def constant(self, node: gs.Node, i: int) -> Array:
        """The float32 constant at input ``i``."""
        tensor = node.inputs[i] if i < len(node.inputs) else None
        if tensor is None or not is_constant(tensor) or not is_float32(tensor):
            raise Declined(f"input {i} of {node.op} is not a float32 constant")
        value: Array = tensor.values
        return value

    def integers(self, node: gs.Node, i: int) -> list[int] | None:
        """An integer parameter as a flat list: a constant, or what one forward pass computed. None if absent."""
        if i >= len(node.inputs) or not node.inputs[i].name:
            return None
        tensor = node.inputs[i]
        value = tensor.values if is_constant(tensor) else self._values.get(tensor.name)
        if value is None or not np.issubdtype(np.asarray(value).dtype, np.integer):
            raise Declined(f"input {i} of {node.op} is not a known integer")
        return [int(v) for v in np.asarray(value).reshape(-1)]

    def has_input(self, node: gs.Node, i: int) -> bool:
        """Whether optional input ``i`` is given."""
        return i < len(node.inputs) and bool(node.inputs[i].name)

    def absorb(
        self, node: gs.Node, i: int, *, times: Literals | None = None, over: Literals | None = None
    ) -> None:
        """Record that constant input ``i`` is multiplied by s[times] and divided by s[over]."""
        self.constant(node, i)
        self.trace.edits.append(Edit(node=node, index=i, times=times, over=over))

    def product(self, node: gs.Node, i: int, rows: int | None, times: Literals, over: Literals) -> None:
        """Record a weight together with its edit."""
        if node.op == "Div":
            self.absorb(node, i, times=over, over=times)
        else:
            self.absorb(node, i, times=times, over=over)
        source = node.inputs[1 - i].name
        self.trace.products.append(
            Product(
                node=node,
                index=i,
                source=source,
                target=node.outputs[0].name,
                rows=rows,
                times=times,
                over=over,
            )
        )

    def additive(self, node: gs.Node, i: int, labels: Literals) -> Literals:
        """Labels of ``labels + constant`` where the constant at ``i`` is rescaled like what it is added to.

        Along axes that the constant repeats, the labels are joined. A single number other than 0 and
        infinity would have to become a vector; the labels are pinned instead.
        """
        value = self.constant(node, i)
        if value.size == 1:
            if not np.all((value == 0) | np.isinf(value)):
                self.classes.pin(labels, f"{node.op} adds or compares a single number")
            return layouts.align(labels, max(labels.ndim, value.ndim))
        rank = max(labels.ndim, value.ndim)
        labels = layouts.align(labels, rank)
        shape = (1,) * (rank - value.ndim) + value.shape
        labels = self.collapse(labels, [a for a in range(rank) if shape[a] == 1])
        self.absorb(node, i, over=labels.reshape(labels.shape[rank - value.ndim :]))
        return labels


def _captured_names(graph: gs.Graph) -> set[str]:
    """Names of tensors that nested graphs read."""
    names: set[str] = set()
    for node in graph.nodes:
        for attribute in node.attrs.values():
            if isinstance(attribute, gs.Graph):
                names |= {t.name for inner in attribute.nodes for t in inner.inputs if t.name}
                names |= {t.name for t in attribute.outputs}
                names |= _captured_names(attribute)
    return names
