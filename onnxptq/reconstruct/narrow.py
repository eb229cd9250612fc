"""Rounding layers of few inputs, with the scale of every output channel chosen together with the integers.

For one output channel with float weights w, G = sum x x^T and a grid of scale s, the layer's error is

    e(s, q) = (s q - w)^T (G + lam I) (s q - w)        q integers in [qmin, qmax]

A depthwise kernel has 9 or 25 weights whose inputs are neighbouring pixels: nearly equal, so that G is
close to singular and e hardly depends on the single roundings, but on a few sums of them. Which scales put
these sums near a grid point is a matter of luck, so many are tried. For each, compensated rounding
(:mod:`onnxptq.reconstruct.closed_form`) gives the first q; then, until nothing changes,

    q_k <- clamp(round(q_k - (H (s q - w))_k / (s H_kk)))      H = G + lam I, one k after another,

which never raises e.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxptq.reconstruct.closed_form import damped, round_weights
from onnxptq.reconstruct.fitted_grid import descend
from onnxptq.reconstruct.gram import Gram
from onnxptq.types import FloatArray, QParams

NARROW = 32
"""Inputs per output up to which scales are searched: 5 x 5 kernels on one channel, and pointwise ones on few."""

DAMPING = 1e-4
"""lam as a share of the mean diagonal of G. Few inputs are seen in all directions, so it only guards."""

_FACTORS = tuple(np.geomspace(1.0, 2.0, 33))
"""Scales tried, in units of the one that fits the largest weight exactly."""

_SWEEPS = 8


def round_narrow(matrix: FloatArray, gram: Gram, qparams: QParams) -> tuple[FloatArray, QParams]:
    """Weights on a grid, and the grid, for which the layer's output is closest to the float one.

    Args:
        matrix: (groups, channels, K) float weights.
        qparams: symmetric, one scale per output channel, in the order of groups and channels.
    """
    groups, channels, width = matrix.shape
    count = len(_FACTORS)
    base = np.broadcast_to(qparams.scale.reshape(-1), (groups * channels,)).reshape(groups, channels)
    scales = (base[:, :, None] * np.array(_FACTORS)).astype(np.float32).reshape(groups, channels * count)
    repeated = np.repeat(matrix, count, axis=1)
    tried = replace(qparams, scale=scales.reshape(-1), zero_point=np.zeros(scales.size, np.int32))
    rounded = round_weights(repeated, gram, tried, damping=DAMPING).astype(np.float64)
    h = damped(gram, DAMPING)
    target = repeated.astype(np.float64)
    wide = scales.astype(np.float64)
    q = np.rint(rounded / wide[:, :, None])
    descend(q, target, wide, h, qparams.qtype, sweeps=_SWEEPS)
    gap = q * wide[:, :, None] - target
    errors = np.einsum("gck,gkl,gcl->gc", gap, h, gap, optimize=True).reshape(groups, channels, count)
    best = errors.argmin(axis=2)[:, :, None]
    chosen = np.take_along_axis(scales.reshape(groups, channels, count), best, 2)
    integers = np.take_along_axis(q.reshape(groups, channels, count, width), best[..., None], 2)[:, :, 0]
    scale = chosen.reshape(-1)
    result = integers.astype(np.float32) * chosen
    return result, replace(qparams, scale=scale, zero_point=np.zeros(scale.size, np.int32))
