"""What learning makes small: the noise of a pack's quantized outputs over their signal.

    sum over outputs o of  E[w (o_q - o_fp)^2] / V_o,     V_o = E||o_fp - mean(o_fp)||^2

so that packs of any size compare; all means are over what is a finite number in the float network. w is 1, or a power
of the Fisher weights of :mod:`onnxptq.reconstruct.fisher`.
Class scores z at the network's outputs are compared by what they decide, at a temperature T that leaves every class
a say:

    2 T^2 KL(softmax(z / T), softmax(z_q / T)) / V,     T = max(1, sqrt(V) / 2)

which would be the same noise over signal with a much larger T.
Where the network's outputs count as well (:mod:`onnxptq.reconstruct.suffix`),

    loss = 2 local / local_0 + global / global_0

with both relative to what they were before anything was learnt, as GLF-Q weighs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from onnxptq.lowering.network import Values
from onnxptq.lowering.output_loss import as_noise, divergence, error_of, numbers_of, rows_of
from onnxptq.reconstruct.pack_data import PackData
from onnxptq.reconstruct.suffix import Suffix

Loss = TypeVar("Loss", float, torch.Tensor)

SPREAD_SHARE = 0.5
"""The temperature at which class scores are compared, over their spread."""

_LOCAL_SHARE = 2.0
"""What the local loss counts beside the global one."""


@dataclass(frozen=True, slots=True)
class Norms:
    """V of each output, P = sum over o of channels * V_o, the weights of the outputs' elements where they are not 1,
    and the outputs that are class scores (True where they are probabilities)."""

    variance: dict[str, float]
    positions: float
    importance: Mapping[str, torch.Tensor]
    class_scores: Mapping[str, bool]


def norms_of(data: PackData, chosen: Sequence[int]) -> Norms:
    """Sums over all of ``chosen``; integers among the outputs (indices, masks), and what cannot be
    compared, have no part in the loss."""
    channels = {}
    if data.ranks.rank == 0:
        first = {n: v for n, v in data.targets(range(1)).items() if n not in data.incomparable}
        channels = {n: v.shape[1] if v.ndim > 1 else 1 for n, v in first.items() if v.is_floating_point()}
    channels = data.ranks.broadcast(channels)
    sums = np.zeros((len(channels), 3))
    for part in data.chunks(chosen):
        targets = data.targets(part)
        for entry, name in zip(sums, channels, strict=True):
            wide = targets[name].double()
            numbers = numbers_of(wide)
            entry += (int(torch.isfinite(wide).sum()), float(numbers.sum()), float(numbers.square().sum()))
    sums = data.ranks.sum(sums)
    variance = {
        name: max(float(q / n - (s / n) ** 2), 1e-30)
        for name, (n, s, q) in zip(channels, sums, strict=True)
        if n
    }
    positions = sum(v * channels[name] for name, v in variance.items()) or 1.0
    return Norms(variance, positions, data.importance, data.class_scores)


def noise_over_signal(found: Values, targets: Values, norms: Norms) -> torch.Tensor:
    """The loss of outputs that were found where ``targets`` are wanted."""
    parts = []
    for name, variance in norms.variance.items():
        if name in norms.class_scores:
            parts.append(_score_noise(found[name], targets[name], norms.class_scores[name], variance))
            continue
        squares = error_of(found[name], targets[name]).square()
        weights = norms.importance.get(name)
        weighed = squares if weights is None else squares * weights
        parts.append(weighed.sum() / torch.isfinite(targets[name]).sum().clamp_min(1) / variance)
    return torch.stack(parts).sum()


def _score_noise(
    found: torch.Tensor, wanted: torch.Tensor, is_probability: bool, variance: float
) -> torch.Tensor:
    temperature = max(1.0, SPREAD_SHARE * math.sqrt(variance))
    apart = divergence(wanted, found, is_probability=is_probability, temperature=temperature)
    return apart * (2.0 * temperature**2 / (variance * rows_of(wanted)))


@dataclass(slots=True)
class Objective:
    """The loss of samples of a pack, local or with what follows the pack.

    ``start`` holds the local and the global loss before anything was learnt, of which the second is 0 where there is
    none.
    """

    data: PackData
    norms: Norms
    suffix: Suffix | None = None
    start: tuple[float, float] = (0.0, 0.0)

    def begin(self, chosen: Sequence[int]) -> float:
        """Measure ``start`` on these samples, and return the loss."""
        self.start = self.measured(chosen)
        return self.combined(*self.start)

    def __call__(self, found: Values, part: Sequence[int]) -> torch.Tensor:
        """The loss of what the pack found for the samples of one pass, to be differentiated."""
        return self.combined(*self._parts(found, part))

    def combined(self, local: Loss, distant: Loss | None) -> Loss:
        """The loss of a local and a global one."""
        if distant is None or not all(0.0 < start < math.inf for start in self.start):
            return local
        return local * (_LOCAL_SHARE / self.start[0]) + distant * (1.0 / self.start[1])

    @torch.no_grad()
    def measured(self, chosen: Sequence[int]) -> tuple[float, float]:
        """The mean local and global loss of these samples, over all ranks."""
        total = np.zeros(2)
        for part in self.data.chunks(chosen):
            local, distant = self._parts(self.data.module(self.data.quantized(part)), part)
            total += np.array([as_noise(local), 0.0 if distant is None else as_noise(distant)]) * len(part)
        local, distant = self.data.ranks.sum(total) / len(chosen)
        return float(local), float(distant)

    def _parts(self, found: Values, part: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        local = noise_over_signal(found, self.data.targets(part), self.norms)
        return local, None if self.suffix is None else self.suffix.loss(found, part)
