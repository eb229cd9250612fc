"""Error-compensated rounding in closed form: the best weights for what the layer really reads, then rounded
one input at a time, each rounding error being spread over the inputs that are still free.

For G = sum x' x'^T and C = sum x' x^T of one layer (x' = Q(x), see :mod:`onnxptq.reconstruct.gram`):

    W* = W C^T (G + lam I)^-1          the ridge solution of min || W x - W* x' ||^2
    for k in order of falling G_kk:
        q_k  = Q(w_k)
        e_k  = (w_k - q_k) / U_kk
        w_j -= e_k U_kj   for j > k     U upper triangular, U^T U = (G + lam I)^-1

(Frantar et al., "GPTQ", arXiv 2210.17323; the ridge start accounts for the error of the activations.)
Scales are kept; the result lies exactly on their grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg.lapack import dtrtri

from onnxptq.reconstruct.gram import Gram, Matrix
from onnxptq.types import FloatArray, QParams

DAMPING = 0.01
"""Keeps directions that the samples do not show near the float weight."""

_BLOCK = 64

_LARGEST_SHARE = 1e30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rounding:
    """What a layer's integers are chosen for: the least of (w - W*)^T H (w - W*) in each output channel.

    Attributes:
        target: W*, (groups, channels, K).
        held: H = G + lam I, (groups, K, K).
        order: the inputs of each group as they are rounded, (groups, K).
        factor: U of ``held`` in that order, (groups, K, K).
    """

    target: Matrix
    held: Matrix
    order: npt.NDArray[np.int64]
    factor: Matrix

    def compensated(self, qparams: QParams) -> FloatArray:
        """Weights on the grid of ``qparams`` by compensated rounding, (groups, channels, K).

        Args:
            qparams: one scale per output channel, in the order of groups and channels, or one for all.
        """
        groups, channels, _ = self.target.shape
        ordered = np.take_along_axis(self.target, self.order[:, None, :], 2)
        done = _compensated(
            np.ascontiguousarray(ordered.transpose(2, 0, 1)), self.factor, qparams, groups * channels
        )
        result = np.empty(self.target.shape, np.float32)
        places = np.broadcast_to(self.order[:, None, :], self.target.shape)
        np.put_along_axis(result, places, done.transpose(1, 2, 0), 2)
        return result


def pose(matrix: FloatArray, gram: Gram, *, damping: float = DAMPING, ridge: float | None = None) -> Rounding:
    """The rounding of a layer's weights for which its output is closest to the float one.

    Args:
        matrix: (groups, channels, K) float weights.
        damping: lam as a share of the mean diagonal of G.
        ridge: another lam for the ridge start, which needs more where it makes up for errors of other layers.
    """
    order = np.argsort(-np.einsum("gkk->gk", gram.quantized), axis=1, kind="stable")
    share, factor = _factored(gram, order, damping)
    start = share
    if ridge is not None:
        # A group that is too close to singular for the rounding to work with ``damping`` is so here too.
        start = np.where(share > damping, np.maximum(share, ridge), ridge)
    return Rounding(
        target=ridge_solution(matrix, gram, start), held=damped(gram, share), order=order, factor=factor
    )


def round_weights(
    matrix: FloatArray,
    gram: Gram,
    qparams: QParams,
    *,
    damping: float = DAMPING,
    ridge: float | None = None,
) -> FloatArray:
    """Weights on the grid of ``qparams`` for which the layer's output is closest to the float one.

    Args: as for :func:`pose` and :meth:`Rounding.compensated`.
    """
    return pose(matrix, gram, damping=damping, ridge=ridge).compensated(qparams)


def ridge_solution(matrix: FloatArray, gram: Gram, share: float | Matrix) -> Matrix:
    """W*, (groups, channels, K), with lam = ``share`` of G's mean diagonal; where inputs are exact, the weight."""
    weight = matrix.astype(np.float64)
    if gram.mixed is gram.quantized:
        return weight
    held = damped(gram, share)
    # The damping pulls towards the float weight, not towards zero.
    right = (gram.mixed + (held - gram.quantized)) @ np.swapaxes(weight, 1, 2)
    return np.swapaxes(np.linalg.solve(held, right), 1, 2)


def damped(gram: Gram, share: float | Matrix) -> Matrix:
    """G + lam I with lam = ``share`` of G's mean diagonal, (groups, K, K); one share, or one per group."""
    g = gram.quantized
    width = g.shape[1]
    strength = np.trace(g, axis1=1, axis2=2) / width
    # A group that saw nothing but zeros keeps the nearest grid points: its damped G is a multiple of the identity.
    strength = np.where(strength > 0.0, strength, 1.0)
    result: Matrix = g + (share * strength)[:, None, None] * np.eye(width)
    return result


def _compensated(work: Matrix, factor: Matrix, qparams: QParams, channels: int) -> FloatArray:
    """Round ``work`` (K, groups, channels) input by input; errors go to later inputs, a block at a time."""
    scale = np.broadcast_to(qparams.scale.reshape(-1), (channels,)).reshape(work.shape[1:])
    qtype = qparams.qtype
    done = np.empty(work.shape, np.float32)
    for start in range(0, work.shape[0], _BLOCK):
        end = min(start + _BLOCK, work.shape[0])
        errors = np.empty((end - start, *work.shape[1:]))
        for k in range(start, end):
            rounded = np.clip(np.rint(work[k].astype(np.float32) / scale), qtype.qmin, qtype.qmax)
            done[k] = rounded.astype(np.float32) * scale
            error = (work[k] - done[k]) / factor[:, k, k, None]
            errors[k - start] = error
            work[k + 1 : end] -= factor[:, k, k + 1 : end].T[:, :, None] * error
        if end < work.shape[0]:
            # Shapes: later x block times block x channels, per group.
            spread = np.swapaxes(factor[:, start:end, end:], 1, 2) @ errors.transpose(1, 0, 2)
            work[end:] -= spread.transpose(1, 0, 2)
    return done


def _factored(gram: Gram, order: npt.NDArray[np.int64], damping: float) -> tuple[Matrix, Matrix]:
    """The share per group that ``damped`` takes, and U in the order of the inputs.

    Where inputs hardly leave their mean, their sums about it are what rounding left over, and need not be
    definite. Such a group is damped more, up to the nearest grid points.
    """
    share = np.full(len(order), damping)
    while True:
        h = damped(gram, share)
        permuted = np.take_along_axis(np.take_along_axis(h, order[:, :, None], 1), order[:, None, :], 2)
        try:
            return share, _inverse_factor(permuted)
        except np.linalg.LinAlgError:
            if share.max() > _LARGEST_SHARE:
                raise
            share = np.where([_is_definite(matrix) for matrix in permuted], share, 10.0 * share)


def _is_definite(matrix: Matrix) -> bool:
    try:
        np.linalg.cholesky(matrix[::-1, ::-1])
    except np.linalg.LinAlgError:
        return False
    return True


def _inverse_factor(matrix: Matrix) -> Matrix:
    """Upper triangular U with U^T U = matrix^-1, for a stack of matrices.

    With the rows and columns reversed, matrix = L L^T gives U = reversed(L^-1).
    """
    lower = np.linalg.cholesky(matrix[:, ::-1, ::-1])
    # What is above the diagonal stays as it was: zero.
    inverse = np.stack([dtrtri(each, lower=1)[0] for each in lower])
    factor: Matrix = np.ascontiguousarray(inverse[:, ::-1, ::-1])
    return factor
