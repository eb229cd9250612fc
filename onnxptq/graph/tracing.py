"""Following channels through a graph: labels of every float tensor, moved and joined operator by operator.

A rule per operator says how the labels of its outputs follow from those of its inputs. What no rule covers
pins what it reads and writes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.classes import Classes, Literals
from onnxptq.graph.index import GraphIndex, is_constant, is_float32
from onnxptq.graph.proto import ONNX_DOMAINS
from onnxptq.types import Array

_CONSTANT_ELEMENTS = 1 << 16


class Declined(Exception):  # noqa: N818 - a decision, not an error
    """A rule's reason to leave a node as it is."""


Shapes = Mapping[str, tuple[int, ...]]


class ChannelTracer:
    """What rules work with.

    Args:
        index: the graph.
        shapes: concrete shapes of float tensors in one forward pass.
        values: concrete values of the integer tensors that movement operators read as parameters.
        change: what the channels undergo, for the reasons of what is pinned.
    """

    def __init__(
        self, index: GraphIndex, shapes: Shapes, values: Mapping[str, Array], *, change: str
    ) -> None:
        self.index = index
        self.shapes = shapes
        self.classes = Classes()
        self.labels: dict[str, Literals] = {}
        self.declined: dict[str, str] = {}
        self._values = values
        self._change = change

    def follow(self, rules: Mapping[str, Callable[[Any, gs.Node], None]]) -> None:
        """Label every tensor in graph order."""
        for tensor in self.index.graph.inputs:
            if tensor.name in self.shapes:
                self.write(tensor, self.classes.fixed(len(self.shapes[tensor.name]), "it is a graph input"))
        for node in self.index.nodes:
            rule = rules.get(node.op) if (node.domain or "") in ONNX_DOMAINS else None
            try:
                if rule is None:
                    raise Declined(f"{node.op} does not commute with a {self._change} of channels")
                rule(self, node)
            except Declined as reason:
                self._decline(node, str(reason))
        for tensor in self.index.graph.outputs:
            if tensor.name in self.labels:
                self.classes.pin(self.labels[tensor.name], "it is a graph output")
        for name in _captured_names(self.index.graph) & self.labels.keys():
            self.classes.pin(self.labels[name], "a nested graph reads it")

    def _decline(self, node: gs.Node, reason: str) -> None:
        if any(t.name in self.shapes for t in (*node.inputs, *node.outputs)):
            self.declined[node.name] = reason
        self.forget(node)
        for tensor in node.inputs:
            if tensor.name in self.labels:
                self.classes.pin(self.labels[tensor.name], f"{reason} ({node.op} reads it)")
        for tensor in node.outputs:
            if tensor.name in self.shapes:
                fixed = self.classes.fixed(len(self.shapes[tensor.name]), f"{node.op} writes it")
                self.labels[tensor.name] = fixed

    def forget(self, node: gs.Node) -> None:
        """Drop what a rule recorded about ``node`` before it gave up."""

    def took_constant(self, node: gs.Node, i: int, labels: Literals) -> None:
        """Constant input ``i`` of ``node`` was given free ``labels``."""

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
        if tensor.name in self.labels:
            return self.labels[tensor.name]
        shape = self.shape(tensor)
        if is_constant(tensor) and is_float32(tensor):
            if int(np.prod(shape)) > _CONSTANT_ELEMENTS:
                raise Declined("it moves a large constant")
            labels = self.classes.fresh(shape)
            self.took_constant(node, i, labels)
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
        self.labels[tensor.name] = labels

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
