"""Types that onnxruntime infers without running anything."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxptq.errors import InvalidModelError
from onnxptq.runtime import element_types, infer_types
from tests.unit.graph.graph_helpers import build, node, random


def _types(model: onnx.ModelProto, *names: str) -> dict[str, tuple[int, list[int | str]]]:
    """Element type and shape; an unknown dimension is 0, an unknown shape []."""
    return {
        entry.name: (
            entry.type.tensor_type.elem_type,
            [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim],
        )
        for entry in infer_types(model, names)
    }


def test_types_and_shapes_behind_an_operator_that_onnx_does_not_know() -> None:
    nodes = [
        helper.make_node("FastGelu", ["x"], ["g"], domain="com.microsoft"),
        node("MatMul", "g w", "h"),
        node("Cast", "h", "c", to=TensorProto.INT32),
        node("NonZero", "h", "where"),
        node("SequenceConstruct", "g h", "s"),
        node("Relu", "h", "y"),
    ]
    model = build(nodes, {"x": ["n", 4]}, ["y"], {"w": random(4, 3)}, extra_domains={"com.microsoft": 1})
    del model.graph.value_info[:]
    found = _types(model, "g", "h", "c", "where", "s")
    assert found["g"] == (TensorProto.FLOAT, ["n", 4])
    assert found["h"] == (TensorProto.FLOAT, ["n", 3])
    assert found["c"] == (TensorProto.INT32, ["n", 3])
    assert found["where"][0] == TensorProto.INT64
    assert len(found["where"][1]) == 2
    assert found["where"][1][1] == 0
    # No tensor; what is none is left out.
    assert "s" not in found
    assert [e.name for e in model.graph.output] == ["y"]


def test_an_unknown_shape_is_not_taken_for_a_scalar() -> None:
    nodes = [node("Reshape", "x to", "r"), node("Relu", "r", "y")]
    model = build(nodes, {"x": ["n", 4], "to": ["k"]}, ["y"])
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.INT64
    [entry] = infer_types(model, ["r"])
    assert entry.type.tensor_type.elem_type == TensorProto.FLOAT
    assert not entry.type.tensor_type.HasField("shape")


def test_an_operator_that_onnxruntime_does_not_know() -> None:
    nodes = [helper.make_node("Foo", ["x"], ["h"], domain="my.ops"), node("Relu", "h", "y")]
    model = build(nodes, {"x": ["n", 4]}, ["y"], {"w": np.float32(1)}, extra_domains={"my.ops": 1})
    with pytest.raises(InvalidModelError, match=r"my\.ops:Foo"):
        infer_types(model, ["h"])


def test_element_types_of_a_file(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("FastGelu", ["x"], ["g"], domain="com.microsoft"),
        node("Cast", "g", "c", to=TensorProto.FLOAT16),
        node("SequenceConstruct", "g", "s"),
        node("Relu", "g", "y"),
    ]
    model = build(nodes, {"x": ["n", 4]}, ["y"], extra_domains={"com.microsoft": 1})
    onnx.save(model, str(tmp_path / "model.onnx"))
    found = element_types(tmp_path / "model.onnx", ["g", "c", "s"])
    assert found == {"g": TensorProto.FLOAT, "c": TensorProto.FLOAT16}
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
