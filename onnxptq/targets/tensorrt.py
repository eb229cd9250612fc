"""TensorRT with explicit quantization: symmetric INT8, zero points 0, float biases.

| operator | activations | weight | bias | output |
|---|---|---|---|---|
| Conv | input 0 | per output channel, axis 0 | float | float: fuses with Relu/Clip and a residual Add |
| ConvTranspose | input 0 | per output channel, axis 1 | float | float |
| Gemm | input 0 | per output channel | float | float |
| MatMul | both inputs, or the one that is not constant | per output channel; a stack per tensor | float | float |
| Add behind a Conv or linear layer | the skip input | | | float |
| MaxPool, AveragePool, GlobalAveragePool | input 0 | | | float |
| Concat of quantized tensors | all inputs, one shared scale | | | float |

A pool is quantized where its output feeds a quantized operator, a Concat where all its inputs are activations.
Of two products that meet in an Add the later one fuses the sum; the other is the skip input.

Left in float because integer kernels do not pay: convolutions with fewer than 16 input or output channels
(up to 4 input channels excepted, the pictures of a first layer, which TensorRT pads), and products in which
one side is a single row or column.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from onnxptq.graph.index import GraphIndex, is_constant
from onnxptq.targets.placement import (
    PlacementRequest,
    Placer,
    Row,
    ScaleGroups,
    channel_axis_of_gemm,
    channel_axis_of_matmul,
    moves_values,
    tie_movements,
)
from onnxptq.targets.residuals import place_residual_sums
from onnxptq.types import QType, QuantPlan, Skip

NAME = "tensorrt"


_FEW_CHANNELS = 16
_PICTURE_CHANNELS = 4


def _is_narrow_convolution(node: gs.Node, index: GraphIndex) -> str | None:
    if not is_constant(node.inputs[1]):
        return "its weight is not constant"
    first, second = (int(d) for d in node.inputs[1].shape[:2])
    grouped = second * int(node.attrs.get("group", 1))
    read, written = (first, grouped) if node.op == "ConvTranspose" else (grouped, first)
    if written < _FEW_CHANNELS or _PICTURE_CHANNELS < read < _FEW_CHANNELS:
        return f"it has fewer than {_FEW_CHANNELS} channels ({read} in, {written} out): float is faster"
    return None


def _is_vector_product(node: gs.Node, index: GraphIndex) -> str | None:
    left, right = node.inputs[0].shape, node.inputs[1].shape
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    if not is_constant(node.inputs[1]) and (left[-2] == 1 or right[-1] == 1):
        return "one side of the product is a single vector, which is faster in floating point"
    return None


TABLE: Mapping[str, Row] = {
    "Conv": Row(activations=(0,), weight=1, weight_axis=lambda node: 0, decline=_is_narrow_convolution),
    "ConvTranspose": Row(
        activations=(0,), weight=1, weight_axis=lambda node: 1, decline=_is_narrow_convolution
    ),
    "Gemm": Row(activations=(0,), weight=1, weight_axis=channel_axis_of_gemm),
    "MatMul": Row(activations=(0,), weight=1, weight_axis=channel_axis_of_matmul, decline=_is_vector_product),
}
_POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool")
_PRODUCTS = tuple(TABLE)


def place(index: GraphIndex, request: PlacementRequest) -> QuantPlan:
    """Quantizers where TensorRT's INT8 kernels fuse them. Activation grids are int8; weights may be narrower."""
    placer = Placer(index, request, activation=lambda bits: QType.signed(8), symmetric=True)
    placer.apply(TABLE)
    place_residual_sums(placer, _PRODUCTS)
    groups = _place_pools_and_concats(placer)
    return placer.finish(NAME, tie_movements(placer, groups))


def _place_pools_and_concats(placer: Placer) -> ScaleGroups:
    """Quantize the inputs of pools and Concats whose outputs are wanted quantized; a Concat shares one scale."""
    groups = ScaleGroups()
    # Backwards, so that each sees whether what it writes is wanted: a pool of a Concat, a Concat of a Concat.
    for node in reversed(placer.index.nodes):
        if node.name in placer.request.declined:
            continue
        if node.op in _POOLS:
            source = node.inputs[0].name
            if source not in placer.request.uncalibrated and _feeds_product(placer, node.outputs[0].name):
                placer.add_edge(node, 0)
                placer.quantized_nodes.add(node.name)
        elif node.op == "Concat" and placer.has_quantizer(node.outputs[0].name):
            reason = _concat_reason(placer, node)
            if reason is not None:
                placer.skips.append(Skip(site=node.name, reason=reason))
                continue
            for i in range(len(node.inputs)):
                placer.add_edge(node, i)
            placer.quantized_nodes.add(node.name)
            groups.join(t.name for t in (*node.inputs, node.outputs[0]))
    return groups


def _feeds_product(placer: Placer, tensor: str) -> bool:
    for use in placer.index.uses(tensor):
        if placer.is_quantized_edge(tensor, use.node):
            return True
        if moves_values(use.node) and any(_feeds_product(placer, t.name) for t in use.node.outputs):
            return True
    return False


def _concat_reason(placer: Placer, node: gs.Node) -> str | None:
    for tensor in node.inputs:
        if is_constant(tensor):
            return f"its input '{tensor.name}' is constant, so its inputs cannot share a scale"
        if tensor.name in placer.request.uncalibrated:
            reason = placer.request.uncalibrated[tensor.name]
            return f"its input '{tensor.name}' cannot be calibrated: {reason}"
    return None
