"""Streaming statistics depend on the values seen and on nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxptq.calibrate.statistics import (
    HALF_BINS,
    HISTOGRAM_ELEMENTS,
    StatisticsBuilder,
    TensorStatistics,
    combined,
    needed_exponent,
    strided,
)

# All magnitudes, denormals and both zeros included, in one array: the hardest mixture for the bin width.
MAGNITUDES = st.floats(-120.0, 127.9).map(lambda e: float(np.float32(2.0**e)))
FLOATS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.builds(lambda m, s: s * m, MAGNITUDES, st.sampled_from([-1.0, 1.0])),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, -1.1754942e-38, 3.4028235e38, -3.4028235e38]),
)
ARRAYS = hnp.arrays(np.float32, st.integers(1, 40), elements=FLOATS)


def _built(*chunks: np.ndarray) -> StatisticsBuilder:
    builder = StatisticsBuilder(histogram=True)
    for chunk in chunks:
        builder.update(chunk)
    return builder


def _result(builder: StatisticsBuilder) -> TensorStatistics:
    result = builder.result()
    assert result is not None
    return result


def _assert_identical(a: TensorStatistics, b: TensorStatistics) -> None:
    assert (a.minimum.hex(), a.maximum.hex()) == (b.minimum.hex(), b.maximum.hex())
    assert (a.elements, a.exponent) == (b.elements, b.exponent)
    np.testing.assert_array_equal(a.counts, b.counts)


def test_both_zeros_are_one() -> None:
    zeros = [np.float32([0.0]), np.float32([-0.0])]
    first = _result(_built(*zeros))
    _assert_identical(first, _result(_built(*zeros[::-1])))
    assert math.copysign(1.0, first.minimum) == math.copysign(1.0, first.maximum) == 1.0


@settings(max_examples=150, deadline=None)
@given(values=ARRAYS, data=st.data())
def test_order_and_cuts_do_not_matter(values: np.ndarray, data: st.DataObject) -> None:
    whole = _result(_built(values))
    shuffled = np.array(data.draw(st.permutations(values.tolist())), np.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, values.size), max_size=6)))
    _assert_identical(whole, _result(_built(*np.split(shuffled, cuts))))


@settings(max_examples=100, deadline=None)
@given(chunks=st.lists(hnp.arrays(np.float32, st.integers(0, 10), elements=FLOATS), min_size=3, max_size=3))
def test_merging_is_associative_and_commutative(chunks: list[np.ndarray]) -> None:
    if not any(c.size for c in chunks):
        return
    a, b, c = (_built(x) for x in chunks)
    a.merge(b)
    a.merge(c)
    d, e, f = (_built(x) for x in chunks)
    f.merge(e)
    f.merge(d)
    _assert_identical(_result(a), _result(f))
    _assert_identical(_result(a), _result(_built(*chunks)))
    _assert_identical(_result(a), combined([_result(_built(x)) for x in chunks if x.size]))


@settings(max_examples=150, deadline=None)
@given(values=ARRAYS)
def test_histogram_is_the_brute_force_one(values: np.ndarray) -> None:
    found = _result(_built(values))
    assert found.minimum == values.min()
    assert found.maximum == values.max()
    wanted = np.zeros(2 * HALF_BINS, np.int64)
    for value in values.tolist():
        # Python's integers and exact halving: no rounding anywhere.
        mantissa, denominator = value.as_integer_ratio()
        shift = -found.exponent
        scaled = mantissa * 2**shift if shift >= 0 else mantissa
        index = scaled // (denominator if shift >= 0 else denominator * 2**-shift)
        wanted[index + HALF_BINS] += 1
    np.testing.assert_array_equal(found.counts, wanted)


@given(absmax=st.floats(min_value=1e-45, max_value=3.4028235e38, exclude_min=False))
def test_between_half_and_all_of_the_bins_are_used(absmax: float) -> None:
    bins = absmax / math.ldexp(1.0, needed_exponent(absmax))
    assert HALF_BINS / 2 <= bins < HALF_BINS


def test_bins_agree_with_numpy() -> None:
    values = np.random.default_rng(0).standard_normal(50_000).astype(np.float32)
    found = _result(_built(values))
    edges = (np.arange(2 * HALF_BINS + 1) - HALF_BINS) * found.bin_width
    wanted, _ = np.histogram(values.astype(np.float64), edges)
    np.testing.assert_array_equal(found.counts, wanted)
    centres, counts = found.bins()
    assert counts.sum() == values.size
    assert np.abs(centres).max() <= found.absmax + found.bin_width


@pytest.mark.parametrize(
    "shape", [(1, 64, 56, 56), (1, 257, 384), (3, 65_537), (131_072,), (2, 2, 2, 99_991), (43_001, 6)]
)
def test_strided_subset(shape: tuple[int, ...]) -> None:
    size = math.prod(shape)
    positions = strided(np.arange(size, dtype=np.float64).reshape(shape)).astype(np.int64)
    assert HISTOGRAM_ELEMENTS / 4 < positions.size <= HISTOGRAM_ELEMENTS
    # Every index of every axis is looked at, unless an axis has more of them than the subset has elements.
    for axis, dim in enumerate(shape):
        seen = np.unique(np.unravel_index(np.minimum(positions, size - 1), shape)[axis])
        assert seen.size == dim or dim > positions.size / 4


def test_large_arrays_keep_their_extremes() -> None:
    values = np.zeros(HISTOGRAM_ELEMENTS * 3, np.float32)
    values[1], values[-2] = -7.0, 9.0
    found = _result(_built(values))
    assert (found.minimum, found.maximum, found.elements) == (-7.0, 9.0, values.size)


@pytest.mark.parametrize(
    ("bad", "word"), [(np.nan, "NaN"), (np.inf, "Inf"), (-np.inf, "Inf")], ids=["nan", "inf", "minus_inf"]
)
def test_values_that_are_not_finite_are_refused_and_not_counted(bad: float, word: str) -> None:
    builder = _built(np.ones(3, np.float32))
    values = np.full(1000, 2.0, np.float32)
    values[567] = bad
    with pytest.raises(ValueError, match=word):
        builder.update(values)
    assert _result(builder).maximum == 1.0


def test_extremes_alone_need_no_histogram() -> None:
    builder = StatisticsBuilder(histogram=False)
    builder.update(np.array([1.0, -2.0], np.float32))
    result = _result(builder)
    assert result.counts is None
    with pytest.raises(ValueError, match="no histograms"):
        result.bins()


def test_nothing_seen_is_no_statistics() -> None:
    assert _built(np.zeros((0, 3), np.float32)).result() is None


def test_extremes_of_one_member_leave_no_histogram() -> None:
    whole, extremes = _built(np.float32([1.0, 2.0])), StatisticsBuilder(histogram=False)
    extremes.update(np.float32([-3.0, 0.5, 4.0]))
    for members in ([_result(whole), _result(extremes)], [_result(extremes), _result(whole)]):
        found = combined(members)
        assert (found.minimum, found.maximum, found.elements, found.counts) == (-3.0, 4.0, 5, None)


def test_zeros_do_not_widen_the_bins_of_a_tiny_tensor() -> None:
    zeros, tiny = _result(_built(np.zeros(3, np.float32))), _result(_built(np.float32([1e-20, -3e-20])))
    for members in ([zeros, tiny], [tiny, zeros]):
        _assert_identical(
            combined(members), _result(_built(np.zeros(3, np.float32), np.float32([1e-20, -3e-20])))
        )
