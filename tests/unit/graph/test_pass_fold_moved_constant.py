"""Constants behind operators that only move or cast them become constants, with identical bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.passes import fold_moved_constant
from onnxptq.graph.surgeon import import_graph
from tests.unit.graph.graph_helpers import apply, assert_close, build, feed_for, node, random, run


def declined(model: onnx.ModelProto, tmp_path: Path) -> None:
    before = [n.op_type for n in model.graph.node]
    count, ops, _ = apply(model, fold_moved_constant.run, tmp_path, tolerance=0)
    assert count == 0
    assert sorted(ops.elements()) == sorted(before)


@pytest.mark.parametrize(
    ("op", "shape", "parameter", "attrs", "result"),
    [
        ("Transpose", (3, 4), None, {}, (4, 3)),
        ("Transpose", (2, 3, 4), None, {"perm": [2, 0, 1]}, (4, 2, 3)),
        ("Transpose", (2, 3, 4), None, {}, (4, 3, 2)),
        ("Transpose", (4, 4), None, {"perm": [1, 0]}, (4, 4)),
        ("Reshape", (2, 3, 4), [4, 6], {}, (4, 6)),
        ("Reshape", (2, 3, 4), [0, -1], {}, (2, 12)),
        ("Flatten", (2, 3, 4), None, {}, (2, 12)),
        ("Flatten", (2, 3, 4), None, {"axis": -1}, (6, 4)),
        ("Flatten", (2, 3, 4), None, {"axis": 3}, (24, 1)),
        ("Flatten", (2, 3, 4), None, {"axis": 0}, (1, 24)),
        ("Squeeze", (1, 3, 1, 4), [0, -2], {}, (3, 4)),
        ("Squeeze", (1, 3, 1, 4), [2], {}, (1, 3, 4)),
        ("Squeeze", (1, 3, 1, 4), None, {}, (3, 4)),
        ("Unsqueeze", (3, 4), [-1, 0], {}, (1, 3, 4, 1)),
        ("Unsqueeze", (3, 4), [1], {}, (3, 1, 4)),
    ],
)
def test_moves(
    tmp_path: Path,
    op: str,
    shape: tuple[int, ...],
    parameter: list[int] | None,
    attrs: dict[str, Any],
    result: tuple[int, ...],
) -> None:
    constants: dict[str, np.ndarray] = {"w": random(*shape)}
    if parameter is not None:
        constants["p"] = np.asarray(parameter, np.int64)
    names = " ".join(constants)
    model = build(
        [node(op, names, "moved", **attrs), node("Add", "x moved", "y")],
        {"x": [2, *result]},
        ["y"],
        constants,
    )
    count, ops, graph = apply(model, fold_moved_constant.run, tmp_path, tolerance=0)
    assert (count, ops) == (1, {"Add": 1})
    assert tuple(graph.tensors()["moved"].shape) == result
    assert "w" not in graph.tensors()


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_casts_round_as_the_operator_does(tmp_path: Path, kind: type) -> None:
    values = np.array([1 / 3, 2**-140, -(2**-150), 1 + 2**-24, 1 + 3 * 2**-24, 60000.0, np.inf], kind)
    if kind is np.float64:
        values[5] = 1e39
    model = build(
        [node("Cast", "w", "c", to=TensorProto.FLOAT), node("Max", "x c", "y")],
        {"x": [7]},
        ["y"],
        {"w": values},
    )
    graph = import_graph(model, tmp_path)
    assert fold_moved_constant.run(graph) == 1
    feed = {"x": np.full(7, -np.inf, np.float32)}
    found = graph.tensors()["c"].values
    assert found.dtype == np.float32
    assert found.tobytes() == run(model, feed)["y"].tobytes()


@pytest.mark.parametrize("opset", [11, 13])
def test_axes_as_attributes_and_chains(tmp_path: Path, opset: int) -> None:
    axes = {"axes": [0]} if opset < 13 else {}
    extra = "" if opset < 13 else " zero"
    nodes = [
        node("Transpose", "w", "t", perm=[1, 0]),
        node("Unsqueeze", f"t{extra}", "u", **axes),
        node("Reshape", "u to", "r"),
        node("Squeeze", f"r{extra}", "s", **axes),
        node("MatMul", "x s", "y"),
    ]
    weights = {"w": random(6, 4), "to": np.array([1, 8, 3])} | ({"zero": np.array([0])} if opset > 12 else {})
    model = build(nodes, {"x": ["n", 8]}, ["y"], weights, opset=opset)
    count, ops, _ = apply(model, fold_moved_constant.run, tmp_path, tolerance=0)
    assert (count, ops) == (4, {"MatMul": 1})


def test_a_shared_weight_is_moved_once(tmp_path: Path) -> None:
    nodes = [
        node("Gather", "e ids", "x"),
        node("Transpose", "e", "t1", perm=[1, 0]),
        node("Transpose", "e", "t2", perm=[1, 0]),
        node("MatMul", "x t1", "m"),
        node("MatMul", "x t2", "k"),
        node("Add", "m k", "y"),
    ]
    model = build(nodes, {"ids": ["n"]}, ["y"], {"e": random(5, 5)}, input_type=TensorProto.INT64)
    graph = import_graph(model, tmp_path)
    assert fold_moved_constant.run(graph) == 2
    graph.cleanup()
    constants = [name for name, t in graph.tensors().items() if isinstance(t, gs.Constant)]
    assert sorted(constants) == ["e", "t1"]
    assert [t.name for n in graph.nodes if n.op == "MatMul" for t in n.inputs] == ["x", "t1", "x", "t1"]
    np.testing.assert_array_equal(graph.tensors()["t1"].values, random(5, 5).T)


def test_equal_shapes_are_not_equal_constants(tmp_path: Path) -> None:
    """A square weight as it is, transposed, and transposed back; and in rows, read in two orders."""
    nodes = [
        node("Transpose", "w", "t", perm=[1, 0]),
        node("Transpose", "w", "same", perm=[0, 1]),
        node("Transpose", "t", "back", perm=[1, 0]),
        node("Reshape", "t to", "rows"),
        *(node("MatMul", f"x {name}", f"by_{name}") for name in ("t", "same", "back", "rows")),
        node("Concat", "by_t by_same by_back by_rows", "y", axis=0),
    ]
    model = build(nodes, {"x": ["n", 4]}, ["y"], {"w": random(4, 4), "to": np.array([4, -1])})
    count, _, _ = apply(model, fold_moved_constant.run, tmp_path, tolerance=0)
    assert count == 4


def test_what_would_only_be_stored_twice_stays(tmp_path: Path) -> None:
    nodes = [
        node("MatMul", "x w", "m"),
        node("Transpose", "w", "t", perm=[1, 0]),
        node("Add", "m t", "y"),
    ]
    declined(build(nodes, {"x": [4, 4]}, ["y"], {"w": random(4, 4)}), tmp_path)


def test_results_that_the_caller_reads_stay(tmp_path: Path) -> None:
    nodes = [node("Transpose", "w", "t"), node("MatMul", "x t", "y")]
    declined(build(nodes, {"x": ["n", 4]}, ["y", "t"], {"w": random(3, 4)}), tmp_path)


def test_what_is_not_constant_stays(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Reshape", "w s", "r"),
        node("Transpose", "x", "t"),
        node("Transpose", "t", "t2"),
        node("Add", "r t2", "y"),
    ]
    declined(build(nodes, {"x": [3, 4]}, ["y"], {"w": random(12)}), tmp_path)


@pytest.mark.parametrize("kind", [np.int64, np.bool_])
def test_other_casts_stay(tmp_path: Path, kind: type) -> None:
    nodes = [node("Cast", "w", "c", to=TensorProto.FLOAT), node("Add", "x c", "y")]
    declined(build(nodes, {"x": [3]}, ["y"], {"w": np.array([0, 1, 1], kind)}), tmp_path)


def test_element_types_without_numpy_stay(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "w", "t"),
        node("Cast", "t", "c", to=TensorProto.FLOAT),
        node("MatMul", "x c", "y"),
    ]
    model = build(nodes, {"x": ["n", 4]}, ["y"], {"w": random(3, 4)})
    raw = (random(3, 4).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    model.graph.initializer[0].CopyFrom(helper.make_tensor("w", TensorProto.BFLOAT16, [3, 4], raw, raw=True))
    graph = import_graph(model, tmp_path)
    assert fold_moved_constant.run(graph) == 0


def test_constants_that_a_nested_graph_reads_stay(tmp_path: Path) -> None:
    def branch(op: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{op}_y", TensorProto.FLOAT, ["n", 3])
        return helper.make_graph([helper.make_node(op, ["x", "t"], [f"{op}_y"])], op, [], [output])

    nodes = [
        node("Transpose", "w", "t"),
        node("ReduceSum", "x", "total", keepdims=0),
        node("Cast", "total", "flag", to=TensorProto.BOOL),
        helper.make_node(
            "If", ["flag"], ["y"], "choice", then_branch=branch("MatMul"), else_branch=branch("MatMul")
        ),
    ]
    nodes[3].attribute[1].g.node[0].output[0] = nodes[3].attribute[1].g.output[0].name = "other_y"
    model = build(nodes, {"x": ["n", 4]}, ["y"], {"w": random(3, 4)})
    declined(model, tmp_path)


def transposed_layer(tmp_path: Path) -> tuple[Path, onnx.ModelProto]:
    nodes = [node("Transpose", "w", "wt", perm=[1, 0]), node("MatMul", "x wt", "m"), node("Add", "m b", "y")]
    model = build(nodes, {"x": ["n", 64]}, ["y"], {"w": random(96, 64), "b": random(96)})
    reference = onnx.ModelProto()
    reference.CopyFrom(model)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.bin", size_threshold=100)
    return path, reference


@pytest.mark.parametrize("large", [False, True], ids=["small", "road of large models"])
def test_layers_get_a_constant_operand_without_onnxsim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    source, reference = transposed_layer(tmp_path)
    if large:
        monkeypatch.setattr("onnxptq.graph.canonicalize.LARGE_MODEL_BYTES", 1000)
    result = canonicalize(source, tmp_path, simplify=large)
    assert [n.op for n in result.graph.nodes] == ["MatMul", "Add"]
    assert fold_moved_constant.NOTE[0] in result.notes
    weight = result.graph.nodes[0].inputs[1]
    assert result.user_name(weight.name) == "wt"
    assert weight.values.flags.c_contiguous
    np.testing.assert_array_equal(weight.values, numpy_helper.to_array(reference.graph.initializer[0]).T)
    feed = feed_for(reference)
    assert_close(run(reference, feed), run(result.path, feed), 0)


def test_memory_maps_are_only_viewed(tmp_path: Path) -> None:
    source, _ = transposed_layer(tmp_path)
    graph = import_graph(onnx.load(source, load_external_data=False), tmp_path)
    assert fold_moved_constant.run(graph) == 1
    moved = graph.tensors()["wt"].values
    assert isinstance(moved, np.memmap)
    assert moved.base is not None
    assert not moved.flags.owndata
