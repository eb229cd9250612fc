"""Every kind of model that is accepted, from the file to the written file in onnxruntime."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.e2e.command import Bench, classifier, pictures
from tests.unit.small_nets import NETS, Net

CLOSE_DB = 20.0
"""Random networks of this size reach 25 to 40 dB at 8 bits; a wrong scale or a lost node gives less than 10."""


def _graph(path: Path) -> onnx.GraphProto:
    return onnx.load(str(path)).graph


def _quantized(bench: Bench, *options: object, calib: object | None = None) -> dict[str, Any]:
    done = bench.quantize("--json", *options, calib=calib)
    assert done.code == 0, done.err
    report: dict[str, Any] = json.loads(done.out)
    assert report["parity"]["max_steps"] == 0
    assert report["quantized"]
    return report


def _run(path: Path, **feeds: np.ndarray) -> list[np.ndarray]:
    return ort.InferenceSession(str(path)).run(None, feeds)


def _sqnr(reference: np.ndarray, other: np.ndarray) -> float:
    noise = np.sum((reference.astype(np.float64) - other) ** 2)
    return float(10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / max(noise, 1e-30)))


def _declared(values: Any) -> list[tuple[str, int, list[int | str]]]:
    return [
        (
            v.name,
            v.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        )
        for v in values
    ]


def test_the_ends_of_the_graph_stay(bench: Bench) -> None:
    _quantized(bench)
    before, after = _graph(bench.model), _graph(bench.output)
    assert _declared(after.input) == _declared(before.input)
    assert [v.name for v in after.output] == [v.name for v in before.output]


def test_a_dynamic_batch_stays_dynamic(bench: Bench) -> None:
    _quantized(bench)
    for batch in (1, 5):
        x = pictures(batch, seed=7)
        (expected,), (got,) = _run(bench.model, x=x), _run(bench.output, x=x)
        assert got.shape == (batch, 10)
        assert _sqnr(expected, got) > CLOSE_DB


def test_a_fixed_batch_of_four(bench: Bench) -> None:
    bench.write(classifier(batch=4))
    np.savez(bench.data, x=pictures(16))
    report = _quantized(bench)
    assert report["latency"]["batch"] == 4
    x = pictures(4, seed=7)
    assert _sqnr(_run(bench.model, x=x)[0], _run(bench.output, x=x)[0]) > CLOSE_DB


def test_symbolic_sizes(bench: Bench) -> None:
    net = Net()
    inner = net.op("Relu", "relu", net.conv("first", "x", (8, 3, 3, 3)))
    bench.write(net.proto({"x": ["batch", 3, "height", "width"]}, [net.conv("last", inner, (4, 8, 1, 1))]))
    _quantized(bench)
    assert _declared(_graph(bench.output).input) == [
        ("x", TensorProto.FLOAT, ["batch", 3, "height", "width"])
    ]
    x = np.random.default_rng(0).standard_normal((2, 3, 5, 11)).astype(np.float32)
    assert _sqnr(_run(bench.model, x=x)[0], _run(bench.output, x=x)[0]) > CLOSE_DB


def test_several_inputs_and_outputs(bench: Bench) -> None:
    net = Net()
    left = net.op("Relu", "left", net.conv("left_conv", "a", (8, 3, 3, 3)))
    right = net.op("Relu", "right", net.conv("right_conv", "b", (8, 2, 3, 3)))
    joined = net.op("Concat", "joined", left, right, axis=1)
    last = net.conv("last", joined, (4, 16, 1, 1))
    bench.write(net.proto({"a": ["n", 3, 6, 6], "b": ["n", 2, 6, 6]}, [last, left]))
    rng = np.random.default_rng(1)
    feeds = {k: rng.standard_normal((8, c, 6, 6)).astype(np.float32) for k, c in (("a", 3), ("b", 2))}
    np.savez(bench.data, **feeds)
    report = _quantized(bench)
    assert [o["name"] for o in report["outputs"]] == ["last", "left"]
    for expected, got in zip(_run(bench.model, **feeds), _run(bench.output, **feeds), strict=True):
        assert _sqnr(expected, got) > CLOSE_DB


def _halved(model: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            half = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(half, tensor.name))
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    return model


def test_half_precision_keeps_its_ends(bench: Bench) -> None:
    bench.write(_halved(classifier()))
    np.savez(bench.data, x=pictures(10).astype(np.float16))
    report = _quantized(bench)
    graph = _graph(bench.output)
    ends = (*graph.input, *graph.output)
    assert [v.type.tensor_type.elem_type for v in ends] == [TensorProto.FLOAT16] * 2
    assert any("alf" in note for note in report["notes"])
    # A file of this size is mostly graph: it grows, and the reason names what was raised and no more than all of it.
    note = report["output"]["note"]
    assert "half precision were raised to float32 (" in note
    share = int(re.search(r"(\d+) ?% of the model in float32", note)[1])
    assert 0 < share < 100
    assert sum(row["before"] for row in report["sizes"]) > report["model"]["bytes"]
    x = pictures(3, seed=7).astype(np.float16)
    assert _sqnr(_run(bench.model, x=x)[0], _run(bench.output, x=x)[0]) > CLOSE_DB


@pytest.mark.parametrize("opset", [11, 12, 13, 17])
def test_old_opsets_are_raised(bench: Bench, opset: int) -> None:
    bench.write(classifier(opset=opset))
    report = _quantized(bench)
    (imported,) = [o.version for o in onnx.load(str(bench.output)).opset_import if not o.domain]
    assert imported >= 13
    assert any("raised" in note for note in report["notes"]) == (imported != opset)


def test_weights_as_constant_nodes(bench: Bench) -> None:
    model = classifier()
    for tensor in reversed(model.graph.initializer):
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del model.graph.initializer[:]
    bench.write(model)
    as_nodes = _quantized(bench)
    bench.write(classifier())
    as_initializers = _quantized(bench)
    assert as_nodes["quantized"] == as_initializers["quantized"]


def test_a_shared_weight(bench: Bench) -> None:
    net = Net()
    weight = net.weight("w", 16, 16, 1, 1)
    x = net.op("Relu", "relu", net.op("Conv", "first", "x", weight))
    bench.write(net.proto({"x": ["n", 16, 4, 4]}, [net.op("Conv", "second", x, weight)]))
    report = _quantized(bench, calib="random")
    rows = [row for row in report["quantized"] if row["tensor"] == "w"]
    assert [sorted(row["readers"]) for row in rows] == [["first", "second"]]
    assert len([t for t in _graph(bench.output).initializer if t.name.startswith("w_quantized")]) == 1


def test_nodes_without_names(bench: Bench) -> None:
    model = classifier()
    for node in model.graph.node:
        node.name = ""
    bench.write(model)
    first = _quantized(bench)
    names = [node.name for node in _graph(bench.output).node]
    assert all(names)
    assert len(set(names)) == len(names)
    assert _quantized(bench)["quantized"] == first["quantized"]


def test_bodies_stay_in_float_and_are_reported(bench: Bench) -> None:
    model = classifier()
    head = next(n for n in model.graph.node if n.name == "head")
    model.graph.node.remove(head)
    shape = helper.make_tensor_value_info("scores", TensorProto.FLOAT, None)
    inner = onnx.NodeProto()
    inner.CopyFrom(head)
    inner.output[0], inner.name = "scores", "inside"
    other = onnx.NodeProto()
    other.CopyFrom(inner)
    other.output[0], other.name = "more", "inside_too"
    negated = helper.make_node("Neg", ["more"], ["negated"])
    bodies = {
        "then_branch": helper.make_graph([inner], "then", [], [shape]),
        "else_branch": helper.make_graph(
            [other, negated], "else", [], [helper.make_tensor_value_info("negated", TensorProto.FLOAT, None)]
        ),
    }
    model.graph.node.extend(
        [
            helper.make_node("ReduceSum", ["flat"], ["total"], keepdims=0),
            helper.make_node("Greater", ["total", "zero"], ["is_positive"]),
            helper.make_node("If", ["is_positive"], ["head"], name="choice", **bodies),
        ]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    bench.write(model)
    report = _quantized(bench)
    assert any(skip["site"] == "choice" and "float" in skip["reason"] for skip in report["skips"])
    (node,) = [n for n in _graph(bench.output).node if n.op_type == "If"]
    assert {n.op_type for a in node.attribute for n in a.g.node} == {"Gemm", "Neg"}
    x = pictures(2, seed=7)
    assert _sqnr(_run(bench.model, x=x)[0], _run(bench.output, x=x)[0]) > CLOSE_DB


def test_functions_are_inlined(bench: Bench) -> None:
    model = classifier()
    body = [
        helper.make_node("Sigmoid", ["a"], ["s"], name="gate"),
        helper.make_node("Mul", ["a", "s"], ["b"], name="product"),
    ]
    model.functions.append(
        helper.make_function("own", "Swish", ["a"], ["b"], body, [helper.make_opsetid("", 21)])
    )
    model.opset_import.append(helper.make_opsetid("own", 1))
    node = next(n for n in model.graph.node if n.name == "inner_relu")
    node.op_type, node.domain = "Swish", "own"
    bench.write(model)
    _quantized(bench)
    written = onnx.load(str(bench.output))
    assert not written.functions
    assert {"Sigmoid", "Mul"} <= {n.op_type for n in written.graph.node}


def test_external_data(bench: Bench) -> None:
    onnx.save(
        classifier(), str(bench.model), save_as_external_data=True, location="net.weights", size_threshold=0
    )
    report = _quantized(bench)
    assert report["model"]["bytes"] > (bench.folder / "net.weights").stat().st_size
    external = _graph(bench.output)
    bench.write(classifier())
    _quantized(bench)
    assert external == _graph(bench.output)


def test_a_larger_output_says_why(bench: Bench) -> None:
    net = Net()
    x: str = "x"
    for i in range(6):
        x = net.conv(f"small{i}", x, (4, 4, 1, 1))
    bench.write(net.proto({"x": ["n", 4, 4, 4]}, [x]))
    report = _quantized(bench, calib="random")
    assert report["output"]["bytes"] >= report["model"]["bytes"]
    assert "not smaller" in report["output"]["note"]
    assert report["output"]["note"] in report["notes"]


@pytest.mark.parametrize("opset", [20, 21, 23])
@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt", "simulate"])
def test_layers_of_three_axes_with_biases_at_any_opset(bench: Bench, target: str, opset: int) -> None:
    """onnxruntime makes Gemms of them, and copies quantizers across the Reshapes that this takes."""
    net = Net(opset=opset)
    inner = net.op("Relu", "r", net.linear("a", "x", 16, 24))
    bench.write(net.proto({"x": [1, 8, 16]}, [net.linear("b", inner, 24, 16)]))
    np.savez(bench.data, x=np.random.default_rng(2).standard_normal((8, 8, 16)).astype(np.float32))
    report = _quantized(bench, "--target", target)
    assert len(report["quantized"]) == (6 if target == "ort-cpu" else 4)
    x = np.random.default_rng(3).standard_normal((1, 8, 16)).astype(np.float32)
    assert _sqnr(_run(bench.model, x=x)[0], _run(bench.output, x=x)[0]) > CLOSE_DB


def test_a_single_layer_that_reads_the_input(bench: Bench) -> None:
    net = Net()
    head = net.op("Gemm", "head", "x", net.weight("w", 16, 4), net.weight("b", 4))
    bench.write(net.proto({"x": ["n", 16]}, [head]))
    done = bench.quantize("--no-report", calib="random", fast=False)
    assert done.code == 0, done.err


@pytest.mark.parametrize("name", sorted(NETS))
def test_placement_patterns_with_all_defaults(bench: Bench, name: str) -> None:
    bench.write(NETS[name]())
    done = bench.quantize("--json", "--no-report", "--samples", 16, calib="random", fast=False)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert report["parity"]["max_steps"] == 0
    assert min(o["sqnr_db"] for o in report["outputs"]) > CLOSE_DB


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt", "simulate"])
def test_a_layer_that_nothing_passes(bench: Bench, target: str) -> None:
    """What is always zero has no range, and the layer behind it has a bias that its integers must hold."""
    net = Net(seed=1)
    x = net.op("Relu", "r0", net.conv("stem", "x", (16, 3, 3, 3)))
    low = net.constant("low", np.full(16, -80, np.float32))
    dead = net.op("Conv", "c1", x, net.weight("c1.w", 16, 16, 3, 3), low, pads=[1] * 4)
    inner = net.op("Relu", "r2", net.conv("c2", net.op("Relu", "r1", dead), (16, 16, 3, 3)))
    y = net.op("Relu", "r3", net.op("Add", "sum", net.conv("c4", inner, (16, 16, 3, 3)), x))
    bench.write(net.proto({"x": ["n", 3, 8, 8]}, [net.conv("last", y, (8, 16, 3, 3))]))
    np.savez(bench.data, x=np.random.default_rng(0).standard_normal((16, 3, 8, 8)).astype(np.float32))
    report = _quantized(bench, "--target", target)
    assert report["outputs"][0]["sqnr_db"] > 30.0
