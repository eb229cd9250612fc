"""The stage that rounds every quantized weight with error compensation, from one pass over the float network."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import Linear, find_linears
from onnxptq.quantizers.affine import fake_quantize
from onnxptq.reconstruct.closed_form import round_weights
from onnxptq.reconstruct.gram import Gram, layer_rows, weight_matrix, weight_tensor
from onnxptq.reconstruct.initial import bias_qparams
from onnxptq.reconstruct.narrow import NARROW, round_narrow
from onnxptq.runtime import Provider, open_exposed
from onnxptq.types import CanonicalModel, Progress, QuantPlan, Sample, Solution, started

_FINE_BITS = 8
"""Activations of this many bits are as good as float: their rounding cannot be compensated, only averaged."""

_ROWS_PER_INPUT = 8
"""Rows over all samples, per input of the layer: enough to determine its K x K sums."""

_ROWS_PER_LAYER = 2048
"""Rows over all samples, at least."""


def round_in_closed_form(
    model: CanonicalModel,
    plan: QuantPlan,
    solution: Solution,
    samples: Sequence[Sample],
    *,
    max_width: int = 2048,
    provider: Provider = "cpu",
    progress: Progress | None = None,
) -> Solution:
    """``solution`` with weights moved to the grid points that serve the layers' outputs best.

    Layers of few inputs get new scales as well, and their biases with them (:mod:`onnxptq.reconstruct.narrow`).
    Layers whose weight is shared, of an unsupported form, or wider than ``max_width`` inputs, and those that
    read values too large for their squares, keep the nearest grid points.
    """
    index = GraphIndex(model.graph)
    layers = compensable_layers(index, plan, max_width)
    if not layers or not samples:
        return solution
    reads = {(s.consumer, s.input_index): q for q in plan.quantizers for s in q.sites}
    exposed = sorted({layer.input.name for layer in layers} - index.input_names)
    session = open_exposed(model.path, exposed, provider=provider)
    grams: dict[str, Gram] = {}
    declined: set[str] = set()
    tick = started(progress, "round weights", len(samples) + len(layers))
    for sample in samples:
        values = {**sample, **session.run(sample, exposed)}
        for layer in layers:
            name = layer.node.name
            if name in declined:
                continue
            quantizer = reads.get((name, 1 - layer.weight_index))
            qparams = solution.qparams[quantizer.quantizer_id] if quantizer else None
            if qparams is not None and qparams.qtype.bits >= _FINE_BITS:
                qparams = None
            value = np.asarray(values[layer.input.name], np.float32)
            changed = None if qparams is None else fake_quantize(value, qparams)
            rows = layer_rows(layer, value, changed, _rows(layer, len(samples)))
            if rows is None:
                declined.add(name)
                continue
            if name not in grams:
                grams[name] = Gram.empty(rows[0].shape[0], rows[0].shape[2], is_mixed=qparams is not None)
            grams[name].add(*rows)
        tick()
    weights, grids = dict(solution.weights), dict(solution.qparams)
    for layer in layers:
        if layer.node.name not in declined and grams[layer.node.name].is_finite:
            quantizer = reads[layer.node.name, layer.weight_index]
            value = np.asarray(weights.get(layer.weight.name, layer.weight.values), np.float32)
            matrix, gram = weight_matrix(layer, value), grams[layer.node.name]
            grid = grids[quantizer.quantizer_id]
            if width_of(layer) <= NARROW and gram.mixed is gram.quantized:
                rounded, grids[quantizer.quantizer_id] = round_narrow(matrix, gram, grid)
            else:
                rounded = round_weights(matrix, gram, grid)
            weights[layer.weight.name] = weight_tensor(layer, rounded)
        tick()
    biases = {q.quantizer_id: bias_qparams(q, grids) for q in plan.quantizers if q.role == "bias"}
    return replace(solution, qparams={**grids, **biases}, weights=weights)


def _rows(layer: Linear, samples: int) -> int:
    """Rows to take of each sample, so that the sums are well determined and no better."""
    return -(-max(_ROWS_PER_LAYER, _ROWS_PER_INPUT * width_of(layer)) // samples)


def compensable_layers(index: GraphIndex, plan: QuantPlan, max_width: int) -> list[Linear]:
    """Layers, in graph order, whose quantized weight has one reader and at most ``max_width`` inputs."""
    quantized: Collection[str] = {q.tensor for q in plan.quantizers if q.role == "weight"}
    return [
        layer
        for layer in find_linears(index)
        if layer.weight.name in quantized
        and len(index.uses(layer.weight.name)) == 1
        and width_of(layer) <= max_width
    ]


def width_of(layer: Linear) -> int:
    """Inputs that one output of the layer sums over."""
    size = int(np.prod(layer.weight.shape))
    channels = int(layer.weight.shape[layer.axis])
    return size // max(1, channels)
