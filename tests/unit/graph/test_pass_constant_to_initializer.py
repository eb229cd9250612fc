"""Constant nodes become initializers, whatever attribute holds their value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxptq.graph.passes import constant_to_initializer
from onnxptq.graph.surgeon import import_graph
from tests.unit.graph.graph_helpers import apply, build, node, random


@pytest.mark.parametrize(
    "attribute",
    [
        {"value": numpy_helper.from_array(np.array([2.0, 3.0, 4.0], np.float32))},
        {"value_floats": [2.0, 3.0, 4.0]},
        {"value_float": 2.5},
    ],
    ids=["value", "value_floats", "value_float"],
)
def test_float_attributes(tmp_path: Path, attribute: dict[str, object]) -> None:
    model = build([node("Constant", "", "c", **attribute), node("Mul", "x c", "y")], {"x": ["n", 3]}, ["y"])
    count, ops, _ = apply(model, constant_to_initializer.run, tmp_path, tolerance=0)
    assert count == 1
    assert ops == {"Mul": 1}


@pytest.mark.parametrize("attribute", [{"value_ints": [3, 2]}, {"value_int": 6}], ids=["ints", "int"])
def test_integer_attributes(tmp_path: Path, attribute: dict[str, object]) -> None:
    nodes = [node("Constant", "", "c", **attribute)]
    if "value_int" in attribute:
        nodes += [node("Constant", "", "axes", value_ints=[0]), node("Unsqueeze", "c axes", "shape")]
    else:
        nodes += [node("Identity", "c", "shape")]
    model = build([*nodes, node("Reshape", "x shape", "y")], {"x": [2, 3]}, ["y"])
    count, ops, _ = apply(model, constant_to_initializer.run, tmp_path, tolerance=0)
    assert count >= 1
    assert "Constant" not in ops


def test_a_constant_that_is_a_graph_output_stays(tmp_path: Path) -> None:
    model = build(
        [node("Constant", "", "c", value_floats=[1.0, 2.0]), node("Add", "x c", "y")],
        {"x": ["n", 2]},
        ["y", "c"],
    )
    count, ops, _ = apply(model, constant_to_initializer.run, tmp_path, tolerance=0)
    assert count == 0
    assert ops["Constant"] == 1


def test_a_value_is_not_decoded_on_the_way(tmp_path: Path) -> None:
    packed = helper.make_tensor("", TensorProto.INT4, [3], [1, -2, 7])
    model = build(
        [
            node("Constant", "", "c", value=packed),
            node("Cast", "c", "f", to=TensorProto.FLOAT),
            node("Add", "x f", "y"),
        ],
        {"x": ["n", 3]},
        ["y"],
        {"unused": random(1)},
        opset=21,
    )
    graph = import_graph(model, tmp_path)
    assert constant_to_initializer.run(graph) == 1
    assert graph.tensors()["c"]._values.tensor.data_type == onnx.TensorProto.INT4
