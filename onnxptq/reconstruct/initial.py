"""The starting solution: weight grids from the weights alone, activation grids as given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.quantizers.affine import SMALLEST_SCALE, search_weight_qparams, symmetric_qparams
from onnxptq.threads import in_threads
from onnxptq.types import Array, PerAxis, PerGroup, QParams, Quantizer, QuantPlan, Solution

_BIAS_LIMIT = 2.0**30
"""Integers of a bias stay within half of int32, so that the accumulator it joins cannot overflow."""


def weight_grids(graph: gs.Graph, plan: QuantPlan, *, search: bool = True) -> dict[str, QParams]:
    """Parameters of every weight quantizer, by id; they depend on the weights alone.

    Args:
        search: minimise the 2.4-norm of the weight error over shrunken ranges, instead of covering the
            largest weight.
    """
    tensors = graph.tensors()
    quantizers = [q for q in plan.quantizers if q.role == "weight"]
    found = in_threads(lambda q: _weight_qparams(tensors[q.tensor].values, q, search), quantizers)
    return {q.quantizer_id: qparams for q, qparams in zip(quantizers, found, strict=True)}


def initial_solution(
    graph: gs.Graph,
    plan: QuantPlan,
    activations: Mapping[str, QParams],
    weights: Mapping[str, QParams] | None = None,
) -> Solution:
    """Round-to-nearest parameters of every quantizer.

    Args:
        activations: parameters of the activation quantizers, by id.
        weights: those of the weight quantizers (see ``weight_grids``); computed here where they are not given.
    """
    qparams: dict[str, QParams] = {
        **activations,
        **(weight_grids(graph, plan) if weights is None else weights),
    }
    by_id = {q.quantizer_id: q for q in plan.quantizers}
    found = with_bias_grids(graph, plan, Solution(qparams=qparams))
    assert set(found.qparams) == set(by_id)
    return found


def with_bias_grids(graph: gs.Graph, plan: QuantPlan, solution: Solution) -> Solution:
    """``solution`` with parameters for the biases that inherit theirs.

    A weight scale is raised where the bias would not fit its integers otherwise.
    """
    constants = graph.tensors()
    qparams = dict(solution.qparams)
    biases = [q for q in plan.quantizers if q.role == "bias"]
    for quantizer in biases:
        assert quantizer.derived_from is not None
        activation, weight = quantizer.derived_from
        bias = solution.weights.get(quantizer.tensor, constants[quantizer.tensor].values)
        qparams[weight] = _widened(qparams[weight], qparams[activation], np.asarray(bias))
    for quantizer in biases:
        qparams[quantizer.quantizer_id] = bias_qparams(quantizer, qparams)
    return replace(solution, qparams=qparams)


def bias_qparams(quantizer: Quantizer, qparams: Mapping[str, QParams]) -> QParams:
    """The parameters that a bias inherits: scale(activation) * scale(weight), zero point 0."""
    assert quantizer.derived_from is not None
    activation, weight = (qparams[i] for i in quantizer.derived_from)
    scale = (activation.scale * weight.scale).astype(np.float32)
    return QParams(
        scale=scale,
        zero_point=np.zeros(scale.shape, np.int32),
        qtype=quantizer.qtype,
        granularity=quantizer.granularity,
    )


def _weight_qparams(weight: Array, quantizer: Quantizer, search: bool) -> QParams:
    granularity = quantizer.granularity
    assert not isinstance(granularity, PerGroup)
    weight = np.asarray(weight, np.float32)
    if search:
        return search_weight_qparams(weight, quantizer.qtype, granularity)
    axes = tuple(
        i
        for i in range(weight.ndim)
        if not (isinstance(granularity, PerAxis) and i == granularity.axis % weight.ndim)
    )
    return symmetric_qparams(np.abs(weight).max(axis=axes, initial=0.0), quantizer.qtype, granularity)


def _widened(weight: QParams, activation: QParams, bias: Array) -> QParams:
    """``weight`` with scales raised where the bias would not fit its integers.

    A channel whose weights are tiny against its bias gets a coarser weight scale; its weights then contribute
    next to nothing to its output either way.
    """
    needed = np.abs(bias).astype(np.float64) / _BIAS_LIMIT / np.maximum(activation.scale, SMALLEST_SCALE)
    scale = np.maximum(weight.scale, needed.astype(np.float32)).astype(np.float32)
    return QParams(
        scale=scale, zero_point=weight.zero_point, qtype=weight.qtype, granularity=weight.granularity
    )
