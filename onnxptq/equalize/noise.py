"""The noise that factors are chosen by, as a function of x = ln s.

An activation tensor with values in [low_c, high_c] on class c, quantized per tensor after the rescaling::

    A = step^2 / 12 * sum_c s_c^2 gain_c        step = (max_c high_c / s_c - min_c low_c / s_c) / levels

(0 counts as a value of every range; symmetric grids: step = 2 max_c |x_c| / s_c / levels). A range that fits
every channel tightly clips more often on new data. With n samples of N elements of class c each, a new sample
exceeds the old extreme m_c with probability 1 / n; an exponential tail of scale t_c beyond it gives, for the
limit L s_c >= m_c that the tensor's range L leaves to the class,

    C = sum_c gain_c 2 t_c^2 / (n N) exp(-(L s_c - m_c) / t_c)        on either side.

A weight with one scale per output channel, reading classes c with mean square E_c::

    B = sum_o gain_o (max_c |W_oc| s_c / 127)^2 / 12 * sum_c E_c / s_c^2

Both are in the units of the unscaled network, so factors on a weight's output side do not enter. Maxima are
smoothed to p-norms for the gradient, with p a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]

_LEVELS = 255.0
_WEIGHT_LEVEL = 127.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ActivationTerm:
    """One quantized tensor. Class ``c`` has ln s = sign[c] x[index[c]]; index -1 means s = 1.

    ``gain`` weighs rounding noise and ``risk`` clipping noise; ``tail_low`` and ``tail_high`` as in Spread.
    """

    name: str
    index: Indices
    sign: Floats
    low: Floats
    high: Floats
    gain: Floats
    tail_low: Floats
    tail_high: Floats
    risk: Floats
    symmetric: bool

    def value(self, x: Floats, p: int | None) -> tuple[float, Floats]:
        """Noise and its gradient by x; ``p`` None for the true maxima (the gradient is then a subgradient)."""
        log_s = _log_factors(self.index, self.sign, x)
        up, up_share = _soft_max(np.maximum(self.high, 0.0), -log_s, p)
        down, down_share = _soft_max(np.maximum(-self.low, 0.0), -log_s, p)
        if self.symmetric:
            up, up_share = _soft_max(np.maximum(np.maximum(self.high, -self.low), 0.0), -log_s, p)
            down, down_share = up, up_share
        step = (up + down) / _LEVELS
        parts = np.exp(2 * log_s) * self.gain
        total = float(parts.sum())
        value = float(step * step / 12 * total)
        slope = np.zeros_like(log_s)
        if value > 0:
            by_step = -(up * up_share + down * down_share) / (up + down)
            slope = value * 2 * (by_step + parts / total)
        for limit, share, extreme, tail in (
            (up, up_share, self.high, self.tail_high),
            (down, down_share, -self.low, self.tail_low),
        ):
            clipped, by_limit = _clipping(limit * np.exp(log_s), extreme, tail, self.risk)
            value += float(clipped.sum())
            slope += by_limit - share * by_limit.sum()
        return value, _gather(self.index, self.sign * slope, x.size)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightTerm:
    """Output channels of one weight that read the same classes: ``absmax`` is (outputs, classes)."""

    name: str
    index: Indices
    sign: Floats
    absmax: Floats
    gain: Floats
    energy: Floats

    def thinned(self, rows: int) -> WeightTerm:
        """An estimate of this term from at most ``rows`` evenly spread output channels."""
        count = self.absmax.shape[0]
        if count <= rows:
            return self
        kept = np.arange(rows) * count // rows
        return replace(
            self,
            absmax=self.absmax[kept],
            gain=self.gain[kept] * (self.gain.sum() / max(self.gain[kept].sum(), 1e-300)),
        )

    def value(self, x: Floats, p: int | None) -> tuple[float, Floats]:
        """As :meth:`ActivationTerm.value`."""
        log_s = _log_factors(self.index, self.sign, x)
        peak, share = _soft_max(self.absmax, log_s, p)
        rows = self.gain * np.square(peak / _WEIGHT_LEVEL) / 12
        parts = np.exp(-2 * log_s) * self.energy
        total = float(parts.sum())
        value = float(rows.sum()) * total
        slope = 2 * (total * (rows @ share) - float(rows.sum()) * parts)
        return value, _gather(self.index, self.sign * slope, x.size)


Term = ActivationTerm | WeightTerm


def total_noise(terms: Sequence[Term], x: Floats, p: int | None = None) -> tuple[float, Floats]:
    """Sum of the terms and its gradient."""
    value, slope = 0.0, np.zeros_like(x)
    for term in terms:
        part, part_slope = term.value(x, p)
        value += part
        slope += part_slope
    return value, slope


def _clipping(limit: Floats, extreme: Floats, tail: Floats, risk: Floats) -> tuple[Floats, Floats]:
    """Expected clipping noise per class and its derivative by the logarithm of the limit."""
    safe = np.where(tail > 0, tail, 1.0)
    odds = np.where(tail > 0, np.exp(-np.clip((limit - extreme) / safe, 0.0, 700.0)), 0.0)
    noise = 2 * np.square(tail) * risk * odds
    return noise, -noise * limit / safe


def _log_factors(index: Indices, sign: Floats, x: Floats) -> Floats:
    result: Floats = (
        np.where(index >= 0, sign * x[np.maximum(index, 0)], 0.0) if x.size else np.zeros(index.size)
    )
    return result


def _gather(index: Indices, slope: Floats, size: int) -> Floats:
    free = index >= 0
    sums: Floats = np.bincount(index[free], weights=slope[free], minlength=size).astype(np.float64)
    return sums


def _soft_max(magnitude: Floats, exponent: Floats, p: int | None) -> tuple[Floats, Floats]:
    """max (or p-norm) over the last axis of magnitude * exp(exponent), and its derivative by ln of each element."""
    scaled = magnitude * np.exp(exponent)
    peak = scaled.max(axis=-1, keepdims=True)
    safe = np.where(peak > 0, peak, 1.0)
    ratio = scaled / safe
    if p is None:
        share = (ratio == 1.0).astype(np.float64)
        return peak[..., 0], share / np.maximum(share.sum(axis=-1, keepdims=True), 1.0)
    powers: Floats = ratio
    for _ in range(p.bit_length() - 1):
        powers = powers * powers
    sums = np.maximum(powers.sum(axis=-1, keepdims=True), 1e-300)
    return (peak * sums ** (1 / p))[..., 0], powers / sums
