"""How strongly the closed form of a layer is held to its float weight, chosen on rows that it has not seen.

For the sums G and C of one half of the samples (see :mod:`onnxptq.reconstruct.gram`) and those of the other, G_v
and C_v, the ridge solution W' = W (C^T + lam I) (G + lam I)^-1 is judged by

    E(lam) = tr(W' G_v W'^T) - 2 tr(W C_v^T W'^T)       the part of sum || W x - W' x' ||^2 that depends on it

and the other way round, over a selection of the outputs. A wide layer behind a small map sees few rows: there a weak
ridge learns the errors of the layers in front by heart, sample by sample, and fails on every other sample.
"""

from __future__ import annotations

import torch

from onnxptq.reconstruct.gram import Gram, Matrix
from onnxptq.types import FloatArray

DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
"""lam as a share of the mean diagonal of G."""

OUTPUTS = 128
"""Outputs of a group whose errors are added up, about: they all read the same inputs, and more tell nothing new."""


def choose_damping(
    matrix: FloatArray, first: Gram, second: Gram, *, device: str | torch.device = "cpu"
) -> float:
    """The best of ``DAMPINGS`` for the layer; the larger one where two are equal.

    Args:
        matrix: (groups, channels, K) float weights.
        first, second: sums of two halves of the samples, both with rows.
        device: where torch works it out.
    """
    stride = -(-matrix.shape[1] // OUTPUTS)
    weight = torch.from_numpy(matrix[:, ::stride]).to(device, torch.float64)
    errors = list(map(sum, zip(_errors(weight, first, second), _errors(weight, second, first), strict=True)))
    return DAMPINGS[min(range(len(DAMPINGS)), key=lambda i: (errors[i], -i))]


def _errors(weight: torch.Tensor, seen: Gram, unseen: Gram) -> list[float]:
    """E per damping, with lam fitted to ``seen``."""

    def on_device(sums: Matrix) -> torch.Tensor:
        return torch.from_numpy(sums).to(weight.device)

    quantized, square = on_device(seen.quantized), on_device(unseen.quantized)
    strength = quantized.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-30)
    target, cross = weight @ on_device(seen.mixed).mT, weight @ on_device(unseen.mixed).mT
    found = []
    for damping in DAMPINGS:
        ridge = (damping * strength)[:, None, None]
        held = quantized.clone()
        held.diagonal(dim1=1, dim2=2).add_(ridge[:, 0])
        factor, failed = torch.linalg.cholesky_ex(held)
        new = torch.cholesky_solve((target + ridge * weight).mT, factor).mT
        # Sums about the mean of inputs that hardly leave it need not be definite: such a group keeps its weight.
        new = torch.where((failed == 0)[:, None, None], new, weight)
        found.append(((new @ square) * new).sum() - 2.0 * (new * cross).sum())
    return [float(error) / max(1, unseen.rows) for error in torch.stack(found).cpu()]
