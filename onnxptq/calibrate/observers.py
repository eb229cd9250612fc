"""From statistics to quantization parameters: four ways to choose the range of a tensor.

``minmax``
    The observed extremes.
``percentile``
    The central ``percentile`` % of the histogram (default 99.999), split evenly between both tails.
``entropy``
    The threshold T that minimises KL(P || Q): P is the histogram of |x| clipped at T, Q the same mass spread
    over the grid's levels (S. Migacz, "8-bit inference with TensorRT", GTC 2017). The bin at zero is left
    out: zero is on every grid, and the spike that a Relu puts there would make any tail look negligible.
``mse``
    The range that minimises sum_i n_i |x_i - x_hat_i|^norm over the histogram, searched on both ends.

All four use the same histogram, so a calibration serves every observer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxptq.calibrate.statistics import HALF_BINS, TensorStatistics
from onnxptq.quantizers.affine import asymmetric_qparams, symmetric_qparams, symmetric_zero_point
from onnxptq.types import PerTensor, QParams, QType

ObserverName = Literal["minmax", "percentile", "entropy", "mse"]
Floats = npt.NDArray[np.float64]
Floats32 = npt.NDArray[np.float32]
Range = tuple[float, float]

_MERGED = 4
"""Histogram bins that the entropy observer and the first look of the mse observer take as one."""

_FLATNESS = 0.1
"""Of all thresholds whose divergence is within this share of the least, the entropy observer takes the
widest: the curve is flat around its minimum, and what is clipped is lost."""

_COARSE = np.concatenate([np.geomspace(0.01, 0.2, 12), np.arange(0.225, 1.0001, 0.025)])
_FINE = 0.005 * np.arange(-5, 6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Observer:
    """A way to choose a range, with its parameters.

    ``norm`` is the exponent of the ``mse`` search; ``percentile`` is in percent. ``margin`` widens the range
    that was found, for values beyond those that calibration has seen.
    """

    name: ObserverName = "mse"
    percentile: float = 99.999
    norm: float = 2.0
    margin: float = 1.0


def choose_qparams(
    statistics: TensorStatistics,
    qtype: QType,
    *,
    symmetric: bool,
    observer: Observer,
    bounds: tuple[float, float] | None = None,
) -> QParams:
    """Per-tensor parameters for values distributed as ``statistics``.

    Args:
        symmetric: zero point at the middle of the grid (0 for signed types).
        bounds: limits that the values cannot leave; a margin stops there.

    Raises:
        ValueError: the observer needs a histogram and the statistics hold none.
    """
    match observer.name:
        case "minmax":
            low, high = statistics.minimum, statistics.maximum
        case "percentile":
            low, high = _percentile(statistics, symmetric, observer.percentile)
        case "entropy":
            low, high = _entropy(statistics, qtype, symmetric)
        case "mse":
            low, high = _mse(statistics, qtype, symmetric, observer.norm)
    low, high = low * observer.margin, high * observer.margin
    if statistics.absmax == 0.0:
        # Samples tell no range of what they leave at zero. In steps as fine as the smallest scale, integer kernels
        # could not hold the bias of the layer that reads it, and nothing else would come through.
        high = float(qtype.qmax - qtype.qmin)
    if bounds is not None:
        low, high = max(low, bounds[0]), min(high, bounds[1])
    if symmetric:
        return symmetric_qparams(np.asarray(max(-low, high, 0.0)), qtype, PerTensor())
    return asymmetric_qparams(low, high, qtype)


def _percentile(s: TensorStatistics, symmetric: bool, percentile: float) -> Range:
    if percentile >= 100.0:  # the histogram may have missed the extremes
        return s.minimum, s.maximum
    centres, counts = s.bins()
    half = s.bin_width / 2
    if symmetric:
        order = np.argsort(np.abs(centres), kind="stable")
        reached = np.cumsum(counts[order]) / counts.sum()
        keep = int(np.searchsorted(reached, percentile / 100.0))
        bound = float(np.abs(centres[order][min(keep, centres.size - 1)])) + half
        bound = min(bound, s.absmax)
        return -bound, bound
    tail = (1.0 - percentile / 100.0) / 2.0
    reached = np.cumsum(counts) / counts.sum()
    low = float(centres[min(int(np.searchsorted(reached, tail, side="right")), centres.size - 1)]) - half
    high = float(centres[min(int(np.searchsorted(reached, 1.0 - tail)), centres.size - 1)]) + half
    return max(low, s.minimum), min(high, s.maximum)


def _entropy(s: TensorStatistics, qtype: QType, symmetric: bool) -> Range:
    if s.absmax == 0.0:
        return 0.0, 0.0
    histogram = _magnitudes(s)
    # The grid's levels on one side of zero: a tensor of both signs shares them.
    one_sided = (s.minimum >= 0.0 or s.maximum <= 0.0) and not symmetric
    levels = (qtype.qmax - qtype.qmin + 1) // (1 if one_sided else 2)
    trials = range(min(levels, histogram.size), histogram.size + 1, max(1, levels // 16))
    divergences = [_clipped_divergence(histogram, bins, levels) for bins in trials]
    allowed = min(divergences) * (1.0 + _FLATNESS)
    widest = max(bins for bins, found in zip(trials, divergences, strict=True) if found <= allowed)
    # The scan may step over the last bin.
    threshold = s.absmax if widest == trials[-1] else widest * _MERGED * s.bin_width
    return max(s.minimum, -threshold), min(s.maximum, threshold)


def _magnitudes(s: TensorStatistics) -> Floats:
    """The histogram of |x| up to its largest value, _MERGED bins in one, the zeros left out."""
    _, _ = s.bins()
    assert s.counts is not None
    folded = s.counts[HALF_BINS:] + s.counts[:HALF_BINS][::-1]
    merged = folded.reshape(-1, _MERGED).sum(axis=1).astype(np.float64)
    merged = merged[: int(np.flatnonzero(merged)[-1]) + 1] if merged.any() else merged[:1]
    if merged.size > 1:
        merged[0] = merged[1]
    magnitudes: Floats = merged
    return magnitudes


def _clipped_divergence(histogram: Floats, bins: int, levels: int) -> float:
    """KL between the first ``bins`` bins (outliers added to the last) and their ``levels``-level version."""
    kept = histogram[:bins]
    reference = kept.copy()
    reference[-1] += histogram[bins:].sum()
    if kept.sum() == 0:
        return math.inf
    level = (np.arange(bins) * levels) // bins
    occupied = kept > 0
    mass = np.bincount(level, weights=kept, minlength=levels)
    spread = np.bincount(level, weights=occupied, minlength=levels)
    candidate = np.where(occupied, mass[level] / np.maximum(spread[level], 1), 0.0)
    p, q = reference / reference.sum(), candidate / candidate.sum()
    # A bin that is empty in Q but holds the outliers in P: smooth by a tiny mass instead of an infinite KL.
    q = np.maximum(q, 1e-9)
    positive = p > 0
    return float((p[positive] * np.log(p[positive] / q[positive])).sum())


def _mse(s: TensorStatistics, qtype: QType, symmetric: bool, norm: float) -> Range:
    low, high = min(s.minimum, 0.0), max(s.maximum, 0.0)
    if s.absmax == 0.0:
        return 0.0, 0.0
    search = _Search(s, qtype, symmetric, norm)
    if symmetric:
        bound = max(-low, high)
        factor = search.factor(np.array([-bound, bound]), np.zeros(2))
        return -bound * factor, bound * factor
    # Both ends together, then each end alone, until nothing moves.
    ends = np.array([low, high])
    factors = np.full(2, search.factor(ends, np.zeros(2)))
    for _ in range(4):
        before = factors.copy()
        for i in (0, 1):
            if ends[i] != 0.0:
                alone = np.where(np.arange(2) == i, ends, 0.0)
                factors[i] = search.factor(alone, ends * factors - alone * factors)
        if (factors == before).all():
            break
    return float(low * factors[0]), float(high * factors[1])


class _Search:
    """The loss of many ranges at once, over the histogram of one tensor.

    Lengths are counted in bins, so that no tensor is too small or too large for single precision. Both
    extremes are added to the histogram, which may have missed them.
    """

    def __init__(self, s: TensorStatistics, qtype: QType, symmetric: bool, norm: float) -> None:
        centres, counts = s.bins()
        self._unit = s.bin_width
        self._qtype = qtype
        self._symmetric = symmetric
        self._norm = norm
        values = np.clip(centres, s.minimum, s.maximum) / self._unit
        weights = counts.astype(np.float64)
        extremes = np.array([s.minimum, s.maximum]) / self._unit
        self._full = _appended(values, weights, extremes)
        block = np.floor_divide(values, _MERGED)
        starts = np.flatnonzero(np.diff(block, prepend=-np.inf))
        merged = np.add.reduceat(weights, starts)
        self._merged = _appended(np.add.reduceat(values * weights, starts) / merged, merged, extremes)

    def factor(self, moving: Floats, fixed: Floats) -> float:
        """The f in (0, 1] of least loss for the range ``fixed + f moving``: a scan, then small steps."""

        def best(factors: Floats, histogram: tuple[Floats32, Floats]) -> float:
            ranges = (fixed + factors[:, None] * moving) / self._unit
            return float(factors[int(np.argmin(self._losses(ranges, *histogram)))])

        around = best(_COARSE, self._merged)
        fine = around + max(1.0, 2.0 * around) * _FINE
        return best(np.unique(np.append(fine[(fine > 0.0) & (fine < 1.0)], [around, 1.0])), self._full)

    def _losses(self, ranges: Floats, values: Floats32, weights: Floats) -> Floats:
        scale, below, above = self._grids(ranges[:, 0], ranges[:, 1])
        steps = values / scale[:, None]
        error = np.abs(steps - np.clip(np.rint(steps), below[:, None], above[:, None]))
        powered = error * error if self._norm == 2.0 else error ** np.float32(self._norm)
        losses: Floats = (powered.astype(np.float64) @ weights) * scale.astype(np.float64) ** self._norm
        return losses

    def _grids(self, low: Floats, high: Floats) -> tuple[Floats32, Floats32, Floats32]:
        """Scale, and the least and greatest integer relative to the zero point, of each range."""
        qmin, qmax = self._qtype.qmin, self._qtype.qmax
        if self._symmetric:
            middle = symmetric_zero_point(self._qtype)
            scale = np.maximum(-low, high) / (qmax - middle)
            zero_point = np.full(scale.shape, float(middle))
        else:
            scale = (high - low) / (qmax - qmin)
            zero_point = np.clip(np.rint(qmin - low / scale), qmin, qmax)
        return (
            scale.astype(np.float32),
            (qmin - zero_point).astype(np.float32),
            (qmax - zero_point).astype(np.float32),
        )


def _appended(values: Floats, weights: Floats, extremes: Floats) -> tuple[Floats32, Floats]:
    return np.append(values, extremes).astype(np.float32), np.append(weights, np.ones(extremes.size))
