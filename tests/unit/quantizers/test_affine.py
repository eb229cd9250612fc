"""Weight search and groups of the affine quantizer; its arithmetic is tested in tests/property."""

from __future__ import annotations

import numpy as np
import pytest

from onnxptq.quantizers.affine import (
    SMALLEST_SCALE,
    asymmetric_qparams,
    expand,
    fake_quantize,
    largest_scale,
    range_of,
    search_weight_qparams,
    shifted_qparams,
    shifted_type,
    symmetric_qparams,
    symmetric_zero_point,
)
from onnxptq.types import PerAxis, PerGroup, PerTensor, QParams, QType, Quantizer


@pytest.mark.parametrize(
    ("qtype", "wanted"),
    [(QType.signed(8), 0), (QType.signed(3), 0), (QType.unsigned(8), 128), (QType.unsigned(4), 8)],
)
def test_symmetric_zero_point(qtype: QType, wanted: int) -> None:
    assert symmetric_zero_point(qtype) == wanted


def test_groups_are_repeated_along_their_axis() -> None:
    values = np.array([[1, 2], [3, 4], [5, 6]])
    expanded = expand(values, PerGroup(1, 3), (3, 5))
    np.testing.assert_array_equal(expanded[0], [1, 1, 1, 2, 2])
    np.testing.assert_array_equal(expanded[:, 4], [2, 4, 6])


def test_an_axis_may_be_counted_from_the_end() -> None:
    values = np.arange(1, 6)
    for axis in (-1, 2):
        np.testing.assert_array_equal(expand(values, PerAxis(axis), (2, 3, 5))[0, 0], values)
    assert expand(values[:3], PerAxis(-2), (2, 3, 5)).shape == (1, 3, 1)


def _loss(weight: np.ndarray, qparams: QParams, norm: float) -> np.ndarray:
    error = np.abs(weight - fake_quantize(weight, qparams)).astype(np.float64) ** norm
    return error.reshape(weight.shape[0], -1).sum(axis=1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_search_finds_the_best_of_its_factors(bits: int) -> None:
    """Brute force over all 80 factors, channel by channel."""
    weight = np.random.default_rng(bits).standard_t(4, (6, 5, 3)).astype(np.float32)
    qtype = QType.signed(bits)
    found = search_weight_qparams(weight, qtype, PerAxis(0), norm=2.4)
    absmax = np.abs(weight).max(axis=(1, 2)).astype(np.float64)
    every = [
        _loss(weight, symmetric_qparams(absmax * (1 - 0.01 * k), qtype, PerAxis(0)), 2.4) for k in range(80)
    ]
    np.testing.assert_allclose(_loss(weight, found, 2.4), np.min(every, axis=0), rtol=0, atol=0)


@pytest.mark.parametrize("seed", [11, 53, 61])
def test_weight_search_goes_on_as_long_as_it_helps(seed: int) -> None:
    """From 6 bits on it stops early, but not at the fifth factor that each were better than the one before."""
    weight = np.random.default_rng(seed).standard_t(3, (1, 400)).astype(np.float32)
    qtype = QType.signed(6)
    every = [
        _loss(weight, symmetric_qparams(np.abs(weight).max(axis=1) * (1 - 0.01 * k), qtype, PerAxis(0)), 2.4)
        for k in range(80)
    ]
    assert int(np.argmin(every)) > 5
    found = search_weight_qparams(weight, qtype, PerAxis(0), norm=2.4)
    np.testing.assert_allclose(_loss(weight, found, 2.4), np.min(every), rtol=1e-6)


def test_weight_search_along_the_last_axis_equals_the_transposed_one() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 7)).astype(np.float32)
    first = search_weight_qparams(weight, QType.signed(4), PerAxis(0))
    last = search_weight_qparams(np.ascontiguousarray(weight.T), QType.signed(4), PerAxis(-1))
    np.testing.assert_array_equal(first.scale, last.scale)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_empty_weights_have_scales(shape: tuple[int, int]) -> None:
    found = search_weight_qparams(np.zeros(shape, np.float32), QType.signed(8), PerAxis(0))
    assert found.scale.shape == (shape[0],)
    assert (found.scale > 0).all()


def test_products_of_the_smallest_scales_are_normal_floats() -> None:
    """Two of them are multiplied and divided by an output scale of up to 1000: denormals are slow."""
    smallest = symmetric_qparams(np.zeros(()), QType.signed(8), PerTensor()).scale
    assert smallest * smallest / np.float32(1000.0) > np.finfo(np.float32).tiny


def test_a_channel_of_zeros_has_a_positive_scale() -> None:
    found = search_weight_qparams(np.zeros((3, 2), np.float32), QType.signed(8), PerTensor())
    assert found.scale > 0
    assert found.scale.shape == ()


def test_ranges_beyond_the_floats_are_cut_to_them() -> None:
    limit = float(np.finfo(np.float32).max)
    for low, high in ((0.0, np.inf), (-np.inf, 0.0), (-np.inf, np.inf)):
        found = asymmetric_qparams(low, high, QType.unsigned(8))
        assert np.isfinite(found.scale)
        assert all(np.isfinite(end) for end in range_of(found))
    wide = QParams(
        scale=np.asarray(limit / 2, np.float32),
        zero_point=np.asarray(128, np.int32),
        qtype=QType.unsigned(8),
        granularity=PerTensor(),
    )
    assert [float(end) for end in range_of(wide)] == [-limit, limit]


@pytest.mark.parametrize("high", [0.0, 1e-30])
def test_grids_above_zero_have_no_smaller_scale_either(high: float) -> None:
    qtype = shifted_type(QType.unsigned(4))
    assert qtype is not None
    assert shifted_qparams(3, high, qtype).scale == np.float32(SMALLEST_SCALE)


@pytest.mark.parametrize(
    ("bounds", "low", "is_bounded"),
    [(None, 0.0, False), ((0.0, np.inf), 0.0, False), ((0.0, 6.0), 0.0, True), ((-6.0, 6.0), -1.0, False)],
)
def test_a_grid_that_starts_with_its_tensor_may_not_end_behind_it(
    bounds: tuple[float, float] | None, low: float, is_bounded: bool
) -> None:
    qparams = asymmetric_qparams(low, 2.0, QType.unsigned(8))
    quantizer = Quantizer(
        quantizer_id="q", tensor="t", role="activation", qtype=qparams.qtype, granularity=PerTensor(),
        symmetric=False, sites=(), scale_group="q", bounds=bounds,
    )  # fmt: skip
    found = largest_scale(quantizer, qparams)
    assert found == (pytest.approx(6.0 / 255) if is_bounded else np.inf)
    assert not is_bounded or np.float32(255) * np.float32(found) <= 6.0
