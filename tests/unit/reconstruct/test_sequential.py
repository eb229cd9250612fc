"""Closed-form rounding of a pack against least squares in numpy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnxptq.quantizers.affine import fake_quantize, symmetric_qparams
from onnxptq.reconstruct import sequential
from onnxptq.reconstruct.closed_form import round_weights
from onnxptq.reconstruct.gram import Gram
from onnxptq.reconstruct.learning import FAST
from onnxptq.reconstruct.sequential import begun, rounded, solve_layers
from onnxptq.types import Array, PerAxis, QType, Solution
from tests.unit.reconstruct.pack_cases import Case, case
from tests.unit.small_nets import Net, residual_block

WIDTH = 8


def _one_layer(folder: Path, *, kind: str = "linear", weight_bits: int = 3, activation_bits: int = 3) -> Case:
    net = Net(seed=2)
    if kind == "linear":
        net.linear("y", "x", WIDTH, 6)
    elif kind == "no bias":
        net.op("MatMul", "y", "x", net.weight("y.w", WIDTH, 6))
    elif kind == "one bias for all":
        bias = net.constant("y.b", np.float32([0.7]))
        net.op("Gemm", "y", "x", net.weight("y.w", WIDTH, 6), bias)
    mixing = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)

    def mixed(x: Array) -> Array:
        """Rows that are correlated, and not about zero."""
        return np.asarray(x[:, :3] @ mixing + 0.3 * x + 0.8, np.float32)

    return case(
        net.proto({"x": [40, WIDTH]}, ["y"]),
        folder,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        samples=8,
        noise=mixed,
    )


def _rounded(made: Case, settled: tuple[str, ...] = ()) -> Solution:
    given = (made.index, made.packs[0], made.plan, made.start, made.data(), rounded)
    return solve_layers(*given, settled=settled)


def _values(made: Case, solution: Solution, name: str) -> Array:
    return np.asarray(solution.weights.get(name, made.model.graph.tensors()[name].values))


def _rows(made: Case) -> tuple[Array, Array]:
    x = np.concatenate([s["x"] for s in made.samples])
    return x, fake_quantize(x, made.start.qparams["x"])


@pytest.mark.parametrize("kind", ["linear", "no bias", "one bias for all"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layer_is_better_than_rounded_to_nearest(kind: str, bits: int, tmp_path: Path) -> None:
    made = _one_layer(tmp_path, kind=kind, weight_bits=bits)
    found = _rounded(made)
    x, read = _rows(made)
    weight = made.model.graph.tensors()["y.w"].values
    bias = np.zeros(1) if kind == "no bias" else made.model.graph.tensors()["y.b"].values
    wanted = x @ weight + bias
    nearest = read @ fake_quantize(weight, made.start.qparams["y.w"]) + bias
    new = found.weights["y.w"]
    np.testing.assert_array_equal(fake_quantize(new, found.qparams["y.w"]), new)
    reached = read @ new + (bias if kind != "linear" else found.weights["y.b"])
    errors = [float(np.square(y - wanted).mean()) for y in (nearest, reached)]
    # With 8-bit weights only the rounding of the inputs is left to be made up for; a bias helps.
    assert errors[1] < (0.95 if bits == 8 else 0.7 if kind == "linear" else 0.85) * errors[0]
    if kind != "linear":
        assert "y.b" not in found.weights


@pytest.mark.parametrize("kind", ["linear", "no bias", "one bias for all"])
def test_without_a_grid_it_is_the_least_squares_solution(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights so fine that rounding them is nothing, damping off, against ``lstsq`` on the rows themselves."""
    monkeypatch.setattr(sequential, "choose_damping", lambda *_, **__: 1e-9)
    monkeypatch.setattr(sequential, "ROUNDING_DAMPING", 1e-9)
    made = _one_layer(tmp_path, kind=kind)
    fine = QType(bits=24, qmin=-(2**23), qmax=2**23 - 1, storage="int32")
    weight = made.model.graph.tensors()["y.w"].values
    qparams = {**made.start.qparams, "y.w": symmetric_qparams(np.full(6, 16.0), fine, PerAxis(1))}
    made = replace(made, start=Solution(qparams=qparams))
    found = _rounded(made)
    x, read = (rows.astype(np.float64) for rows in _rows(made))
    wanted = x @ weight
    if kind == "linear":
        columns = np.concatenate([read, np.ones((len(read), 1))], axis=1)
        best = np.linalg.lstsq(columns, wanted, rcond=None)[0]
        shift = _values(made, found, "y.b") - made.model.graph.tensors()["y.b"].values
        np.testing.assert_allclose(shift, best[-1], rtol=0, atol=1e-3)
        best = best[:-1]
    else:
        best = np.linalg.lstsq(read, wanted, rcond=None)[0]
    assert np.abs(best - weight).max() > 0.01
    # Sums in single precision, and the grid's step of 2e-6.
    np.testing.assert_allclose(found.weights["y.w"], best, rtol=0, atol=1e-3)


def test_the_bias_takes_the_mean_error(tmp_path: Path) -> None:
    made = _one_layer(tmp_path, weight_bits=2, activation_bits=2)
    found = _rounded(made)
    x, read = _rows(made)
    wanted = x @ made.model.graph.tensors()["y.w"].values + made.model.graph.tensors()["y.b"].values
    error = (read @ found.weights["y.w"] + found.weights["y.b"] - wanted).mean(axis=0)
    assert np.abs(read @ found.weights["y.w"] - wanted).mean() > 0.1
    # Single-precision sums of 320 rows.
    np.testing.assert_allclose(error, 0.0, atol=1e-5)


def test_later_layers_make_up_for_earlier_ones(tmp_path: Path) -> None:
    """The second layer reads what the quantized first one computes, and so beats being solved on float inputs."""
    net = Net(seed=3)
    inner = net.op("Relu", "act", net.linear("a", "x", 12, 12))
    net.linear("b", inner, 12, 6)
    made = case(net.proto({"x": [64, 12]}, ["b"]), tmp_path, weight_bits=2, activation_bits=8, samples=8)
    assert len(made.packs) == 1 or len({n for p in made.packs for n in p.nodes}) > 1
    found = made.solved(FAST).solution
    values = {n: _values(made, found, n) for n in ("a.w", "a.b", "b.w", "b.b")}
    floats = {n: t.values for n, t in made.model.graph.tensors().items() if n in values}
    x = np.concatenate([s["x"] for s in made.samples])
    read = fake_quantize(x, found.qparams["x"])
    hidden = fake_quantize(np.maximum(read @ values["a.w"] + values["a.b"], 0), found.qparams["act"])
    wanted = np.maximum(x @ floats["a.w"] + floats["a.b"], 0) @ floats["b.w"] + floats["b.b"]
    error = hidden @ values["b.w"] + values["b.b"] - wanted
    np.testing.assert_allclose(error.mean(axis=0), 0.0, atol=1e-5)
    # Least squares by hand on the same hidden values: rounding and damping cost no more than a third.
    columns = np.concatenate([hidden, np.ones((len(hidden), 1))], axis=1)
    best = columns @ np.linalg.lstsq(columns, wanted, rcond=None)[0]
    on_float = fake_quantize(floats["b.w"], found.qparams["b.w"])
    apart = np.square(hidden @ on_float + floats["b.b"] - wanted).mean()
    assert np.square(best - wanted).mean() < np.square(error).mean() < 0.7 * apart


def test_settled_layers_stay(tmp_path: Path) -> None:
    made = case(residual_block(), tmp_path, samples=6, longest=9)
    free = _rounded(made)
    assert {"conv1.w", "conv2.w", "conv1.b"} <= set(free.weights)
    kept = _rounded(made, settled=("conv1.w",))
    assert set(free.weights) - set(kept.weights) == {"conv1.w", "conv1.b"}


def test_layers_that_share_a_weight_stay(tmp_path: Path) -> None:
    net = Net()
    shared = net.weight("w", WIDTH, WIDTH)
    a = net.op("MatMul", "b", net.op("Relu", "r", net.op("MatMul", "a", "x", shared)), shared)
    net.linear("y", a, WIDTH, 4)
    made = case(net.proto({"x": [9, WIDTH]}, ["y"]), tmp_path, samples=6, longest=9)
    found = made.solved(FAST).solution
    assert set(found.weights) == {"y.w", "y.b"}


def test_inputs_that_never_leave_their_mean(tmp_path: Path) -> None:
    """Their sums about the mean are rounding noise of either sign, in one group of two."""
    rng = np.random.default_rng(0)
    for constant, spread in ((100.0, 0.0), (100.0, 1e-3), (1000.0, 0.05)):
        x = np.full((2, 4096, WIDTH), constant) + spread * rng.standard_normal((2, 4096, WIDTH))
        x = (x * np.linspace(0.5, 1.0, WIDTH)).astype(np.float32)
        x[1] = rng.standard_normal((4096, WIDTH)) @ rng.standard_normal((WIDTH, WIDTH))
        gram, alone = Gram.empty(2, WIDTH), Gram.empty(1, WIDTH)
        for part in np.split(x, 64, axis=1):
            gram.add(part, part)
            alone.add(part[1:], part[1:])
        weight = rng.standard_normal((2, 4, WIDTH)).astype(np.float32)
        qparams = symmetric_qparams(np.abs(weight).max(axis=2).reshape(-1), QType.signed(4), PerAxis(0))
        own = symmetric_qparams(np.abs(weight[1]).max(axis=1), QType.signed(4), PerAxis(0))
        found = round_weights(weight, gram.centred(), qparams, damping=0.1)
        assert np.isfinite(found).all()
        # The other group is none the worse for it.
        np.testing.assert_array_equal(found[1:], round_weights(weight[1:], alone.centred(), own, damping=0.1))


def test_values_too_large_for_their_squares_are_left_alone(tmp_path: Path) -> None:
    net = Net()
    net.linear("y", "x", WIDTH, 4)
    made = case(
        net.proto({"x": [9, WIDTH]}, ["y"]), tmp_path, samples=4, noise=lambda x: x * np.float32(1e25)
    )
    assert _rounded(made).weights == {}


@pytest.mark.parametrize(("bits", "is_fitted"), [(3, False), (4, True)])
def test_grids_are_fitted_unless_few_bits_are_learnt(bits: int, is_fitted: bool, tmp_path: Path) -> None:
    made = _one_layer(tmp_path, weight_bits=bits)
    given = (made.index, made.packs[0], made.plan, made.start, made.data())
    last, first = (solve_layers(*given, how, settled=()) for how in (rounded, begun))
    scales = [found.qparams["y.w"].scale for found in (made.start, last, first)]
    assert not np.array_equal(scales[1], scales[0])
    assert np.array_equal(scales[2], scales[1] if is_fitted else scales[0])
    weight = first.weights["y.w"]
    np.testing.assert_array_equal(fake_quantize(weight, first.qparams["y.w"]), weight)
