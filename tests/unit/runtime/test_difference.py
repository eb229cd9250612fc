"""When a form of a model may take the place of another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxptq.runtime import compare_forms

SAMPLE = {"x": np.asarray([1.0, -4.0, 2.0], np.float32)}


def _scaling(path: Path, factor: float) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [3]) for name in "xy"]
    constant = helper.make_tensor("factor", TensorProto.FLOAT, [], [factor])
    node = helper.make_node("Mul", ["x", "factor"], ["y"])
    graph = helper.make_graph([node], "g", values[:1], values[1:], [constant])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("factor", "reason"), [(1.000001, ""), (1.001, "differ by 1.0e-03"), (np.inf, "inf")]
)
def test_the_gap_is_relative_to_the_largest_output(tmp_path: Path, factor: float, reason: str) -> None:
    forms = _scaling(tmp_path / "a.onnx", 1.0), _scaling(tmp_path / "b.onnx", factor)
    gap, found = compare_forms(*forms, SAMPLE)
    # Every output moves by the same share, so the largest one decides.
    assert gap == pytest.approx(factor - 1.0, rel=0.1)
    assert reason in found
    assert bool(found) == bool(reason)
