"""Bias correction: what quantization shifts on average is added back to the layer's bias.

For a layer y = W x + b whose quantized form is y' = Q(W) Q(x) + b,

    b_new[c] = b[c] + E[y[c] - y'[c]],

with the expectation over samples, batch and positions, and x taken from the float network (Nagel et al.,
"Data-free quantization through weight equalization and bias correction", arXiv 1906.04721, in its
empirical form). The difference is measured by running the layer twice inside one float graph, so padding,
groups, dilations and clipping are all accounted for exactly.

Sums over samples are exactly rounded (``math.fsum``), so the order of samples does not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import Linear, find_linears
from onnxptq.graph.save import save_graph
from onnxptq.runtime import Provider, open_transient
from onnxptq.types import (
    Array,
    CanonicalModel,
    FloatArray,
    Progress,
    QuantPlan,
    Sample,
    Site,
    Solution,
    started,
)

Insert = Callable[[gs.Graph, QuantPlan, Solution], gs.Graph]
"""Writes quantizers into a graph (``onnxptq.qdq.insert_quantizers``)."""

_TWIN = "/quantized_twin"


def correct_biases(
    model: CanonicalModel,
    plan: QuantPlan,
    solution: Solution,
    samples: Collection[Sample],
    *,
    insert: Insert,
    work_dir: Path,
    provider: Provider = "cpu",
    progress: Progress | None = None,
) -> Solution:
    """``solution`` with corrected biases in its ``weights``.

    Layers without a constant bias of their own are left as they are.
    """
    index = GraphIndex(model.graph)
    quantized = {(s.consumer, s.input_index) for q in plan.quantizers if q.role != "bias" for s in q.sites}
    layers = [
        layer
        for layer in find_linears(index)
        if _owns_bias(index, layer) and any((layer.node.name, i) in quantized for i in range(2))
    ]
    if not layers or not samples:
        return solution
    graph, outputs = _error_graph(model, layers)
    twins = _redirected(plan, {layer.node.name for layer in layers})
    session = open_transient(
        work_dir / "bias_errors.onnx",
        lambda path: save_graph(insert(graph, twins, solution), path, share=True),
        provider=provider,
    )
    tick = started(progress, "correct biases", len(samples))
    seen: dict[str, list[Array]] = {name: [] for name in outputs}
    for sample in samples:
        for name, value in session.run(sample, outputs).items():
            seen[name].append(value.reshape(-1).astype(np.float64))
        tick()
    weights = dict(solution.weights)
    for layer, name in zip(layers, outputs, strict=True):
        assert layer.bias is not None
        bias = np.asarray(solution.weights.get(layer.bias.name, layer.bias.values), np.float32)
        weights[layer.bias.name] = _shifted(bias, _mean(seen[name]))
    return replace(solution, weights=weights)


def _owns_bias(index: GraphIndex, layer: Linear) -> bool:
    return layer.bias is not None and len(index.uses(layer.bias.name)) == 1


def _mean(rows: list[Array]) -> FloatArray:
    return np.asarray([math.fsum(column) / len(rows) for column in zip(*rows, strict=True)], np.float32)


def _shifted(bias: FloatArray, shift: FloatArray) -> FloatArray:
    """``bias + shift``; a bias that cannot hold one value per channel, or a shift that is not finite, stays."""
    if bias.size != shift.size or not np.isfinite(shift).all():
        return bias
    return (bias + shift.reshape(bias.shape)).astype(np.float32)


def _error_graph(model: CanonicalModel, layers: list[Linear]) -> tuple[gs.Graph, list[str]]:
    """The float graph with a twin of every layer, and one output per layer: the mean error per channel."""
    graph = model.graph.copy()
    nodes = {node.name: node for node in graph.nodes}
    outputs = []
    for layer in layers:
        node = nodes[layer.node.name]
        twin_output = gs.Variable(node.outputs[0].name + _TWIN, dtype=np.float32)
        twin = gs.Node(node.op, node.name + _TWIN, dict(node.attrs), list(node.inputs), [twin_output])
        difference = gs.Variable(node.outputs[0].name + "/error", dtype=np.float32)
        mean = gs.Variable(node.outputs[0].name + "/mean_error", dtype=np.float32)
        graph.nodes += [twin, gs.Node("Sub", inputs=[node.outputs[0], twin_output], outputs=[difference])]
        if node.op in ("MatMul", "Gemm"):  # channels last, whatever the rank
            graph.nodes += _rows_mean(difference, mean, layer.weight.shape[layer.axis], model.opset)
        else:
            axes = [i for i in range(len(layer.weight.shape)) if i != 1]
            graph.nodes.append(_reduce_mean(difference, mean, axes, model.opset))
        outputs.append(mean)
    graph.outputs = list(outputs)
    return graph, [tensor.name for tensor in outputs]


def _rows_mean(source: gs.Tensor, target: gs.Tensor, channels: int, opset: int) -> list[gs.Node]:
    rows = gs.Variable(target.name + "/rows", dtype=np.float32)
    shape = gs.Constant(target.name + "/shape", np.asarray([-1, channels], np.int64))
    reshape = gs.Node("Reshape", inputs=[source, shape], outputs=[rows])
    return [reshape, _reduce_mean(rows, target, [0], opset)]


def _reduce_mean(source: gs.Tensor, target: gs.Tensor, axes: list[int], opset: int) -> gs.Node:
    if opset < 18:
        return gs.Node("ReduceMean", attrs={"axes": axes, "keepdims": 0}, inputs=[source], outputs=[target])
    constant = gs.Constant(target.name + "/axes", np.asarray(axes, np.int64))
    return gs.Node("ReduceMean", attrs={"keepdims": 0}, inputs=[source, constant], outputs=[target])


def _redirected(plan: QuantPlan, layers: Collection[str]) -> QuantPlan:
    """The plan's quantizers on the inputs of ``layers``, moved to their twins."""

    def moved(site: Site) -> Site:
        return replace(site, consumer=site.consumer + _TWIN)

    kept = []
    for quantizer in plan.quantizers:
        sites = tuple(moved(s) for s in quantizer.sites if s.consumer in layers and s.input_index < 2)
        if sites:
            kept.append(replace(quantizer, sites=sites))
    return QuantPlan(target=plan.target, quantizers=tuple(kept))
