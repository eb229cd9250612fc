"""The stage that rounds every quantized weight with error compensation, from one pass over the float network."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import Linear, find_linears
from onnxptq.quantizers.affine import fake_quantize
from onnxptq.reconstruct.closed_form import round_weights
from onnxptq.reconstruct.fitted_grid import round_on_fitted_grid
from onnxptq.reconstruct.gram import Gram, layer_rows, weight_matrix, weight_tensor
from onnxptq.reconstruct.initial import bias_qparams
from onnxptq.reconstruct.narrow import NARROW, round_narrow
from onnxptq.runtime import Provider, open_exposed
from onnxptq.types import (
    CanonicalModel,
    FloatArray,
    Progress,
    QParams,
    QuantPlan,
    Sample,
    Solution,
    started,
)

_FINE_BITS = 8
"""Activations of this many bits are as good as float: their rounding cannot be compensated, only averaged."""

_ROWS_PER_INPUT = 8
"""Rows over all samples, per input of the layer: enough to determine its K x K sums."""

_ROWS_PER_LAYER = 2048
"""Rows over all samples, at least."""

_SHARED_SAMPLES = 64
"""Samples that weights of several layers are rounded on, at most, before packs are solved."""

Choose = Callable[[Linear, FloatArray, Gram, QParams], tuple[FloatArray, QParams]]
"""The weights of a layer and their grid, from its matrix, its sums and the grid so far."""


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
    A weight that several layers read serves all of them. Weights of an unsupported form, or wider than ``max_width``
    inputs, and those of layers that read values too large for their squares, keep the nearest grid points.
    """
    index = GraphIndex(model.graph)
    reads = {(s.consumer, s.input_index): q for q in plan.quantizers for s in q.sites}

    def coarse(layer: Linear) -> QParams | None:
        """The grid of what ``layer`` reads, where its rounding is worth making up for."""
        quantizer = reads.get((layer.node.name, 1 - layer.weight_index))
        qparams = solution.qparams[quantizer.quantizer_id] if quantizer else None
        return None if qparams is None or qparams.qtype.bits >= _FINE_BITS else qparams

    def chosen(layer: Linear, matrix: FloatArray, gram: Gram, grid: QParams) -> tuple[FloatArray, QParams]:
        if width_of(layer) <= NARROW and gram.mixed is gram.quantized:
            return round_narrow(matrix, gram, grid)
        return round_weights(matrix, gram, grid), grid

    readers = weight_readers(index, plan, max_width)
    grams = _grams(model, index, readers, samples, coarse, provider, progress)
    return _rounded(plan, solution, readers, grams, chosen)


def round_shared(
    model: CanonicalModel,
    plan: QuantPlan,
    solution: Solution,
    samples: Sequence[Sample],
    *,
    max_width: int,
    damping: float,
    provider: Provider = "cpu",
    progress: Progress | None = None,
) -> Solution:
    """``solution`` with weights that several layers read on grids, and at grid points, that serve all of these on
    float inputs. Solving packs, which have one of the layers each, leaves them alone.

    Args:
        damping: as for :func:`onnxptq.reconstruct.closed_form.pose`.
    """
    index = GraphIndex(model.graph)
    readers = [layers for layers in weight_readers(index, plan, max_width) if len(layers) > 1]
    chosen = samples[:: -(-len(samples) // _SHARED_SAMPLES)] if samples else samples
    grams = _grams(model, index, readers, chosen, lambda _: None, provider, progress)
    return _rounded(
        plan,
        solution,
        readers,
        grams,
        lambda _, matrix, gram, grid: round_on_fitted_grid(
            matrix, gram, grid, damping=damping, ridge=damping
        ),
    )


def _rounded(
    plan: QuantPlan,
    solution: Solution,
    readers: Sequence[tuple[Linear, ...]],
    grams: Mapping[str, Gram],
    choose: Choose,
) -> Solution:
    """``solution`` with the weights of ``grams`` as ``choose`` has them, and biases on the grids that follow."""
    of_weight = {q.tensor: q.quantizer_id for q in plan.quantizers if q.role == "weight"}
    weights, grids = dict(solution.weights), dict(solution.qparams)
    for layer, *_ in readers:
        name = layer.weight.name
        if name in grams:
            matrix = weight_matrix(layer, np.asarray(weights.get(name, layer.weight.values), np.float32))
            grid = grids[of_weight[name]]
            rounded, grids[of_weight[name]] = choose(layer, matrix, grams[name], grid)
            weights[name] = weight_tensor(layer, rounded)
    biases = {q.quantizer_id: bias_qparams(q, grids) for q in plan.quantizers if q.role == "bias"}
    return replace(solution, qparams={**grids, **biases}, weights=weights)


def _grams(
    model: CanonicalModel,
    index: GraphIndex,
    readers: Sequence[tuple[Linear, ...]],
    samples: Sequence[Sample],
    grid_of: Callable[[Linear], QParams | None],
    provider: Provider,
    progress: Progress | None,
) -> dict[str, Gram]:
    """The sums of what the readers of each weight read in the float network, and on the grids that ``grid_of`` names
    for some of them; without weights whose sums cannot be had."""
    if not readers or not samples:
        return {}
    exposed = sorted({layer.input.name for layers in readers for layer in layers} - index.input_names)
    session = open_exposed(model.path, exposed, provider=provider)
    grids = {layer.node.name: grid_of(layer) for layers in readers for layer in layers}
    grams: dict[str, Gram] = {}
    declined: set[str] = set()
    tick = started(progress, "round weights", len(samples))
    for sample in samples:
        values = {**sample, **session.run(sample, exposed)}
        for layers in readers:
            name = layers[0].weight.name
            is_mixed = any(grids[layer.node.name] is not None for layer in layers)
            limit = _rows(layers[0], len(samples) * len(layers))
            for layer in layers:
                if name in declined:
                    break
                grid = grids[layer.node.name]
                value = np.asarray(values[layer.input.name], np.float32)
                changed = None if grid is None else fake_quantize(value, grid)
                rows = layer_rows(layer, value, changed, limit)
                if rows is None:
                    declined.add(name)
                    break
                if name not in grams:
                    grams[name] = Gram.empty(rows[0].shape[0], rows[0].shape[2], is_mixed=is_mixed)
                grams[name].add(*rows)
        tick()
    return {name: gram for name, gram in grams.items() if name not in declined and gram.is_finite}


def _rows(layer: Linear, samples: int) -> int:
    """Rows to take of each sample, so that the sums are well determined and no better."""
    return -(-max(_ROWS_PER_LAYER, _ROWS_PER_INPUT * width_of(layer)) // samples)


def compensable_layers(index: GraphIndex, plan: QuantPlan, max_width: int) -> list[Linear]:
    """Layers, in graph order, whose quantized weight has one reader and at most ``max_width`` inputs."""
    return [layers[0] for layers in weight_readers(index, plan, max_width) if len(layers) == 1]


def weight_readers(index: GraphIndex, plan: QuantPlan, max_width: int) -> list[tuple[Linear, ...]]:
    """The layers that read each quantized weight of at most ``max_width`` inputs, in graph order of the first, where
    nothing else reads it and all take it for the same matrix."""
    quantized: Collection[str] = {q.tensor for q in plan.quantizers if q.role == "weight"}
    readers: dict[str, list[Linear]] = {}
    for layer in find_linears(index):
        if layer.weight.name in quantized and width_of(layer) <= max_width:
            readers.setdefault(layer.weight.name, []).append(layer)
    return [
        tuple(layers)
        for name, layers in readers.items()
        if len(layers) == len(index.uses(name)) and len({_form(layer) for layer in layers}) == 1
    ]


def _form(layer: Linear) -> tuple[bool, int, int]:
    """What decides how a weight becomes a matrix."""
    return layer.node.op == "Conv", layer.axis % max(1, len(layer.weight.shape)), layer.group


def width_of(layer: Linear) -> int:
    """Inputs that one output of the layer sums over."""
    size = int(np.prod(layer.weight.shape))
    channels = int(layer.weight.shape[layer.axis])
    return size // max(1, channels)
