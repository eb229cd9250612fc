"""What learning makes small: the noise of a pack's quantized outputs over their signal.

    sum over outputs o of  E[w (o_q - o_fp)^2] / V_o,     V_o = E||o_fp - mean(o_fp)||^2

so that packs of any size compare. w is 1, or a power of the Fisher weights of :mod:`onnxptq.reconstruct.fisher`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from onnxptq.lowering.network import Values
from onnxptq.reconstruct.pack_data import PackData


@dataclass(frozen=True, slots=True)
class Norms:
    """V of each output, P = sum over o of channels * V_o, and the weights of the outputs' elements where they
    are not 1."""

    variance: dict[str, float]
    positions: float
    importance: Mapping[str, torch.Tensor]


def norms_of(data: PackData, chosen: Sequence[int]) -> Norms:
    """Sums over all of ``chosen``; integers among the outputs (indices, masks) have no part in the loss."""
    channels = {}
    if data.ranks.rank == 0:
        first = data.targets(range(1)).items()
        channels = {n: v.shape[1] if v.ndim > 1 else 1 for n, v in first if v.is_floating_point()}
    channels = data.ranks.broadcast(channels)
    sums = np.zeros((len(channels), 3))
    for part in data.chunks(chosen):
        targets = data.targets(part)
        for entry, name in zip(sums, channels, strict=True):
            wide = targets[name].double()
            entry += (wide.numel(), float(wide.sum()), float(wide.square().sum()))
    sums = data.ranks.sum(sums)
    variance = {
        name: max(float(q / n - (s / n) ** 2), 1e-30)
        for name, (n, s, q) in zip(channels, sums, strict=True)
        if n
    }
    positions = sum(v * channels[name] for name, v in variance.items()) or 1.0
    return Norms(variance, positions, data.importance)


def noise_over_signal(found: Values, targets: Values, norms: Norms) -> torch.Tensor:
    """The loss of outputs that were found where ``targets`` are wanted."""
    parts = []
    for name, variance in norms.variance.items():
        squares = (found[name] - targets[name]).square()
        weights = norms.importance.get(name)
        parts.append((squares if weights is None else squares * weights).mean() / variance)
    return torch.stack(parts).sum()
