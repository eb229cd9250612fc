"""Operators between two integer kernels of onnxruntime's CPU provider, where they run on integers as well.

A convolution writes 8-bit values and the next one reads such values. An operator in between has an integer kernel
too if all that it reads and what it writes is quantized; in float it costs a DequantizeLinear per input, a
QuantizeLinear behind it and four times the bytes. Such operators come in chains (x sigmoid(x), a Concat of sums,
sums along a skip connection). Those that are quantized are the largest set in which every member

1. reads nothing but what is on 8 bits anyway: what integer kernels write or read, convolutions or other members, and
   what operators move of it;
2. is read by an integer kernel or another member, be it behind operators that move values.

Members that only float operators read would be rounded for nothing.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_graphsurgeon as gs

from onnxptq.graph.index import is_constant, is_float32
from onnxptq.targets.placement import FUSED_ACTIVATIONS, Placer, moves_values

INTEGER_OPS = frozenset({"Add", "AveragePool", "Concat", "GlobalAveragePool", "LeakyRelu", "Mul", "Sigmoid"})
"""Operators with a kernel for 8-bit values that onnxruntime takes for DequantizeLinear, operator, QuantizeLinear."""


def place_chains(placer: Placer, kernels: Collection[str]) -> None:
    """Quantize what the members read and write.

    Args:
        kernels: operators whose quantized nodes read and write integers.
    """
    members = _members(placer, kernels)
    for node in placer.index.nodes:
        if node.name in members:
            for i, tensor in enumerate(node.inputs):
                placer.add_edge(node, i)
                source = placer.index.producer(tensor.name)
                if source is not None and moves_values(source):
                    # Another pool behind a pool that is read here, say, must not keep the first in float.
                    placer.quantize_tensor(tensor.name)
            placer.quantize_tensor(placer.behind_activation(node))
            placer.quantized_nodes.add(node.name)


def _members(placer: Placer, kernels: Collection[str]) -> Collection[str]:
    members = {node.name for node in placer.index.nodes if _may_run_on_integers(placer, node)}
    while True:
        chain = _Chain(placer, kernels, members)
        left = {name for name in members if chain.holds(placer.index.by_name[name])}
        if left == members:
            return members
        members = left


def _may_run_on_integers(placer: Placer, node: gs.Node) -> bool:
    if node.op not in INTEGER_OPS or node.domain not in ("", None) or node.name in placer.request.declined:
        return False
    tensors = [*node.inputs, *node.outputs]
    return not any(
        is_constant(tensor) or not is_float32(tensor) or tensor.name in placer.request.uncalibrated
        for tensor in tensors
    )


class _Chain:
    """What runs on integers if all of ``members`` do."""

    def __init__(self, placer: Placer, kernels: Collection[str], members: Collection[str]) -> None:
        self._placer = placer
        self._kernels = kernels
        self._members = members
        self._there: dict[str, bool] = {}
        self._wanted: dict[str, bool] = {}

    def holds(self, node: gs.Node) -> bool:
        """Whether ``node`` reads integers only, and some integer kernel reads what it writes."""
        return all(self._is_there(tensor.name) for tensor in node.inputs) and self._is_wanted(
            self._placer.behind_activation(node)
        )

    def _is_there(self, tensor: str) -> bool:
        """Whether ``tensor`` is on 8 bits whatever reads it."""
        if tensor not in self._there:
            is_read = any(self._is_kernel_read(tensor, use.node) for use in self._placer.index.uses(tensor))
            self._there[tensor] = is_read or self._is_written(tensor)
        return self._there[tensor]

    def _is_written(self, tensor: str) -> bool:
        """Whether an integer kernel writes ``tensor``, or what is moved to it."""
        node = self._placer.index.producer(tensor)
        if node is None:
            return False
        if moves_values(node):
            return not is_constant(node.inputs[0]) and self._is_there(node.inputs[0].name)
        if node.op in FUSED_ACTIVATIONS:
            node = self._placer.index.producer(node.inputs[0].name)
        if node is None or self._placer.behind_activation(node) != tensor:
            return False
        return node.name in self._members or (self._is_kernel(node) and self._placer.has_quantizer(tensor))

    def _is_wanted(self, tensor: str) -> bool:
        """Whether an integer kernel reads ``tensor``, or values of it that are moved."""
        if tensor not in self._wanted:
            self._wanted[tensor] = any(
                self._reads(tensor, use.node) for use in self._placer.index.uses(tensor)
            )
        return self._wanted[tensor]

    def _reads(self, tensor: str, node: gs.Node) -> bool:
        if moves_values(node):
            return any(self._is_wanted(output.name) for output in node.outputs)
        return self._is_kernel_read(tensor, node) or node.name in self._members

    def _is_kernel_read(self, tensor: str, node: gs.Node) -> bool:
        return self._is_kernel(node) and self._placer.is_quantized_edge(tensor, node)

    def _is_kernel(self, node: gs.Node) -> bool:
        return node.op in self._kernels and node.name in self._placer.quantized_nodes
