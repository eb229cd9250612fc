"""TensorRT with explicit quantization: symmetric INT8, zero points 0, float biases.

| operator | activations | weight | bias | output |
|---|---|---|---|---|
| Conv | input 0 | per output channel, axis 0 | float | float: fuses with Relu/Clip and a residual Add |
| ConvTranspose | input 0 | per output channel, axis 1 | float | float |
| Gemm | input 0 | per output channel | float | float |
| MatMul | both inputs, or the one that is not constant | per output channel | float | float |
| Add behind a Conv or linear layer | the skip input | | | float |
| MaxPool, AveragePool, GlobalAveragePool | input 0 | | | float |
| Concat of quantized tensors | all inputs, one shared scale | | | float |

Left in float because integer kernels do not pay: convolutions with fewer than 16 input or output
channels per group product (the first layer's 3 input channels excepted, which TensorRT pads), and
products in which one side is a single row or column.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from onnxptq.graph.index import GraphIndex, is_constant
from onnxptq.targets.placement import (
    FUSED_ACTIVATIONS,
    MOVEMENT_OPS,
    PlacementRequest,
    Placer,
    Row,
    channel_axis_of_gemm,
    channel_axis_of_matmul,
    tie_movements,
)
from onnxptq.types import QType, QuantPlan

NAME = "tensorrt"


def _constant_weight(node: gs.Node, index: GraphIndex) -> str | None:
    return None if is_constant(node.inputs[1]) else "its weight is not constant"


def _is_vector_product(node: gs.Node, index: GraphIndex) -> str | None:
    left, right = node.inputs[0].shape, node.inputs[1].shape
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    if not is_constant(node.inputs[1]) and (left[-2] == 1 or right[-1] == 1):
        return "one side of the product is a single vector, which is faster in floating point"
    return None


TABLE: Mapping[str, Row] = {
    "Conv": Row(activations=(0,), weight=1, weight_axis=lambda node: 0, decline=_constant_weight),
    "ConvTranspose": Row(activations=(0,), weight=1, weight_axis=lambda node: 1, decline=_constant_weight),
    "Gemm": Row(activations=(0,), weight=1, weight_axis=channel_axis_of_gemm),
    "MatMul": Row(activations=(0,), weight=1, weight_axis=channel_axis_of_matmul, decline=_is_vector_product),
}
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool")
_PRODUCTS = tuple(TABLE)


def place(index: GraphIndex, request: PlacementRequest) -> QuantPlan:
    """Quantizers where TensorRT's INT8 kernels fuse them. Activation grids are int8; weights may be narrower."""
    placer = Placer(index, request, activation=lambda bits: QType.signed(8), symmetric=True)
    placer.apply(TABLE)
    _place_residual_sums(placer)
    _place_pools(placer)
    groups = tie_movements(placer)
    return placer.finish(NAME, {**groups, **_place_concats(placer, groups)})


def _place_residual_sums(placer: Placer) -> None:
    """Quantize the skip input of a sum, so that the product on the other input fuses the sum into its kernel."""
    for node in placer.index.nodes:
        if (
            node.op != "Add"
            or any(is_constant(t) for t in node.inputs)
            or node.name in placer.request.declined
        ):
            continue
        products = [i for i in (0, 1) if _is_product_output(placer, node.inputs[i].name, node)]
        if not products:
            continue
        # With a product on both sides the later one fuses; the other is then the skip input.
        skip = 1 - products[-1]
        if node.inputs[skip].name not in placer.request.uncalibrated:
            placer.add_edge(node, skip)
            placer.quantized_nodes.add(node.name)


def _is_product_output(placer: Placer, tensor: str, reader: gs.Node) -> bool:
    """Whether ``tensor`` is a quantized product (with its bias Add) that only ``reader`` reads."""
    producer = placer.index.producer(tensor)
    if producer is None or placer.index.sole_user(tensor) is not reader:
        return False
    if producer.op == "Add" and sum(is_constant(t) for t in producer.inputs) == 1:
        bias = next(i for i, t in enumerate(producer.inputs) if is_constant(t))
        return _is_product_output(placer, producer.inputs[1 - bias].name, producer)
    return producer.op in _PRODUCTS and producer.name in placer.quantized_nodes


def _place_pools(placer: Placer) -> None:
    """Pools between quantized products run on INT8: their input is quantized like any other reader's."""
    for node in placer.index.nodes:
        if node.op not in _POOLS or node.name in placer.request.declined:
            continue
        source = node.inputs[0].name
        if source not in placer.request.uncalibrated and _feeds_product(placer, node.outputs[0].name):
            placer.add_edge(node, 0)
            placer.quantized_nodes.add(node.name)


def _feeds_product(placer: Placer, tensor: str) -> bool:
    for use in placer.index.uses(tensor):
        if placer.is_quantized_edge(tensor, use.node):
            return True
        if use.node.op in MOVEMENT_OPS and any(_feeds_product(placer, t.name) for t in use.node.outputs):
            return True
    return False


def _place_concats(placer: Placer, groups: Mapping[str, str]) -> dict[str, str]:
    """One scale for all inputs of a Concat whose output is quantized, and for that output."""
    shared: dict[str, str] = {}
    for node in placer.index.nodes:
        output = node.outputs[0].name
        if node.op != "Concat" or not placer.has_quantizer(output) or node.name in placer.request.declined:
            continue
        names = [t.name for t in node.inputs]
        if any(is_constant(t) for t in node.inputs) or any(n in placer.request.uncalibrated for n in names):
            continue
        for i in range(len(node.inputs)):
            placer.add_edge(node, i)
        placer.quantized_nodes.add(node.name)
        members = {groups.get(n, n) for n in (*names, output)}
        members |= {shared.get(m, m) for m in members}
        for name in (*names, output):
            shared[name] = min(members)
    return shared


__all__ = ["FUSED_ACTIVATIONS", "NAME", "TABLE", "place"]
