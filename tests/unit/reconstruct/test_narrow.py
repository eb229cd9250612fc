"""Rounding narrow layers together with their scales."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from onnxptq.quantizers.affine import fake_quantize, search_weight_qparams
from onnxptq.reconstruct.closed_form import damped, round_weights
from onnxptq.reconstruct.fitted_grid import descend
from onnxptq.reconstruct.gram import Gram
from onnxptq.reconstruct.narrow import DAMPING, round_narrow
from onnxptq.types import PerAxis, QType

RNG = np.random.default_rng(0)


def depthwise(groups: int, channels: int, width: int = 9) -> tuple[Gram, np.ndarray]:
    """Neighbouring pixels: a common value and small differences."""
    x = 1.0 + RNG.standard_normal((groups, 800, 1)) + 0.05 * RNG.standard_normal((groups, 800, width))
    gram = Gram.empty(groups, width, is_mixed=False)
    gram.add(x.astype(np.float32), x.astype(np.float32))
    return gram, RNG.standard_normal((groups, channels, width)).astype(np.float32)


def errors(gram: Gram, gap: np.ndarray) -> np.ndarray:
    return np.einsum("gck,gkl,gcl->gc", gap, damped(gram, DAMPING), gap.astype(np.float64))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("groups", "channels"), [(6, 1), (1, 5), (3, 2)])
def test_no_channel_gets_worse_and_most_gain_much(groups: int, channels: int, bits: int) -> None:
    gram, weight = depthwise(groups, channels)
    qparams = search_weight_qparams(weight.reshape(-1, 9), QType.signed(bits), PerAxis(0))
    found, grid = round_narrow(weight, gram, qparams)
    np.testing.assert_array_equal(fake_quantize(found.reshape(-1, 9), grid), found.reshape(-1, 9))
    assert grid.scale.shape == qparams.scale.shape
    # A bias that fits its integers at the old scale must fit at the new one.
    assert (grid.scale >= qparams.scale).all()
    after = errors(gram, found - weight)
    before = errors(gram, round_weights(weight, gram, qparams, damping=DAMPING) - weight)
    assert (after <= before * (1 + 1e-9)).all()
    assert np.median(after / before) < 0.5


def test_descent_ends_where_no_single_step_helps() -> None:
    gram, weight = depthwise(4, 1, width=5)
    qparams = search_weight_qparams(weight.reshape(-1, 5), QType.signed(5), PerAxis(0))
    scales = qparams.scale.reshape(4, 1).astype(np.float64)
    target = weight.astype(np.float64)
    q = np.clip(np.rint(target / scales[:, :, None]), -16, 15)
    start = errors(gram, q * scales[:, :, None] - target)
    descend(q, target, scales, damped(gram, DAMPING), qparams.qtype, sweeps=20)
    reached = errors(gram, q * scales[:, :, None] - target)
    assert (reached <= start).all()
    assert (reached < start).any()
    for k, step in itertools.product(range(5), (-1, 1)):
        moved = q.copy()
        moved[:, :, k] = np.clip(moved[:, :, k] + step, -16, 15)
        # Equal only where the step ran into the end of the grid.
        assert (errors(gram, moved * scales[:, :, None] - target) >= reached * (1 - 1e-12)).all()


def test_inputs_that_are_always_zero_keep_weights_near() -> None:
    gram = Gram.empty(2, 6, is_mixed=False)
    weight = RNG.standard_normal((2, 3, 6)).astype(np.float32)
    qparams = search_weight_qparams(weight.reshape(-1, 6), QType.signed(8), PerAxis(0))
    found, grid = round_narrow(weight, gram, qparams)
    assert (np.abs(found - weight).reshape(6, 6) <= grid.scale[:, None] * 0.5001).all()
