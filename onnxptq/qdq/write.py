"""From a plan and its solution to a graph with QuantizeLinear/DequantizeLinear pairs.

An activation quantizer becomes ``[Clip ->] QuantizeLinear -> DequantizeLinear`` and the readers named in
its sites read the result; all others keep reading the float tensor. QuantizeLinear saturates at the limits
of its storage type only, so a grid narrower than its storage needs the Clip, whose bounds are the grid's
ends: values inside them round to the grid's integers exactly as without it.

A weight becomes its integers and a DequantizeLinear. A bias becomes int32 integers with the scale
``scale(x) scale(w)`` that integer kernels accumulate in.

A branch (:mod:`onnxptq.graph.branches`) reads what its layer reads and is added to what the layer writes, in front of
any bias that is added behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxptq.graph.branches import OUTPUT, SUM, UP, branch_nodes
from onnxptq.graph.surgeon import free_name
from onnxptq.qdq import names
from onnxptq.quantizers.affine import quantize, range_of
from onnxptq.types import (
    GRAPH_OUTPUT,
    Array,
    Branch,
    PerAxis,
    PerGroup,
    PerTensor,
    QParams,
    Quantizer,
    QuantPlan,
    Solution,
)

_OUTPUT_TYPES_SINCE = 21
"""The opset from which QuantizeLinear may name its output's type."""

_NARROW = {"int4": onnx.TensorProto.INT4, "uint4": onnx.TensorProto.UINT4}


def insert_quantizers(graph: gs.Graph, plan: QuantPlan, solution: Solution) -> gs.Graph:
    """A copy of ``graph`` that carries every quantizer of ``plan`` with the parameters of ``solution``.

    Weights named in ``solution.weights`` replace the float ones, quantized or not. Sub-graphs of If and Loop
    keep reading the float tensor. A name that the model has taken already gets a number behind it.
    """
    result, _ = _inserted(graph, plan, solution, names_zeros=False)
    return result


def insert_adjustable(
    graph: gs.Graph, plan: QuantPlan, solution: Solution
) -> tuple[gs.Graph, Callable[[Mapping[str, QParams]], dict[str, Array]]]:
    """As :func:`insert_quantizers`, with the parameters of every activation as inputs of the graph.

    Returns:
        The graph, and what to feed for parameters given by quantizer id; of the types and shapes of
        ``solution``'s.

    Raises:
        ValueError: an activation is stored in a type that numpy lacks.
    """
    result, writers = _inserted(graph, plan, solution, names_zeros=True)
    activations = [w for w in writers if w.quantizer.role == "activation"]
    if any(w.qparams.qtype.storage in _NARROW for w in activations):
        raise ValueError("4-bit storage cannot be fed")
    for writer in activations:
        for tensor, value in writer.feed(writer.qparams).values():
            fed = gs.Variable(tensor.name, dtype=value.dtype, shape=value.shape)
            for reader in list(tensor.outputs):
                for i, read in enumerate(reader.inputs):
                    if read is tensor:
                        reader.inputs[i] = fed
            result.inputs.append(fed)

    def feeds(qparams: Mapping[str, QParams]) -> dict[str, Array]:
        return {
            name: value
            for writer in activations
            for name, (_, value) in writer.feed(qparams[writer.quantizer.quantizer_id]).items()
        }

    return result, feeds


def _inserted(
    graph: gs.Graph, plan: QuantPlan, solution: Solution, *, names_zeros: bool
) -> tuple[gs.Graph, list[_Writer]]:
    result = graph.copy()
    taken = {node.name for node in result.nodes} | set(result.tensors())
    nodes = {node.name: node for node in result.nodes}
    tensors = result.tensors()
    for name, value in solution.weights.items():
        tensors[name].values = np.asarray(value, np.float32)
    writers = []
    for quantizer in plan.quantizers:
        qparams = solution.qparams[quantizer.quantizer_id]
        writer = _Writer(result, tensors, nodes, taken, quantizer, qparams)
        writers.append(writer)
        if quantizer.role == "activation":
            writer.activation(names_zero=names_zeros)
        else:
            writer.constant(tensors[quantizer.tensor].values)
    for node in list(result.nodes):
        if node.name in solution.branches:
            _add_branch(result, node, solution.branches[node.name], taken)
    result.cleanup(remove_unused_node_outputs=False, recurse_subgraphs=False).toposort()
    return result, writers


def _add_branch(graph: gs.Graph, node: gs.Node, branch: Branch, taken: set[str]) -> None:
    def name(role: str) -> str:
        return free_name(node.name + role, taken)

    target = node.outputs[0]
    product = gs.Variable(name(names.BRANCH_PRODUCT), dtype=np.float32, shape=target.shape)
    node.outputs[0] = product
    made = gs.Variable(name(UP + OUTPUT), dtype=np.float32, shape=target.shape)
    graph.nodes += branch_nodes(node, branch, node.inputs[0], made, name)
    graph.nodes.append(gs.Node("Add", name(SUM), inputs=[product, made], outputs=[target]))


class _Writer:
    """Adds one quantizer."""

    def __init__(
        self,
        graph: gs.Graph,
        tensors: dict[str, gs.Tensor],
        nodes: Mapping[str, gs.Node],
        taken: set[str],
        quantizer: Quantizer,
        qparams: QParams,
    ) -> None:
        self.graph = graph
        self.tensors = tensors
        self.nodes = nodes
        self.taken = taken
        self.quantizer = quantizer
        self.qparams = qparams
        self.tensor = tensors[quantizer.tensor]
        self.prefix = quantizer.quantizer_id
        self.constants: dict[str, gs.Constant] = {}

    def feed(self, qparams: QParams) -> dict[str, tuple[gs.Tensor, Array]]:
        """By name, the constants that hold the parameters of an activation, and their values for ``qparams``."""
        low, high = range_of(qparams)
        values = {
            names.SCALE: np.asarray(qparams.scale, np.float32),
            names.ZERO_POINT: np.asarray(qparams.zero_point).astype(qparams.qtype.storage),
            names.CLIP_LOW: low,
            names.CLIP_HIGH: high,
        }
        return {tensor.name: (tensor, values[role]) for role, tensor in self.constants.items()}

    def activation(self, *, names_zero: bool) -> None:
        """Insert [Clip,] QuantizeLinear and DequantizeLinear, and re-point the readers.

        Without ``names_zero``, a DequantizeLinear of int8 names no zero point of 0, which is what it takes without a
        name: where both nodes name one, onnxruntime turns the pair into uint8, and from opset 21 on it cannot open
        the model if it has copied the pair across a Reshape by then.
        """
        is_output = any(site.consumer == GRAPH_OUTPUT for site in self.quantizer.sites)
        source = self.tensor
        if is_output:
            source = self._split_graph_output()
        clipped = self._clip(source) if self.qparams.qtype.is_narrow else source
        scale, zero_point = self._parameters()
        quantized = gs.Variable(
            self._name(names.QUANTIZE_OUTPUT), dtype=np.dtype(self.qparams.qtype.storage), shape=source.shape
        )
        self._add("QuantizeLinear", names.QUANTIZE_NODE, [clipped, scale, zero_point], quantized)
        target = (
            self.tensor
            if is_output
            else gs.Variable(self._name(names.DEQUANTIZE_OUTPUT), dtype=np.float32, shape=source.shape)
        )
        is_plain = self.qparams.qtype.storage == "int8" and not np.any(self.qparams.zero_point)
        is_silent = is_plain and not names_zero and self.graph.opset >= _OUTPUT_TYPES_SINCE
        parameters = [scale] if is_silent else [scale, zero_point]
        self._add("DequantizeLinear", names.DEQUANTIZE_NODE, [quantized, *parameters], target)
        self._repoint(target)

    def constant(self, value: Array) -> None:
        """Insert the integers of a weight or bias and a DequantizeLinear, and re-point the readers."""
        scale, zero_point = self._parameters()
        integers = quantize(np.asarray(value, np.float32), self.qparams)
        stored = _constant(self._name(names.QUANTIZED), integers, self.qparams.qtype.storage)
        output = gs.Variable(self._name(names.DEQUANTIZE_OUTPUT), dtype=np.float32, shape=list(value.shape))
        self._add("DequantizeLinear", names.DEQUANTIZE_NODE, [stored, scale, zero_point], output)
        self._repoint(output)

    def _split_graph_output(self) -> gs.Tensor:
        """Give the producer a new output name, so that the graph's output can come from the DequantizeLinear."""
        inner = gs.Variable(
            self._name(names.QUANTIZE_INPUT), dtype=self.tensor.dtype, shape=self.tensor.shape
        )
        (producer,) = self.tensor.inputs
        producer.outputs[[t is self.tensor for t in producer.outputs].index(True)] = inner
        for reader in list(self.tensor.outputs):
            for i, tensor in enumerate(reader.inputs):
                if tensor is self.tensor:
                    reader.inputs[i] = inner
        # Another quantizer of this tensor must not read what this one writes.
        self.tensors[self.quantizer.tensor] = inner
        return inner

    def _clip(self, source: gs.Tensor) -> gs.Tensor:
        low, high = range_of(self.qparams)
        output = gs.Variable(self._name(names.CLIP_OUTPUT), dtype=np.float32, shape=source.shape)
        bounds = [
            gs.Constant(self._name(names.CLIP_LOW), low),
            gs.Constant(self._name(names.CLIP_HIGH), high),
        ]
        self.constants |= zip((names.CLIP_LOW, names.CLIP_HIGH), bounds, strict=True)
        self._add("Clip", names.CLIP_NODE, [source, *bounds], output, axis=False)
        return output

    def _parameters(self) -> tuple[gs.Tensor, gs.Tensor]:
        storage = self.qparams.qtype.storage
        scale = gs.Constant(self._name(names.SCALE), np.asarray(self.qparams.scale, np.float32))
        zero_point = _constant(self._name(names.ZERO_POINT), self.qparams.zero_point, storage)
        self.constants |= {names.SCALE: scale, names.ZERO_POINT: zero_point}
        return scale, zero_point

    def _add(
        self, op: str, suffix: str, inputs: list[gs.Tensor], output: gs.Tensor, *, axis: bool = True
    ) -> None:
        attrs = _axis_attributes(self.qparams) if axis else {}
        self.graph.nodes.append(gs.Node(op, self._name(suffix), attrs=attrs, inputs=inputs, outputs=[output]))

    def _repoint(self, target: gs.Tensor) -> None:
        for site in self.quantizer.sites:
            if site.consumer != GRAPH_OUTPUT:
                self.nodes[site.consumer].inputs[site.input_index] = target

    def _name(self, suffix: str) -> str:
        return free_name(self.prefix + suffix, self.taken)


def _axis_attributes(qparams: QParams) -> dict[str, int]:
    match qparams.granularity:
        case PerTensor():
            return {}
        case PerAxis(axis):
            return {"axis": axis}
        case PerGroup(axis, group_size):
            return {"axis": axis, "block_size": group_size}


def _constant(name: str, values: Array, storage: str) -> gs.Constant:
    if storage not in _NARROW:
        return gs.Constant(name, np.asarray(values).astype(storage))
    # Raw bytes, two values in each: the other field of a tensor takes up to ten bytes for a negative pair.
    nibbles = np.asarray(values).astype(np.int8).reshape(-1).view(np.uint8) & 0xF
    low, high = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8)).reshape(-1, 2).T
    packed = (low | high << 4).tobytes()
    stored = onnx.helper.make_tensor(name, _NARROW[storage], list(values.shape), packed, raw=True)
    return gs.Constant(name, LazyValues(stored))
