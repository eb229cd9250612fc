"""The matrix form of old softmax nodes goes where the rows lie along the last axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_graphsurgeon import Graph

from onnxptq.graph.passes import remove_identity, unwrap_softmax
from tests.unit.graph.graph_helpers import apply, build, node

TARGETS = {"whole": np.array([-1, 2, 4]), "other": np.array([-1, 8]), "copies": np.array([0, 1, 2])}


def both(graph: Graph) -> int:
    return unwrap_softmax.run(graph) + remove_identity.run(graph)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax"])
@pytest.mark.parametrize(("axis", "softmax_axis"), [(2, -1), (-1, 1)])
def test_unwrapped(tmp_path: Path, op: str, axis: int, softmax_axis: int) -> None:
    nodes = [
        node("Flatten", "x", "f", axis=axis),
        node(op, "f", "s", axis=softmax_axis),
        node("Reshape", "s whole", "r"),
    ]
    model = build([*nodes, node("Neg", "r", "y")], {"x": ["n", 2, 4]}, ["y"], TARGETS)
    count, ops, _ = apply(model, both, tmp_path, tolerance=0)
    assert (count, ops) == (2, {op: 1, "Neg": 1})


def test_another_target_keeps_its_reshape(tmp_path: Path) -> None:
    nodes = [node("Flatten", "x", "f", axis=2), node("Softmax", "f", "s"), node("Reshape", "s other", "y")]
    count, ops, _ = apply(build(nodes, {"x": ["n", 2, 4]}, ["y"], TARGETS), both, tmp_path, tolerance=0)
    assert (count, ops) == (1, {"Softmax": 1, "Reshape": 1})


@pytest.mark.parametrize(
    ("flatten_axis", "softmax_axis", "target", "extra"),
    [(1, -1, "whole", False), (2, 0, "whole", False), (2, -1, "copies", False), (2, -1, "whole", True)],
    ids=["two axes", "columns", "copied dimension", "second reader"],
)
def test_declined(tmp_path: Path, flatten_axis: int, softmax_axis: int, target: str, extra: bool) -> None:
    nodes = [
        node("Flatten", "x", "f", axis=flatten_axis),
        node("Softmax", "f", "s", axis=softmax_axis),
        node("Reshape", f"s {target}", "y"),
        *([node("Neg", "s", "z")] if extra else []),
    ]
    shape = [2, 3, 2] if target == "copies" else [3, 2, 4]
    model = build(nodes, {"x": shape}, ["y", "z"] if extra else ["y"], TARGETS)
    count, ops, _ = apply(model, unwrap_softmax.run, tmp_path, tolerance=0)
    assert (count, ops["Flatten"]) == (0, 1)
