"""Choosing the factors: candidates of one parameter, then descent, and the best by the true noise.

Candidates are s_c = r_c^alpha / w_c^(1 - alpha) with r the range of a channel over the quantized tensors and
w the largest weight that reads it (alpha = 1 equalizes ranges, alpha = 0 weights; in between they are the
migration strengths of SmoothQuant, arXiv 2211.10438, and 1/2 is the fixed point of cross-layer equalization,
arXiv 1906.04721). s = 1 is always a candidate, so the predicted noise never grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxptq.equalize.noise import ActivationTerm, Floats, Term, WeightTerm, smooth_noise, total_noise

_ALPHAS = tuple(np.linspace(0.0, 1.0, 9))
_SMOOTHNESS = (8, 32)
_ITERATIONS = 12
_ROWS = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """Factors of one independent set of classes: ``x`` = ln s, and the noise before and after."""

    x: Floats
    before: float
    after: float


def choose(terms: Sequence[Term], low: Floats, high: Floats, *, snap: bool) -> Choice:
    """The best x with low <= x <= high, which must include x = 0.

    Args:
        snap: only powers of two, which rescale floats without rounding.
    """
    size = low.size
    ranges, weights = _log_ranges(terms, size), _log_weights(terms, size)
    alive = np.isfinite(ranges)
    zero = np.zeros(size)
    before = total_noise(terms, zero)
    if not alive.any():
        return Choice(x=zero, before=before, after=before)
    ranges = np.where(alive, ranges, 0.0)
    weights = np.where(np.isfinite(weights), weights, 0.0)
    candidates = [zero]
    anchored = any(bool((term.index < 0).any()) for term in terms) or bool(low.max() > low.min())
    for alpha in _ALPHAS:
        x = alpha * ranges - (1 - alpha) * weights
        shifts = [float(x[alive].mean())] + ([float(ranges[alive].max())] if anchored else [])
        candidates += [np.clip(np.where(alive, x - shift, 0.0), low, high) for shift in shifts]
    # The search needs no more than a fair sample of the output channels; what is chosen is judged by all.
    rough = [term.thinned(_ROWS) if isinstance(term, WeightTerm) else term for term in terms]
    x = min(candidates, key=lambda x: total_noise(rough, x))
    found = [x]
    for p in _SMOOTHNESS:
        x = _descend(rough, x, alive, (low, high), p)
        found.append(x)
    if snap:
        ends = np.ceil(low / np.log(2)), np.floor(high / np.log(2))
        found = [np.clip(np.rint(x / np.log(2)), *ends) * np.log(2) for x in found]
    found.append(zero)
    best = min(found, key=lambda x: total_noise(terms, x))
    after = total_noise(terms, best)
    return Choice(x=best, before=before, after=after)


def _descend(
    terms: Sequence[Term], start: Floats, alive: np.ndarray, ends: tuple[Floats, Floats], p: int
) -> Floats:
    # It takes a quarter of a second, which runs that rescale nothing need not wait for.
    from scipy import optimize

    noise = smooth_noise(terms, p)
    scale, _ = noise(start)
    if scale <= 0:
        return start

    def objective(x: Floats) -> tuple[float, Floats]:
        value, slope = noise(x)
        return float(np.log(value / scale)), np.where(alive, slope / value, 0.0)

    result = optimize.minimize(
        objective,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=optimize.Bounds(*ends),
        options={"maxiter": _ITERATIONS},
    )
    found: Floats = result.x
    return found


def _log_ranges(terms: Sequence[Term], size: int) -> Floats:
    """Mean over tensors of sign * ln(range / tensor's range); NaN for variables that are zero everywhere."""
    found = [term for term in terms if isinstance(term, ActivationTerm)]
    return _mean_logs([(term, np.maximum(term.high, -term.low)) for term in found], size)


def _log_weights(terms: Sequence[Term], size: int) -> Floats:
    """Mean over weights of sign * ln of the largest weight reading a variable; NaN where there is none."""
    found = [term for term in terms if isinstance(term, WeightTerm)]
    return _mean_logs([(term, term.absmax.max(axis=0)) for term in found], size)


def _mean_logs(peaks: Sequence[tuple[Term, Floats]], size: int) -> Floats:
    """The mean of sign * ln(peak / largest peak of its term) by variable, over peaks above 0; NaN without any."""
    sums, counts = np.zeros(size), np.zeros(size)
    for term, peak in peaks:
        used = (term.index >= 0) & (peak > 0)
        if used.any():
            logs = term.sign[used] * np.log(peak[used] / peak.max())
            sums += np.bincount(term.index[used], weights=logs, minlength=size)
            counts += np.bincount(term.index[used], minlength=size)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
