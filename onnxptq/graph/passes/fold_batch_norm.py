"""Folds an inference-mode ``BatchNormalization`` into the linear layer that feeds it.

::

    y = gamma (z - mean) / sqrt(var + epsilon) + beta,     z = W x + b
    f = gamma / sqrt(var + epsilon)
    W' = f W (per output channel),     b' = f (b - mean) + beta

Into ``Conv`` and ``ConvTranspose`` of any rank and group count, ``Gemm``, and 2-D ``MatMul`` with or
without ``Add``. The arithmetic is float64, rounded once to float32. Declined: a ``z`` with another reader or
that is a graph output, weights or statistics that are no constants, and training mode.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxptq.graph.surgeon import (
    float_constant,
    is_op,
    live_nodes,
    new_constant,
    producer,
    set_constant,
    sole_reader,
)
from onnxptq.types import Array

NOTE = (
    "One BatchNormalization node went into the layer in front.",
    "{} BatchNormalization nodes went into the layers in front.",
)


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many BatchNormalization nodes were folded."""
    return sum(_fold(graph, node) for node in live_nodes(graph, "BatchNormalization"))


@dataclass(frozen=True, slots=True, eq=False)
class _Affine:
    """The batch norm as ``f z + shift`` per channel, float64 of shape (channels,)."""

    factor: npt.NDArray[np.float64]
    shift: npt.NDArray[np.float64]


def _fold(graph: gs.Graph, norm: gs.Node) -> bool:
    affine = _affine(norm)
    layer = producer(norm.inputs[0])
    if affine is None or layer is None or sole_reader(graph, norm.inputs[0]) is not norm:
        return False
    if is_op(layer, "Conv", "ConvTranspose"):
        return _fold_into_conv(graph, layer, norm, affine)
    if is_op(layer, "Gemm"):
        return _fold_into_gemm(graph, layer, norm, affine)
    if is_op(layer, "Add", "MatMul"):
        return _fold_into_matmul(graph, layer, norm, affine)
    return False


def _affine(norm: gs.Node) -> _Affine | None:
    if norm.attrs.get("training_mode", 0) or any(t.outputs for t in norm.outputs[1:]):
        return None
    values = [float_constant(tensor) for tensor in norm.inputs[1:5]]
    if len(values) != 4 or any(value is None for value in values):
        return None
    gamma, beta, mean, var = (np.asarray(value, np.float64).reshape(-1) for value in values)
    with np.errstate(invalid="ignore", divide="ignore"):
        factor = gamma / np.sqrt(var + norm.attrs.get("epsilon", 1e-5))
    if not np.isfinite(factor).all():
        return None
    return _Affine(factor, beta - mean * factor)


def _fold_into_conv(graph: gs.Graph, conv: gs.Node, norm: gs.Node, affine: _Affine) -> bool:
    weight = float_constant(conv.inputs[1])
    channels = affine.factor.size
    bias = _bias_value(conv, 2, channels)
    if weight is None or bias is None:
        return False
    if conv.op == "Conv":
        scaled = weight * affine.factor.reshape(-1, *[1] * (weight.ndim - 1))
    else:
        # (C_in, M / group, ...): input channel i belongs to group i // (C_in / group).
        group = int(conv.attrs.get("group", 1))
        split = weight.reshape(group, weight.shape[0] // group, *weight.shape[1:])
        factor = affine.factor.reshape(group, 1, weight.shape[1], *[1] * (weight.ndim - 2))
        scaled = (split * factor).reshape(weight.shape)
    set_constant(graph, conv, 1, scaled.astype(np.float32))
    _set_bias(graph, conv, 2, bias * affine.factor + affine.shift)
    return _drop_norm(graph, norm)


def _fold_into_gemm(graph: gs.Graph, gemm: gs.Node, norm: gs.Node, affine: _Affine) -> bool:
    weight = float_constant(gemm.inputs[1])
    bias = _bias_value(gemm, 2, affine.factor.size)
    if weight is None or bias is None:
        return False
    factor = affine.factor.reshape((-1, 1) if gemm.attrs.get("transB", 0) else (1, -1))
    set_constant(graph, gemm, 1, (weight * factor).astype(np.float32))
    bias = bias * gemm.attrs.get("beta", 1.0)
    gemm.attrs.pop("beta", None)
    _set_bias(graph, gemm, 2, bias * affine.factor + affine.shift)
    return _drop_norm(graph, norm)


def _fold_into_matmul(graph: gs.Graph, last: gs.Node, norm: gs.Node, affine: _Affine) -> bool:
    """``last`` is the MatMul, or the Add of its bias; channels are axis 1, so the output must be 2-D."""
    channels = affine.factor.size
    matmul, bias_index = last, None
    bias: Array = np.zeros(channels)
    if last.op == "Add":
        found = _bias_add(graph, last, channels)
        if found is None:
            return False
        matmul, bias_index, bias = found
    weight = float_constant(matmul.inputs[1]) if is_op(matmul, "MatMul") else None
    rank = None if matmul.inputs[0].shape is None else len(matmul.inputs[0].shape)
    if weight is None or weight.ndim != 2 or rank != 2 or weight.shape[1] != channels:
        return False
    set_constant(graph, matmul, 1, (weight * affine.factor).astype(np.float32))
    shifted = (bias * affine.factor + affine.shift).astype(np.float32)
    if bias_index is not None:
        set_constant(graph, last, bias_index, shifted)
        return _drop_norm(graph, norm)
    norm.op = "Add"
    norm.attrs.clear()
    norm.outputs = [norm.outputs[0]]
    norm.inputs = [norm.inputs[0], new_constant(graph, f"{norm.name}_bias", shifted)]
    return True


def _bias_add(graph: gs.Graph, add: gs.Node, channels: int) -> tuple[gs.Node, int, Array] | None:
    for index in (0, 1):
        bias = float_constant(add.inputs[index])
        matmul = producer(add.inputs[1 - index])
        if bias is None or bias.shape not in ((channels,), (1, channels)):
            continue
        if is_op(matmul, "MatMul") and sole_reader(graph, add.inputs[1 - index]) is add:
            assert matmul is not None
            return matmul, index, bias.reshape(-1).astype(np.float64)
    return None


def _bias_value(node: gs.Node, index: int, channels: int) -> npt.NDArray[np.float64] | None:
    """The constant bias as float64 (channels,), zeros where there is none, None where it cannot be folded."""
    if len(node.inputs) <= index or not node.inputs[index].name:
        return np.zeros(channels)
    value = float_constant(node.inputs[index])
    if value is None or any(dim != 1 for dim in value.shape[:-1]) or value.size not in (1, channels):
        return None
    return np.broadcast_to(value.reshape(-1).astype(np.float64), (channels,))


def _set_bias(graph: gs.Graph, node: gs.Node, index: int, bias: npt.NDArray[np.float64]) -> None:
    values = bias.astype(np.float32)
    if len(node.inputs) > index and node.inputs[index].name:
        set_constant(graph, node, index, values)
        return
    node.inputs = [*node.inputs[:index], new_constant(graph, f"{node.name}_bias", values)]


def _drop_norm(graph: gs.Graph, norm: gs.Node) -> bool:
    """Let the layer write what the norm wrote, so that the name that the rest of the graph reads stays."""
    source, target = norm.inputs[0], norm.outputs[0]
    layer = producer(source)
    assert layer is not None
    norm.outputs.clear()
    norm.inputs.clear()
    layer.outputs[next(i for i, tensor in enumerate(layer.outputs) if tensor is source)] = target
    graph.nodes.remove(norm)
    return True
