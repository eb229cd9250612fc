"""Low-rank corrections in closed form, against least squares and descent on the rows themselves."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from onnxptq.graph.linear import find_linears
from onnxptq.quantizers.affine import fake_quantize
from onnxptq.reconstruct.gram import Gram
from onnxptq.reconstruct.layer_noise import layer_noise
from onnxptq.reconstruct.low_rank import correct_pack, correction
from onnxptq.types import Array, Solution
from tests.unit.reconstruct.pack_cases import Case, case
from tests.unit.small_nets import NETS, Net, depthwise_block

CHANNELS, WIDTH, RIDGE = 5, 7, 0.05


def _problem(seed: int = 0, rows: int = 400) -> tuple[Array, Array, Array, Gram]:
    """A weight, rows whose errors have a few strong directions, what is read instead, and the sums."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, WIDTH)) @ rng.standard_normal((WIDTH, WIDTH))
    read = 0.8 * x + rng.standard_normal((rows, 2)) @ rng.standard_normal((2, WIDTH))
    read += 0.3 * rng.standard_normal((rows, WIDTH))
    gram = Gram.empty(1, WIDTH)
    gram.add(x[None].astype(np.float32), read[None].astype(np.float32))
    return rng.standard_normal((CHANNELS, WIDTH)).astype(np.float32), x, read, gram


def _loss(weight: Array, move: Array, x: Array, read: Array) -> float:
    """||W x - (W + D) x'||^2 + lam ||D||^2, from the rows."""
    lam = RIDGE * np.trace(read.T @ read) / WIDTH
    return float(np.square(x @ weight.T - read @ (weight + move).T).sum() + lam * np.square(move).sum())


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_no_search_finds_a_better_correction_of_that_rank(rank: int) -> None:
    """One factor after the other by least squares, again and again, from several places."""
    weight, x, read, gram = _problem()
    found = _loss(weight, correction(weight[None], gram, RIDGE, rank).product(), x, read)
    lam = RIDGE * np.trace(read.T @ read) / WIDTH
    rows = np.concatenate([read, np.sqrt(lam) * np.eye(WIDTH)])
    errors = np.concatenate([(x - read) @ weight.T, np.zeros((WIDTH, CHANNELS))])
    best = np.inf
    for seed in range(4):
        left = np.random.default_rng(seed).standard_normal((CHANNELS, rank))
        for _ in range(300):
            basis = np.linalg.qr(left)[0]
            right = np.linalg.lstsq(rows, errors @ basis, rcond=None)[0].T
            left = np.linalg.lstsq(rows @ right.T, errors, rcond=None)[0].T
        best = min(best, _loss(weight, left @ right, x, read))
    # Sums in single precision.
    assert found == pytest.approx(best, rel=1e-5)


def test_at_full_rank_it_is_the_ridge_solution() -> None:
    weight, x, read, gram = _problem()
    lam = RIDGE * np.trace(read.T @ read) / WIDTH
    rows = np.concatenate([read, np.sqrt(lam) * np.eye(WIDTH)])
    errors = np.concatenate([(x - read) @ weight.T, np.zeros((WIDTH, CHANNELS))])
    expected = np.linalg.lstsq(rows, errors, rcond=None)[0].T
    found = correction(weight[None], gram, RIDGE, 99)
    assert found.rank == min(CHANNELS, WIDTH)
    np.testing.assert_allclose(found.product(), expected, atol=1e-4 * np.abs(expected).max())


def test_every_further_rank_helps_and_none_is_worst() -> None:
    weight, x, read, gram = _problem()
    whole = correction(weight[None], gram, RIDGE, 5)
    losses = [_loss(weight, whole.truncated(rank).product(), x, read) for rank in range(6)]
    assert losses[0] == pytest.approx(_loss(weight, np.zeros_like(weight), x, read))
    assert all(more < less for less, more in itertools.pairwise(losses))
    for rank in range(1, 6):
        alone = correction(weight[None], gram, RIDGE, rank).product()
        np.testing.assert_allclose(whole.truncated(rank).product(), alone, atol=1e-5)


def test_inputs_without_errors_ask_for_nothing() -> None:
    weight, x, _, _ = _problem()
    gram = Gram.empty(1, WIDTH)
    gram.add(x[None].astype(np.float32), x[None].astype(np.float32))
    np.testing.assert_allclose(correction(weight[None], gram, RIDGE, 3).product(), 0.0, atol=1e-5)


def test_inputs_that_are_always_zero_are_survived() -> None:
    zeros = np.zeros((1, 10, WIDTH), np.float32)
    gram = Gram.empty(1, WIDTH)
    gram.add(zeros, zeros)
    weight = np.ones((1, CHANNELS, WIDTH), np.float32)
    np.testing.assert_array_equal(correction(weight, gram, RIDGE, 3).product(), 0.0)


# ---- packs ---------------------------------------------------------------------------------------


def _corrected(made: Case, rank: int = 4) -> tuple[Solution, dict[str, int]]:
    solution, found = correct_pack(
        made.index, made.packs[0], made.plan, made.start, made.data(), rank=rank, settled=frozenset()
    )
    return solution, {name: factors.rank for name, factors in found.items()}


@pytest.mark.parametrize("kind", ["residual_block", "attention_block", "vit_mlp", "max_pool_net"])
def test_layers_are_rounded_with_their_correction_merged(kind: str, tmp_path: Path) -> None:
    made = case(NETS[kind](), tmp_path, longest=99, weight_bits=8, activation_bits=3, samples=24)
    solution, found = correct_pack(
        made.index, made.packs[0], made.plan, made.start, made.data(), rank=4, settled=frozenset()
    )
    layers = find_linears(made.index)
    assert set(found) == {layer.weight.name for layer in layers}
    for layer in layers:
        name = layer.weight.name
        factors = found[name]
        move = factors.product()
        move = (move.T if factors.is_transposed else move).reshape(layer.weight.shape)
        expected = fake_quantize(layer.weight.values + move, made.start.qparams[name])
        np.testing.assert_allclose(solution.weights[name], expected, atol=1e-6)
        assert np.abs(move).max() > 0.0
    # Coarse activations, fine weights: the correction is all that can help.
    assert made.error(solution) < made.error(made.start)


def test_grouped_convolutions_are_rounded_with_error_compensation(tmp_path: Path) -> None:
    made = case(depthwise_block(), tmp_path, longest=99, weight_bits=3, activation_bits=3, samples=12)
    solution, found = _corrected(made)
    assert set(found) == {"expand.w", "project.w"}
    weight = made.model.graph.tensors()["depthwise.w"].values
    nearest = fake_quantize(weight, made.start.qparams["depthwise.w"])
    assert not np.array_equal(solution.weights["depthwise.w"], nearest)


def test_convolutions_of_two_groups_have_no_correction(tmp_path: Path) -> None:
    net = Net()
    net.conv("y", net.conv("a", "x", (8, 4, 1, 1)), (8, 4, 3, 3), group=2)
    made = case(net.proto({"x": [1, 4, 8, 8]}, ["y"]), tmp_path, longest=99, weight_bits=3, activation_bits=3)
    assert set(_corrected(made)[1]) == {"a.w"}


def test_ranks_end_at_what_the_matrix_has(tmp_path: Path) -> None:
    made = case(NETS["residual_block"](), tmp_path, longest=99, samples=8)
    assert _corrected(made, rank=12)[1] == {"stem.w": 12, "conv1.w": 12, "conv2.w": 12, "head.w": 10}


@pytest.mark.parametrize("shape", ["linear", "conv", "no bias", "one bias for all", "a bias per row"])
def test_noise_of_a_layer_by_hand(shape: str, tmp_path: Path) -> None:
    net = Net(seed=5)
    if shape == "conv":
        net.conv("y", "x", (6, 4, 1, 1))
        dims = [8, 4, 5, 5]
    else:
        dims = [40, 8]
        if shape == "linear":
            net.linear("y", "x", 8, 6)
        elif shape == "no bias":
            net.op("MatMul", "y", "x", net.weight("y.w", 8, 6))
        else:
            size = (1,) if shape == "one bias for all" else (40, 6)
            net.op("Gemm", "y", "x", net.weight("y.w", 8, 6), net.weight("y.b", *size))
    made = case(net.proto({"x": dims}, ["y"]), tmp_path, weight_bits=3, activation_bits=3, samples=4)
    rng = np.random.default_rng(0)
    tensors = made.model.graph.tensors()
    other = {
        n: tensors[n].values + np.float32(0.1) * rng.standard_normal(tensors[n].shape).astype(np.float32)
        for n in ("y.w", "y.b")
        if n in tensors and (n == "y.w" or shape != "a bias per row")
    }
    solution = Solution(qparams=made.start.qparams, weights=other)
    data = made.data(together=1 if shape == "a bias per row" else 64)
    found = layer_noise(
        made.index, made.packs[0], made.plan, data, ["y.w"], start=made.start, solution=solution
    )
    wanted = np.stack([v["y"].numpy() for v in made.outputs(None)]).astype(np.float64)
    if shape == "a bias per row":
        # Signal and noise of the layer are those of one row's bias in place of all.
        wanted += np.mean(tensors["y.b"].values, axis=0) - tensors["y.b"].values
    expected = []
    for tried in (made.start, solution):
        reached = np.stack([v["y"].numpy() for v in made.outputs(tried)])
        if shape == "a bias per row":
            reached = reached + np.mean(tensors["y.b"].values, axis=0) - tensors["y.b"].values
        expected.append(float(np.square(reached - wanted).mean() / wanted.var()))
    assert found["y.w"] == pytest.approx(expected, rel=1e-4)
