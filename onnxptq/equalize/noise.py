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
smoothed to p-norms for the gradient, with p a power of two; a weight's is then a product with a matrix that
does not depend on x,

    (sum_c (|W_oc| s_c)^p)^(1/p) = (M u)_o^(1/p)        M_oc = |W_oc|^p, u_c = s_c^p.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]
Smooth = Callable[[Floats], tuple[float, Floats]]

_LEVELS = 255.0
_WEIGHT_LEVEL = 127.0
_SMALLEST = 1e-300


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

    def noise(self, x: Floats) -> float:
        """The noise."""
        log_s = _log_factors(self.index, self.sign, x)
        scaled = [side * np.exp(-log_s) for side in self._sides]
        up, down = (float(side.max()) for side in scaled)
        return self._rounding(log_s, up, down) + sum(
            float(_clipping(limit * np.exp(log_s), extreme, tail, self.risk)[0].sum())
            for limit, extreme, tail in ((up, self.high, self.tail_high), (down, -self.low, self.tail_low))
        )

    def smooth(self, p: int) -> Smooth:
        """The noise and its gradient by x, with p-norms for the maxima."""

        def value(x: Floats) -> tuple[float, Floats]:
            log_s = _log_factors(self.index, self.sign, x)
            (up, up_share), (down, down_share) = (_soft_max(side, -log_s, p) for side in self._sides)
            value = self._rounding(log_s, up, down)
            slope = np.zeros_like(log_s)
            if value > 0:
                by_step = -(up * up_share + down * down_share) / (up + down)
                parts = np.exp(2 * log_s) * self.gain
                slope = value * 2 * (by_step + parts / parts.sum())
            for limit, share, extreme, tail in (
                (up, up_share, self.high, self.tail_high),
                (down, down_share, -self.low, self.tail_low),
            ):
                clipped, by_limit = _clipping(limit * np.exp(log_s), extreme, tail, self.risk)
                value += float(clipped.sum())
                slope += by_limit - share * by_limit.sum()
            return value, _gather(self.index, self.sign * slope, x.size)

        return value

    @property
    def _sides(self) -> tuple[Floats, Floats]:
        """What each class needs above and below 0."""
        up, down = np.maximum(self.high, 0.0), np.maximum(-self.low, 0.0)
        if self.symmetric:
            up = down = np.maximum(up, down)
        return up, down

    def _rounding(self, log_s: Floats, up: float, down: float) -> float:
        step = (up + down) / _LEVELS
        return float(step * step / 12 * (np.exp(2 * log_s) * self.gain).sum())


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

    def noise(self, x: Floats) -> float:
        """The noise."""
        log_s = _log_factors(self.index, self.sign, x)
        peak = (self.absmax * np.exp(log_s)).max(axis=1)
        return float(self._rows(peak).sum() * (np.exp(-2 * log_s) * self.energy).sum())

    def smooth(self, p: int) -> Smooth:
        """As of :class:`ActivationTerm`."""
        largest = np.maximum(self.absmax.max(axis=1), np.finfo(np.float64).tiny)
        powers = _powered(self.absmax / largest[:, None], p)

        def value(x: Floats) -> tuple[float, Floats]:
            log_s = _log_factors(self.index, self.sign, x)
            top = log_s.max()
            factors = np.exp(p * (log_s - top))
            sums = np.maximum(powers @ factors, _SMALLEST)
            rows = self._rows(largest * np.exp(top) * sums ** (1 / p))
            parts = np.exp(-2 * log_s) * self.energy
            total = float(parts.sum())
            shares = ((rows / sums) @ powers) * factors
            slope = 2 * (total * shares - float(rows.sum()) * parts)
            return float(rows.sum()) * total, _gather(self.index, self.sign * slope, x.size)

        return value

    def _rows(self, peak: Floats) -> Floats:
        rows: Floats = self.gain * np.square(peak / _WEIGHT_LEVEL) / 12
        return rows


Term = ActivationTerm | WeightTerm


def total_noise(terms: Sequence[Term], x: Floats) -> float:
    """Sum of the terms."""
    return sum(term.noise(x) for term in terms)


def smooth_noise(terms: Sequence[Term], p: int) -> Smooth:
    """Sum of the terms with p-norms for the maxima, and its gradient, as a function of x."""
    parts = [term.smooth(p) for term in terms]

    def value(x: Floats) -> tuple[float, Floats]:
        found = [part(x) for part in parts]
        return sum(value for value, _ in found), np.sum([slope for _, slope in found], axis=0)

    return value


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


def _soft_max(magnitude: Floats, exponent: Floats, p: int) -> tuple[float, Floats]:
    """p-norm of magnitude * exp(exponent), and its derivative by ln of each element."""
    scaled = magnitude * np.exp(exponent)
    peak = float(scaled.max())
    powers = _powered(scaled / (peak if peak > 0 else 1.0), p)
    total = max(float(powers.sum()), _SMALLEST)
    return peak * total ** (1 / p), powers / total


def _powered(values: Floats, p: int) -> Floats:
    """``values`` to the power p, a power of two."""
    for _ in range(p.bit_length() - 1):
        values = values * values
    return values
