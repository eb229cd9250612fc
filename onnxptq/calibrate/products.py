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

from onnxptq.graph.attention import Attention, find_attention
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
    sites = _softmax_sites(GraphIndex(model.graph), plan)
    if not sites or not samples:
        return {}
    read = {name for _, products in sites.values() for a in products for name in (a.weights, a.values)}
    exposed = sorted(read - set(samples[0]))
    session = open_transient(
        model.path.with_name(f"products_{model.path.name}"),
        lambda path: exposed_copy(model.path, exposed, path),
        provider=provider,
    )
    losses: dict[str, list[list[float]]] = {i: [[] for _ in _ENDS] for i in sites}
    top = {i: float(_upper_end(ranges[i])) for i in sites}
    step = progress.start("softmax ranges", len(samples)) if progress else None
    for sample in samples:
        values = {**sample, **session.run(sample, exposed)}
        for quantizer_id, (quantizer, products) in sites.items():
            for k, qparams in enumerate(_candidates(quantizer, top[quantizer_id])):
                losses[quantizer_id][k] += [_product_error(product, values, qparams) for product in products]
        if step:
            step()
    result = {}
    for quantizer_id, (quantizer, _) in sites.items():
        total = [math.fsum(rows) for rows in losses[quantizer_id]]
        result[quantizer_id] = _candidates(quantizer, top[quantizer_id])[int(np.argmin(total))]
    return result


def _softmax_sites(index: GraphIndex, plan: QuantPlan) -> dict[str, tuple[Quantizer, Sequence[Attention]]]:
    """The quantizers of softmax weights, by id, with the products that read them. One that serves another reader
    as well is left out: its range is not for the product alone to choose."""
    products = {
        (found.product.name, found.weights_index): found
        for found in find_attention(index)
        if found.form == "product" and found.product.op in ("MatMul", "Gemm")
    }
    result: dict[str, tuple[Quantizer, Sequence[Attention]]] = {}
    for quantizer in plan.quantizers:
        read = [products.get((site.consumer, site.input_index)) for site in quantizer.sites]
        known = [found for found in read if found is not None]
        if quantizer.role == "activation" and len(known) == len(read):
            result[quantizer.quantizer_id] = (quantizer, known)
    return result


def _candidates(quantizer: Quantizer, top: float) -> list[QParams]:
    if quantizer.symmetric:
        return [symmetric_qparams(np.asarray(top * end), quantizer.qtype, PerTensor()) for end in _ENDS]
    return [asymmetric_qparams(0.0, top * end, quantizer.qtype) for end in _ENDS]


def _upper_end(qparams: QParams) -> float:
    return float((qparams.qtype.qmax - qparams.zero_point) * qparams.scale)


def _product_error(found: Attention, values: Mapping[str, Array], qparams: QParams) -> float:
    weights, other = _operands(found, values)
    rows = weights[..., :: max(1, weights.shape[-2] // _ROWS), :]
    error = (rows - fake_quantize(rows, qparams)) @ other
    flat = error.reshape(-1).astype(np.float64)
    return float(flat @ flat)


def _operands(found: Attention, values: Mapping[str, Array]) -> tuple[Array, Array]:
    """P and V of the product P V; of V P they are P^T and V^T, as (V P)^T = P^T V^T."""
    names = ("transA", "transB") if found.product.op == "Gemm" else ("", "")
    left, right = (
        values[tensor.name].T if found.product.attrs.get(name, 0) else values[tensor.name]
        for tensor, name in zip(found.product.inputs[:2], names, strict=True)
    )
    return (left, right) if found.weights_index == 0 else (right.swapaxes(-1, -2), left.swapaxes(-1, -2))
