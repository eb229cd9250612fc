"""Low-rank corrections of weights in closed form: what makes up for the errors of a layer's inputs (AILoC of
AIQViT, arXiv 2502.04628, with a start of our own).

For y = W x, W (channels, K), that reads x' in the quantized network, with the sums G and C of
:mod:`onnxptq.reconstruct.gram` and H = G + lam I, the ridge solution moves W by

    D = W (C^T - G) H^-1           the minimum of  E|| W x - (W + D) x' ||^2 + lam ||D||^2

and everything else of that loss is || (D - L R) H^1/2 ||^2. So the best correction of rank r is

    U S V^T = D H^1/2              (only the r largest singular values)
    L = U S,    R = V^T H^-1/2

The correction is merged, W + L R, before the weight is rounded, so that nothing of it remains at run time. It makes
up for errors of inputs alone: a correction of rounding errors would be taken back by rounding again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np

from onnxptq.graph.index import GraphIndex
from onnxptq.quantizers.affine import fake_quantize
from onnxptq.quantizers.low_rank import Factors
from onnxptq.reconstruct.closed_form import damped
from onnxptq.reconstruct.gram import Gram, weight_matrix, weight_tensor
from onnxptq.reconstruct.pack_data import PackData
from onnxptq.reconstruct.sequential import LayerTask, rounded, solve_layers
from onnxptq.types import FloatArray, Pack, QuantPlan, Solution


def correction(matrix: FloatArray, gram: Gram, ridge: float, rank: int) -> Factors:
    """The best correction of at most ``rank``, the strongest part first.

    Args:
        matrix: (1, channels, K) float weights.
        gram: the sums of one group, about the means where a bias is solved for as well.
        ridge: lam as a share of the mean diagonal of G.
    """
    weight = matrix[0].astype(np.float64)
    h = damped(gram, ridge)[0]
    values, basis = np.linalg.eigh(h)
    # Rounding may leave the smallest ones below zero; the damping is what they are.
    root = np.sqrt(np.maximum(values, 1e-12 * values[-1]))
    # D H^1/2 in the basis of H: W (C^T - G) H^-1/2.
    moved = weight @ (gram.mixed[0].T - gram.quantized[0]) @ basis / root
    u, strength, v = np.linalg.svd(moved, full_matrices=False)
    u, strength, v = u[:, :rank], strength[:rank], v[:rank]
    right = (v / root) @ basis.T
    return Factors(left=(u * strength).astype(np.float32), right=right.astype(np.float32))


def correct_pack(
    index: GraphIndex,
    pack: Pack,
    plan: QuantPlan,
    solution: Solution,
    data: PackData,
    *,
    rank: int,
    settled: Collection[str],
) -> tuple[Solution, Mapping[str, Factors]]:
    """``solution`` with corrected weights, rounded to nearest, and the corrections by weight tensor.

    Grouped convolutions, whose matrices are small, are rounded with error compensation instead.
    """
    found: dict[str, Factors] = {}

    def solve(task: LayerTask, solution: Solution) -> Solution:
        if len(task.matrix) > 1:
            return rounded(task, solution)
        factors = correction(task.matrix, task.sums, task.ridge, rank)
        layer = task.layer
        found[layer.weight.name] = replace(factors, is_transposed=layer.axis % 2 == 1)
        merged = task.matrix + factors.product()[None]
        nearest = fake_quantize(weight_tensor(layer, merged), solution.qparams[task.quantizer_id])
        return task.solved(solution, weight_matrix(layer, nearest))

    solution = solve_layers(index, pack, plan, solution, data, solve, settled=settled)
    return solution, found
