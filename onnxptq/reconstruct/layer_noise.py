"""How far single layers of a solved pack are from their float form.

For a layer y = W x + b that reads x' in the quantized network,

    E|| W x + b - (W' x' + b') ||^2 / E|| W x + b - mean ||^2

on a selection of rows, as :mod:`onnxptq.reconstruct.gram` takes them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import Linear, find_linears
from onnxptq.lowering.quantized import quantizing_hooks
from onnxptq.quantizers.affine import fake_quantize
from onnxptq.reconstruct.gram import has_rows, layer_rows, weight_matrix
from onnxptq.reconstruct.pack_data import InnerValues, PackData
from onnxptq.types import Array, FloatArray, Pack, QuantPlan, Solution

SAMPLES = 32
"""Most samples that layers are compared on."""

_ROWS = 1024
"""Most rows of one pass."""


def layer_noise(
    index: GraphIndex,
    pack: Pack,
    plan: QuantPlan,
    data: PackData,
    weights: Collection[str],
    *,
    start: Solution,
    solution: Solution,
) -> Mapping[str, tuple[float, float]]:
    """Noise over signal of the layers with these ``weights``: with weight and bias of ``start``, and of ``solution``.

    Both read what ``solution`` leaves in front of them, quantized as it says.
    """
    reads = {(s.consumer, s.input_index): q.quantizer_id for q in plan.quantizers for s in q.sites}
    hooks = quantizing_hooks(index.graph, pack, plan, solution)
    inner = InnerValues(data, SAMPLES)
    found = {}
    for layer in find_linears(index):
        if layer.weight.name not in weights or layer.node.name not in pack.nodes:
            continue
        own = _matrices(layer, layer.weight.values, layer.bias and layer.bias.values)
        quantizer = reads[layer.node.name, layer.weight_index]
        changed = [
            _matrices(
                layer,
                fake_quantize(
                    np.asarray(s.weights.get(layer.weight.name, layer.weight.values), np.float32),
                    s.qparams[quantizer],
                ),
                layer.bias and s.weights.get(layer.bias.name, layer.bias.values),
            )
            for s in (start, solution)
        ]
        reader = reads.get((layer.node.name, 1 - layer.weight_index))
        if not has_rows(layer):
            continue
        sums, squares, noise, count = 0.0, 0.0, np.zeros(2), 0
        for _, _, value, other in inner.at(layer.input.name, hooks):
            read = other.cpu().numpy()
            read = read if reader is None else fake_quantize(read, solution.qparams[reader])
            rows = layer_rows(layer, value.cpu().numpy(), read, _ROWS)
            assert rows is not None
            wanted = _applied(own, rows[0])
            sums += float(wanted.sum())
            squares += float(np.square(wanted).sum())
            count += wanted.size
            noise += [float(np.square(_applied(new, rows[1]) - wanted).sum()) for new in changed]
        total = data.ranks.sum(np.array([sums, squares, count, *noise]))
        signal = total[1] - total[0] ** 2 / max(1.0, total[2])
        if signal > 0.0:
            found[layer.weight.name] = (float(total[3] / signal), float(total[4] / signal))
    return found


def _matrices(layer: Linear, weight: Array, bias: Array | None) -> tuple[FloatArray, FloatArray]:
    """The weight as (groups, channels per group, K), and the bias that fits beside it."""
    matrix = weight_matrix(layer, np.asarray(weight, np.float32))
    shape = (matrix.shape[0], 1, matrix.shape[1])
    if bias is None:
        return matrix, np.zeros(shape, np.float32)
    # One for all channels, one per channel, or for Gemm one per row and channel.
    values = np.asarray(bias, np.float32)
    rows = (
        values.reshape(1, -1)
        if values.ndim < 2 or values.shape[0] == 1 or layer.node.op != "Gemm"
        else values
    )
    mean = np.broadcast_to(rows.mean(axis=0), (shape[0] * shape[2],))
    return matrix, np.array(mean, np.float32).reshape(shape)


def _applied(layer: tuple[FloatArray, FloatArray], rows: FloatArray) -> Array:
    weight, bias = layer
    return (rows @ np.swapaxes(weight, 1, 2) + bias).astype(np.float64)
