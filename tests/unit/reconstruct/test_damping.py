"""The damping of the closed form: the best on unseen rows, by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from onnxptq.reconstruct.damping import DAMPINGS, choose_damping
from onnxptq.reconstruct.gram import Gram
from onnxptq.types import FloatArray

RNG = np.random.default_rng(11)


def _halves(rows: int, width: int, noise: float, groups: int = 1) -> list[tuple[FloatArray, FloatArray]]:
    """Float rows and what a quantized network reads instead, for two halves of the samples."""
    mixing = RNG.standard_normal((groups, width, width)).astype(np.float32)
    found = []
    for _ in range(2):
        x = (RNG.standard_normal((groups, rows, width)) @ mixing).astype(np.float32)
        found.append((x, (x + noise * RNG.standard_normal(x.shape)).astype(np.float32)))
    return found


def _gram(x: FloatArray, read: FloatArray) -> Gram:
    gram = Gram.empty(x.shape[0], x.shape[2])
    gram.add(x, read)
    return gram


def _brute_force(matrix: FloatArray, halves: list[tuple[FloatArray, FloatArray]]) -> list[float]:
    """The error on the other half of the ridge solution of one half, for every damping, from the rows."""
    totals = []
    for damping in DAMPINGS:
        total = 0.0
        for (x, read), (other, other_read) in (halves, halves[::-1]):
            for group in range(matrix.shape[0]):
                a, b, w = (v[group].astype(np.float64) for v in (x, read, matrix))
                ridge = damping * np.trace(b.T @ b) / b.shape[1] * np.eye(b.shape[1])
                new = np.linalg.solve(b.T @ b + ridge, (b.T @ a + ridge) @ w.T).T
                wanted, got = other[group] @ w.T, other_read[group].astype(np.float64) @ new.T
                total += float(((wanted - got) ** 2).sum())
        totals.append(total)
    return totals


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize(("rows", "noise"), [(400, 0.5), (30, 0.5), (30, 4.0), (2000, 0.01)])
def test_the_choice_is_that_of_brute_force(rows: int, noise: float, groups: int) -> None:
    matrix = RNG.standard_normal((groups, 5, 24)).astype(np.float32)
    halves = _halves(rows, 24, noise, groups)
    errors = _brute_force(matrix, halves)
    chosen = choose_damping(matrix, *(_gram(*half) for half in halves))
    # Sums in single precision decide between dampings that are equally good.
    assert errors[DAMPINGS.index(chosen)] == pytest.approx(min(errors), rel=1e-3)


def test_a_selection_of_many_outputs_tells_enough() -> None:
    matrix = RNG.standard_normal((1, 300, 24)).astype(np.float32)
    halves = _halves(60, 24, 2.0)
    errors = _brute_force(matrix, halves)
    chosen = choose_damping(matrix, *(_gram(*half) for half in halves))
    assert errors[DAMPINGS.index(chosen)] == pytest.approx(min(errors), rel=0.02)


def test_a_group_whose_sums_are_not_definite_does_not_decide() -> None:
    """As sums about the mean are where inputs hardly leave it: what rounding has left over."""
    matrix = RNG.standard_normal((2, 8, 24)).astype(np.float32)
    halves = _halves(30, 24, 4.0, groups=2)
    grams = [_gram(*half) for half in halves]
    for gram in grams:
        left_over = RNG.standard_normal((24, 24))
        gram.quantized[1] = 1e3 * (left_over + left_over.T)
    alone = choose_damping(matrix[:1], *(_gram(x[:1], read[:1]) for x, read in halves))
    assert choose_damping(matrix, *grams) == alone


def test_few_rows_of_noise_ask_for_more_than_many_rows() -> None:
    matrix = RNG.standard_normal((1, 8, 48)).astype(np.float32)
    many = choose_damping(matrix, *(_gram(*half) for half in _halves(20_000, 48, 1.0)))
    few = choose_damping(matrix, *(_gram(*half) for half in _halves(26, 48, 1.0)))
    assert few > many


def test_rows_that_are_all_zero_decide_nothing() -> None:
    matrix = RNG.standard_normal((1, 3, 4)).astype(np.float32)
    zero = np.zeros((1, 10, 4), np.float32)
    assert choose_damping(matrix, _gram(zero, zero), _gram(zero, zero)) == DAMPINGS[-1]


@pytest.mark.parametrize("size", [2.0**-20, 2.0**10])
def test_the_size_of_the_inputs_does_not_matter(size: float) -> None:
    """lam is a share of their own squares."""
    matrix = RNG.standard_normal((1, 5, 24)).astype(np.float32)
    halves = _halves(30, 24, 4.0)
    scaled = [(np.float32(size) * x, np.float32(size) * read) for x, read in halves]
    one, other = (choose_damping(matrix, *(_gram(*half) for half in pair)) for pair in (halves, scaled))
    assert one == other > DAMPINGS[0]
