"""onnxruntime's CPU provider: unsigned asymmetric activations, signed per-channel weights.

| operator | activations | weight | bias | output | integer kernel |
|---|---|---|---|---|---|
| Conv | input 0, uint8 | int8 per output channel | int32 | quantized, behind a fused Relu/Clip | QLinearConv |
| Conv of few products, depthwise behind it | float | float | float | quantized where a kernel reads it | none |
| Conv that only float operators follow | input 0, uint8 | int8 per output channel | int32 | float | none |
| Add, Mul, Concat, Sigmoid, LeakyRelu, average pools between such | uint8 | | | quantized | QLinearAdd, ... |
| Gemm | input 0, uint8 | int8 per output channel | int32 | float | QGemm |
| MatMul with a constant | input 0, uint8 | int8 per output channel | int32, in its Add | float | see below |
| everything else | float | | | | |

A MatMul becomes MatMulIntegerToFloat, or QGemm where its shapes are static and an Add follows it. That Gemm
runs in float unless its bias is int32: a ViT-S then takes four times as long.

A convolution without a quantizer behind it runs in float, and slowly: its weight is no constant to onnxruntime then,
which keeps it from the layout of its fast kernels (ResNet-50 with group normalizations took 1.4 times as long as in
float, with all outputs quantized 0.7). So its output is quantized wherever only convolutions follow, and behind
grouped ones wherever any kernel does. What linear layers read behind normalizations is a residual stream, which
would carry its noise: 1.4 dB behind the patches of a ViT, 9 dB in a text recognizer.

The first convolution on a picture, 3 x 3 over 3 channels, takes 1.5 times as long on integers as in float:
QLinearConv copies what each output reads, which few products do not pay for. From 4 channels, or 4 x 4 values
of 3, it is faster. A depthwise convolution right behind it stays in float as well (EfficientNet-Lite0: 3 % of
the time, and 2.3 dB, for what the first channels lose on one grid).

Between two activations a MatMul is faster in float (quantized attention MatMuls run at 0.5-0.8 of the
speed), and LayerNormalization, Gelu and ReduceMean have no integer kernel. Operators between two convolutions run on
integers where that makes whole chains of integer kernels (:mod:`onnxptq.targets.integer_chains`):
EfficientNet-B0, whose activations are x sigmoid(x), takes 1.1 times as long as in float instead of 1.7, ResNet-50
with its sums 0.4 instead of 0.6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import onnx_graphsurgeon as gs

from onnxptq.graph.index import GraphIndex, is_constant
from onnxptq.graph.linear import linear_of
from onnxptq.targets.integer_chains import place_chains
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

NAME = "ort-cpu"


def _needs_constant_weight(node: gs.Node, index: GraphIndex) -> str | None:
    if is_constant(node.inputs[0]):
        return "its constant operand is the left one; onnxruntime has no fast integer kernel for it"
    if not is_constant(node.inputs[1]):
        return "no operand is constant; between two activations the float kernel is faster on the CPU"
    if len(node.inputs[1].shape) != 2:
        return "its constant operand is not a matrix; onnxruntime has no fast integer kernel for it"
    return None


def _gemm_needs_plain_product(node: gs.Node, index: GraphIndex) -> str | None:
    if not is_constant(node.inputs[1]):
        return "its second operand is not constant"
    if node.attrs.get("transA", 0):
        return "its first operand is transposed (transA)"
    if node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
        return "alpha or beta is not 1, which QGemm does not take"
    return None


_CARRIERS = MOVEMENT_OPS | {
    "Add",
    "AveragePool",
    "BatchNormalization",
    "Clip",
    "Concat",
    "Elu",
    "GlobalAveragePool",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Mul",
    "Pad",
    "PRelu",
    "Relu",
    "Resize",
    "Sigmoid",
    "Sub",
}
"""Operators that integer kernels have between them, on 8 bits or in float."""


def _carries(node: gs.Node) -> bool:
    """Whether ``node`` is of the operators between two integer kernels.

    A division is, by a constant: x clip(x + 3, 0, 6) / 6 is an activation; norms divide by what they measure.
    """
    return node.op in _CARRIERS or (node.op == "Div" and is_constant(node.inputs[1]))


def _output_gains_nothing(node: gs.Node, index: GraphIndex) -> str | None:
    """A reason to keep a convolution's output in float: it would be rounded for the sake of one kernel."""
    if any(
        name in index.output_names or _readers(name, index) for name in _behind(node, index, through=_carries)
    ):
        return None
    far = [op for name in _behind(node, index, through=_is_no_kernel) for op in _readers(name, index)]
    if not far:
        return (
            "its output stays in float, and so does its kernel: no integer kernel follows that would read it"
        )
    if set(far) == {"Conv"} or node.attrs.get("group", 1) > 1:
        return None
    return (
        "its output stays in float, and so does its kernel: linear layers follow behind float operators, and what "
        "they add up would carry its rounding noise"
    )


def _is_no_kernel(node: gs.Node) -> bool:
    return node.op not in TABLE


def _behind(node: gs.Node, index: GraphIndex, *, through: Callable[[gs.Node], bool]) -> Iterator[str]:
    """The output of ``node``, and what the operators that one may look ``through`` make of it."""
    waiting, seen = [node.outputs[0].name], {node.name}
    while waiting:
        name = waiting.pop()
        yield name
        for follower in (use.node for use in index.uses(name)):
            if through(follower) and follower.name not in seen:
                seen.add(follower.name)
                waiting += [t.name for t in follower.outputs]


def _readers(tensor: str, index: GraphIndex) -> list[str]:
    """Types of the integer kernels that read ``tensor``."""
    return [use.node.op for use in index.uses(tensor) if use.node.op in TABLE]


_FEW_CHANNELS = 3
_FEW_VALUES = 32
"""Input channels, and products per output value, up to which a convolution is faster in float."""


def _products(node: gs.Node) -> int:
    """How many products an output value of a convolution sums."""
    return math.prod(node.inputs[1].shape[1:])


def _is_small(node: gs.Node, index: GraphIndex) -> bool:
    """Whether ``node`` is faster in float.

    Not where a MaxPool reads it: onnxruntime moves the quantizer behind the pool to the front of it, and between a
    float and an integer kernel the pool takes six times as long.
    """
    is_plain = node.attrs.get("group", 1) == 1 and node.inputs[1].shape[1] <= _FEW_CHANNELS
    return is_plain and _products(node) <= _FEW_VALUES and not _is_pooled(node.outputs[0].name, index)


def _is_pooled(tensor: str, index: GraphIndex) -> bool:
    """Whether a MaxPool reads ``tensor``, or the activation of it."""
    followers = [use.node for use in index.uses(tensor)]
    return any(
        node.op == "MaxPool" or (node.op in FUSED_ACTIVATIONS and _is_pooled(node.outputs[0].name, index))
        for node in followers
    )


def _convolution_before(node: gs.Node, index: GraphIndex) -> gs.Node | None:
    """The convolution whose output, or whose activation's, this one reads."""
    source = index.producer(node.inputs[0].name)
    while source is not None and source.op in FUSED_ACTIVATIONS:
        source = index.producer(source.inputs[0].name)
    return source if source is not None and source.op == "Conv" and is_constant(source.inputs[1]) else None


def _conv_gains_nothing(node: gs.Node, index: GraphIndex) -> str | None:
    if not is_constant(node.inputs[1]):
        return "its weight is not constant"
    if len(node.inputs) > 2 and not is_constant(node.inputs[2]):
        return "its bias is not constant"
    if _is_small(node, index):
        return f"an output value sums {_products(node)} products only: the float kernel is faster on the CPU"
    first = _convolution_before(node, index)
    if (
        node.inputs[1].shape[1] == 1
        and node.attrs.get("group", 1) > 1
        and first is not None
        and _is_small(first, index)
    ):
        return f"it reads '{first.name}', which runs in float: both are faster without a quantizer in between"
    return None


TABLE: Mapping[str, Row] = {
    "Conv": Row(
        activations=(0,),
        weight=1,
        weight_axis=lambda node: 0,
        bias=2,
        bias_storage="int32",
        quantize_output=True,
        output_is_idle=_output_gains_nothing,
        decline=_conv_gains_nothing,
    ),
    "Gemm": Row(
        activations=(0,),
        weight=1,
        weight_axis=channel_axis_of_gemm,
        bias=2,
        bias_storage="int32",
        decline=_gemm_needs_plain_product,
    ),
    "MatMul": Row(
        activations=(0,), weight=1, weight_axis=channel_axis_of_matmul, decline=_needs_constant_weight
    ),
}


def _free_float_products(placer: Placer) -> None:
    """Products left in float between two quantizers read float values.

    Otherwise onnxruntime quantizes their weights on its own, per tensor, and runs them on integers all the same.
    """
    for node in placer.index.nodes:
        if node.op not in TABLE or node.name in placer.quantized_nodes or not is_constant(node.inputs[1]):
            continue
        if placer.has_quantizer(placer.behind_activation(node)):
            placer.release(node)


def place(index: GraphIndex, request: PlacementRequest) -> QuantPlan:
    """Quantizers for onnxruntime's CPU kernels. Grids are 8 bits; ``weight_bits`` below 8 narrows the weights."""
    placer = Placer(index, request, activation=lambda bits: QType.unsigned(8), symmetric=False)
    placer.apply(TABLE)
    # Not in front of linear layers: those write float values, and what a classifier reads is small.
    place_chains(placer, ("Conv",))
    _free_float_products(placer)
    _place_added_biases(placer)
    return placer.finish(NAME, tie_movements(placer))


def _place_added_biases(placer: Placer) -> None:
    """Quantize the bias that an Add puts on a MatMul.

    Where shapes are static onnxruntime turns the pair into a Gemm, and a Gemm with a float bias runs in float.
    """
    for node in placer.index.nodes:
        if node.op != "MatMul" or node.name not in placer.quantized_nodes:
            continue
        linear = linear_of(placer.index, node)
        if linear is not None and linear.bias_node is not None and linear.bias_index is not None:
            placer.add_bias(linear.bias_node, linear.bias_index, node, linear.weight_index)
