"""Rounding together with the scale of every output channel, against brute force and the plain algorithm."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from onnxptq.quantizers.affine import fake_quantize, search_weight_qparams, symmetric_qparams
from onnxptq.reconstruct.closed_form import pose
from onnxptq.reconstruct.fitted_grid import descend, round_on_fitted_grid
from onnxptq.reconstruct.gram import Gram
from onnxptq.types import Array, PerAxis, PerTensor, QParams, QType

RNG = np.random.default_rng(0)

GIVEN = {"damping": 0.1, "ridge": 0.02}


def _sums(groups: int, width: int) -> Gram:
    """Inputs that go together, and what their rounding leaves of them."""
    mixing = RNG.standard_normal((groups, max(2, width // 2), width))
    x = RNG.standard_normal((groups, 600, mixing.shape[1])) @ mixing
    x = (x + 0.3 * RNG.standard_normal(x.shape)).astype(np.float32)
    gram = Gram.empty(groups, width)
    gram.add(x, (np.round(x * 2) / 2).astype(np.float32))
    return gram


def _weights(groups: int, channels: int, width: int, bits: int) -> tuple[Array, QParams]:
    weight = RNG.standard_normal((groups, channels, width)).astype(np.float32)
    return weight, search_weight_qparams(weight.reshape(-1, width), QType.signed(bits), PerAxis(0))


def _errors(gram: Gram, matrix: Array, found: Array) -> Array:
    rounding = pose(matrix, gram, **GIVEN)
    gap = found - rounding.target
    return np.einsum("gck,gkl,gcl->gc", gap, rounding.held, gap)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("groups", "channels", "width"), [(1, 12, 150), (4, 3, 9), (2, 1, 65)])
def test_no_channel_is_worse_than_on_the_given_grid(
    groups: int, channels: int, width: int, bits: int
) -> None:
    gram = _sums(groups, width)
    matrix, qparams = _weights(groups, channels, width, bits)
    found, grid = round_on_fitted_grid(matrix, gram, qparams, **GIVEN)
    rows = found.reshape(-1, width)
    np.testing.assert_array_equal(fake_quantize(rows, grid), rows)
    assert grid.scale.shape == qparams.scale.shape
    plain = _errors(gram, matrix, pose(matrix, gram, **GIVEN).compensated(qparams))
    share = _errors(gram, matrix, found) / plain
    # A scale in single precision may miss the best one by its last bit.
    assert (share <= 1.0 + 1e-6).all()
    assert share.mean() < 0.95


def test_a_scale_for_all_channels_stays_and_integers_gain() -> None:
    gram = _sums(1, 40)
    matrix, _ = _weights(1, 8, 40, 3)
    qparams = symmetric_qparams(np.asarray(np.abs(matrix).max()), QType.signed(3), PerTensor())
    found, grid = round_on_fitted_grid(matrix, gram, qparams, **GIVEN)
    assert grid is qparams
    np.testing.assert_array_equal(fake_quantize(found[0], grid), found[0])
    plain = _errors(gram, matrix, pose(matrix, gram, **GIVEN).compensated(qparams))
    assert _errors(gram, matrix, found).sum() < plain.sum()


def test_nothing_beats_it_by_much_where_everything_can_be_tried() -> None:
    """Three weights at two bits: all 64 choices of integers, each with its own best scale."""
    gram = _sums(1, 3)
    matrix, qparams = _weights(1, 40, 3, 2)
    found, _ = round_on_fitted_grid(matrix, gram, qparams, **GIVEN)
    rounding = pose(matrix, gram, **GIVEN)
    held, least = rounding.held[0], np.full(40, np.inf)
    for choice in itertools.product(range(-2, 2), repeat=3):
        q = np.array(choice, np.float64)
        if not q.any():
            continue
        best = np.maximum(rounding.target[0] @ held @ q / (q @ held @ q), 1e-6)
        gap = best[:, None] * q - rounding.target[0]
        least = np.minimum(least, np.einsum("ck,kl,cl->c", gap, held, gap))
    reached = _errors(gram, matrix, found)[0]
    assert (reached >= least * (1 - 1e-6)).all()
    # Few scales are tried, around the given one: most channels reach the best choice, none is far off in the mean.
    assert np.mean(reached <= least * 1.01) > 0.5
    assert reached.sum() < 1.5 * least.sum()


def test_channels_without_weights_keep_their_grid() -> None:
    gram = _sums(1, 20)
    matrix, qparams = _weights(1, 3, 20, 4)
    matrix[0, 1] = 0.0
    qparams = replace(qparams, scale=np.array([0.1, 0.25, 0.1], np.float32))
    found, grid = round_on_fitted_grid(matrix, gram, qparams, **GIVEN)
    assert not found[0, 1].any()
    assert grid.scale[1] == np.float32(0.25)


def test_inputs_that_are_always_zero_keep_weights_near() -> None:
    gram = Gram.empty(2, 6)
    matrix, qparams = _weights(2, 3, 6, 8)
    found, grid = round_on_fitted_grid(matrix, gram, qparams, **GIVEN)
    assert (np.abs(found - matrix).reshape(6, 6) <= grid.scale[:, None] * 0.5001).all()


def test_descent_in_blocks_is_descent_one_by_one() -> None:
    groups, channels, width = 2, 3, 150
    gram = _sums(groups, width)
    matrix, qparams = _weights(groups, channels, width, 3)
    rounding = pose(matrix, gram, **GIVEN)
    scales = qparams.scale.reshape(groups, channels).astype(np.float64)
    start = np.clip(np.rint(matrix / scales[:, :, None]), -4, 3)
    wanted = start.copy()
    for _ in range(2):
        for k in range(width):
            slope = np.einsum(
                "gck,gk->gc", wanted * scales[:, :, None] - rounding.target, rounding.held[:, :, k]
            )
            step = slope / (scales * rounding.held[:, None, k, k])
            wanted[:, :, k] = np.clip(np.rint(wanted[:, :, k] - step), -4, 3)
    assert (wanted != start).any()
    descend(start, rounding.target, scales, rounding.held, QType.signed(3), sweeps=2)
    np.testing.assert_array_equal(start, wanted)
