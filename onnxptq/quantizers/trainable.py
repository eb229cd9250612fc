"""Quantizers whose parameters are learnt, on torch tensors.

Straight-through weights: a latent v takes the place of W / s,

    w_hat = s clamp(round(v), qmin, qmax),     d round(v) / dv = 1

AdaRound weights (Nagel et al., arXiv 2004.10568): each weight is rounded down or up,

    w_hat = s clamp(floor(W / s) + h(a), qmin, qmax),     h(a) = clamp(1.2 sigmoid(a) - 0.1, 0, 1)

Kept weights: the integers q of a weight on its grid stay, w_hat = s q, and the scale is learnt.

Activations (LSQ, Esser et al., arXiv 1902.08153): the scale is learnt, the zero point is kept,

    x_hat = s (clamp(round(x / s) + z, qmin, qmax) - z) = s clamp(round(x / s), qmin - z, qmax - z)

Learnt scales are s = s_0 exp(t) with t starting at 0, so that they stay positive and one learning rate serves
all. ``hardened`` gives what reaches the file: parameters in single precision and values on their grid.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from onnxptq.quantizers.affine import SMALLEST_SCALE, expand
from onnxptq.quantizers.straight_through import round_through, scaled_grid
from onnxptq.types import Array, FloatArray, QParams

_STRETCH = 1.2
_SHIFT = -0.1

_START_WITHIN = 0.25
"""A latent starts at most this far from an integer that is not its nearest: nearer to the boundary between the
two, the first steps would flip it at random."""

_ON_ITS_SIDE = 0.4999
"""Nearer to the boundary single precision could round a latent to the other integer."""


class LearnedScale(torch.nn.Module):
    """s = s_0 exp(t), shaped to broadcast against a tensor of ``shape``; fixed unless ``is_learned``."""

    def __init__(self, qparams: QParams, shape: tuple[int, ...], *, is_learned: bool) -> None:
        super().__init__()
        self._qparams = qparams
        values = np.array(expand(qparams.scale, qparams.granularity, shape), np.float32)
        self.start = torch.nn.Buffer(torch.from_numpy(values))
        self.log = torch.nn.Parameter(torch.zeros(values.shape), requires_grad=is_learned)

    def forward(self) -> torch.Tensor:
        """The scale, differentiable where it is learnt."""
        if not self.log.requires_grad:
            return self.start
        return (self.start * torch.exp(self.log)).clamp_min(SMALLEST_SCALE)

    @torch.no_grad()
    def hardened(self) -> QParams:
        """The parameters at the start, with the learnt scale."""
        known = self._qparams
        scale = self().cpu().numpy().astype(np.float32).reshape(known.scale.shape)
        return QParams(
            scale=scale, zero_point=known.zero_point, qtype=known.qtype, granularity=known.granularity
        )


class ScaledWeight(torch.nn.Module, ABC):
    """w_hat = s q with a scale that may be learnt; what q is, derived classes say."""

    def __init__(self, qparams: QParams, shape: tuple[int, ...], *, learn_scale: bool) -> None:
        super().__init__()
        self.scale = LearnedScale(qparams, shape, is_learned=learn_scale)

    @property
    def latents(self) -> list[torch.nn.Parameter]:
        """What is learnt beside the scale."""
        return []

    def forward(self) -> torch.Tensor:
        """The weight on its grid, differentiable."""
        return cast(torch.Tensor, self._integers() * self.scale())

    @torch.no_grad()
    def hardened(self) -> tuple[QParams, FloatArray]:
        """Parameters and weight as the file will hold them."""
        qparams = self.scale.hardened()
        return qparams, _on_grid(self._integers(), qparams)

    @abstractmethod
    def _integers(self) -> torch.Tensor: ...


class StraightThroughWeight(ScaledWeight):
    """Latents that follow the gradient as if rounding were not there.

    Args:
        weight: float values.
        start: where the search begins: ``weight``, rounded in some way or not at all.
        qparams: the grid, with zero point 0.
        learn_scale: whether scales follow the gradient too.
    """

    def __init__(
        self, weight: FloatArray, start: FloatArray, qparams: QParams, *, learn_scale: bool = True
    ) -> None:
        super().__init__(qparams, weight.shape, learn_scale=learn_scale)
        self._low, self._high = qparams.qtype.qmin, qparams.qtype.qmax
        quotient, chosen = _quotients(weight, start, qparams)
        apart = quotient - chosen
        moved = np.clip(apart, -_START_WITHIN, _START_WITHIN)
        latent = chosen + np.where(np.abs(apart) < _ON_ITS_SIDE, apart, moved)
        self.latent = torch.nn.Parameter(torch.from_numpy(latent.astype(np.float32)))

    @property
    def latents(self) -> list[torch.nn.Parameter]:
        """What is learnt beside the scale."""
        return [self.latent]

    def _integers(self) -> torch.Tensor:
        return round_through(self.latent).clamp(self._low, self._high)


class KeptWeight(ScaledWeight):
    """The integers of ``weight``, which is on the grid of ``qparams``, stay as they are; zero point 0."""

    def __init__(self, weight: FloatArray, qparams: QParams, *, learn_scale: bool = True) -> None:
        super().__init__(qparams, weight.shape, learn_scale=learn_scale)
        _, chosen = _quotients(weight, weight, qparams)
        self._kept = torch.nn.Buffer(torch.from_numpy(chosen.astype(np.float32)))

    def _integers(self) -> torch.Tensor:
        return self._kept


class AdaRoundWeight(torch.nn.Module):
    """Each weight between the two integers beside it. Scales are kept.

    Args: as for :class:`StraightThroughWeight`; where ``start`` is the farther of the two integers, the
        rounding leans towards it.
    """

    def __init__(self, weight: FloatArray, start: FloatArray, qparams: QParams) -> None:
        super().__init__()
        self._qparams = qparams
        self._low, self._high = qparams.qtype.qmin, qparams.qtype.qmax
        scale = np.array(expand(qparams.scale, qparams.granularity, weight.shape), np.float32)
        self.scale = torch.nn.Buffer(torch.from_numpy(scale))
        quotient, chosen = _quotients(weight, start, qparams)
        down = np.floor(quotient)
        share = quotient - down
        lean = np.where(
            chosen == down + 1, 0.5 + _START_WITHIN, np.where(chosen == down, 0.5 - _START_WITHIN, share)
        )
        share = np.where(np.abs(quotient - chosen) < _ON_ITS_SIDE, share, lean)
        stretched = (share - _SHIFT) / _STRETCH
        self.down = torch.nn.Buffer(torch.from_numpy(down.astype(np.float32)))
        latent = np.log(stretched / (1 - stretched))
        self.latent = torch.nn.Parameter(torch.from_numpy(latent.astype(np.float32)))

    @property
    def latents(self) -> list[torch.nn.Parameter]:
        """What is learnt."""
        return [self.latent]

    def share(self) -> torch.Tensor:
        """h(a), the choice between down (0) and up (1)."""
        return (torch.sigmoid(self.latent) * _STRETCH + _SHIFT).clamp(0.0, 1.0)

    def forward(self) -> torch.Tensor:
        """The weight between its two grid points, differentiable; in evaluation mode on one of them."""
        if not self.training:
            return self._integers() * self.scale
        return (self.down + self.share()).clamp(self._low, self._high) * self.scale

    def indecision(self, beta: float) -> torch.Tensor:
        """Sum of 1 - |2 h - 1|^beta: zero where every weight has chosen."""
        return (1.0 - (2.0 * self.share() - 1.0).abs().pow(beta)).sum()

    @torch.no_grad()
    def hardened(self) -> tuple[QParams, FloatArray]:
        """Parameters and weight as the file will hold them: up where a >= 0."""
        return self._qparams, _on_grid(self._integers(), self._qparams)

    def _integers(self) -> torch.Tensor:
        return (self.down + (self.latent >= 0)).clamp(self._low, self._high)


LearnedWeight = ScaledWeight | AdaRoundWeight


class LearnedActivation(torch.nn.Module):
    """A per-tensor activation quantizer with a learnt scale of at most ``largest``."""

    def __init__(self, qparams: QParams, largest: float = math.inf) -> None:
        super().__init__()
        self._largest = largest
        self._largest_log = math.log(largest / float(qparams.scale))
        self.scale = LearnedScale(qparams, (1,), is_learned=True)
        zero_point = int(qparams.zero_point)
        self._low, self._high = qparams.qtype.qmin - zero_point, qparams.qtype.qmax - zero_point

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` on the grid, differentiable."""
        with torch.no_grad():
            # A step that passes the bound ends on it: from beyond it no gradient would lead back.
            self.scale.log.clamp_max_(self._largest_log)
        free = self.scale().reshape(1)
        scale = free + (free.clamp_max(self._largest) - free).detach()
        return scaled_grid(x, scale, self._low, self._high)

    def hardened(self) -> QParams:
        """Parameters as the file will hold them."""
        found = self.scale.hardened()
        return replace(found, scale=np.minimum(found.scale, np.float32(self._largest)))


def _quotients(weight: FloatArray, start: FloatArray, qparams: QParams) -> tuple[Array, Array]:
    """W / s, and the integers of ``start``, in double precision.

    A start beyond the grid begins at its end: from far beyond it no gradient would bring a latent back.
    """
    scale = expand(qparams.scale, qparams.granularity, weight.shape).astype(np.float64)
    return weight / scale, np.clip(np.rint(start / scale), qparams.qtype.qmin, qparams.qtype.qmax)


def _on_grid(integers: torch.Tensor, qparams: QParams) -> FloatArray:
    values = integers.cpu().numpy().astype(np.float32)
    return np.asarray(values * expand(qparams.scale, qparams.granularity, values.shape), np.float32)
