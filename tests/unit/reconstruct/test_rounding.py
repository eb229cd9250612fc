"""The rounding stage: what it returns is a solution of the plan like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnxptq.calibrate.observers import Observer
from onnxptq.calibrate.ranges import choose_ranges
from onnxptq.calibrate.run import calibrate
from onnxptq.graph.index import GraphIndex
from onnxptq.quantizers.affine import fake_quantize
from onnxptq.reconstruct.fitted_grid import round_on_fitted_grid
from onnxptq.reconstruct.gram import Gram, layer_rows, weight_matrix, weight_tensor
from onnxptq.reconstruct.initial import bias_qparams, initial_solution
from onnxptq.reconstruct.rounding import (
    compensable_layers,
    round_in_closed_form,
    round_shared,
    weight_readers,
)
from onnxptq.runtime import Session
from onnxptq.samples import ListFeeds
from tests.unit.reconstruct.pack_cases import Case, case
from tests.unit.small_nets import Net, canonical, planned, random_samples


def test_weights_lie_on_their_grids_and_biases_follow_the_scales(tmp_path: Path) -> None:
    """A depthwise layer gets new scales; a kernel accepts its bias on the grid of the new products only."""
    net = Net()
    net.conv("a", "x", (6, 1, 3, 3), group=6, pads=[1, 1, 1, 1])
    net.conv("b", "a", (8, 6, 3, 3))
    net.conv("y", "b", (4, 8, 1, 1))
    model = canonical(net.proto({"x": [1, 6, 12, 12]}, ["y"]), tmp_path)
    samples = random_samples(model, 4)
    plan = planned(model, "ort-cpu")
    tensors = sorted({q.tensor for q in plan.quantizers if q.role == "activation"})
    ranges = choose_ranges(plan, calibrate(model, ListFeeds(samples), tensors), Observer(name="minmax"))
    start = initial_solution(model.graph, plan, ranges)
    found = round_in_closed_form(model, plan, start, samples)
    assert found.qparams.keys() == start.qparams.keys()
    kept = []
    for q in plan.quantizers:
        grid = found.qparams[q.quantizer_id]
        if q.role == "weight":
            np.testing.assert_array_equal(
                fake_quantize(found.weights[q.tensor], grid), found.weights[q.tensor]
            )
            kept.append(np.array_equal(grid.scale, start.qparams[q.quantizer_id].scale))
        elif q.role == "bias":
            np.testing.assert_array_equal(grid.scale, bias_qparams(q, found.qparams).scale)
        else:
            assert grid is start.qparams[q.quantizer_id]
    # Of 9, 54 and 8 inputs: the middle layer is wide and keeps its scales.
    assert kept == [False, True, False]


def _siblings(kind: str) -> onnx.ModelProto:
    """One weight, read by two layers: what channels have in common adds up in one and cancels in the other."""
    net, shape = Net(), (6, 1, 1) if kind == "conv" else (6,)
    mask = net.constant("mask", np.array([1.0, -1.0, 0.3] * 2, np.float32).reshape(shape))
    second = net.op("Mul", "second", "x", mask)
    if kind == "conv":
        weight = net.weight("w", 7, 6, 3, 3)
        found = [net.op("Conv", f"y{i}", x, weight, pads=[1] * 4) for i, x in enumerate(("x", second))]
        return net.proto({"x": [1, 6, 12, 12]}, found)
    weight = net.weight("w", 6, 7)
    found = [net.op("MatMul", f"y{i}", x, weight) for i, x in enumerate(("x", second))]
    if kind == "also gathered":
        found.append(net.op("Gather", "rows", weight, net.constant("i", np.array([1, 2], np.int64))))
    return net.proto({"x": [1, 40, 6]}, found)


def _noise(made: Case, weight: np.ndarray) -> float:
    """The error that rounding the shared weight leaves at the outputs of its readers."""
    model = made.model
    net = Session(model.path)
    graph = model.graph.copy()
    graph.tensors()["w"].values = weight
    onnx.save(gs.export_onnx(graph), made.folder / "other.onnx")
    other = Session(made.folder / "other.onnx")
    names = [t.name for t in model.graph.outputs]
    noise = 0.0
    for sample in made.samples:
        wanted, found = net.run(sample, names), other.run(sample, names)
        noise += sum(float(np.square(wanted[n] - found[n]).sum()) for n in names)
    return noise


@pytest.mark.parametrize("kind", ["conv", "matmul"])
@pytest.mark.parametrize("bits", [3, 8])
def test_a_weight_of_several_layers_serves_all_of_them(kind: str, bits: int, tmp_path: Path) -> None:
    axis = 1 if kind == "conv" else 2
    made = case(
        _siblings(kind),
        tmp_path,
        weight_bits=bits,
        activation_bits=8,
        noise=lambda x: (0.3 * x + x.mean(axis=axis, keepdims=True)).astype(np.float32),
    )
    nearest = fake_quantize(made.model.graph.tensors()["w"].values, made.start.qparams["w"])
    for found in (
        round_in_closed_form(made.model, made.plan, made.start, made.samples),
        round_shared(made.model, made.plan, made.start, made.samples, max_width=99, damping=0.01),
    ):
        weight = found.weights["w"]
        np.testing.assert_array_equal(fake_quantize(weight, found.qparams["w"]), weight)
        assert _noise(made, weight) < 0.95 * _noise(made, nearest)
    # Rounded for one of them alone it serves both less.
    layers = weight_readers(made.index, made.plan, 99)[0]
    gram = Gram.empty(1, 54 if kind == "conv" else 6, is_mixed=False)
    for sample in made.samples:
        rows = layer_rows(layers[1], sample["x"] * made.model.graph.tensors()["mask"].values, None, 999)
        assert rows is not None
        gram.add(*rows)
    matrix = weight_matrix(layers[0], made.model.graph.tensors()["w"].values)
    alone, _ = round_on_fitted_grid(matrix, gram, made.start.qparams["w"], damping=0.01, ridge=0.01)
    assert _noise(made, weight) < _noise(made, weight_tensor(layers[0], alone))


def test_a_weight_that_is_looked_up_as_well_stays(tmp_path: Path) -> None:
    made = case(_siblings("also gathered"), tmp_path, activation_bits=8)
    assert not weight_readers(made.index, made.plan, 99)
    assert not round_in_closed_form(made.model, made.plan, made.start, made.samples).weights
    shared = round_shared(made.model, made.plan, made.start, made.samples, max_width=99, damping=0.01)
    assert not shared.weights


def test_weights_of_the_solution_take_the_place_of_the_models(tmp_path: Path) -> None:
    """What an earlier stage made of a weight is what is rounded."""
    net = Net()
    net.conv("y", "x", (8, 6, 3, 3))
    model = canonical(net.proto({"x": [1, 6, 12, 12]}, ["y"]), tmp_path)
    samples = random_samples(model, 2)
    plan = planned(model, "simulate", activation_bits=8)
    ranges = choose_ranges(plan, calibrate(model, ListFeeds(samples), ["x"]), Observer(name="minmax"))
    start = initial_solution(model.graph, plan, ranges)
    other = np.ascontiguousarray(model.graph.tensors()["y.w"].values[::-1])
    found = round_in_closed_form(model, plan, replace(start, weights={"y.w": other}), samples)
    (grid,) = [start.qparams[q.quantizer_id] for q in plan.quantizers if q.role == "weight"]
    # Channels trade places, so some are cut off at the ends of each other's grids.
    inside = np.abs(other) < 127 * grid.scale.reshape(-1, 1, 1, 1)
    assert np.mean(inside) > 0.9
    apart = np.abs(found.weights["y.w"] - other) / grid.scale.reshape(-1, 1, 1, 1)
    assert np.mean(apart[inside]) < 2.0


def test_values_too_large_for_their_squares_keep_the_nearest_grid_points(tmp_path: Path) -> None:
    net = Net()
    net.conv("y", "x", (8, 6, 3, 3))
    model = canonical(net.proto({"x": [1, 6, 12, 12]}, ["y"]), tmp_path)
    samples = [{"x": np.float32(1e25) * sample["x"]} for sample in random_samples(model, 2)]
    plan = planned(model, "simulate", activation_bits=8)
    ranges = choose_ranges(plan, calibrate(model, ListFeeds(samples), ["x"]), Observer(name="minmax"))
    start = initial_solution(model.graph, plan, ranges)
    assert round_in_closed_form(model, plan, start, samples).weights == start.weights


@pytest.mark.parametrize(("most", "is_in"), [(54, True), (53, False)])
def test_layers_of_the_greatest_width_are_rounded(most: int, is_in: bool, tmp_path: Path) -> None:
    net = Net()
    net.conv("y", "x", (8, 6, 3, 3))
    model = canonical(net.proto({"x": [1, 6, 12, 12]}, ["y"]), tmp_path)
    found = compensable_layers(GraphIndex(model.graph), planned(model, "simulate"), most)
    assert len(found) == is_in


def test_a_weight_that_two_layers_read_is_not_rounded_for_one_of_them(tmp_path: Path) -> None:
    net = Net()
    w = net.weight("w", 6, 6)
    net.op("MatMul", "y", net.op("MatMul", "a", "x", w), w)
    model = canonical(net.proto({"x": [4, 6]}, ["y"]), tmp_path)
    assert compensable_layers(GraphIndex(model.graph), planned(model, "simulate"), 99) == []
