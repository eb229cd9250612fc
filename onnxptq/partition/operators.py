"""What an operator does to the flow of data, as far as cutting a network into blocks needs to know it."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from onnxptq.graph.index import is_constant

SHAPE_READERS = frozenset({"Shape", "Size", "EyeLike", "RandomNormalLike", "RandomUniformLike"})
"""Operators whose result depends on the shape of their input only."""

_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_PRODUCTS = frozenset(
    {"Conv", "ConvTranspose", "DeformConv", "Gemm", "MatMul", "Einsum", "Attention", *_RECURRENT}
)
_NORMALIZATIONS = frozenset(
    {
        "BatchNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "RMSNormalization",
    }
)
_LOOKUPS = frozenset({"Gather", "GatherND", "GatherElements"})
# fmt: off
_ELEMENTWISE = frozenset({
    "Abs", "Add", "BitShift", "Cast", "CastLike", "Ceil", "Celu", "Clip", "Cos", "Div", "Dropout", "Elu",
    "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Log", "Max",
    "Min", "Mish", "Mod", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid",
    "Sign", "Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu", "Where",
})
# fmt: on


def is_product(node: gs.Node) -> bool:
    """Whether ``node`` sums products: what quantization speeds up, and what its error comes from."""
    return node.op in _PRODUCTS


def is_linear(node: gs.Node) -> bool:
    """Whether ``node`` is a product with a constant weight."""
    return is_product(node) and any(is_constant(t) for t in node.inputs[:2])


def is_elementwise(node: gs.Node) -> bool:
    """Whether every element of the output depends on one element of each input."""
    return node.op in _ELEMENTWISE


def is_normalization(node: gs.Node) -> bool:
    """Whether ``node`` normalizes features and rescales them by constants."""
    return node.op in _NORMALIZATIONS


def is_parametrised(node: gs.Node) -> bool:
    """Whether ``node`` turns what the caller gives into features: a product, a norm, a table look-up."""
    is_lookup = node.op in _LOOKUPS and is_constant(node.inputs[0]) and len(node.inputs[0].shape) > 1
    return is_product(node) or is_normalization(node) or is_lookup


def is_depthwise(node: gs.Node) -> bool:
    """Whether ``node`` convolves every channel on its own."""
    if node.op != "Conv" or not is_constant(node.inputs[1]):
        return False
    shape = node.inputs[1].shape
    return int(node.attrs.get("group", 1)) == int(shape[0]) > 1 and int(shape[1]) == 1


def is_pointwise(node: gs.Node) -> bool:
    """Whether ``node`` is a dense convolution with a kernel of one element."""
    if node.op != "Conv" or not is_constant(node.inputs[1]):
        return False
    kernel = [int(d) for d in node.inputs[1].shape[2:]]
    return int(node.attrs.get("group", 1)) == 1 and all(d == 1 for d in kernel)


def weight_count(node: gs.Node) -> int:
    """Number of elements of the constant operands of a product; 0 for other nodes."""
    if not is_product(node):
        return 0
    return sum(math.prod(int(d) for d in t.shape) for t in node.inputs if is_constant(t))
