"""Who produces and who consumes each tensor of a graph.

The index is a snapshot: build a new one after an edit.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxptq.types import Array


@dataclass(frozen=True, slots=True)
class Use:
    """One read of a tensor: input ``index`` of ``node``."""

    node: gs.Node
    index: int


class GraphIndex:
    """Producers, consumers and constants of ``graph``, by tensor name.

    Nodes must have unique, non-empty names (``graph.load`` gives them).
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.nodes: Sequence[gs.Node] = tuple(graph.nodes)
        self.by_name: Mapping[str, gs.Node] = {node.name: node for node in self.nodes}
        producers: dict[str, gs.Node] = {}
        uses: dict[str, list[Use]] = {}
        for node in self.nodes:
            for tensor in node.outputs:
                if tensor.name:
                    producers[tensor.name] = node
            for i, tensor in enumerate(node.inputs):
                if tensor.name:
                    uses.setdefault(tensor.name, []).append(Use(node, i))
        self._producers = producers
        self._uses = uses
        self.graph_inputs: Sequence[str] = tuple(t.name for t in graph.inputs)
        self.input_names = frozenset(self.graph_inputs)
        self.output_names = frozenset(t.name for t in graph.outputs)

    def producer(self, tensor: str) -> gs.Node | None:
        """The node that writes ``tensor``; None for graph inputs and initializers."""
        return self._producers.get(tensor)

    def uses(self, tensor: str) -> Sequence[Use]:
        """Every read of ``tensor`` by a node, in graph order. Graph outputs are not uses."""
        return self._uses.get(tensor, ())

    def is_only_read_by(self, tensor: str, node: gs.Node) -> bool:
        """Whether ``node`` is the single reader of ``tensor`` and the caller does not see it."""
        return (
            tensor not in self.output_names
            and bool(self.uses(tensor))
            and all(use.node is node for use in self.uses(tensor))
        )

    def sole_user(self, tensor: str) -> gs.Node | None:
        """The one node that reads ``tensor`` once, if there is exactly one and it is no graph output."""
        uses = self.uses(tensor)
        return uses[0].node if len(uses) == 1 and tensor not in self.output_names else None


def probability_outputs(graph: gs.Graph) -> frozenset[str]:
    """Graph outputs written by a Softmax: they are p itself, not logits."""
    return frozenset(t.name for t in graph.outputs if t.inputs and t.inputs[0].op == "Softmax")


_RESHAPING = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


def softmax_outputs(graph: gs.Graph) -> frozenset[str]:
    """Graph outputs that hold what a Softmax writes, along whatever axis, in whatever shape."""
    found = set()
    for output in graph.outputs:
        tensor = output
        while tensor.inputs and tensor.inputs[0].op in _RESHAPING and tensor.inputs[0].inputs:
            tensor = tensor.inputs[0].inputs[0]
        if tensor.inputs and tensor.inputs[0].op == "Softmax":
            found.add(output.name)
    return frozenset(found)


def is_constant(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is an initializer."""
    return isinstance(tensor, gs.Constant)


LARGE_WEIGHT = 4096
"""Elements from which on copies of a constant show in the size of the file."""


READ_AGAIN = "its weight is read elsewhere as well"
"""Why channels stay that only a copy of a shared weight could follow."""


def is_large_weight(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is a constant of which copies would show."""
    return is_constant(tensor) and math.prod(tensor.shape) >= LARGE_WEIGHT


def is_shared_weight(index: GraphIndex, tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is a large constant of several readers, which must not get one for each of them."""
    return is_large_weight(tensor) and len(index.uses(tensor.name)) > 1


def is_float32(tensor: gs.Tensor) -> bool:
    """Whether ``tensor`` is known to hold single-precision floats."""
    dtype = tensor.dtype
    if isinstance(dtype, int):  # graphsurgeon keeps the ONNX enumeration of types that numpy does not know
        return bool(dtype == onnx.TensorProto.FLOAT)
    return dtype is not None and np.dtype(dtype) == np.float32


def constant_value(tensor: gs.Tensor) -> Array | None:
    """The value of an initializer, or None for any other tensor."""
    if not isinstance(tensor, gs.Constant):
        return None
    value: Array = tensor.values
    return value


def read_tensors(node: gs.Node) -> Iterator[gs.Tensor]:
    """The inputs of ``node`` that exist, and what its subgraphs read from outside."""
    yield from (t for t in node.inputs if t.name)
    for attribute in node.attrs.values():
        if isinstance(attribute, gs.Graph):
            own = {t.name for inner in attribute.nodes for t in inner.outputs} | {
                t.name for t in attribute.inputs
            }
            captured = [t for inner in attribute.nodes for t in read_tensors(inner)]
            yield from (t for t in (*captured, *attribute.outputs) if t.name not in own)


SHAPE_READERS = frozenset({"Shape", "Size"})
"""What they compute does not depend on the values that they read."""


def computed_from(nodes: Iterable[gs.Node], names: Collection[str]) -> set[str]:
    """Tensors whose values depend on what the nodes of these ``names`` compute, of nodes in graph order."""
    computed: set[str] = set()
    for node in nodes:
        is_changed = node.op not in SHAPE_READERS and any(t.name in computed for t in read_tensors(node))
        if node.name in names or is_changed:
            computed.update(t.name for t in node.outputs if t.name)
    return computed


def outputs_behind(index: GraphIndex, names: Collection[str]) -> frozenset[str]:
    """The graph outputs whose values depend on what the nodes of these ``names`` compute."""
    return index.output_names & computed_from(index.nodes, names)
