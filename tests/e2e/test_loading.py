"""What onnxruntime says of a model on loading: operators of other domains, and nodes of one name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import onnxptq
from onnxptq.errors import UnsupportedModelError
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.recipe import Recipe
from onnxptq.runtime import infer_types
from tests.unit.graph.graph_helpers import build, node, random, run

MICROSOFT = "com.microsoft"


def _network(op: str, domain: str, *, opset: int = 17, half: bool = False) -> onnx.ModelProto:
    """Nothing behind ``op`` has a type that the onnx package could infer."""
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    weights = {"w": random(8, 16), "v": random(16, 12, seed=1), "u": random(12, 4, seed=2)}
    model = build(
        [
            node("MatMul", "x w", "h"),
            helper.make_node(op, ["h"], ["g"], name="inner", domain=domain),
            node("MatMul", "g v", "m"),
            node("Softmax", "m", "p", axis=1),
            node("MatMul", "p u", "y"),
        ],
        {"x": ["n", 5, 8]},
        {"y": kind},
        {k: v.astype(np.float16) if half else v for k, v in weights.items()},
        opset=opset,
        input_type=kind,
        extra_domains={domain: 1},
    )
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", kind, ["n", 5, 4]))
    return model


def _samples(half: bool = False) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    kind = np.float16 if half else np.float32
    return [{"x": rng.standard_normal((1, 5, 8)).astype(kind)} for _ in range(8)]


@pytest.mark.parametrize("simplify", [True, False])
@pytest.mark.parametrize("opset", [11, 17])
def test_types_behind_them_come_from_onnxruntime(tmp_path: Path, opset: int, simplify: bool) -> None:
    source = tmp_path / "m.onnx"
    model = _network("FastGelu", MICROSOFT, opset=opset)
    onnx.save(model, source)
    result = canonicalize(source, tmp_path, simplify=simplify, infer_types=infer_types)
    inner = [t for t in result.graph.tensors().values() if t.name not in "xywvu"]
    assert all(t.dtype is not None and t.shape is not None for t in inner)
    assert next(t for t in inner if t.name == "g").shape == ["n", 5, 16]
    # Of opset 11, Softmax over axis 1 is one over both axes behind it, written with Reshape nodes from 13 on.
    feed = _samples()[0]
    np.testing.assert_allclose(run(result.path, feed)["y"], run(model, feed)["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_layers_around_them_are_quantized(tmp_path: Path, half: bool) -> None:
    source, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(_network("FastGelu", MICROSOFT, half=half), source)
    result = onnxptq.quantize(source, output, calibration=_samples(half), recipe=Recipe(holdout=0.25))
    read = {reader for row in result.report.quantized if row.role == "weight" for reader in row.readers}
    assert len(read) == 3
    assert any(node.op_type == "FastGelu" for node in onnx.load(output).graph.node)


def _unread() -> Iterator[dict[str, np.ndarray]]:
    pytest.fail("the calibration data were read")
    yield {}


@pytest.mark.parametrize("domain", ["my.ops", MICROSOFT])
def test_what_onnxruntime_cannot_load_is_refused_at_once(tmp_path: Path, domain: str) -> None:
    source = tmp_path / "m.onnx"
    onnx.save(_network("Foo", domain), source)
    with pytest.raises(UnsupportedModelError) as refused:
        onnxptq.quantize(source, tmp_path / "q.onnx", calibration=_unread())
    said = refused.value.message
    assert all(part in said for part in (str(source), f"{domain}:Foo", "node 'inner'"))
    assert "canonical" not in said
    assert "custom operators" in refused.value.remedy
    assert refused.value.exit_code == 3
    assert not (tmp_path / "q.onnx").exists()
    notes = onnxptq.inspect(source).notes
    assert any("cannot be quantized" in note and "node 'inner'" in note for note in notes)


def test_what_cannot_be_learnt_through_is_named_with_its_domain(tmp_path: Path) -> None:
    onnx.save(_network("QuickGelu", MICROSOFT), tmp_path / "m.onnx")
    (skip,) = onnxptq.inspect(tmp_path / "m.onnx").untrainable
    assert (skip.site, skip.reason) == (
        "inner",
        "no differentiable form of com.microsoft.QuickGelu version 1",
    )


def test_nodes_of_one_name_are_no_obstacle(tmp_path: Path) -> None:
    source, output = tmp_path / "m.onnx", tmp_path / "q.onnx"
    model = _network("FastGelu", MICROSOFT)
    for twin in model.graph.node:
        twin.name = "same"
    onnx.save(model, source)
    result = onnxptq.quantize(source, output, calibration=_samples(), recipe=Recipe(holdout=0.25))
    assert result.report.model.path == str(source)
    assert any("'same'" in note for note in result.report.notes)
    assert result.report.outputs
    assert len({n.name for n in onnx.load(output).graph.node}) == len(onnx.load(output).graph.node)
    found = onnxptq.validate(source, output, data=_samples(), layers=True)
    assert {layer.tensor for layer in found.layers} >= {"h", "g", "m", "p", "y"}
    (note,) = found.notes
    assert note.startswith(f"{source}: Several nodes have one name")
    assert found.outputs[0].sqnr_db is not None
    assert found.outputs[0].sqnr_db > 20


def test_a_renamed_model_that_cannot_be_loaded_is_called_by_its_name(tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    model = _network("Foo", "my.ops")
    model.graph.node[0].name = "inner"
    onnx.save(model, source)
    with pytest.raises(UnsupportedModelError, match=r"my\.ops:Foo") as refused:
        onnxptq.quantize(source, tmp_path / "q.onnx", calibration=_unread())
    assert str(source) in refused.value.message
    assert "renamed_source" not in refused.value.message


def test_a_renamed_model_that_cannot_be_compared_is_called_by_its_name(tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    model = _network("Foo", "my.ops")
    for twin in model.graph.node:
        twin.name = "same"
    onnx.save(model, source)
    with pytest.raises(UnsupportedModelError, match=r"my\.ops:Foo") as refused:
        onnxptq.validate(source, source, data=_samples())
    assert str(source) in refused.value.message
    assert "numbered" not in refused.value.message
