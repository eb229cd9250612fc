"""Error-compensated rounding with the scale of every output channel fitted to what the layer reads.

The grids that weights start with are the best for the weights alone. With H = G + lam I and the wanted weights W* of
:mod:`onnxptq.reconstruct.closed_form`, the error of one output channel with scale s and integers q is

    e(s, q) = (s q - w)^T H (s q - w)

Compensated rounding gives q for a few scales around the given one, and the best pair is taken. Then, in turns,

    s <- q^T H w / q^T H q
    q_k <- clamp(round(q_k - (H (s q - w))_k / (s H_kk)))      one k after another,

of which neither raises e.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from onnxptq.quantizers.affine import SMALLEST_SCALE
from onnxptq.reconstruct.closed_form import Rounding, pose
from onnxptq.reconstruct.gram import Gram, Matrix
from onnxptq.types import FloatArray, QParams, QType

_FACTORS = (1.0, 0.8, 0.87, 0.93, 1.08, 1.16)
"""Scales tried, in units of the given one, which wins where several are equal."""

_TURNS = 2

_SWEEPS = 3
"""Passes over all integers per turn. The first ones gain nearly everything."""

_BLOCK = 64


def round_on_fitted_grid(
    matrix: FloatArray, gram: Gram, qparams: QParams, *, damping: float, ridge: float
) -> tuple[FloatArray, QParams]:
    """Weights on a grid, and the grid, for which the layer's output is closest to the float one.

    Args:
        matrix: (groups, channels, K) float weights.
        qparams: symmetric, one scale per output channel, in the order of groups and channels. One for all of them
            stays as it is.
        damping, ridge: as for :func:`onnxptq.reconstruct.closed_form.pose`.
    """
    rounding = pose(matrix, gram, damping=damping, ridge=ridge)
    groups, channels, _ = matrix.shape
    is_fitted = qparams.scale.size == groups * channels
    scale = np.broadcast_to(qparams.scale.reshape(-1), (groups * channels,)).reshape(groups, channels)
    scale, q = _searched(rounding, scale, qparams, _FACTORS if is_fitted else _FACTORS[:1])
    for _ in range(_TURNS):
        if is_fitted:
            scale = _refitted(scale, q, rounding)
        descend(q, rounding.target, scale.astype(np.float64), rounding.held, qparams.qtype, sweeps=_SWEEPS)
    weights = q.astype(np.float32) * scale[:, :, None]
    return weights, replace(qparams, scale=scale.reshape(-1)) if is_fitted else qparams


def _searched(
    rounding: Rounding, scale: FloatArray, qparams: QParams, factors: tuple[float, ...]
) -> tuple[FloatArray, Matrix]:
    """The scale (groups, channels) of the least error among those tried, and its integers."""
    best, found, integers = np.full(scale.shape, np.inf), scale, np.zeros(rounding.target.shape)
    for factor in factors:
        tried = (scale * factor).astype(np.float32)
        weights = rounding.compensated(replace(qparams, scale=tried.reshape(-1)))
        gap = weights - rounding.target
        error = np.einsum("gck,gck->gc", gap @ rounding.held, gap)
        is_better = error < best
        best, found = np.where(is_better, error, best), np.where(is_better, tried, found)
        integers = np.where(is_better[:, :, None], np.rint(weights / tried[:, :, None]), integers)
    return found, integers


def _refitted(scale: FloatArray, q: Matrix, rounding: Rounding) -> FloatArray:
    """The best scales for the integers; a channel without any keeps its own."""
    seen = q @ rounding.held
    power = np.einsum("gck,gck->gc", seen, q)
    wanted = np.einsum("gck,gck->gc", seen, rounding.target)
    fitted = wanted / np.where(power > 0.0, power, 1.0)
    is_usable = (power > 0.0) & (fitted >= SMALLEST_SCALE)
    return np.where(is_usable, fitted, scale).astype(np.float32)


def descend(q: Matrix, target: Matrix, scales: Matrix, held: Matrix, qtype: QType, *, sweeps: int) -> None:
    """Coordinate descent on the integers ``q`` (groups, channels, K), in place, until nothing changes.

    Args:
        target: w, in the shape of ``q``.
        scales: (groups, channels).
        held: H, (groups, K, K).
        sweeps: passes over all integers, at most.
    """
    width = q.shape[2]
    slope = (q * scales[:, :, None] - target) @ held
    for _ in range(sweeps):
        moved = False
        for start in range(0, width, _BLOCK):
            block = slice(start, min(start + _BLOCK, width))
            steps = _descended(q[:, :, block], slope[:, :, block], scales, held[:, block, block], qtype)
            if steps.any():
                moved = True
                slope += (steps * scales[:, :, None]) @ held[:, block]
        if not moved:
            return


def _descended(q: Matrix, slope: Matrix, scales: Matrix, held: Matrix, qtype: QType) -> Matrix:
    """Move the integers of one block in place; ``slope`` is left as it was. Returns by how much each was moved."""
    own, steps = slope.copy(), np.zeros(q.shape)
    for k in range(q.shape[2]):
        curvature = scales * held[:, None, k, k]
        step = np.clip(np.rint(q[:, :, k] - own[:, :, k] / curvature), qtype.qmin, qtype.qmax) - q[:, :, k]
        group, channel = np.nonzero(step)
        if len(group):
            q[:, :, k] += step
            steps[:, :, k] = step
            # Few channels move at a time, and what lies in front is not looked at again.
            change = (step * scales)[group, channel]
            own[group, channel, k + 1 :] += change[:, None] * held[group, k, k + 1 :]
    return steps
