"""Low-rank branches in closed form: what rounding a weight has spoilt, beside the layer and in float (QERA, arXiv
2410.06040; EoRA, arXiv 2410.21271).

For a layer that was to compute W* x' (:mod:`onnxptq.reconstruct.closed_form`) and got W' on the grid, with the
residual E = W* - W' and H = G + lam I of :mod:`onnxptq.reconstruct.gram`, the best correction of rank r is

    min || (E - U D) H^1/2 ||^2     U = the r leading left singular vectors of E H^1/2,    D = U^T E

since U U^T (E H^1/2) is the best approximation of that rank (Eckart and Young) and H^1/2 cancels. Any square root of
H has these left singular vectors; QERA's is the symmetric one, EoRA's the one of its eigenbasis, as here. W* accounts
for the errors of the inputs, which both papers leave out: with x' = x it is W.

A branch is worth a multiply-add where it removes enough noise. With N(r) = E|| W x - (W' + U_r D_r) x' ||^2 and the
share c(r) = r (channels + K) / (channels K) of the layer's multiply-adds (and of its parameters), the rank is

    argmax over r with c(r) <= MOST of    10 log10 N(0) / N(r) - PRICE c(r)

which is 0 where no rank pays, and where the best one gains less than ``LEAST``: beside multiply-adds a branch costs
three more operators and one more pass over the layer's output.

Every residual has some low-rank part: if E H^1/2 were noise of channels by K independent elements, its leading
singular values would be about sqrt(channels) + sqrt(K) times theirs (Marchenko and Pastur), so that one percent of
multiply-adds would buy 0.04 to 0.09 dB. ``PRICE`` asks for more than that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from onnxptq.graph.branches import make_branch
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import Linear
from onnxptq.reconstruct.closed_form import damped, ridge_solution
from onnxptq.reconstruct.gram import Gram, Matrix, has_rows, weight_matrix
from onnxptq.reconstruct.rounding import compensable_layers
from onnxptq.reconstruct.sequential import MAX_WIDTH, ROUNDING_DAMPING, LayerTask, rounded
from onnxptq.types import Branch, FloatArray, QuantPlan, Solution

MOST = 0.05
"""Largest share of a layer's multiply-adds that its branch may add, so of the network's as well."""

PRICE = 10.0
"""dB that all of a layer's multiply-adds would have to buy: 0.1 dB for one percent."""


LEAST = 0.3
"""dB that any branch must gain."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Residual:
    """What is left of a layer's error, by ranks: ``left`` (channels, R) and ``right`` (R, K), the strongest part
    first; ``noise`` of R + 1 elements is N(r) over the layer's signal."""

    left: FloatArray
    right: FloatArray
    noise: Matrix

    def best_rank(self) -> int:
        """The rank that pays most, by ``PRICE``; 0 where it gains less than ``LEAST``."""
        channels, width = self.left.shape[0], self.right.shape[1]
        share = np.arange(len(self.noise)) * (channels + width) / (channels * width)
        gain = 10.0 * np.log10(self.noise[0] / np.maximum(self.noise, 1e-30 * self.noise[0]))
        best = int(np.argmax(gain - PRICE * share))
        return best if gain[best] >= LEAST else 0


def highest_rank(channels: int, width: int) -> int:
    """The highest rank that ``MOST`` allows."""
    return int(MOST * channels * width / (channels + width))


def may_have_branch(layer: Linear) -> bool:
    """Whether ``layer`` is large enough for a branch of rank 1 and has one matrix."""
    size = math.prod(int(dim) for dim in layer.weight.shape)
    channels = int(layer.weight.shape[layer.axis])
    return layer.group == 1 and channels > 0 and highest_rank(channels, size // channels) > 0


def largest_branches(index: GraphIndex, plan: QuantPlan) -> dict[str, Branch]:
    """Branches of zeros and of the highest rank beside every layer that may have one: what they can take at most."""
    found = {}
    for layer in compensable_layers(index, plan, MAX_WIDTH):
        if has_rows(layer) and may_have_branch(layer):
            channels, width = weight_matrix(layer, layer.weight.values).shape[1:]
            rank = highest_rank(channels, width)
            left, right = np.zeros((channels, rank), np.float32), np.zeros((rank, width), np.float32)
            found[layer.node.name] = make_branch(layer, left, right, before=0.0, after=0.0)
    return found


def residual(matrix: FloatArray, quantized: FloatArray, gram: Gram, ridge: float, most: int) -> Residual:
    """The residual of an ungrouped layer up to rank ``most``.

    Args:
        matrix, quantized: W and W', (1, channels, K).
        gram: the sums with ``floats``, about the means where a bias takes care of these.
        ridge: of W*, as a share of the mean diagonal of G.
    """
    assert gram.floats is not None
    wanted, found = matrix[0].astype(np.float64), quantized[0].astype(np.float64)
    error = ridge_solution(matrix, gram, ridge)[0] - found
    values, basis = np.linalg.eigh(damped(gram, ROUNDING_DAMPING)[0])
    root = basis * np.sqrt(np.maximum(values, 0.0))
    left = np.linalg.svd(error @ root, full_matrices=False)[0][:, :most]
    right = left.T @ error
    signal = float(((wanted @ gram.floats[0]) * wanted).sum())
    # W C^T - W' G, the sum of (W x - W' x') x'^T.
    open_ = wanted @ gram.mixed[0].T - found @ gram.quantized[0]
    start = signal - float(((wanted @ gram.mixed[0].T + open_) * found).sum())
    # U has orthonormal columns, so every rank takes away its own part.
    gains = 2.0 * ((left.T @ open_) * right).sum(axis=1) - ((right @ gram.quantized[0]) * right).sum(axis=1)
    noise = np.maximum(start - np.cumsum([0.0, *gains]), 0.0)
    return Residual(
        left=left.astype(np.float32),
        right=right.astype(np.float32),
        noise=noise / signal if signal > 0.0 else np.zeros_like(noise),
    )


def branched(task: LayerTask, solution: Solution) -> Solution:
    """The layer rounded with error compensation, and with a branch where one pays: it needs the sums of float inputs.

    Layers behind account for the branch.
    """
    solution = rounded(task, solution)
    layer = task.layer
    if not may_have_branch(layer):
        return solution
    quantized = weight_matrix(layer, solution.weights[layer.weight.name])
    channels, width = quantized.shape[1:]
    found = residual(task.matrix, quantized, task.sums, task.ridge, highest_rank(channels, width))
    rank = found.best_rank()
    if not rank:
        return solution
    left, right = found.left[:, :rank], found.right[:rank]
    branch: Branch = make_branch(
        layer, left, right, before=float(found.noise[0]), after=float(found.noise[rank])
    )
    solution = task.solved(solution, quantized, beside=(left @ right)[None])
    return replace(solution, branches={**solution.branches, layer.node.name: branch})
