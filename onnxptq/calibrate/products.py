"""Ranges of softmax outputs, chosen by what they do to the product that reads them.

Attention weights P are many and small: on a grid over [0, 1] most of a row rounds to zero together, and
the lost mass shifts every output in the same direction. The error of P itself does not show that; the
error of the product does. So the upper end of the range is the one that minimises

    sum || (P - P_hat) V ||^2

over a grid of ends between the largest observed weight and 1/128 of it, on a few samples (the focusing
interval of AIQViT, arXiv 2502.04628, with its lower end at 0).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.save import exposed_copy
from onnxptq.quantizers.affine import asymmetric_qparams, fake_quantize, symmetric_qparams
from onnxptq.runtime import Provider, open_transient
from onnxptq.types import Array, CanonicalModel, PerTensor, Progress, QParams, Quantizer, QuantPlan, Sample

_ENDS = tuple(2.0 ** (-k / 3) for k in range(22))
"""Candidate upper ends, relative to the largest weight: three per octave."""

_ROWS = 64
"""Rows of each attention matrix that are looked at; evenly spread."""


def choose_softmax_ranges(
    model: CanonicalModel,
    plan: QuantPlan,
    ranges: Mapping[str, QParams],
    samples: Sequence[Sample],
    *,
    provider: Provider = "cpu",
    progress: Progress | None = None,
) -> dict[str, QParams]:
    """Parameters of the quantizers behind a softmax that feed a product of two activations, by quantizer id.

    Args:
        ranges: the parameters found so far; their upper ends bound the search from above together with the
            largest weight in ``samples``.
    """
    index = GraphIndex(model.graph)
    sites = {q.quantizer_id: (q, found) for q in plan.quantizers if (found := _product(index, q)) is not None}
    if not sites or not samples:
        return {}
    exposed = sorted({name for _, pair in sites.values() for name in pair})
    session = open_transient(
        model.path.with_name(f"products_{model.path.name}"),
        lambda path: exposed_copy(model.path, exposed, path),
        provider=provider,
    )
    losses: dict[str, list[list[float]]] = {i: [[] for _ in _ENDS] for i in sites}
    top = {i: float(_upper_end(ranges[i])) for i in sites}
    step = progress.start("softmax ranges", len(samples)) if progress else None
    for sample in samples:
        values = session.run(sample, exposed)
        for quantizer_id, (quantizer, (weights, other)) in sites.items():
            for k, qparams in enumerate(_candidates(quantizer, top[quantizer_id])):
                losses[quantizer_id][k].append(_product_error(values[weights], values[other], qparams))
        if step:
            step()
    result = {}
    for quantizer_id, (quantizer, _) in sites.items():
        total = [math.fsum(rows) for rows in losses[quantizer_id]]
        result[quantizer_id] = _candidates(quantizer, top[quantizer_id])[int(np.argmin(total))]
    return result


def _product(index: GraphIndex, quantizer: Quantizer) -> tuple[str, str] | None:
    """The softmax output and the other operand of the one MatMul that reads it, if that is what this is."""
    node = index.producer(quantizer.tensor)
    reader = index.sole_user(quantizer.tensor)
    if quantizer.role != "activation" or node is None or node.op != "Softmax":
        return None
    if reader is None or reader.op != "MatMul" or reader.inputs[0].name != quantizer.tensor:
        return None
    other = reader.inputs[1].name
    return (quantizer.tensor, other) if index.producer(other) is not None else None


def _candidates(quantizer: Quantizer, top: float) -> list[QParams]:
    if quantizer.symmetric:
        return [symmetric_qparams(np.asarray(top * end), quantizer.qtype, PerTensor()) for end in _ENDS]
    return [asymmetric_qparams(0.0, top * end, quantizer.qtype) for end in _ENDS]


def _upper_end(qparams: QParams) -> float:
    return float((qparams.qtype.qmax - qparams.zero_point) * qparams.scale)


def _product_error(weights: Array, other: Array, qparams: QParams) -> float:
    rows = weights[..., :: max(1, weights.shape[-2] // _ROWS), :]
    error = (rows - fake_quantize(rows, qparams)) @ other
    flat = error.reshape(-1).astype(np.float64)
    return float(flat @ flat)
