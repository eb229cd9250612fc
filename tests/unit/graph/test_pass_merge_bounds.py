"""Bounds on values become one Clip, which kernels take in."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.passes import merge_bounds
from onnxptq.targets import ort_cpu
from onnxptq.targets.placement import PlacementRequest
from onnxptq.types import QuantPlan
from tests.unit.graph.graph_helpers import apply, build, node, random

WEIGHTS = {
    "zero": np.float32(0.0), "half": np.float32([0.5]), "low": np.float32(-0.7), "many": random(4, seed=1),
    "deep": np.zeros((1,) * 4, np.float32), "all": np.float32(np.inf),
}  # fmt: skip


def net(nodes: list[onnx.NodeProto], outputs: tuple[str, ...] = ("y",)) -> onnx.ModelProto:
    used = {name for n in nodes for name in n.input}
    return build(nodes, {"x": ["n", 4]}, outputs, {k: v for k, v in WEIGHTS.items() if k in used})


MERGED = {
    "max": ([node("Max", "x low", "y")], {"Clip": 1}, 1),
    "max with zero": ([node("Max", "zero x", "y")], {"Relu": 1}, 1),
    "min": ([node("Min", "x half", "y")], {"Clip": 1}, 1),
    "relu6": ([node("Max", "x zero", "a"), node("Min", "a half", "y")], {"Clip": 1}, 3),
    "relu and min": ([node("Relu", "x", "a"), node("Min", "half a", "y")], {"Clip": 1}, 2),
    "clip and relu": ([node("Clip", "x low half", "a"), node("Relu", "a", "y")], {"Clip": 1}, 1),
    "upper and lower": ([node("Min", "x half", "a"), node("Max", "a low", "y")], {"Clip": 1}, 3),
    "beyond": ([node("Max", "x half", "a"), node("Min", "a low", "y")], {"Clip": 1}, 3),
    "clip of nothing": ([node("Clip", "x", "a"), node("Relu", "a", "y")], {"Relu": 1}, 1),
    "three": (
        [node("Relu", "x", "a"), node("Min", "a half", "b"), node("Max", "b low", "y")], {"Clip": 1}, 4
    ),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "wanted", "changed"), MERGED.values(), ids=MERGED)
def test_bounds_are_merged(
    nodes: list[onnx.NodeProto], wanted: dict[str, int], changed: int, tmp_path: Path
) -> None:
    count, ops, _ = apply(net(nodes), merge_bounds.run, tmp_path, tolerance=0)
    assert (count, dict(ops)) == (changed, wanted)


DECLINED = {
    "one per channel": (net([node("Max", "x many", "y")]), {"Max": 1}),
    "more dimensions": (net([node("Max", "x deep", "y")]), {"Max": 1}),
    "no bound": (net([node("Min", "x all", "y")]), {"Min": 1}),
    "one operand": (net([node("Max", "x", "y")]), {"Max": 1}),
    "three operands": (net([node("Max", "x zero low", "y")]), {"Max": 1}),
    "no constant": (net([node("Neg", "x", "a"), node("Min", "x a", "y")]), {"Neg": 1, "Min": 1}),
    "out of order": (net([node("Clip", "x half low", "a"), node("Relu", "a", "y")]), {"Clip": 1, "Relu": 1}),
    "relu alone": (net([node("Relu", "x", "y")]), {"Relu": 1}),
    "another reader": (
        net([node("Relu", "x", "a"), node("Clip", "a low half", "y"), node("Neg", "a", "z")], ("y", "z")),
        {"Relu": 1, "Clip": 1, "Neg": 1},
    ),
    "the caller reads it": (
        net([node("Relu", "x", "a"), node("Clip", "a low half", "y")], ("a", "y")), {"Relu": 1, "Clip": 1}
    ),
    "integers": (
        build(
            [node("Shape", "x", "a"), node("Max", "a one", "y")], {"x": ["n", 4]}, {"y": 7}, {"one": np.int64(1)}
        ),
        {"Shape": 1, "Max": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("model", "wanted"), DECLINED.values(), ids=DECLINED)
def test_anything_else_stays(model: onnx.ModelProto, wanted: dict[str, int], tmp_path: Path) -> None:
    count, ops, _ = apply(model, merge_bounds.run, tmp_path, tolerance=0)
    assert (count, dict(ops)) == (0, wanted)


BOUND = st.sampled_from([-1.0, -0.25, 0.0, 0.25, 1.0])


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chain=st.lists(st.tuples(st.sampled_from(["Max", "Min", "Relu"]), BOUND), min_size=1, max_size=5))
def test_any_row_of_bounds_computes_the_same(chain: list[tuple[str, float]], tmp_path: Path) -> None:
    nodes, weights, name = [], {}, "x"
    for number, (op, bound) in enumerate(chain):
        out = "y" if number == len(chain) - 1 else f"t{number}"
        weights[f"c{number}"] = np.float32(bound)
        nodes.append(node(op, name if op == "Relu" else f"{name} c{number}", out))
        name = out
    used = {i for n in nodes for i in n.input}
    model = build(nodes, {"x": ["n", 4]}, ["y"], {k: v for k, v in weights.items() if k in used})
    _, ops, _ = apply(model, merge_bounds.run, tmp_path, tolerance=0)
    assert sum(ops.values()) == 1


def _plan(activation: list[onnx.NodeProto], folder: Path) -> QuantPlan:
    weights = {"w": random(6, 4, 3, 3, seed=1), "v": random(4, 6, 3, 3, seed=2)}
    bounds = {"zero": np.float32(0.0), "six": np.float32(6.0)}
    used = {i for n in activation for i in n.input}
    model = build(
        [node("Conv", "x w", "a"), *activation, node("Conv", "c v", "y")],
        {"x": [1, 4, 8, 8]},
        ["y"],
        {**weights, **{k: v for k, v in bounds.items() if k in used}},
    )
    folder.mkdir()
    onnx.save(model, str(folder / "net.onnx"))
    index = GraphIndex(canonicalize(folder / "net.onnx", folder).graph)
    return ort_cpu.place(index, PlacementRequest())


def test_a_convolution_takes_in_bounds_however_they_are_written(tmp_path: Path) -> None:
    written = (
        [node("Clip", "a zero six", "c")],
        [node("Max", "a zero", "b"), node("Min", "b six", "c")],
        [node("Relu", "a", "b"), node("Min", "b six", "c")],
    )
    plans = [_plan(activation, tmp_path / str(i)) for i, activation in enumerate(written)]
    for one, other in itertools.pairwise(plans):
        assert one.quantizers == other.quantizers
