"""What is said where onnxruntime does not load a model."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from onnxptq.errors import InvalidModelError
from onnxptq.runtime import Session


def _saved(path: Path, *nodes: onnx.NodeProto, domain: str = "my.ops") -> Path:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy"]
    graph = helper.make_graph(list(nodes), "g", ends[:1], ends[1:])
    domains = [helper.make_opsetid("", 17), helper.make_opsetid(domain, 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("nodes", "said", "remedy"),
    [
        ([helper.make_node("Foo", ["x"], ["y"], "it", domain="my.ops")], "(node 'it')", "custom operators"),
        ([helper.make_node("Foo", ["x"], ["y"], domain="my.ops")], "(node 'y')", "custom operators"),
        ([helper.make_node("Foo", ["x"], ["y"], "it")], '"it"', "custom operators"),
        (
            [
                helper.make_node("Cast", ["x"], ["h"], "a", to=TensorProto.BFLOAT16),
                helper.make_node("Sqrt", ["h"], ["r"], "it"),
                helper.make_node("Cast", ["r"], ["y"], "c", to=TensorProto.FLOAT),
            ],
            "'it'",
            "--provider",
        ),
        (
            [helper.make_node("Relu", ["x"], ["h"], "it"), helper.make_node("Relu", ["h"], ["y"], "it")],
            "(it)",
            "name of its own",
        ),
        ([helper.make_node("Add", ["x", "absent"], ["y"], "it")], "'absent'", "onnxruntime alone"),
    ],
    ids=["domain", "unnamed", "operator", "kernel", "names", "other"],
)
def test_file_reason_node_and_remedy(
    tmp_path: Path, nodes: list[onnx.NodeProto], said: str, remedy: str
) -> None:
    path = _saved(tmp_path / "failed: m.onnx", *nodes)
    with pytest.raises(InvalidModelError) as refused:
        Session(path)
    message = refused.value.message
    assert message.startswith(f"onnxruntime cannot load {path}: ")
    assert said in message
    assert "ONNXRuntimeError" not in message
    assert message.count(str(path)) == 1
    assert remedy in refused.value.remedy
