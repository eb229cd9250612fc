"""Every way in which a file may say something else than its plan is caught."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxptq.errors import OutputCheckError
from onnxptq.targets import PlacementRequest
from onnxptq.types import PerAxis
from onnxptq.validate import structure
from onnxptq.validate.parity import check_parity
from onnxptq.validate.structure import check_structure
from tests.unit.small_nets import Net
from tests.unit.validate.written_model import Written, samples, write

Corrupt = Callable[[onnx.ModelProto], None]


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def _set(model: onnx.ModelProto, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    value = numpy_helper.to_array(tensor)
    changed = np.asarray(change(value.copy()), value.dtype)
    assert not np.array_equal(changed, value)
    tensor.CopyFrom(numpy_helper.from_array(changed, name))


def _bumped(value: np.ndarray) -> np.ndarray:
    value.flat[0] = int(value.flat[0]) + (-1 if value.flat[0] > 0 else 1)
    return value


def _next_float(value: np.ndarray) -> np.ndarray:
    value.flat[0] = np.nextafter(value.flat[0], np.float32(np.inf))
    return value


def _quantizer_of(
    model: onnx.ModelProto, consumer: str, index: int
) -> tuple[onnx.NodeProto, onnx.NodeProto | None]:
    """The DequantizeLinear, and the QuantizeLinear if there is one, in front of an edge."""
    producers = {t: n for n in model.graph.node for t in n.output}
    dequantize = producers[_node(model, consumer).input[index]]
    assert dequantize.op_type == "DequantizeLinear"
    return dequantize, producers.get(dequantize.input[0])


def scale_off_by_one_ulp(model: onnx.ModelProto) -> None:
    _set(model, _quantizer_of(model, "conv1", 0)[0].input[1], _next_float)


def weight_scale_off_by_one_ulp(model: onnx.ModelProto) -> None:
    _set(model, _quantizer_of(model, "conv1", 1)[0].input[1], _next_float)


def weight_integer_changed(model: onnx.ModelProto) -> None:
    _set(model, _quantizer_of(model, "conv1", 1)[0].input[0], _bumped)


def bias_integer_changed(model: onnx.ModelProto) -> None:
    _set(model, _quantizer_of(model, "conv1", 2)[0].input[0], _bumped)


def zero_point_changed(model: onnx.ModelProto) -> None:
    _set(model, _quantizer_of(model, "conv0", 0)[0].input[2], _bumped)


def zero_point_cleared(model: onnx.ModelProto) -> None:
    _set(model, _quantizer_of(model, "conv0", 0)[0].input[2], np.zeros_like)


def axis_changed(model: onnx.ModelProto) -> None:
    for attribute in _quantizer_of(model, "conv1", 1)[0].attribute:
        if attribute.name == "axis":
            attribute.i = 1


def axis_removed(model: onnx.ModelProto) -> None:
    # Without the attribute the standard's default, axis 1, holds.
    del _quantizer_of(model, "conv1", 1)[0].attribute[:]


def reader_repointed_to_float(model: onnx.ModelProto) -> None:
    _node(model, "conv1").input[0] = "r0"


def float_reader_repointed_to_quantized(model: onnx.ModelProto) -> None:
    node = _node(model, "act")
    node.input[0] = _node(model, "conv1").input[0]


def quantizer_source_repointed(model: onnx.ModelProto) -> None:
    """The quantizer of 'act' reads what 'act' reads."""
    _, quantize = _quantizer_of(model, "conv2", 0)
    assert quantize is not None
    assert quantize.input[0] == "act"
    quantize.input[0] = "sum"


def pair_removed(model: onnx.ModelProto) -> None:
    dequantize, quantize = _quantizer_of(model, "head", 0)
    assert quantize is not None
    _node(model, "head").input[0] = quantize.input[0]
    gone = {*dequantize.input[1:], *quantize.input[1:]}
    model.graph.node.remove(dequantize)
    model.graph.node.remove(quantize)
    for tensor in [t for t in model.graph.initializer if t.name in gone]:
        model.graph.initializer.remove(tensor)


def quantize_node_removed(model: onnx.ModelProto) -> None:
    """The integers come from a Cast instead."""
    _, quantize = _quantizer_of(model, "head", 0)
    assert quantize is not None
    quantize.op_type = "Cast"
    del quantize.input[1:]
    quantize.attribute.append(helper.make_attribute("to", onnx.TensorProto.UINT8))


def extra_pair(model: onnx.ModelProto) -> None:
    _insert_pair(model, "act", 0)


def extra_pair_behind_a_pair(model: onnx.ModelProto) -> None:
    _insert_pair(model, "conv1", 0)


def _insert_pair(model: onnx.ModelProto, consumer: str, index: int) -> None:
    scale = numpy_helper.from_array(np.float32(0.05), "extra_scale")
    zero = numpy_helper.from_array(np.uint8(128), "extra_zero")
    model.graph.initializer.extend([scale, zero])
    node = _node(model, consumer)
    at = list(model.graph.node).index(node)
    pair = [
        helper.make_node(
            "QuantizeLinear", [node.input[index], "extra_scale", "extra_zero"], ["eq"], name="eq"
        ),
        helper.make_node("DequantizeLinear", ["eq", "extra_scale", "extra_zero"], ["ed"], name="ed"),
    ]
    node.input[index] = "ed"
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], *pair, *nodes[at:]])


def extra_node(model: onnx.ModelProto) -> None:
    node = _node(model, "act")
    at = list(model.graph.node).index(node)
    extra = helper.make_node("Identity", [node.input[0]], ["idle"], name="idle")
    node.input[0] = "idle"
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], extra, *nodes[at:]])


def name_repeated(model: onnx.ModelProto) -> None:
    extra_node(model)
    _node(model, "idle").name = "act"


def clip_added(model: onnx.ModelProto) -> None:
    _, quantize = _quantizer_of(model, "conv1", 0)
    assert quantize is not None
    at = list(model.graph.node).index(quantize)
    bounds = [numpy_helper.from_array(np.float32(value), f"bound{value}") for value in (0, 1)]
    model.graph.initializer.extend(bounds)
    clip = helper.make_node("Clip", [quantize.input[0], *(b.name for b in bounds)], ["clipped"], name="clip")
    quantize.input[0] = "clipped"
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*nodes[:at], clip, *nodes[at:]])


def sparse_weight_added(model: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    places = numpy_helper.from_array(np.zeros(1, np.int64), "sparse_indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [4]))


def function_added(model: onnx.ModelProto) -> None:
    body = [helper.make_node("Relu", ["a"], ["b"])]
    opsets = [helper.make_opsetid("", 17)]
    model.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], body, opsets))
    model.opset_import.append(helper.make_opsetid("own", 1))


def output_renamed(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "renamed"
    _node(model, "head").output[0] = "renamed"


def outputs_swapped(model: onnx.ModelProto) -> None:
    first, second = model.graph.output
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(first)
    first.CopyFrom(second)
    second.CopyFrom(copy)


def batch_fixed(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def float_attribute_changed(model: onnx.ModelProto) -> None:
    _node(model, "act").attribute[0].f = 0.11


def float_inputs_swapped(model: onnx.ModelProto) -> None:
    node = _node(model, "sum")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def float_constant_changed(model: onnx.ModelProto) -> None:
    _set(model, _node(model, "relu6").input[2], _next_float)


def dead_weight_left(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(3, np.float32), "b_dead"))


def opset_changed(model: onnx.ModelProto) -> None:
    model.opset_import[0].version += 1


def ir_version_too_old(model: onnx.ModelProto) -> None:
    model.ir_version = 7


def clip_bound_changed(model: onnx.ModelProto) -> None:
    _set(model, _clip(model).input[2], _next_float)


def clip_removed(model: onnx.ModelProto) -> None:
    clip = _clip(model)
    reader = next(n for n in model.graph.node if clip.output[0] in n.input)
    reader.input[0] = clip.input[0]
    gone = set(clip.input[1:])
    model.graph.node.remove(clip)
    for tensor in [t for t in model.graph.initializer if t.name in gone]:
        model.graph.initializer.remove(tensor)


def _clip(model: onnx.ModelProto) -> onnx.NodeProto:
    producers = {t: n for n in model.graph.node for t in n.output}
    _, quantize = _quantizer_of(model, "conv2", 0)
    assert quantize is not None
    clip = producers[quantize.input[0]]
    assert clip.op_type == "Clip"
    return clip


def float_bias_changed(model: onnx.ModelProto) -> None:
    _set(model, _node(model, "conv1").input[2], _next_float)


INT8: tuple[tuple[Corrupt, str], ...] = (
    (scale_off_by_one_ulp, "activation 'r0'.*the scale of its QuantizeLinear"),
    (weight_scale_off_by_one_ulp, "weight 'w1'.*the scale of its DequantizeLinear"),
    (weight_integer_changed, "weight 'w1'.*1 of its integers"),
    (bias_integer_changed, "bias 'b1'.*1 of its integers"),
    (zero_point_changed, "activation 'x'.*the zero point"),
    (zero_point_cleared, "activation 'x'.*the zero point"),
    (axis_changed, "weight 'w1'.*the axis"),
    (axis_removed, "weight 'w1'.*the axis"),
    (reader_repointed_to_float, "activation 'r0'.*is absent on some or all"),
    (float_reader_repointed_to_quantized, "inputs of node 'act'"),
    (quantizer_source_repointed, "quantizer of 'act' reads 'sum' instead"),
    (pair_removed, "activation 'flat'.*is absent"),
    (quantize_node_removed, "activation 'flat'.*is absent"),
    (extra_pair, "'ed' is not in the plan"),
    (extra_pair_behind_a_pair, "activation 'r0'|is not in the plan"),
    (extra_node, "node 'idle'"),
    (name_repeated, "nodes without a name of their own"),
    (clip_added, "activation 'r0'.*it has a Clip that its grid does not need"),
    (sparse_weight_added, "holds sparse initializers"),
    (function_added, "holds functions"),
    (output_renamed, "outputs are renamed, features instead of scores, features"),
    (outputs_swapped, "outputs are features, scores instead"),
    (batch_fixed, "type or shape of graph input 'x'"),
    (float_attribute_changed, "attributes of node 'act'"),
    (float_inputs_swapped, "'r0'|'c1'"),
    (float_constant_changed, "initializer 'six'"),
    (dead_weight_left, "nothing reads initializer 'b_dead'"),
    (opset_changed, "declares opset"),
    (ir_version_too_old, "IR version|checker"),
)
NARROW: tuple[tuple[Corrupt, str], ...] = (
    (clip_bound_changed, "activation 'act'.*bounds of its Clip"),
    (clip_removed, "activation 'act'.*the Clip is missing"),
    (float_bias_changed, "initializer 'b1' is not the model's"),
    (axis_changed, "weight 'w1'.*the axis"),
    (zero_point_changed, "activation 'x'.*the zero point"),
)
# What changes values behind a quantizer shows in its own output, whatever the structure says.
VISIBLE_TO_PARITY = (
    scale_off_by_one_ulp,
    weight_scale_off_by_one_ulp,
    weight_integer_changed,
    bias_integer_changed,
    zero_point_changed,
    axis_changed,
    axis_removed,
)


def _corrupted(written: Written, corrupt: Corrupt, folder: Path) -> Path:
    model = onnx.load(str(written.path))
    corrupt(model)
    path = folder / "corrupted.onnx"
    onnx.save(model, str(path))
    return path


def _check(written: Written, path: Path) -> None:
    check_structure(path, written.model, written.plan, written.solution)


def _compare(written: Written, path: Path, folder: Path) -> None:
    check_parity(path, written.model, written.plan, written.solution, written.samples, work_dir=folder)


def test_the_written_files_pass(int8: Written, narrow: Written, tmp_path: Path) -> None:
    for written in (int8, narrow):
        _check(written, written.path)
        _compare(written, written.path, tmp_path)


def test_the_scale_of_a_single_channel_is_one_of_its_axis(tmp_path: Path) -> None:
    net = Net(opset=17)
    onnx.save(net.proto({"x": [1, 4, 8, 8]}, [net.conv("y", "x", (1, 4, 3, 3))]), str(tmp_path / "net.onnx"))
    written = write(tmp_path / "net.onnx", tmp_path, "ort-cpu", PlacementRequest(), samples(1, batch=1))
    assert {q.granularity for q in written.plan.quantizers if q.role != "activation"} == {PerAxis(0)}
    _check(written, written.path)


@pytest.mark.parametrize(("corrupt", "message"), INT8, ids=lambda v: getattr(v, "__name__", None))
def test_structure_catches(int8: Written, corrupt: Corrupt, message: str, tmp_path: Path) -> None:
    with pytest.raises(OutputCheckError) as caught:
        _check(int8, _corrupted(int8, corrupt, tmp_path))
    assert re.search(message, caught.value.message), caught.value.message


@pytest.mark.parametrize(("corrupt", "message"), NARROW, ids=lambda v: getattr(v, "__name__", None))
def test_structure_catches_in_narrow_files(
    narrow: Written, corrupt: Corrupt, message: str, tmp_path: Path
) -> None:
    with pytest.raises(OutputCheckError) as caught:
        _check(narrow, _corrupted(narrow, corrupt, tmp_path))
    assert re.search(message, caught.value.message), caught.value.message


@pytest.mark.parametrize("corrupt", VISIBLE_TO_PARITY, ids=lambda v: v.__name__)
def test_parity_catches(int8: Written, corrupt: Corrupt, tmp_path: Path) -> None:
    with pytest.raises(OutputCheckError, match="computes other values than the simulation"):
        _compare(int8, _corrupted(int8, corrupt, tmp_path), tmp_path)


def test_parity_catches_a_missing_clip(narrow: Written, tmp_path: Path) -> None:
    """The samples are scaled beyond the calibrated range, so that the Clip has something to do."""
    wide = replace(narrow, samples=tuple({"x": 4 * s["x"]} for s in narrow.samples))
    _compare(wide, narrow.path, tmp_path)
    with pytest.raises(OutputCheckError, match=r"activation 'act'.*computes other values"):
        _compare(wide, _corrupted(narrow, clip_removed, tmp_path), tmp_path)


@pytest.mark.parametrize("elements", [1, 7, 100])
def test_large_weights_are_taken_in_blocks(
    int8: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    """Per-channel scales along axis 0 (convolutions) and axis 1 (the Gemm), cut at odd places."""

    def last_integer_changed(model: onnx.ModelProto) -> None:
        for name in ("w1_quantized", "w3_quantized"):
            _set(model, name, lambda v: v - np.eye(1, v.size, v.size - 1).reshape(v.shape))

    monkeypatch.setattr(structure, "_BLOCK_ELEMENTS", elements)
    _check(int8, int8.path)
    _compare(int8, int8.path, tmp_path)
    for check in (lambda p: _check(int8, p), lambda p: _compare(int8, p, tmp_path)):
        with pytest.raises(OutputCheckError, match="weight 'w1'"):
            check(_corrupted(int8, last_integer_changed, tmp_path))


def test_a_file_that_the_checker_refuses(int8: Written, tmp_path: Path) -> None:
    def dangling(model: onnx.ModelProto) -> None:
        _node(model, "act").input[0] = "nowhere"

    with pytest.raises(OutputCheckError, match="The ONNX checker refuses"):
        _check(int8, _corrupted(int8, dangling, tmp_path))


def test_a_replaced_weight_must_be_the_solutions(int8: Written, tmp_path: Path) -> None:
    """The same file against a solution with another float weight."""
    weight = int8.model.graph.tensors()["w1"].values.copy()
    weight.flat[5] += 1.0
    other = replace(int8.solution, weights={"w1": weight})
    with pytest.raises(OutputCheckError, match="weight 'w1'"):
        check_structure(int8.path, int8.model, int8.plan, other)


def test_errors_use_the_users_names(int8: Written, tmp_path: Path) -> None:
    renamed = replace(int8.model, user_names={"w1": "backbone.weight"})
    path = _corrupted(int8, weight_integer_changed, tmp_path)
    with pytest.raises(OutputCheckError, match=r"'backbone\.weight'"):
        check_structure(path, renamed, int8.plan, int8.solution)
    with pytest.raises(OutputCheckError, match=r"'backbone\.weight'"):
        check_parity(path, renamed, int8.plan, int8.solution, int8.samples, work_dir=tmp_path)
