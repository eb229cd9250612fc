"""Bias correction and the starting solution against brute force."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from onnxptq.calibrate.observers import Observer
from onnxptq.calibrate.ranges import choose_ranges
from onnxptq.calibrate.run import calibrate
from onnxptq.qdq import insert_quantizers
from onnxptq.quantizers.affine import fake_quantize, quantize
from onnxptq.reconstruct.bias import correct_biases
from onnxptq.reconstruct.initial import bias_qparams, initial_solution
from onnxptq.samples import ListFeeds
from onnxptq.types import CanonicalModel, QuantPlan, Sample, Solution
from tests.unit.small_nets import Net, canonical, planned, random_samples


def _solved(
    model: CanonicalModel, samples: list[Sample], target: str = "simulate", **request: object
) -> tuple[QuantPlan, Solution]:
    plan = planned(model, target, **request)
    tensors = sorted({q.tensor for q in plan.quantizers if q.role == "activation"})
    ranges = choose_ranges(plan, calibrate(model, ListFeeds(samples), tensors), Observer(name="minmax"))
    return plan, initial_solution(model.graph, plan, ranges)


def _corrected(
    model: CanonicalModel, plan: QuantPlan, solution: Solution, samples: list[Sample], folder: Path
) -> dict[str, np.ndarray]:
    found = correct_biases(model, plan, solution, samples, insert=insert_quantizers, work_dir=folder)
    assert found.qparams is solution.qparams
    assert [p.name for p in folder.iterdir()] == ["model.onnx"]
    return dict(found.weights)


CONVS = {
    "plain": {},
    "padded": {"pads": [1, 1, 1, 1]},
    "uneven_padding": {"pads": [0, 2, 1, 0]},
    "strided": {"pads": [1, 1, 1, 1], "strides": [2, 2]},
    "dilated": {"pads": [2, 2, 2, 2], "dilations": [2, 2]},
    "grouped": {"pads": [1, 1, 1, 1], "group": 2},
    "depthwise": {"pads": [1, 1, 1, 1], "group": 4},
}


@pytest.mark.parametrize("kind", CONVS)
def test_convolutions(kind: str, tmp_path: Path) -> None:
    attrs = {"pads": [0, 0, 0, 0], **CONVS[kind]}
    group = int(attrs.get("group", 1))  # type: ignore[call-overload]
    net = Net()
    net.conv("y", "x", (4, 4 // group, 3, 3), **attrs)
    model = canonical(net.proto({"x": [2, 4, 9, 9]}, ["y"]), tmp_path)
    samples = random_samples(model, 3)
    plan, solution = _solved(model, samples, weight_bits=3, activation_bits=3)
    found = _corrected(model, plan, solution, samples, tmp_path)["y.b"]

    weight, bias = (model.graph.tensors()[n].values for n in ("y.w", "y.b"))

    def layer(x: np.ndarray, w: np.ndarray) -> np.ndarray:
        top, left, bottom, right = attrs["pads"]  # type: ignore[misc]
        padded = functional.pad(torch.from_numpy(x), (left, right, top, bottom))
        return functional.conv2d(
            padded,
            torch.from_numpy(w),
            stride=attrs.get("strides", [1, 1]),  # type: ignore[arg-type]
            dilation=attrs.get("dilations", [1, 1]),  # type: ignore[arg-type]
            groups=group,
        ).numpy()

    errors = [
        layer(s["x"], weight)
        - layer(fake_quantize(s["x"], solution.qparams["x"]), fake_quantize(weight, solution.qparams["y.w"]))
        for s in samples
    ]
    shift = np.mean([e.mean(axis=(0, 2, 3)) for e in errors], axis=0)
    assert np.abs(shift).max() > 1e-3
    # Float rounding of sums of 36 products.
    np.testing.assert_allclose(found, bias + shift, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemm", "gemm_transB", "matmul_2d", "matmul_3d", "matmul_any_rank"])
def test_matrix_products(kind: str, tmp_path: Path) -> None:
    net = Net()
    shape: list[int | str] = [3, 6] if kind.startswith("gemm") or kind == "matmul_2d" else [2, 5, 6]
    if kind == "gemm_transB":
        net.op("Gemm", "y", "x", net.weight("y.w", 4, 6), net.weight("y.b", 4), transB=1)
    elif kind == "gemm":
        net.op("Gemm", "y", "x", net.weight("y.w", 6, 4), net.weight("y.b", 4))
    else:
        net.linear("y", "x", 6, 4)
    proto = net.proto({"x": shape}, ["y"])
    if kind == "matmul_any_rank":
        del proto.graph.value_info[:]
    model = canonical(proto, tmp_path)
    if kind == "matmul_any_rank":
        model.graph.tensors()["y.mm"].shape = None
    samples = random_samples(model, 4)
    plan, solution = _solved(model, samples, weight_bits=3, activation_bits=3)
    found = _corrected(model, plan, solution, samples, tmp_path)["y.b"]
    weight, bias = (model.graph.tensors()[n].values for n in ("y.w", "y.b"))
    rounded = fake_quantize(weight, solution.qparams["y.w"])
    if kind == "gemm_transB":
        weight, rounded = weight.T, rounded.T
    errors = [s["x"] @ weight - fake_quantize(s["x"], solution.qparams["x"]) @ rounded for s in samples]
    shift = np.mean([e.reshape(-1, 4).mean(axis=0) for e in errors], axis=0)
    assert np.abs(shift).max() > 1e-3
    np.testing.assert_allclose(found, bias + shift, rtol=0, atol=1e-5)


def test_later_layers_are_corrected_on_float_inputs(tmp_path: Path) -> None:
    """The error of the first layer must not leak into the second: its inputs come from the float network."""
    net = Net()
    net.linear("b", net.op("Relu", "act", net.linear("a", "x", 6, 6)), 6, 4)
    model = canonical(net.proto({"x": [5, 6]}, ["b"]), tmp_path)
    samples = random_samples(model, 3)
    plan, solution = _solved(model, samples, weight_bits=3, activation_bits=4)
    found = _corrected(model, plan, solution, samples, tmp_path)["b.b"]
    values = {n: t.values for n, t in model.graph.tensors().items() if hasattr(t, "values")}
    inputs = [np.maximum(s["x"] @ values["a.w"] + values["a.b"], 0) for s in samples]
    rounded = fake_quantize(values["b.w"], solution.qparams["b.w"])
    errors = [x @ values["b.w"] - fake_quantize(x, solution.qparams["act"]) @ rounded for x in inputs]
    wanted = values["b.b"] + np.mean([e.mean(axis=0) for e in errors], axis=0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_the_order_of_samples_changes_no_bit(tmp_path: Path) -> None:
    net = Net()
    net.conv("y", "x", (4, 3, 3, 3))
    model = canonical(net.proto({"x": [1, 3, 9, 9]}, ["y"]), tmp_path)
    samples = random_samples(model, 9)
    plan, solution = _solved(model, samples, weight_bits=4)
    first = _corrected(model, plan, solution, samples, tmp_path)
    last = _corrected(model, plan, solution, samples[::-1], tmp_path)
    np.testing.assert_array_equal(first["y.b"], last["y.b"])


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_int32_biases_do_not_hide_what_they_correct(op: str, tmp_path: Path) -> None:
    """On ort-cpu the bias itself has a quantizer; the correction is the same as without one."""
    net = Net()
    if op == "MatMul":
        net.linear("b", "x", 6, 4)
    else:
        net.op("Gemm", "b", "x", net.weight("b.w", 6, 4), net.weight("b.b", 4))
    model = canonical(net.proto({"x": [5, 6]}, ["b"]), tmp_path)
    samples = random_samples(model, 3)
    results = []
    for target in ("ort-cpu", "simulate"):
        plan, solution = _solved(model, samples, target, weight_bits=4)
        results.append(_corrected(model, plan, solution, samples, tmp_path)["b.b"])
    np.testing.assert_array_equal(*results)


def test_layers_without_a_bias_of_their_own_are_left_alone(tmp_path: Path) -> None:
    net = Net()
    shared = net.weight("shared", 6)
    a = net.op("Gemm", "a", "x", net.weight("a.w", 6, 6), shared)
    b = net.op("Gemm", "b", a, net.weight("b.w", 6, 6), shared)
    net.op("Gemm", "c", b, net.weight("c.w", 6, 6))
    model = canonical(net.proto({"x": [5, 6]}, ["c"]), tmp_path)
    samples = random_samples(model, 2)
    plan, solution = _solved(model, samples, weight_bits=3)
    assert _corrected(model, plan, solution, samples, tmp_path) == {}


@pytest.mark.parametrize("shape", [(1,), (5, 4)], ids=["one for all", "one per row"])
def test_a_bias_that_is_no_value_per_channel_stays(shape: tuple[int, ...], tmp_path: Path) -> None:
    net = Net()
    net.op("Gemm", "y", "x", net.weight("w", 6, 4), net.weight("b", *shape))
    model = canonical(net.proto({"x": [5, 6]}, ["y"]), tmp_path)
    samples = random_samples(model, 2)
    plan, solution = _solved(model, samples, weight_bits=3)
    found = _corrected(model, plan, solution, samples, tmp_path)
    np.testing.assert_array_equal(found["b"], model.graph.tensors()["b"].values)


def test_samples_that_are_not_finite_correct_nothing(tmp_path: Path) -> None:
    net = Net()
    net.linear("y", "x", 6, 4)
    model = canonical(net.proto({"x": [5, 6]}, ["y"]), tmp_path)
    plan, solution = _solved(model, random_samples(model, 2))
    bad: list[Sample] = [{"x": np.full((5, 6), np.inf, np.float32)}]
    found = _corrected(model, plan, solution, bad, tmp_path)
    np.testing.assert_array_equal(found["y.b"], model.graph.tensors()["y.b"].values)


def test_a_bias_fits_its_integers_even_where_the_weights_are_tiny(tmp_path: Path) -> None:
    net = Net()
    weight = np.full((2, 4, 1, 1), 1e-12, np.float32)
    weight[1] = 0.5
    net.op("Conv", "y", "x", net.constant("w", weight), net.constant("b", np.array([5.0, 1.0], np.float32)))
    model = canonical(net.proto({"x": [1, 4, 4, 4]}, ["y"]), tmp_path)
    plan, solution = _solved(model, random_samples(model, 2), "ort-cpu")
    (bias,) = [q for q in plan.quantizers if q.role == "bias"]
    qparams = solution.qparams[bias.quantizer_id]
    integers = quantize(np.array([5.0, 1.0], np.float32), qparams)
    assert np.abs(integers).max() <= 2**30
    # Half a step of each channel's own accumulator.
    assert (np.abs(integers * qparams.scale - [5.0, 1.0]) <= 0.51 * qparams.scale).all()
    np.testing.assert_array_equal(qparams.scale, bias_qparams(bias, solution.qparams).scale)
    # The other channel's weights keep the grid that suits them.
    assert solution.qparams["w"].scale[1] == pytest.approx(0.5 / 127, rel=0.3)


def test_the_solution_covers_the_plan(tmp_path: Path) -> None:
    net = Net()
    net.conv("y", "x", (4, 3, 3, 3))
    model = canonical(net.proto({"x": [1, 3, 9, 9]}, ["y"]), tmp_path)
    for target in ("ort-cpu", "tensorrt", "simulate"):
        plan, solution = _solved(model, random_samples(model, 1), target)
        assert set(solution.qparams) == {q.quantizer_id for q in plan.quantizers}
        for q in plan.quantizers:
            assert solution.qparams[q.quantizer_id].qtype == q.qtype
            assert solution.qparams[q.quantizer_id].granularity == q.granularity


def test_a_bias_of_the_solution_is_the_one_that_is_corrected(tmp_path: Path) -> None:
    net = Net()
    net.conv("y", "x", (4, 3, 3, 3))
    model = canonical(net.proto({"x": [1, 3, 9, 9]}, ["y"]), tmp_path)
    samples = random_samples(model, 2)
    plan, solution = _solved(model, samples, weight_bits=3)
    bias = model.graph.tensors()["y.b"].values
    moved = replace(solution, weights={"y.b": bias + np.float32(2.0)})
    first, second = (_corrected(model, plan, s, samples, tmp_path)["y.b"] for s in (solution, moved))
    np.testing.assert_allclose(second - first, 2.0, atol=1e-6)


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_means_are_written_as_the_opset_has_them(opset: int, tmp_path: Path) -> None:
    """From 18 on their axes are an input."""
    net = Net(opset=opset)
    net.conv("y", "x", (4, 3, 3, 3))
    model = replace(canonical(net.proto({"x": [1, 3, 9, 9]}, ["y"]), tmp_path), opset=opset)
    samples = random_samples(model, 2)
    plan, solution = _solved(model, samples, weight_bits=3)
    found = _corrected(model, plan, solution, samples, tmp_path)["y.b"]
    assert np.abs(found - model.graph.tensors()["y.b"].values).max() > 1e-4
