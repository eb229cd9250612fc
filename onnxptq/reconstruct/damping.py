"""How strongly the closed form of a layer is held to its float weight, chosen on rows that it has not seen.

For the sums G and C of one half of the samples (see :mod:`onnxptq.reconstruct.gram`) and those of the other, G_v
and C_v, the ridge solution W' = W (C^T + lam I) (G + lam I)^-1 is judged by

    E(lam) = tr(W' G_v W'^T) - 2 tr(W C_v^T W'^T)       the part of sum || W x - W' x' ||^2 that depends on it

and the other way round. A wide layer behind a small map sees few rows: there a weak ridge learns the errors of the
layers in front by heart, sample by sample, and fails on every other sample.
"""

from __future__ import annotations

import numpy as np

from onnxptq.reconstruct.gram import Gram, Matrix
from onnxptq.types import FloatArray

DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
"""lam as a share of the mean diagonal of G."""


def choose_damping(matrix: FloatArray, first: Gram, second: Gram) -> float:
    """The best of ``DAMPINGS`` for the layer; the larger one where two are equal.

    Args:
        matrix: (groups, channels, K) float weights.
        first, second: sums of two halves of the samples, both with rows.
    """
    errors = _errors(matrix, first, second) + _errors(matrix, second, first)
    best = len(DAMPINGS) - 1 - int(np.argmin(errors[::-1]))
    return DAMPINGS[best]


def _errors(matrix: FloatArray, seen: Gram, unseen: Gram) -> Matrix:
    """E per damping, with lam fitted to ``seen``."""
    weight = matrix.astype(np.float64)
    values, basis = np.linalg.eigh(seen.quantized)
    strength = np.maximum(np.einsum("gkk->g", seen.quantized) / seen.quantized.shape[1], 1e-30)
    turned = np.swapaxes(basis, 1, 2)
    target = weight @ np.swapaxes(seen.mixed, 1, 2) @ basis
    plain = weight @ basis
    square = turned @ unseen.quantized @ basis
    cross = weight @ np.swapaxes(turned @ unseen.mixed, 1, 2)
    found = []
    for damping in DAMPINGS:
        ridge = (damping * strength)[:, None, None]
        new = (target + ridge * plain) / (np.maximum(values, 0.0)[:, None, :] + ridge)
        found.append(float(((new @ square) * new).sum() - 2.0 * (new * cross).sum()))
    return np.asarray(found) / max(1, unseen.rows)
