"""Orthogonal matrices Q with Q 1 = 1: they spread every channel over all others and keep mean and norm.

For n = 4^k m, Q = P (H_4^k (x) R) P' with random permutations P and P', the regular Hadamard matrix

    H_4 = J / 2 - I    (all entries +-1/2, every row sums to 1),    H_4^k = H_4 (x) ... (x) H_4,

and R drawn uniformly from the orthogonal m x m matrices that keep 1. Where m is 1, all entries of Q have the
same magnitude n^-1/2, so that no channel can keep a share of its own.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_FEWEST = 6
"""Smallest random factor, unless there is none: among 2 or 3 numbers, keeping their sum leaves little to turn."""


def spreading_rotation(size: int, rng: np.random.Generator) -> Floats:
    """A random orthogonal ``size`` x ``size`` matrix Q with Q 1 = 1."""
    fours, rest = 0, size
    while rest % 4 == 0:
        fours, rest = fours + 1, rest // 4
    if 1 < rest < _FEWEST and fours:
        fours, rest = fours - 1, rest * 4
    flat: Floats = np.ones((1, 1))
    for _ in range(fours):
        flat = np.kron(flat, np.full((4, 4), 0.5) - np.eye(4)).astype(np.float64)
    result: Floats = np.kron(flat, _uniform(rest, rng)).astype(np.float64)
    shuffled: Floats = result[rng.permutation(size)][:, rng.permutation(size)]
    return shuffled


def _uniform(size: int, rng: np.random.Generator) -> Floats:
    """R = A diag(1, M) A with M uniformly distributed and the reflection A that swaps e_1 and 1 / sqrt(size)."""
    if size == 1:
        return np.ones((1, 1))
    q, r = np.linalg.qr(rng.standard_normal((size - 1, size - 1)))
    inner = np.eye(size)
    inner[1:, 1:] = q * np.sign(np.diag(r))
    normal = np.full(size, size**-0.5)
    normal[0] -= 1.0
    reflection = np.eye(size) - 2.0 * np.outer(normal, normal) / normal.dot(normal)
    result: Floats = reflection @ inner @ reflection
    return result
