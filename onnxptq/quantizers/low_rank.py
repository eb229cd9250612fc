"""A weight that is learnt through a low-rank term alone: AILoC of AIQViT (arXiv 2502.04628), merged form.

    w_hat = s clamp(round(v + L R / s_0), qmin, qmax),     d round(v) / dv = 1

v is the frozen latent of the float weight (W / s_0), L is (channels, r) and R is (r, inputs). While a rank is being
searched several terms add up, each weighed by its share p = softmax(alpha) and dropped now and then:

    w_hat = s clamp(round(v + sum_i m_i p_i L_i R_i / s_0), qmin, qmax)

so that the searched object is the deployed one, rounding included. L and R are kept in units that let one learning
rate serve both: a step of a given size in all elements of L moves v about as far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from onnxptq.quantizers.straight_through import round_through
from onnxptq.quantizers.trainable import StraightThroughWeight
from onnxptq.types import FloatArray, QParams


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Factors:
    """A matrix (channels, inputs) as ``left`` (channels, r) times ``right`` (r, inputs), strongest part first.

    ``is_transposed`` where the weight that it belongs to has its channels last.
    """

    left: FloatArray
    right: FloatArray
    is_transposed: bool = False

    @property
    def rank(self) -> int:
        """r."""
        return int(self.left.shape[1])

    def truncated(self, rank: int) -> Factors:
        """The strongest part."""
        return replace(self, left=self.left[:, :rank], right=self.right[:rank])

    def product(self) -> FloatArray:
        """The matrix."""
        return self.left @ self.right


class LowRankWeight(StraightThroughWeight):
    """One low-rank term, or several candidates to choose from.

    Args:
        weight, start, qparams, learn_scale: as for :class:`StraightThroughWeight`; what they make of the latent
            stays as it is.
        candidates: where each term starts.
    """

    def __init__(
        self,
        weight: FloatArray,
        start: FloatArray,
        qparams: QParams,
        candidates: Sequence[Factors],
        *,
        learn_scale: bool = True,
    ) -> None:
        super().__init__(weight, start, qparams, learn_scale=learn_scale)
        self.latent.requires_grad_(False)
        self._is_transposed = candidates[0].is_transposed
        unit = float(qparams.scale.mean())
        self.left, self.right = torch.nn.ParameterList(), torch.nn.ParameterList()
        for factors in candidates:
            root = math.sqrt(factors.rank)
            size = np.sqrt(np.mean(np.square(factors.right), axis=1, keepdims=True))
            size = np.where(size > 0.0, size, 1.0)
            left = factors.left * size.T * (root / unit)
            self.left.append(torch.nn.Parameter(torch.from_numpy(left.astype(np.float32))))
            right = factors.right / size
            self.right.append(torch.nn.Parameter(torch.from_numpy(right.astype(np.float32))))
        self.unit = torch.nn.Buffer(unit / self.scale.start)
        self.alpha = torch.nn.Parameter(torch.zeros(len(candidates)), requires_grad=len(candidates) > 1)
        self.kept = torch.nn.Buffer(torch.ones(len(candidates)))

    @property
    def latents(self) -> list[torch.nn.Parameter]:
        """What takes the place of a latent among the parameters."""
        return [*self.left, *self.right]

    @torch.no_grad()
    def drop(self, probability: float, generator: torch.Generator) -> None:
        """Choose the candidates that count until the next call; those left stand in for the others."""
        is_kept = torch.rand(len(self.kept), generator=generator) >= probability
        self.kept.copy_(is_kept / (1.0 - probability))

    def shares(self) -> torch.Tensor:
        """softmax(alpha)."""
        return torch.softmax(self.alpha, dim=0)

    def correction(self) -> torch.Tensor:
        """The sum of the terms, in steps of the starting grid, of the weight's shape."""
        weights = self.shares() * self.kept if self.training else self.shares()
        left = [
            part * (weight / math.sqrt(part.shape[1]))
            for part, weight in zip(self.left, weights, strict=True)
        ]
        total = torch.cat(left, dim=1) @ torch.cat(list(self.right), dim=0)
        if self._is_transposed:
            total = total.t()
        return total.reshape(self.latent.shape) * self.unit

    def _integers(self) -> torch.Tensor:
        return round_through(self.latent + self.correction()).clamp(self._low, self._high)
