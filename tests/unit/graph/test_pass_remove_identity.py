"""Idle nodes go; nodes that only look idle, and those between two names that must stay, remain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto

from onnxptq.graph.passes import remove_identity
from tests.unit.graph.graph_helpers import apply, build, node, random

WEIGHTS = {"half": np.array(0.5, np.float32), "yes": np.array(True), "no": np.array(False)}


@pytest.mark.parametrize(
    "idle",
    [
        node("Identity", "a", "b"),
        node("Dropout", "a", "b"),
        node("Dropout", "a half no", "b"),
        node("Cast", "a", "b", to=TensorProto.FLOAT),
        node("Transpose", "a", "b", perm=[0, 1]),
        node("Reshape", "a same", "b"),
        node("Reshape", "a rest", "b"),
    ],
    ids=["identity", "dropout", "dropout-inference", "cast", "transpose", "reshape", "reshape-symbolic"],
)
@pytest.mark.parametrize("is_last", [False, True], ids=["inside", "at-output"])
def test_removed(tmp_path: Path, idle: object, is_last: bool) -> None:
    shape = {"same": np.array([0, 4]), "rest": np.array([-1, 4])}
    nodes = [node("Relu", "x", "a"), idle]
    if not is_last:
        nodes.append(node("Neg", "b", "y"))
    model = build(nodes, {"x": ["n", 4]}, ["b" if is_last else "y"], {**WEIGHTS, **shape})
    count, ops, _ = apply(model, remove_identity.run, tmp_path, tolerance=0)
    assert count == 1
    assert sum(ops.values()) == len(nodes) - 1


def test_other_readers_follow_the_renamed_output(tmp_path: Path) -> None:
    model = build(
        [node("Relu", "x", "a"), node("Identity", "a", "y"), node("Neg", "a", "z")], {"x": [2]}, ["y", "z"]
    )
    count, ops, graph = apply(model, remove_identity.run, tmp_path, tolerance=0)
    assert (count, ops["Identity"]) == (1, 0)
    assert next(n for n in graph.nodes if n.op == "Neg").inputs[0].name == "y"


def test_an_identity_of_an_initializer_goes(tmp_path: Path) -> None:
    model = build(
        [node("Identity", "w", "v"), node("MatMul", "x v", "y")], {"x": ["n", 3]}, ["y"], {"w": random(3, 2)}
    )
    count, ops, _ = apply(model, remove_identity.run, tmp_path, tolerance=0)
    assert (count, ops) == (1, {"MatMul": 1})


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ([node("Identity", "x", "y")], ["y"]),
        ([node("Relu", "x", "a"), node("Identity", "a", "y")], ["a", "y"]),
        ([node("Reshape", "x flat", "b"), node("Neg", "b", "y")], ["y"]),
        ([node("Transpose", "x", "b", perm=[1, 0]), node("Neg", "b", "y")], ["y"]),
        ([node("Transpose", "x", "b"), node("Neg", "b", "y")], ["y"]),
        (
            [
                node("Cast", "x", "b", to=TensorProto.INT32),
                node("Cast", "b", "y", to=TensorProto.FLOAT),
            ],
            ["y"],
        ),
    ],
    ids=["input-to-output", "two-outputs", "flatten", "transpose", "transpose-default", "cast"],
)
def test_kept(tmp_path: Path, nodes: list[object], outputs: list[str]) -> None:
    model = build(nodes, {"x": ["n", 4]}, outputs, {"flat": np.array([-1])})
    count, ops, _ = apply(model, remove_identity.run, tmp_path, tolerance=0)
    assert count == 0
    assert sum(ops.values()) == len(nodes)


def test_swapped_symbolic_dimensions_are_no_idle_reshape(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s swap", "t"),
        node("Reshape", "x t", "r"),
        node("Neg", "r", "y"),
    ]
    model = build(nodes, {"x": ["n", "m"]}, ["y"], {"swap": np.array([1, 0])})
    count, ops, _ = apply(model, remove_identity.run, tmp_path, tolerance=0)
    assert (count, ops["Reshape"]) == (0, 1)


def test_a_training_dropout_and_a_used_mask_stay(tmp_path: Path) -> None:
    graph_nodes = [node("Dropout", "x half no", "a m"), node("Where", "m a x", "y")]
    model = build(graph_nodes, {"x": [2, 3]}, ["y"], WEIGHTS)
    assert apply(model, remove_identity.run, tmp_path, tolerance=0)[0] == 0
    training = build(
        [node("Dropout", "x half yes", "a"), node("Neg", "a", "y")], {"x": [2, 3]}, ["y"], WEIGHTS
    )
    import onnx_graphsurgeon as gs

    assert remove_identity.run(gs.import_onnx(training)) == 0
