"""``onnxptq.shift`` behind activations: one subtraction where the range is lopsided, taken up by every reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from onnxptq.graph.index import GraphIndex
from onnxptq.pipeline import quantize
from onnxptq.recipe import Recipe
from onnxptq.runtime import SAME_FUNCTION, Session, difference
from onnxptq.shift.run import Shift, shift
from onnxptq.targets import TARGETS, PlacementRequest
from onnxptq.types import CanonicalModel
from tests.unit.equalize.equalize_helpers import canonical, samples_for
from tests.unit.rotate import rotate_nets as nets
from tests.unit.shift.shift_cases import READ_OTHERWISE, WIDTH, Parts, shifted
from tests.unit.small_nets import conv_relu_conv


def centred(proto: onnx.ModelProto, folder: Path, count: int = 6) -> tuple[CanonicalModel, Shift]:
    """The form with subtractions, held against onnx's own interpreter as well."""
    source, result, found = shifted(proto, folder, count, where="behind activations")
    session, interpreter = Session(source.path, exact=True, threads=1), ReferenceEvaluator(str(result.path))
    for sample in list(samples_for(proto, count + 3))[count:]:
        interpreted = dict(zip(interpreter.output_names, interpreter.run(None, dict(sample)), strict=True))
        assert difference(session.run(sample), interpreted) <= SAME_FUNCTION
    added = [node for node in result.graph.nodes if node.name not in {n.name for n in source.graph.nodes}]
    assert [node.op for node in added] == ["Sub"] * len(found.tensors)
    assert [node.inputs[0].name for node in added] == list(found.tensors)
    return result, found


class Activated(Parts):
    def begin(self, op: str = "Gelu") -> str:
        return self.op(op, "act", self.linear("up", "x", 7, WIDTH))


def product_and_bias() -> onnx.ModelProto:
    net = Activated()
    return net.end(net.linear("y", net.begin(), WIDTH, 5))


def rectified() -> onnx.ModelProto:
    net = Activated()
    return net.end(net.linear("y", net.begin("Relu"), WIDTH, 5))


def two_readers() -> onnx.ModelProto:
    net = Activated()
    act = net.begin("HardSwish")
    return net.end(net.linear("y", act, WIDTH, 5), net.linear("z", act, WIDTH, 3))


def gemms() -> onnx.ModelProto:
    """One of them without a bias yet."""
    net = Activated()
    rows = net.op("Reshape", "rows", net.begin(), net.ints("s", -1, WIDTH))
    a = net.op("Gemm", "a", rows, net.weight("a.w", 5, WIDTH), net.weight("a.b", 5), transB=1)
    return net.end(a, net.op("Gemm", "b", rows, net.weight("b.w", WIDTH, 3)))


def gated() -> onnx.ModelProto:
    """SiLU as exporters write it: the product is shifted, the sigmoid that it reads is not."""
    net = Activated()
    x = net.linear("up", "x", 7, WIDTH)
    act = net.op("Mul", "act", x, net.op("Sigmoid", "gate", x))
    return net.end(net.linear("y", act, WIDTH, 5))


def scaled() -> onnx.ModelProto:
    """A product of two single numbers, as attention scales are computed, multiplies the channels behind."""
    net = Activated()
    y = net.linear("y", net.begin(), WIDTH, 5)
    total = net.op("ReduceSum", "total", "x", keepdims=0)
    return net.end(net.op("Mul", "z", y, net.op("Mul", "factor", total, net.constant("c", np.float32(0.1)))))


@pytest.mark.parametrize("build", [product_and_bias, rectified, two_readers, gemms, gated, scaled])
def test_one_subtraction_centres_the_channels_for_every_reader(
    build: Callable[[], onnx.ModelProto], tmp_path: Path
) -> None:
    proto = build()
    result, found = centred(proto, tmp_path)
    assert found.tensors == ("act",)
    assert found.channels == WIDTH
    assert "Shifted behind activations: 12 channels of 1 tensor;" in found.summary
    taking = next(node for node in result.graph.nodes if node.op == "Sub")
    assert [node.op for node in taking.outputs[0].outputs] == [
        node.op for node in canonical(proto, tmp_path).graph.tensors()["act"].outputs
    ]
    rest, channels = taking.outputs[0].name, taking.inputs[1].values
    model = onnx.load(str(result.path))
    model.graph.output.append(onnx.helper.make_tensor_value_info("act", onnx.TensorProto.FLOAT, None))
    model.graph.output.append(onnx.helper.make_tensor_value_info(rest, onnx.TensorProto.FLOAT, None))
    interpreter = ReferenceEvaluator(model)
    values, left = (
        np.concatenate([interpreter.run([name], dict(s))[0] for s in samples_for(proto, 6)])
        for name in ("act", rest)
    )
    extremes = left.reshape(-1, WIDTH).min(axis=0), left.reshape(-1, WIDTH).max(axis=0)
    np.testing.assert_allclose(extremes[0], -extremes[1], atol=1e-5)
    np.testing.assert_allclose(values - left, np.broadcast_to(channels, values.shape), atol=1e-5)
    assert np.abs(left).max() < 2 / 3 * np.abs(values).max()
    assert result.user_name(rest) == "act"


def _read_by_a_convolution(net: Parts) -> str:
    front = net.op("Transpose", "front", net.begin(), perm=[0, 3, 1, 2])
    net.linear("z", "act", WIDTH, 5)
    return net.conv("y", front, (4, WIDTH, 1, 1), pads=[0] * 4)


def _behind_a_convolution(net: Parts) -> str:
    x = net.op("Relu", "act", net.conv("up", "x", (8, 6, 1, 1), pads=[0] * 4))
    return net.linear("y", x, 7, 5)


def _on_both_sides(net: Parts) -> str:
    """A product of two signed tensors: half the width of its range is about its largest magnitude."""
    both = (net.op("Tanh", f"{side}t", net.linear(side, "x", 7, WIDTH)) for side in "lr")
    act = net.op("Mul", "act", *both)
    return net.linear("y", act, WIDTH, 5)


@pytest.mark.parametrize(
    "build",
    [*READ_OTHERWISE, _read_by_a_convolution, _behind_a_convolution, _on_both_sides],
)
def test_no_subtraction_where_it_cannot_be_taken_up_or_gains_little(
    build: Callable[[Parts], str], tmp_path: Path
) -> None:
    net = Activated()
    _, found = centred(net.end(*{build(net): None, "y": None}), tmp_path)
    assert found == Shift(where="behind activations")
    assert "No channels behind activations" in found.summary


def test_between_layers_nothing_is_subtracted(tmp_path: Path) -> None:
    source = canonical(product_and_bias(), tmp_path)
    assert shift(source, samples_for(product_and_bias(), 4), work_dir=tmp_path)[0] is source


def test_activations_between_convolutions_stay(tmp_path: Path) -> None:
    assert not centred(conv_relu_conv(), tmp_path)[1].tensors


def test_both_kinds_of_shifts_follow_each_other(tmp_path: Path) -> None:
    proto = nets.transformer()
    first, found = centred(proto, tmp_path)
    assert len(found.tensors) == 2
    samples = samples_for(proto, 6)
    second, more = shift(first, samples, work_dir=tmp_path)
    assert len(more.tensors) == 6
    assert {first.path.name, second.path.name} == {
        "shifted_behind_activations.onnx",
        "shifted_between_layers.onnx",
    }
    sample = next(iter(samples))
    outputs = [
        Session(m.path, exact=True, threads=1).run(sample) for m in (canonical(proto, tmp_path), second)
    ]
    assert difference(*outputs) <= SAME_FUNCTION


def test_tensorrt_quantizes_behind_the_subtraction_alone(tmp_path: Path) -> None:
    result, _ = centred(product_and_bias(), tmp_path)
    plan = TARGETS["tensorrt"](GraphIndex(result.graph), PlacementRequest())
    taking = next(node for node in result.graph.nodes if node.op == "Sub")
    rest = taking.outputs[0].name
    sites = {(s.tensor, s.consumer) for q in plan.quantizers if q.role == "activation" for s in q.sites}
    assert sites == {("x", "up.mm"), (rest, "y.mm")}


# ---- in a run ------------------------------------------------------------------------------------


def test_subtractions_are_tried_unless_shifts_are_turned_off() -> None:
    for values in ({}, {"shift": True}, {"weight_bits": 4}):
        assert Recipe.create(values).tries_subtraction
    for values in ({"shift": False}, {"method": "rtn"}):
        assert not Recipe.create(values).tries_subtraction


def test_a_run_for_symmetric_grids_gains_and_names_what_the_user_named(tmp_path: Path) -> None:
    net = Activated()
    proto = net.proto({"x": [6, 7]}, [net.linear("y", net.begin("Relu"), WIDTH, 5)])
    path = tmp_path / "net.onnx"
    onnx.save(proto, str(path))
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((6, 7)).astype(np.float32)} for _ in range(40)]
    reports = {}
    for name, shifts in (("default", None), ("never", False)):
        recipe = Recipe(
            target="tensorrt",
            equalize=False,
            rotate=False,
            simplify=False,
            holdout=0.5,
            enough=None,
            shift=shifts,
        )
        written = tmp_path / f"{name}.onnx"
        result = quantize(path, written, calibration=feeds, recipe=recipe, work_dir=tmp_path / "work")
        reports[name] = result.report
    said = {name: "\n".join(report.notes) for name, report in reports.items()}
    assert "The channels shifted behind activations were kept" in said["default"]
    assert "hift" not in said["never"]
    assert all(edge.different == 0 for edge in reports["default"].parity.edges)
    for report in reports.values():
        assert {row.tensor for row in report.quantized if row.role == "activation"} == {"x", "act"}
    gain = reports["default"].outputs[0].sqnr_db - reports["never"].outputs[0].sqnr_db
    assert gain > 0.5


def test_asymmetric_grids_take_no_subtraction(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(product_and_bias(), str(path))
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((1, 6, 4, 7)).astype(np.float32)} for _ in range(8)]
    for target in ("ort-cpu", "simulate"):
        written = tmp_path / f"{target}.onnx"
        recipe = Recipe(target=target, enough=None)
        quantize(path, written, calibration=feeds, recipe=recipe, work_dir=tmp_path / "work")
        assert not [node for node in onnx.load(str(written)).graph.node if node.op_type == "Sub"]
