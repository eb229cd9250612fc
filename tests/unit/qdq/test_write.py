"""The written graph against a simulation in numpy, edge by edge, in unusual surroundings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxptq.graph.save import save_graph
from onnxptq.qdq import insert_adjustable, insert_quantizers
from onnxptq.quantizers.affine import (
    asymmetric_qparams,
    fake_quantize,
    search_weight_qparams,
    symmetric_qparams,
)
from onnxptq.runtime import Session
from onnxptq.types import (
    GRAPH_OUTPUT,
    CanonicalModel,
    PerAxis,
    PerGroup,
    PerTensor,
    QParams,
    QType,
    Quantizer,
    QuantPlan,
    Site,
    Solution,
)
from tests.unit.small_nets import Net, canonical, random_samples

U8 = QType.unsigned(8)


def _activation(
    tensor: str, *sites: tuple[str, int], qtype: QType = U8, quantizer_id: str | None = None
) -> Quantizer:
    name = quantizer_id or tensor
    return Quantizer(
        quantizer_id=name,
        tensor=tensor,
        role="activation",
        qtype=qtype,
        granularity=PerTensor(),
        symmetric=False,
        sites=tuple(Site(tensor=tensor, consumer=c, input_index=i) for c, i in sites),
        scale_group=name,
    )


def _weight(
    tensor: str,
    axis: int,
    *sites: tuple[str, int],
    qtype: QType | None = None,
    quantizer_id: str | None = None,
) -> Quantizer:
    name = quantizer_id or tensor
    return Quantizer(
        quantizer_id=name,
        tensor=tensor,
        role="weight",
        qtype=qtype or QType.signed(8),
        granularity=PerAxis(axis),
        symmetric=True,
        sites=tuple(Site(tensor=tensor, consumer=c, input_index=i, is_weight=True) for c, i in sites),
        scale_group=name,
    )


def _write(
    model: CanonicalModel,
    folder: Path,
    quantizers: list[Quantizer],
    qparams: dict[str, QParams],
    **weights: np.ndarray,
) -> Path:
    path = folder / "written.onnx"
    plan = QuantPlan(target="simulate", quantizers=tuple(quantizers))
    before = {name: t.values.copy() for name, t in model.graph.tensors().items() if hasattr(t, "values")}
    nodes_before = [(n.name, [t.name for t in n.inputs]) for n in model.graph.nodes]
    save_graph(insert_quantizers(model.graph, plan, Solution(qparams=qparams, weights=weights)), path)
    onnx.checker.check_model(str(path), full_check=True)
    # The canonical graph is shared by all stages: writing must not touch it.
    assert [(n.name, [t.name for t in n.inputs]) for n in model.graph.nodes] == nodes_before
    for name, value in before.items():
        np.testing.assert_array_equal(model.graph.tensors()[name].values, value)
    return path


def _run(path: Path, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return dict(Session(path, exact=True, threads=1).run(feed))


def _nodes(path: Path) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in onnx.load(str(path)).graph.node}


def _fan_out_proto(*outputs: str) -> onnx.ModelProto:
    """x -> relu -> {neg, abs}."""
    net = Net()
    net.op("Relu", "relu", "x")
    net.op("Neg", "neg", "relu")
    net.op("Abs", "abs", "relu")
    return net.proto({"x": [2, 5]}, outputs or ("neg", "abs"))


def _fan_out(folder: Path, *outputs: str) -> CanonicalModel:
    return canonical(_fan_out_proto(*outputs), folder)


COARSE = asymmetric_qparams(0.0, 2.0, QType.unsigned(2))


def test_only_the_named_readers_see_quantized_values(tmp_path: Path) -> None:
    model = _fan_out(tmp_path)
    qtype = QType.unsigned(2)
    path = _write(model, tmp_path, [_activation("relu", ("neg", 0), qtype=qtype)], {"relu": COARSE})
    feed = random_samples(model, 1)[0]
    found = _run(path, feed)
    relu = np.maximum(feed["x"], 0)
    np.testing.assert_array_equal(found["neg"], -fake_quantize(relu, COARSE))
    np.testing.assert_array_equal(found["abs"], relu)


def test_names_are_those_that_debugging_tools_parse(tmp_path: Path) -> None:
    model = _fan_out(tmp_path)
    path = _write(
        model, tmp_path, [_activation("relu", ("neg", 0), qtype=QType.unsigned(2))], {"relu": COARSE}
    )
    quantize = _nodes(path)["relu_QuantizeLinear"]
    assert list(quantize.input) == ["relu_Clip_Output", "relu_scale", "relu_zero_point"]
    assert list(quantize.output) == ["relu_QuantizeLinear_Output"]
    assert list(_nodes(path)["relu_DequantizeLinear"].output) == ["relu_DequantizeLinear_Output"]


@pytest.mark.parametrize("seen", [True, False], ids=["caller_quantized", "caller_float"])
def test_a_graph_output_that_is_also_quantized(seen: bool, tmp_path: Path) -> None:
    model = _fan_out(tmp_path, "relu", "neg", "abs")
    sites = [("neg", 0), *([(GRAPH_OUTPUT, 0)] if seen else [])]
    path = _write(model, tmp_path, [_activation("relu", *sites, qtype=QType.unsigned(2))], {"relu": COARSE})
    feed = random_samples(model, 1)[0]
    found = _run(path, feed)
    assert list(found) == ["relu", "neg", "abs"]
    relu = np.maximum(feed["x"], 0)
    coarse = fake_quantize(relu, COARSE)
    np.testing.assert_array_equal(found["relu"], coarse if seen else relu)
    np.testing.assert_array_equal(found["neg"], -coarse)
    np.testing.assert_array_equal(found["abs"], relu)


@pytest.mark.parametrize("output_first", [True, False])
def test_two_quantizers_of_a_graph_output_both_read_the_float_tensor(
    output_first: bool, tmp_path: Path
) -> None:
    model = _fan_out(tmp_path, "relu", "neg")
    fine = asymmetric_qparams(0.0, 3.0, U8)
    quantizers = [
        _activation("relu", (GRAPH_OUTPUT, 0), qtype=QType.unsigned(2), quantizer_id="relu@uint8_2"),
        _activation("relu", ("neg", 0), quantizer_id="relu@uint8_8"),
    ]
    path = _write(
        model,
        tmp_path,
        quantizers if output_first else quantizers[::-1],
        {"relu@uint8_2": COARSE, "relu@uint8_8": fine},
    )
    feed = random_samples(model, 1)[0]
    relu = np.maximum(feed["x"], 0)
    found = _run(path, feed)
    np.testing.assert_array_equal(found["relu"], fake_quantize(relu, COARSE))
    np.testing.assert_array_equal(found["neg"], -fake_quantize(relu, fine))


def test_graph_inputs_can_be_quantized(tmp_path: Path) -> None:
    model = _fan_out(tmp_path)
    path = _write(model, tmp_path, [_activation("x", ("relu", 0), qtype=QType.unsigned(2))], {"x": COARSE})
    feed = random_samples(model, 1)[0]
    np.testing.assert_array_equal(_run(path, feed)["abs"], fake_quantize(feed["x"], COARSE))


@pytest.mark.parametrize("taken", ["relu_scale", "relu_QuantizeLinear", "relu_DequantizeLinear_Output"])
def test_names_that_the_model_has_taken_get_a_number(taken: str, tmp_path: Path) -> None:
    net = Net()
    net.op("Relu", "relu", "x")
    net.op("Neg", "neg", "relu")
    net.op("Sigmoid", taken, "x")
    model = canonical(net.proto({"x": [2, 5]}, ["neg", taken]), tmp_path)
    path = _write(
        model, tmp_path, [_activation("relu", ("neg", 0), qtype=QType.unsigned(2))], {"relu": COARSE}
    )
    feed = random_samples(model, 1)[0]
    np.testing.assert_array_equal(_run(path, feed)["neg"], -fake_quantize(np.maximum(feed["x"], 0), COARSE))


@pytest.mark.parametrize("taken", ["node", "tensor"])
def test_nodes_and_tensors_have_names_of_their_own(taken: str, tmp_path: Path) -> None:
    """A name counts as taken whether a node or a tensor has it."""
    proto = _fan_out_proto()
    relu, neg, _ = proto.graph.node
    if taken == "node":
        neg.name = "relu_QuantizeLinear"
    else:
        relu.output[0] = neg.input[0] = proto.graph.node[2].input[0] = "relu_QuantizeLinear_Output"
    del proto.graph.value_info[:]
    model = canonical(proto, tmp_path)
    source = "relu" if taken == "node" else "relu_QuantizeLinear_Output"
    quantizer = _activation(source, (neg.name, 0), qtype=QType.unsigned(2), quantizer_id="relu")
    path = _write(model, tmp_path, [quantizer], {"relu": COARSE})
    written = onnx.load(str(path)).graph
    assert len({node.name for node in written.node}) == len(written.node)
    feed = random_samples(model, 1)[0]
    np.testing.assert_array_equal(_run(path, feed)["neg"], -fake_quantize(np.maximum(feed["x"], 0), COARSE))


def test_the_second_output_of_a_node_as_a_quantized_graph_output(tmp_path: Path) -> None:
    net = Net()
    net.op("Split", "first", "x", outputs=["second"], axis=1, num_outputs=2)
    model = canonical(net.proto({"x": [2, 6]}, ["first", "second"]), tmp_path)
    quantizer = _activation("second", (GRAPH_OUTPUT, 0), qtype=QType.unsigned(2))
    path = _write(model, tmp_path, [quantizer], {"second": COARSE})
    feed = random_samples(model, 1)[0]
    found = _run(path, feed)
    np.testing.assert_array_equal(found["first"], feed["x"][:, :3])
    np.testing.assert_array_equal(found["second"], fake_quantize(feed["x"][:, 3:], COARSE))


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize(("low", "high"), [(-2.0, 2.0), (-2.0, 1.0)], ids=["zero", "not zero"])
def test_int8_activations_name_their_zero_point_unless_it_is_zero(
    low: float, high: float, opset: int, tmp_path: Path
) -> None:
    """From opset 21 on, where a node that names none has zeros of type int8."""
    net = Net(opset=opset)
    net.op("Neg", "neg", "x")
    model = canonical(net.proto({"x": [2, 5]}, ["neg"]), tmp_path)
    qtype = QType.signed(8)
    qparams = symmetric_qparams(np.asarray(high), qtype, PerTensor())
    if low != -high:
        qparams = asymmetric_qparams(low, high, qtype)
    path = _write(model, tmp_path, [_activation("x", ("neg", 0), qtype=qtype)], {"x": qparams})
    feed = random_samples(model, 1)[0]
    np.testing.assert_array_equal(_run(path, feed)["neg"], -fake_quantize(feed["x"], qparams))
    is_silent = opset >= 21 and low == -high
    assert len(_nodes(path)["x_DequantizeLinear"].input) == (2 if is_silent else 3)


def test_zero_points_that_are_zero_at_first_can_be_fed_too(tmp_path: Path) -> None:
    """A node that names none would keep to 0."""
    net = Net()
    net.op("Neg", "neg", "x")
    model = canonical(net.proto({"x": [2, 5]}, ["neg"]), tmp_path)
    qtype = QType.signed(8)
    start = symmetric_qparams(np.asarray(2.0), qtype, PerTensor())
    plan = QuantPlan(target="simulate", quantizers=(_activation("x", ("neg", 0), qtype=qtype),))
    graph, feeds = insert_adjustable(model.graph, plan, Solution(qparams={"x": start}))
    save_graph(graph, tmp_path / "adjustable.onnx")
    feed = dict(random_samples(model, 1)[0])
    for qparams in (start, asymmetric_qparams(-0.5, 2.0, qtype)):
        found = _run(tmp_path / "adjustable.onnx", feed | feeds({"x": qparams}))
        np.testing.assert_array_equal(found["neg"], -fake_quantize(feed["x"], qparams))


def test_parameters_of_4_bit_storage_cannot_be_fed(tmp_path: Path) -> None:
    model = _fan_out(tmp_path)
    qtype = QType.unsigned(4, "uint4")
    plan = QuantPlan(target="simulate", quantizers=(_activation("relu", ("neg", 0), qtype=qtype),))
    solution = Solution(qparams={"relu": asymmetric_qparams(0.0, 2.0, qtype)})
    with pytest.raises(ValueError, match="4-bit storage cannot be fed"):
        insert_adjustable(model.graph, plan, solution)


@pytest.mark.parametrize("bits", range(2, 9))
def test_narrow_activations_saturate_at_their_own_grid(bits: int, tmp_path: Path) -> None:
    model = _fan_out(tmp_path)
    qtype = QType.unsigned(bits)
    qparams = asymmetric_qparams(-0.4, 0.7, qtype)
    path = _write(model, tmp_path, [_activation("x", ("relu", 0), qtype=qtype)], {"x": qparams})
    feed = {"x": np.linspace(-50, 50, 10, dtype=np.float32).reshape(2, 5)}
    wanted = np.maximum(fake_quantize(feed["x"], qparams), 0)
    np.testing.assert_array_equal(_run(path, feed)["abs"], wanted)
    assert ("x_Clip" in _nodes(path)) == (bits < 8)


def test_a_weight_shared_along_different_axes(tmp_path: Path) -> None:
    net = Net()
    w = net.weight("w", 6, 6)
    net.op("MatMul", "a", "x", w)
    net.op("Gemm", "b", "a", w, transB=1)
    model = canonical(net.proto({"x": [3, 6]}, ["b"]), tmp_path)
    values = model.graph.tensors()["w"].values
    columns = search_weight_qparams(values, QType.signed(3), PerAxis(1))
    rows = search_weight_qparams(values, QType.signed(3), PerAxis(0))
    path = _write(
        model,
        tmp_path,
        [
            _weight("w", 1, ("a", 1), qtype=QType.signed(3)),
            _weight("w", 0, ("b", 1), qtype=QType.signed(3), quantizer_id="w@b"),
        ],
        {"w": columns, "w@b": rows},
    )
    feed = random_samples(model, 1)[0]
    wanted = feed["x"] @ fake_quantize(values, columns) @ fake_quantize(values, rows).T
    # Float rounding of two products of six terms.
    np.testing.assert_allclose(_run(path, feed)["b"], wanted, rtol=1e-5, atol=1e-6)
    assert {"w_quantized", "w@b_quantized"} <= {t.name for t in onnx.load(str(path)).graph.initializer}


def test_a_weight_read_in_float_elsewhere_stays(tmp_path: Path) -> None:
    net = Net()
    w = net.weight("w", 6, 6)
    net.op("MatMul", "a", "x", w)
    net.op("Add", "b", "a", w)
    model = canonical(net.proto({"x": [6, 6]}, ["b"]), tmp_path)
    values = model.graph.tensors()["w"].values
    coarse = search_weight_qparams(values, QType.signed(2), PerAxis(1))
    path = _write(model, tmp_path, [_weight("w", 1, ("a", 1), qtype=QType.signed(2))], {"w": coarse})
    feed = random_samples(model, 1)[0]
    np.testing.assert_allclose(
        _run(path, feed)["b"], feed["x"] @ fake_quantize(values, coarse) + values, rtol=1e-5, atol=1e-6
    )


def test_replaced_weights_are_the_ones_that_are_quantized(tmp_path: Path) -> None:
    net = Net()
    net.op("MatMul", "m", "x", net.weight("w", 6, 4))
    net.op("Add", "y", "m", net.weight("b", 4))
    model = canonical(net.proto({"x": [3, 6]}, ["y"]), tmp_path)
    new_w = np.random.default_rng(9).standard_normal((6, 4)).astype(np.float32)
    new_b = np.arange(4, dtype=np.float32)
    qparams = search_weight_qparams(new_w, QType.signed(8), PerAxis(1))
    path = _write(model, tmp_path, [_weight("w", 1, ("m", 1))], {"w": qparams}, w=new_w, b=new_b)
    feed = random_samples(model, 1)[0]
    np.testing.assert_allclose(
        _run(path, feed)["y"], feed["x"] @ fake_quantize(new_w, qparams) + new_b, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("shape", [(6, 4), (5, 3)], ids=["even", "odd_count"])
def test_int4_weights_survive_saving(bits: int, shape: tuple[int, int], tmp_path: Path) -> None:
    net = Net(opset=21)
    net.op("MatMul", "y", "x", net.weight("w", *shape))
    model = canonical(net.proto({"x": [3, shape[0]]}, ["y"]), tmp_path)
    values = model.graph.tensors()["w"].values
    qtype = QType.signed(bits, "int4")
    qparams = search_weight_qparams(values, qtype, PerAxis(1))
    path = _write(model, tmp_path, [_weight("w", 1, ("y", 1), qtype=qtype)], {"w": qparams})
    (stored,) = [t for t in onnx.load(str(path)).graph.initializer if t.name == "w_quantized"]
    assert stored.data_type == TensorProto.INT4
    assert len(stored.raw_data) == (values.size + 1) // 2
    assert stored.ByteSize() < 40 + values.size
    scale = qparams.scale.reshape(1, -1)
    np.testing.assert_array_equal(
        numpy_helper.to_array(stored).astype(np.float32) * scale, fake_quantize(values, qparams)
    )
    feed = random_samples(model, 1)[0]
    np.testing.assert_allclose(
        _run(path, feed)["y"], feed["x"] @ fake_quantize(values, qparams), rtol=1e-5, atol=1e-6
    )


def test_groups_become_blocks(tmp_path: Path) -> None:
    net = Net(opset=21)
    net.op("MatMul", "y", "x", net.weight("w", 8, 3))
    model = canonical(net.proto({"x": [3, 8]}, ["y"]), tmp_path)
    values = model.graph.tensors()["w"].values
    qparams = QParams(
        scale=np.abs(values).reshape(2, 4, 3).max(axis=1) / np.float32(7),
        zero_point=np.zeros((2, 3), np.int32),
        qtype=QType.signed(4),
        granularity=PerGroup(0, 4),
    )
    path = _write(model, tmp_path, [_weight("w", 0, ("y", 1), qtype=QType.signed(4))], {"w": qparams})
    attributes = {a.name: a.i for a in _nodes(path)["w_DequantizeLinear"].attribute}
    assert attributes == {"axis": 0, "block_size": 4}
    feed = random_samples(model, 1)[0]
    np.testing.assert_allclose(
        _run(path, feed)["y"], feed["x"] @ fake_quantize(values, qparams), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("seen", [True, False], ids=["caller_quantized", "caller_float"])
def test_sub_graphs_keep_reading_the_float_tensor(seen: bool, tmp_path: Path) -> None:
    branches = {
        name: helper.make_graph(
            [helper.make_node(op, ["relu"], [f"{name}_out"], name=f"{name}_node")],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [2, 5])],
        )
        for name, op in (("then", "Neg"), ("else", "Abs"))
    }
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["relu"], name="relu"),
            helper.make_node("Neg", ["relu"], ["neg"], name="neg"),
            helper.make_node("ReduceSum", ["x"], ["sum"], name="sum", keepdims=0),
            helper.make_node("Greater", ["sum", "zero"], ["positive"], name="positive"),
            helper.make_node(
                "If",
                ["positive"],
                ["branch"],
                name="branch",
                then_branch=branches["then"],
                else_branch=branches["else"],
            ),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 5]) for n in ("neg", "branch", "relu")],
        [numpy_helper.from_array(np.float32(0.0), "zero")],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model = canonical(proto, tmp_path)
    sites = [("neg", 0), *([(GRAPH_OUTPUT, 0)] if seen else [])]
    path = _write(model, tmp_path, [_activation("relu", *sites, qtype=QType.unsigned(2))], {"relu": COARSE})
    for sign in (1, -1):
        feed = {"x": sign * (np.arange(10, dtype=np.float32).reshape(2, 5) / 7 - 0.2)}
        relu = np.maximum(feed["x"], 0)
        found = _run(path, feed)
        np.testing.assert_array_equal(found["neg"], -fake_quantize(relu, COARSE))
        np.testing.assert_array_equal(found["branch"], -relu if feed["x"].sum() > 0 else relu)
        np.testing.assert_array_equal(found["relu"], fake_quantize(relu, COARSE) if seen else relu)


def test_int32_biases_are_stored_on_the_accumulators_grid(tmp_path: Path) -> None:
    net = Net()
    net.conv("y", "x", (4, 2, 3, 3))
    model = canonical(net.proto({"x": [1, 2, 5, 5]}, ["y"]), tmp_path)
    bias = model.graph.tensors()["y.b"].values
    qparams = QParams(
        scale=np.array([1e-3, 2e-3, 3e-3, 4e-3], np.float32),
        zero_point=np.zeros(4, np.int32),
        qtype=QType.signed(32, "int32"),
        granularity=PerAxis(0),
    )
    quantizer = Quantizer(
        quantizer_id="y.b@y",
        tensor="y.b",
        role="bias",
        qtype=qparams.qtype,
        granularity=PerAxis(0),
        symmetric=True,
        sites=(Site(tensor="y.b", consumer="y", input_index=2, is_weight=True),),
        scale_group="y.b@y",
    )
    path = _write(model, tmp_path, [quantizer], {"y.b@y": qparams})
    (stored,) = [t for t in onnx.load(str(path)).graph.initializer if t.name == "y.b@y_quantized"]
    assert stored.data_type == TensorProto.INT32
    np.testing.assert_array_equal(
        numpy_helper.to_array(stored), np.rint(bias / qparams.scale).astype(np.int32)
    )
