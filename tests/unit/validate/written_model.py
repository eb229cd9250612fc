"""A small network quantized and written for a target, as the tests of ``onnxptq.validate`` need it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.save import save_graph
from onnxptq.qdq import insert_quantizers
from onnxptq.quantizers.affine import asymmetric_qparams, symmetric_qparams
from onnxptq.reconstruct.initial import initial_solution
from onnxptq.runtime import Session, open_exposed
from onnxptq.targets import TARGETS, PlacementRequest
from onnxptq.types import CanonicalModel, QParams, QuantPlan, Sample, Solution

CHANNELS = 6


@dataclass(frozen=True, eq=False)
class Written:
    """A quantized file and everything that it was written from."""

    path: Path
    model: CanonicalModel
    plan: QuantPlan
    solution: Solution
    samples: tuple[Sample, ...]


class ListFeeds(list[Sample]):
    """Samples in memory."""

    fingerprint = "in memory"
    description = "samples in memory"

    def __iter__(self) -> Iterator[Sample]:
        return super().__iter__()


def network(*, batch: int | str = "batch") -> onnx.ModelProto:
    """Convolutions with ReLU6, Relu and a skip, then a classifier; the feature map is an output too.

    The second convolution has as many inputs as outputs, so that a wrong axis still has the right length.
    """
    rng = np.random.default_rng(7)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        return numpy_helper.from_array(rng.normal(0, 0.4, shape).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], name="conv0", pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["c0", "zero", "six"], ["r0"], name="relu6"),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c1", "r0"], ["sum"], name="sum"),
        helper.make_node("LeakyRelu", ["sum"], ["act"], name="act", alpha=0.1),
        helper.make_node("Conv", ["act", "w2"], ["c2"], name="conv2"),
        helper.make_node("Relu", ["c2"], ["features"], name="relu"),
        helper.make_node("GlobalAveragePool", ["features"], ["pooled"], name="pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["scores"], name="head"),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 4, 8, 8])],
        [
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, 7]),
            helper.make_tensor_value_info("features", TensorProto.FLOAT, [batch, CHANNELS, 8, 8]),
        ],
        [
            weight("w0", CHANNELS, 4, 3, 3),
            weight("b0", CHANNELS),
            weight("w1", CHANNELS, CHANNELS, 3, 3),
            weight("b1", CHANNELS),
            weight("w2", CHANNELS, CHANNELS, 1, 1),
            weight("w3", CHANNELS, 7),
            weight("b3", 7),
            numpy_helper.from_array(np.float32(0), "zero"),
            numpy_helper.from_array(np.float32(6), "six"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return model


def samples(count: int, *, seed: int = 0, batch: int = 2) -> tuple[Sample, ...]:
    """Random pictures."""
    rng = np.random.default_rng(seed)
    return tuple({"x": rng.normal(0, 1, (batch, 4, 8, 8)).astype(np.float32)} for _ in range(count))


def minmax_solution(model: CanonicalModel, plan: QuantPlan, feeds: tuple[Sample, ...]) -> Solution:
    """Ranges from the extremes over ``feeds``, shared in scale groups."""
    ranges: dict[str, QParams] = {}
    activations = [q for q in plan.quantizers if q.role == "activation"]
    inner = sorted({q.tensor for q in activations} - set(feeds[0]))
    session = open_exposed(model.path, inner, exact=True)
    runs = [{**feed, **session.run(feed, inner)} for feed in feeds]
    ends = {name: (min(r[name].min() for r in runs), max(r[name].max() for r in runs)) for name in runs[0]}
    for quantizer in activations:
        members = [q.tensor for q in activations if q.scale_group == quantizer.scale_group]
        low, high = min(ends[m][0] for m in members), max(ends[m][1] for m in members)
        if quantizer.symmetric:
            params = symmetric_qparams(max(-low, high), quantizer.qtype, quantizer.granularity)
        else:
            params = asymmetric_qparams(float(low), float(high), quantizer.qtype)
        ranges[quantizer.quantizer_id] = params
    return initial_solution(model.graph, plan, ranges)


def write(
    source: Path, folder: Path, target: str, request: PlacementRequest, feeds: tuple[Sample, ...]
) -> Written:
    """Canonicalize, place, solve and write."""
    model = canonicalize(source, folder)
    plan = TARGETS[target](GraphIndex(model.graph), request)
    solution = minmax_solution(model, plan, feeds)
    path = folder / f"{target}.onnx"
    save_graph(insert_quantizers(model.graph, plan, solution), path)
    return Written(path=path, model=model, plan=plan, solution=solution, samples=feeds)


def run_outputs(path: Path, feed: Sample, *, exact: bool = False) -> dict[str, np.ndarray]:
    """All outputs of a model."""
    return Session(path, exact=exact).run(feed)
