"""How far the outputs of two networks are apart."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from onnxptq.runtime.session import Provider, Session
from onnxptq.types import Array, Sample

SAME_FUNCTION = 1e-5
"""Largest :func:`difference` of a form of a model that computes the same in real arithmetic.

Such forms move single-precision rounding errors around: about 1e-6 through a network of a hundred layers."""


def difference(before: Mapping[str, Array], after: Mapping[str, Array]) -> float:
    """Largest relative difference over all outputs; infinite where NaN or infinity appear or vanish."""
    worst = 0.0
    for name, expected in before.items():
        if not np.issubdtype(expected.dtype, np.floating):
            continue
        found = after[name].astype(np.float64)
        wanted = expected.astype(np.float64)
        finite = np.isfinite(wanted)
        if not np.array_equal(finite, np.isfinite(found)):
            return float("inf")
        if finite.any():
            peak = float(np.abs(wanted[finite]).max())
            gap = float(np.abs(wanted[finite] - found[finite]).max())
            worst = max(worst, gap / peak if peak > 0 else gap)
    return worst


def compare_forms(
    before: Path, after: Path, sample: Sample, *, provider: Provider = "cpu"
) -> tuple[float, str]:
    """The :func:`difference` of two forms' outputs on ``sample``, and why ``after`` must not replace ``before``.

    The reason is empty where it may. NaN is no small difference.
    """
    gap = difference(*(Session(path, provider=provider).run(sample) for path in (before, after)))
    if gap <= SAME_FUNCTION:
        return gap, ""
    return gap, f"the float outputs would differ by {gap:.1e} of their largest magnitude"


def signal_and_noise(reference: Array, value: Array) -> tuple[float, float]:
    """Sums of the squares of ``reference`` and of the error, over what is a finite number in ``reference``; the noise
    is infinite where ``value`` has lost such a number."""
    known = np.isfinite(reference)
    if not known.all():
        reference, value = reference[known], value[known]
    if not np.isfinite(value).all():
        return _energy(reference), math.inf
    return _energy(reference), _energy(reference.astype(np.float64) - value)


def _energy(values: Array) -> float:
    flat = values.reshape(-1).astype(np.float64)
    return float(flat @ flat)
