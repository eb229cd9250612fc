"""Reading the QuantizeLinear/DequantizeLinear pairs of a file, by structure alone.

::

    source -> [Clip ->] QuantizeLinear -> DequantizeLinear -> output      (an activation)
    integers ------------------------->  DequantizeLinear -> output      (a weight or a bias)

Names play no part, so files of other tools read the same way.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper

from onnxptq.graph import proto
from onnxptq.types import Array, FloatArray, Granularity, PerAxis, PerGroup, PerTensor

QUANTIZE = "QuantizeLinear"
DEQUANTIZE = "DequantizeLinear"
_QDQ_DOMAINS = (*proto.ONNX_DOMAINS, "com.microsoft")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Parameters:
    """Scale, zero point (int32, zeros where the node has none), integer type and granularity of one node."""

    scale: FloatArray
    zero_point: Array
    storage: str
    granularity: Granularity


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """A DequantizeLinear with what feeds it.

    ``source`` is the float tensor that QuantizeLinear (or the Clip before it) reads, None for a constant;
    ``integers`` names the initializer of a constant, None for an activation. ``clip`` holds the bounds of
    the Clip.
    ``nodes`` and ``initializers`` are the names of all that belongs to the pair.
    """

    output: str
    source: str | None
    integers: str | None
    quantize: Parameters | None
    dequantize: Parameters
    clip: tuple[Array, Array] | None
    nodes: tuple[str, ...]
    initializers: tuple[str, ...]


class WrittenModel:
    """The protobuf of a model file, indexed; weights in external data stay on disk.

    Attributes:
        nodes: the nodes of the main graph, by name.
        producers: the node that writes each tensor.
        initializers: the initializers of the main graph, by name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model = onnx.load(str(path), load_external_data=False)
        self.graph = self.model.graph
        self.nodes: Mapping[str, onnx.NodeProto] = {node.name: node for node in self.graph.node}
        self.producers: Mapping[str, onnx.NodeProto] = {t: n for n in self.graph.node for t in n.output if t}
        self.initializers: Mapping[str, onnx.TensorProto] = {t.name: t for t in self.graph.initializer}

    def value(self, name: str) -> Array:
        """The elements of an initializer; 2- and 4-bit integers come as int8 or uint8."""
        tensor = self.initializers[name]
        bits = proto.bits_per_element(tensor.data_type)
        if proto.is_external(tensor) and bits is not None and bits >= 8:
            return proto.map_external(tensor, self.path.parent)
        value: Array = onnx.numpy_helper.to_array(tensor, str(self.path.parent))
        if bits is not None and bits < 8 and "INT" in (kind := _kind(tensor.data_type)).upper():
            return value.astype(np.uint8 if kind.startswith("u") else np.int8)
        return value

    def pairs(self, float_names: Container[str]) -> Mapping[str, Pair]:
        """Every DequantizeLinear of the main graph whose parameters are constant, by the tensor it writes.

        ``float_names`` are the node and tensor names of the float model: a Clip among them (a ReLU6) is the
        model's own and no part of a quantizer.
        """
        found = (self._pair(node, float_names) for node in self.graph.node if is_op(node, DEQUANTIZE))
        return {pair.output: pair for pair in found if pair is not None}

    def _pair(self, node: onnx.NodeProto, float_names: Container[str]) -> Pair | None:
        dequantize = self._parameters(node)
        if dequantize is None:
            return None
        nodes, initializers = [node.name], [*node.input[1:]]
        source, integers, quantize, clip = None, None, None, None
        if node.input[0] in self.initializers:
            integers = node.input[0]
            initializers.append(integers)
        else:
            quantizer = self.producers.get(node.input[0])
            if quantizer is None or not is_op(quantizer, QUANTIZE):
                return None
            quantize = self._parameters(quantizer)
            if quantize is None:
                return None
            source = quantizer.input[0]
            nodes.append(quantizer.name)
            initializers += quantizer.input[1:]
            clipper = self.producers.get(source)
            bounds = self._clip_bounds(clipper)
            is_own = clipper is None or clipper.name in float_names or source in float_names
            if clipper is not None and bounds is not None and not is_own:
                clip = bounds
                source = clipper.input[0]
                nodes.append(clipper.name)
                initializers += clipper.input[1:]
        return Pair(
            output=node.output[0],
            source=source,
            integers=integers,
            quantize=quantize,
            dequantize=dequantize,
            clip=clip,
            nodes=tuple(nodes),
            initializers=tuple(name for name in initializers if name),
        )

    def _parameters(self, node: onnx.NodeProto) -> Parameters | None:
        if len(node.input) < 2 or node.input[1] not in self.initializers:
            return None
        scale = self.value(node.input[1])
        zero_name = node.input[2] if len(node.input) > 2 else ""
        if zero_name and zero_name not in self.initializers:
            return None
        zero_point = self.value(zero_name).astype(np.int32) if zero_name else np.zeros(scale.shape, np.int32)
        return Parameters(
            scale=scale,
            zero_point=zero_point,
            storage=self._storage(node, zero_name),
            granularity=_granularity(node, scale),
        )

    def _storage(self, node: onnx.NodeProto, zero_name: str) -> str:
        if zero_name:
            return _kind(self.initializers[zero_name].data_type)
        if node.input[0] in self.initializers and node.op_type == DEQUANTIZE:
            return _kind(self.initializers[node.input[0]].data_type)
        if node.op_type == DEQUANTIZE and (producer := self.producers.get(node.input[0])) is not None:
            return self._storage(producer, producer.input[2] if len(producer.input) > 2 else "")
        return _kind(proto.attribute_value(node, "output_dtype", 0) or onnx.TensorProto.UINT8)

    def _clip_bounds(self, node: onnx.NodeProto | None) -> tuple[Array, Array] | None:
        if node is None or node.op_type != "Clip" or len(node.input) != 3:
            return None
        low, high = node.input[1:]
        if low not in self.initializers or high not in self.initializers:
            return None
        return self.value(low), self.value(high)


def is_op(node: onnx.NodeProto, op: str) -> bool:
    """Whether ``node`` is QuantizeLinear or DequantizeLinear (``op``), of ONNX or of onnxruntime's domain."""
    return node.op_type == op and node.domain in _QDQ_DOMAINS


def _kind(data_type: int) -> str:
    name: str = onnx.TensorProto.DataType.Name(data_type)
    return name.lower()


def _granularity(node: onnx.NodeProto, scale: Array) -> Granularity:
    axis = int(proto.attribute_value(node, "axis", 1))
    group_size = int(proto.attribute_value(node, "block_size", 0))
    if group_size:
        return PerGroup(axis, group_size)
    return PerAxis(axis) if scale.ndim == 1 else PerTensor()
