"""Streaming statistics of one tensor: bounded memory, independent of the order and grouping of samples.

Minimum and maximum are exact over all elements. The histogram has bins of width ``2^exponent``, aligned
at zero. When a larger value arrives the width doubles and neighbouring bins merge; because
``floor(floor(x / w) / 2) = floor(x / 2w)``, the result depends only on the set of values seen, not on
when the width doubled. Counts are integers, so merging is associative.

An array larger than HISTOGRAM_ELEMENTS contributes a strided subset of its elements to the histogram (never
to the extremes), chosen by position alone. The stride is a prime that divides none of its dimensions, so
that no channel is favoured. Up to that size an array may be cut into pieces in any way without changing the
result; beyond it the pieces are subsampled one by one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxptq.types import Array, FloatArray

HALF_BINS = 8192
"""Bins on each side of zero; between 4096 and 8192 of them cover the largest magnitude."""

HISTOGRAM_ELEMENTS = 65_536
"""Elements of one tensor in one sample that reach the histogram."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorStatistics:
    """What is known of one tensor after calibration.

    ``counts`` has 2 * HALF_BINS entries; entry ``i`` counts values in
    [(i - HALF_BINS) w, (i + 1 - HALF_BINS) w) with w = 2^exponent. It is None where only extremes were asked.
    ``elements`` is the number of values behind the extremes.
    """

    minimum: float
    maximum: float
    elements: int
    exponent: int
    counts: npt.NDArray[np.int64] | None

    @property
    def absmax(self) -> float:
        """The largest magnitude."""
        return max(-self.minimum, self.maximum, 0.0)

    def bins(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        """Centres and counts of the occupied bins."""
        if self.counts is None:
            raise ValueError("this calibration holds no histograms")
        occupied = np.flatnonzero(self.counts)
        centres: npt.NDArray[np.float64] = (occupied.astype(np.float64) - HALF_BINS + 0.5) * self.bin_width
        return centres, self.counts[occupied]

    @property
    def bin_width(self) -> float:
        """Width of a histogram bin, in the tensor's units."""
        return math.ldexp(1.0, self.exponent)


class StatisticsBuilder:
    """Accumulates :class:`TensorStatistics` value by value."""

    def __init__(self, *, histogram: bool) -> None:
        self._minimum = math.inf
        self._maximum = -math.inf
        self._elements = 0
        self._exponent: int | None = None
        self._counts = np.zeros(2 * HALF_BINS, np.int64) if histogram else None

    def update(self, values: Array) -> None:
        """Add all elements of ``values``, of any shape.

        Raises:
            ValueError: ``values`` holds NaN or Inf; nothing of it is added then.
        """
        if values.size == 0:
            return
        # Adding 0 turns -0 into +0: which of both zeros is the minimum would depend on the order.
        low, high = float(values.min()) + 0.0, float(values.max()) + 0.0
        # NaN survives min and max, so two passes over memory find everything that is not finite.
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("NaN" if math.isnan(low) or math.isnan(high) else "Inf")
        self._minimum = min(self._minimum, low)
        self._maximum = max(self._maximum, high)
        self._elements += values.size
        if self._counts is not None:
            self._count(strided(values), max(-low, high))

    def _count(self, values: FloatArray, absmax: float) -> None:
        assert self._counts is not None
        if absmax > 0.0:
            needed = needed_exponent(absmax)
            if self._exponent is None:
                self._exponent = needed
            if self._exponent < needed:
                self._counts = _coarsened(self._counts, needed - self._exponent)
                self._exponent = needed
        if self._exponent is None:  # nothing but zeros so far
            self._counts[HALF_BINS] += values.size
            return
        index = np.floor(_scaled(values, -self._exponent)).astype(np.intp) + HALF_BINS
        self._counts += np.bincount(index, minlength=2 * HALF_BINS)

    def merge(self, other: StatisticsBuilder) -> None:
        """Add what ``other`` has seen; associative and commutative."""
        self._minimum = min(self._minimum, other._minimum)
        self._maximum = max(self._maximum, other._maximum)
        self._elements += other._elements
        if self._counts is None or other._counts is None:
            return
        mine, theirs = self._counts, other._counts
        exponents = [e for e in (self._exponent, other._exponent) if e is not None]
        target = max(exponents, default=None)
        if target is not None:
            mine = _coarsened(mine, 0 if self._exponent is None else target - self._exponent)
            theirs = _coarsened(theirs, 0 if other._exponent is None else target - other._exponent)
        self._counts, self._exponent = mine + theirs, target

    def result(self) -> TensorStatistics | None:
        """The statistics, or None when no element was ever seen."""
        if self._elements == 0:
            return None
        return TensorStatistics(
            minimum=self._minimum,
            maximum=self._maximum,
            elements=self._elements,
            exponent=self._exponent if self._exponent is not None else 0,
            counts=None if self._counts is None else self._counts.copy(),
        )


def combined(members: Sequence[TensorStatistics]) -> TensorStatistics:
    """The statistics of all values of ``members`` together; without a histogram if one of them has none."""
    exponent = max((m.exponent for m in members if m.absmax > 0.0), default=0)
    # The zeros of a tensor that holds nothing else are in the same bin at every width.
    histograms = [
        _coarsened(m.counts, max(0, exponent - m.exponent)) for m in members if m.counts is not None
    ]
    return TensorStatistics(
        minimum=min(m.minimum for m in members),
        maximum=max(m.maximum for m in members),
        elements=sum(m.elements for m in members),
        exponent=exponent,
        counts=np.sum(histograms, axis=0) if len(histograms) == len(members) else None,
    )


def needed_exponent(absmax: float) -> int:
    """The smallest exponent whose HALF_BINS bins hold +-``absmax``."""
    _, exponent = math.frexp(absmax)  # absmax = m 2^exponent with m in [0.5, 1)
    return exponent - HALF_BINS.bit_length() + 1


def strided(values: Array) -> FloatArray:
    """At most HISTOGRAM_ELEMENTS elements of ``values``, flat and float32, chosen by position alone."""
    flat = values.reshape(-1)
    if flat.size > HISTOGRAM_ELEMENTS:
        flat = flat[:: _stride(flat.size, values.shape)]
    return flat.astype(np.float32, copy=False)


def _stride(size: int, shape: tuple[int, ...]) -> int:
    stride = math.ceil(size / HISTOGRAM_ELEMENTS)
    while not (_is_prime(stride) and all(dim % stride or dim == 1 for dim in shape)):
        stride += 1
    return stride


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


def _scaled(values: FloatArray, exponent: int) -> FloatArray:
    """``values * 2^exponent``, exactly as far as ``floor`` can tell."""
    if exponent > 100:  # the factor alone may leave the range of a float
        return np.ldexp(values, exponent)
    scaled: FloatArray = values * np.float32(math.ldexp(1.0, exponent))
    if exponent < 0:
        # A tiny negative value must stay below zero, or its bin would depend on the width it was counted at.
        scaled = np.where((scaled == 0.0) & (values < 0.0), np.float32(-1.0), scaled)
    return scaled


def _coarsened(counts: npt.NDArray[np.int64], doublings: int) -> npt.NDArray[np.int64]:
    """Double the bin width ``doublings`` times: each time bin k takes what bins 2k and 2k + 1 held."""
    half = HALF_BINS // 2
    # After 14 doublings everything is in the two bins beside zero, where it stays.
    for _ in range(min(doublings, HALF_BINS.bit_length())):
        merged = np.zeros_like(counts)
        merged[HALF_BINS - half : HALF_BINS + half] = counts.reshape(-1, 2).sum(axis=1)
        counts = merged
    return counts
