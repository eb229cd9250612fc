"""Which part of a network lies behind a selection, and what enters it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxptq.graph.boundary import ends_of, find_selection, selected_within, without_boundary
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.surgeon import import_graph
from tests.unit.detector_nets import one_stage, two_stages
from tests.unit.small_nets import Net, residual_block


def test_boxes_and_scores_stand_for_what_is_found() -> None:
    found = find_selection(import_graph(one_stage(), Path()))
    assert found.nodes == {"kept", "rows", "found"}
    assert found.outputs == ("found",)
    assert found.layers == ()
    assert {tensor.name for tensor in found.boundary} == {"boxes", "scores"}


def test_layers_behind_it_are_named_and_features_enter_it() -> None:
    found = find_selection(import_graph(two_stages(), Path()))
    assert found.outputs == ("found", "classes")
    assert found.layers == ("fc.mm", "classes.mm")
    assert {tensor.name for tensor in found.boundary} == {"boxes", "scores", "r2"}


def test_networks_without_a_selection_have_no_such_part() -> None:
    assert find_selection(import_graph(residual_block(), Path())).nodes == frozenset()


def _masked(*, is_behind_a_layer: bool) -> onnx.ModelProto:
    net = Net(seed=1, opset=17)
    y = net.linear("fc", "x", 8, 8)
    chosen = net.op("Greater", "above", y if is_behind_a_layer else "x", net.constant("zero", np.float32(0)))
    places = net.op("Transpose", "places", net.op("NonZero", "nonzero", chosen), perm=[1, 0])
    return net.proto({"x": [4, 8]}, [net.op("GatherND", "y", y, places)])


@pytest.mark.parametrize("is_behind_a_layer", [True, False])
def test_a_selection_by_inputs_selects_the_same_in_every_network(is_behind_a_layer: bool) -> None:
    found = find_selection(import_graph(_masked(is_behind_a_layer=is_behind_a_layer), Path()))
    assert found.outputs == (("y",) if is_behind_a_layer else ())
    assert [tensor.name for tensor in found.boundary] == (["fc"] if is_behind_a_layer else [])


def test_shapes_of_what_layers_compute_select_nothing() -> None:
    net = Net(seed=1, opset=17)
    y = net.linear("fc", "x", 8, 8)
    ones = net.op("ConstantOfShape", "ones", net.op("Shape", "shape", y))
    net.op("Transpose", "turned", net.op("NonZero", "places", ones), perm=[1, 0])
    graph = import_graph(net.proto({"x": [4, 8]}, [net.op("GatherND", "y", y, "turned")]), Path())
    assert find_selection(graph).nodes == frozenset()


def _ranked(*, has_layer_behind: bool) -> onnx.ModelProto:
    """The best boxes by score, perhaps looked at once more, and what a suppression leaves of them per class."""
    net = Net(seed=1, opset=17)
    boxes = net.op("Reshape", "boxes", net.linear("fc", "x", 8, 8), net.constant("bs", np.array([1, -1, 4])))
    scores = net.op(
        "Sigmoid", "scores", net.op("ReduceSum", "sum", boxes, net.constant("last", np.array([2])))
    )
    flat = net.op("Reshape", "flat", scores, net.constant("fs", np.array([1, 1, -1])))
    net.op("TopK", "best", flat, net.constant("k", np.array([3])), outputs=["places"])
    rows = net.op("Reshape", "rows", "places", net.constant("rs", np.array([-1])))
    chosen = net.op("Gather", "chosen", boxes, rows, axis=1)
    if has_layer_behind:
        chosen = net.linear("again", chosen, 4, 4)
    limits = net.constant("most", np.array(5)), net.constant("overlap", np.float32(0.5))
    kept = net.op("NonMaxSuppression", "kept", chosen, "best", *limits)
    return net.proto({"x": [4, 8]}, [net.op("Cast", "y", kept, to=onnx.TensorProto.FLOAT)])


def test_ranking_for_a_selection_is_part_of_it_unless_layers_are_between() -> None:
    found = find_selection(import_graph(_ranked(has_layer_behind=False), Path()))
    assert {"best", "chosen", "kept"} <= found.nodes
    assert {tensor.name for tensor in found.boundary} == {"boxes", "flat"}
    other = find_selection(import_graph(_ranked(has_layer_behind=True), Path()))
    assert other.nodes == {"kept", "y"}
    assert {tensor.name for tensor in other.boundary} == {"again", "best"}


def test_a_selection_in_a_branch_is_one() -> None:
    net = Net(seed=1, opset=17)
    y = net.linear("fc", "x", 8, 8)
    branches = {}
    for name, reads in (("then", y), ("else", "x")):
        nodes = [
            helper.make_node("NonZero", [reads], [f"{name}.places"]),
            helper.make_node("Cast", [f"{name}.places"], [f"{name}.y"], to=TensorProto.FLOAT),
        ]
        output = helper.make_tensor_value_info(f"{name}.y", TensorProto.FLOAT, [2, "n"])
        branches[f"{name}_branch"] = helper.make_graph(nodes, name, [], [output])
    above = net.op(
        "Greater", "above", net.op("ReduceMax", "most", y, keepdims=0), net.constant("0", np.float32(0))
    )
    graph = import_graph(net.proto({"x": [4, 8]}, [net.op("If", "y", above, **branches)]), Path())
    found = find_selection(graph)
    assert found.outputs == ("y",)
    assert "fc" in {tensor.name for tensor in found.boundary}


def test_parts_of_one_tensor_count_as_one() -> None:
    net = Net(seed=1, opset=17)
    scores = net.op("Sigmoid", "scores", net.linear("fc", "x", 8, 3))
    limit = net.constant("limit", np.float32(0.5))
    found = []
    for i in range(3):
        column = net.op("Gather", f"column{i}", scores, net.constant(f"i{i}", np.array(i)), axis=1)
        above = net.op("Greater", f"above{i}", column, limit)
        found.append(net.op("Compress", f"y{i}", column, above, axis=0))
    selection = find_selection(import_graph(net.proto({"x": [4, 8]}, found), Path()))
    assert selection.outputs == ("y0", "y1", "y2")
    assert {tensor.name for tensor in selection.boundary} == {"scores"}


def test_the_canonical_graph_has_the_boundary_as_outputs_and_the_users_apart(tmp_path: Path) -> None:
    onnx.save(one_stage(), str(tmp_path / "net.onnx"))
    model = canonicalize(tmp_path / "net.onnx", tmp_path)
    assert model.outputs == model.selected == ("found",)
    assert set(model.boundary) == set(model.judged) == {"boxes", "scores"}
    assert [t.name for t in model.graph.outputs] == ["found", *model.boundary]
    assert any(note.startswith("Alternatives are compared by") for note in model.notes)
    assert [t.name for t in without_boundary(model.graph.copy(), model.outputs).outputs] == ["found"]


def test_what_a_block_selects_itself_is_told_from_what_it_is_given() -> None:
    index = GraphIndex(import_graph(two_stages(), Path()))
    selection = find_selection(index.graph)
    assert selected_within(index, ["boxes", "kept", "rows"], selection) == {"kept", "rows"}
    assert selected_within(index, ["vector", "fc.mm"], selection) == frozenset()


def test_two_files_are_compared_by_the_tensors_that_both_name(tmp_path: Path) -> None:
    model = one_stage()
    onnx.save(model, str(tmp_path / "a.onnx"))
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = "other" if name == "boxes" else name
    onnx.save(model, str(tmp_path / "b.onnx"))
    ends = ends_of(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert (ends.inner, ends.selected) == (("scores",), ("found",))
    onnx.save(residual_block(), str(tmp_path / "c.onnx"))
    plain = ends_of(tmp_path / "c.onnx", tmp_path / "c.onnx")
    assert (plain.inner, plain.selected) == ((), ())


@pytest.mark.parametrize("name", ["", "same"])
def test_nodes_of_a_file_need_no_names_of_their_own(name: str, tmp_path: Path) -> None:
    for is_behind_a_layer, selected in ((True, ("y",)), (False, ())):
        model = _masked(is_behind_a_layer=is_behind_a_layer)
        for node in model.graph.node:
            node.name = name
        onnx.save(model, str(tmp_path / "net.onnx"))
        assert ends_of(tmp_path / "net.onnx", tmp_path / "net.onnx").selected == selected
