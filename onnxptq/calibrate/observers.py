"""From statistics to quantization parameters: four ways to choose the range of a tensor.

``minmax``
    The observed extremes.
``percentile``
    The central ``percentile`` % of the histogram (default 99.999), split evenly between both tails.
``entropy``
    The symmetric threshold T that minimises KL(P || Q): P is the histogram of |x| clipped at T, Q the same
    mass spread over the grid's levels (S. Migacz, "8-bit inference with TensorRT", GTC 2017).
``mse``
    The range that minimises sum_i n_i |x_i - x_hat_i|^norm over the histogram, searched on both ends.

All four use the same histogram, so a calibration serves every observer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxptq.calibrate.statistics import TensorStatistics
from onnxptq.quantizers.affine import asymmetric_qparams, symmetric_qparams
from onnxptq.types import PerTensor, QParams, QType

ObserverName = Literal["minmax", "percentile", "entropy", "mse"]
Floats = npt.NDArray[np.float64]

_ENTROPY_BINS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Observer:
    """A way to choose a range, with its parameters.

    ``norm`` is the exponent of the ``mse`` search; ``percentile`` is in percent.
    """

    name: ObserverName = "mse"
    percentile: float = 99.999
    norm: float = 2.0


def choose_qparams(
    statistics: TensorStatistics, qtype: QType, *, symmetric: bool, observer: Observer
) -> QParams:
    """Per-tensor parameters for values distributed as ``statistics``.

    Args:
        symmetric: zero point at the middle of the grid (0 for signed types).

    Raises:
        ValueError: the observer needs a histogram and the statistics hold none.
    """
    low, high = _CHOOSERS[observer.name](statistics, qtype, symmetric, observer)
    return _qparams(low, high, qtype, symmetric)


def _qparams(low: float, high: float, qtype: QType, symmetric: bool) -> QParams:
    if symmetric:
        return symmetric_qparams(np.asarray(max(-low, high, 0.0)), qtype, PerTensor())
    return asymmetric_qparams(low, high, qtype)


def _minmax(s: TensorStatistics, qtype: QType, symmetric: bool, observer: Observer) -> tuple[float, float]:
    return s.minimum, s.maximum


def _percentile(s: TensorStatistics, qtype: QType, symmetric: bool, observer: Observer) -> tuple[float, float]:
    centres, counts = s.bins()
    half = s.bin_width / 2
    if symmetric:
        order = np.argsort(np.abs(centres), kind="stable")
        reached = np.cumsum(counts[order]) / counts.sum()
        keep = int(np.searchsorted(reached, observer.percentile / 100.0))
        bound = float(np.abs(centres[order][min(keep, centres.size - 1)])) + half
        bound = min(bound, s.absmax)
        return -bound, bound
    tail = (1.0 - observer.percentile / 100.0) / 2.0
    reached = np.cumsum(counts) / counts.sum()
    low = float(centres[min(int(np.searchsorted(reached, tail, side="right")), centres.size - 1)]) - half
    high = float(centres[min(int(np.searchsorted(reached, 1.0 - tail)), centres.size - 1)]) + half
    return max(low, s.minimum), min(high, s.maximum)


def _entropy(s: TensorStatistics, qtype: QType, symmetric: bool, observer: Observer) -> tuple[float, float]:
    absmax = s.absmax
    if absmax == 0.0:
        return 0.0, 0.0
    centres, counts = s.bins()
    histogram, _ = np.histogram(np.abs(centres), bins=_ENTROPY_BINS, range=(0.0, absmax), weights=counts)
    # One side of the grid: |x| of a signed tensor shares the levels between both signs.
    one_sided = s.minimum >= 0.0 or s.maximum <= 0.0
    levels = qtype.qmax - qtype.qmin + 1
    levels = levels if one_sided and not symmetric else levels // 2
    best, threshold = math.inf, absmax
    for bins in range(levels, _ENTROPY_BINS + 1, max(1, levels // 16)):
        divergence = _clipped_divergence(histogram, bins, levels)
        if divergence < best:
            best, threshold = divergence, absmax * bins / _ENTROPY_BINS
    return max(s.minimum, -threshold), min(s.maximum, threshold)


def _clipped_divergence(histogram: Floats, bins: int, levels: int) -> float:
    """KL between the first ``bins`` bins (outliers added to the last) and their ``levels``-level version."""
    kept = histogram[:bins].astype(np.float64)
    reference = kept.copy()
    reference[-1] += histogram[bins:].sum()
    if reference.sum() == 0 or kept.sum() == 0:
        return math.inf
    level = np.minimum((np.arange(bins) * levels) // bins, levels - 1)
    occupied = kept > 0
    mass = np.bincount(level, weights=kept, minlength=levels)
    spread = np.bincount(level, weights=occupied, minlength=levels)
    candidate = np.where(occupied, mass[level] / np.maximum(spread[level], 1), 0.0)
    p, q = reference / reference.sum(), candidate / candidate.sum()
    # A bin that is empty in Q but holds the outliers in P: smooth by a tiny mass instead of an infinite KL.
    q = np.maximum(q, 1e-9)
    positive = p > 0
    return float((p[positive] * np.log(p[positive] / q[positive])).sum())


def _mse(s: TensorStatistics, qtype: QType, symmetric: bool, observer: Observer) -> tuple[float, float]:
    values, weights = _weighted_values(s)
    low, high = min(s.minimum, 0.0), max(s.maximum, 0.0)

    def loss(a: float, b: float) -> float:
        return _histogram_loss(values, weights, _qparams(a, b, qtype, symmetric), observer.norm)

    if symmetric:
        bound = max(-low, high)
        factor = _best_factor(lambda f: loss(-bound * f, bound * f))
        return -bound * factor, bound * factor
    # Both ends together first, then each end alone, until nothing moves.
    both = _best_factor(lambda f: loss(low * f, high * f))
    low_factor = high_factor = both
    for _ in range(2):
        if high > 0.0:
            high_factor = _best_factor(lambda f: loss(low * low_factor, high * f), around=high_factor)
        if low < 0.0:
            low_factor = _best_factor(lambda f: loss(low * f, high * high_factor), around=low_factor)
    return low * low_factor, high * high_factor


def _best_factor(loss: Callable[[float], float], around: float | None = None) -> float:
    """The shrink factor of least loss: a coarse scan over (0, 1], then a scan of 0.5 % steps around its best."""
    if around is None:
        coarse = np.concatenate([np.geomspace(0.01, 0.2, 12), np.arange(0.225, 1.0001, 0.025)])
        around = float(coarse[int(np.argmin([loss(float(f)) for f in coarse]))])
    width = max(0.005, around * 0.01)
    fine = around + width * np.arange(-5, 6)
    fine = fine[(fine > 0.0) & (fine <= 1.0)]
    candidates = [around, *(float(f) for f in fine)]
    losses = [loss(f) for f in candidates]
    return candidates[int(np.argmin(losses))]


def _histogram_loss(values: Floats, weights: Floats, qparams: QParams, norm: float) -> float:
    scale, zero_point = float(qparams.scale), int(qparams.zero_point)
    qtype = qparams.qtype
    q = np.clip(np.rint(values / scale), qtype.qmin - zero_point, qtype.qmax - zero_point)
    error = np.abs(values - q * scale)
    powered = error * error if norm == 2.0 else error**norm
    return float(powered @ weights)


def _weighted_values(s: TensorStatistics) -> tuple[Floats, Floats]:
    """Bin centres with their counts, and both extremes, which a strided histogram may have missed."""
    centres, counts = s.bins()
    values = np.concatenate([[s.minimum], np.clip(centres, s.minimum, s.maximum), [s.maximum]])
    return values, np.concatenate([[1.0], counts.astype(np.float64), [1.0]])


_CHOOSERS: Mapping[str, Callable[[TensorStatistics, QType, bool, Observer], tuple[float, float]]] = {
    "minmax": _minmax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
