"""Folds a factor per output channel into the linear layer in front (LayerScale of vision transformers).

::

    s * (x W + b) = x (W diag(s)) + s * b

The ``Mul`` must be the only reader of a Conv, ConvTranspose, Gemm or MatMul, bias included, and its other
operand a constant with one factor per output channel. Exact in real arithmetic; within rounding otherwise.
Declined: weights with other readers, which would have to be stored twice, and biases that are no constants.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import Linear, find_linears
from onnxptq.graph.surgeon import bypass, float_constant, is_op, set_constant
from onnxptq.types import FloatArray

NOTE = (
    "One factor per channel went into the layer in front.",
    "{} factors per channel went into the layers in front.",
)


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many factors were folded."""
    index = GraphIndex(graph)
    return sum(_fold(graph, index, layer) for layer in find_linears(index))


def _fold(graph: gs.Graph, index: GraphIndex, layer: Linear) -> bool:
    scaling = index.sole_user(layer.output.name)
    if scaling is None or not is_op(scaling, "Mul") or not _can_change(index, layer):
        return False
    position = 1 if scaling.inputs[0] is layer.output else 0
    factor = _factor(layer, scaling.inputs[position])
    if factor is None:
        return False
    if position == 0:
        scaling.inputs[0], scaling.inputs[1] = scaling.inputs[1], scaling.inputs[0]
    if not bypass(graph, scaling):
        return False
    weight = layer.weight.values
    shape = [-1 if axis == layer.axis else 1 for axis in range(weight.ndim)]
    set_constant(graph, layer.node, layer.weight_index, (weight * factor.reshape(shape)).astype(np.float32))
    if layer.bias is not None and layer.bias_node is not None and layer.bias_index is not None:
        bias = (layer.bias.values * factor).astype(np.float32)
        set_constant(graph, layer.bias_node, layer.bias_index, bias)
    return True


def _can_change(index: GraphIndex, layer: Linear) -> bool:
    if (
        layer.weight_index != 1
        or float_constant(layer.weight) is None
        or len(index.uses(layer.weight.name)) > 1
    ):
        return False
    if layer.node.op == "ConvTranspose" and layer.group != 1:
        return False
    if layer.bias is None:
        return len(layer.node.inputs) < 3 or not layer.node.inputs[2].name
    return float_constant(layer.bias) is not None


def _factor(layer: Linear, operand: gs.Tensor) -> FloatArray | None:
    """One factor per output channel; None if ``operand`` is anything else."""
    value = float_constant(operand)
    rank = None if layer.output.shape is None else len(layer.output.shape)
    channels = int(layer.weight.shape[layer.axis])
    if value is None or rank is None or value.ndim > rank or value.size != channels or channels == 1:
        return None
    axis = 1 if layer.node.op in ("Conv", "ConvTranspose") else rank - 1
    wanted = [channels if a == axis else 1 for a in range(rank)][rank - value.ndim :]
    if list(value.shape) != wanted or not np.isfinite(value).all():
        return None
    return np.asarray(value.reshape(-1), np.float32)
