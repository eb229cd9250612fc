"""Plans of small networks, and the kernels that run what is written of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from onnxptq.calibrate.observers import Observer
from onnxptq.calibrate.ranges import choose_ranges
from onnxptq.calibrate.run import calibrate
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.save import save_graph
from onnxptq.qdq import insert_quantizers
from onnxptq.reconstruct.initial import initial_solution
from onnxptq.runtime import count_kernels
from onnxptq.samples import ListFeeds
from onnxptq.targets import TARGETS, PlacementRequest
from onnxptq.types import Quantizer, QuantPlan
from tests.unit.small_nets import canonical, graph_of, planned, random_samples


def plan_of(model: onnx.ModelProto, folder: Path, target: str, **request: object) -> QuantPlan:
    """What ``target`` does to ``model``."""
    return TARGETS[target](GraphIndex(graph_of(model, folder)), PlacementRequest(**request))  # type: ignore[arg-type]


def edges_of(plan: QuantPlan) -> dict[tuple[str, int], Quantizer]:
    """The quantizer of every edge, by reader and input."""
    return {(site.consumer, site.input_index): q for q in plan.quantizers for site in q.sites}


def reasons_of(plan: QuantPlan) -> dict[str, str]:
    """Why nodes stay in float, by node."""
    return {skip.site: skip.reason for skip in plan.skips}


def quantized_file(model: onnx.ModelProto, folder: Path, observer: Observer, **request: Any) -> Path:
    """``model`` quantized for ort-cpu with random samples and nearest rounding."""
    canonical_model = canonical(model, folder)
    plan = planned(canonical_model, "ort-cpu", **request)
    tensors = sorted({q.tensor for q in plan.quantizers if q.role == "activation"})
    feeds = ListFeeds(random_samples(canonical_model, 4))
    ranges = choose_ranges(plan, calibrate(canonical_model, feeds, tensors), observer)
    solution = initial_solution(canonical_model.graph, plan, ranges)
    path = folder / "quantized.onnx"
    save_graph(insert_quantizers(canonical_model.graph, plan, solution), path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def kernels_of(model: onnx.ModelProto, folder: Path, observer: Observer | None = None) -> Mapping[str, int]:
    """The kernels that onnxruntime runs for ``model``, quantized for ort-cpu."""
    return count_kernels(quantized_file(model, folder, observer or Observer(name="minmax")), folder)
