"""How far the output of a changed network is from that of the float network.

    kl         mean over rows of sum_c p_c (log p_c - log q_c),  p = softmax of the float logits
    relative   sum over outputs of  sum ||o_q - o_fp||^2 / sum ||o_fp||^2,  both sums over all samples

Both are zero with zero gradient at the float network. Only outputs that hold floats are compared, and of these what
is a finite number in the float network: nothing is to be met elsewhere. A masked class, of logit -inf, is left out of
both distributions. Where only the changed network has NaN or Inf, the loss is infinite. The classes c of
``kl`` lie along one axis, and everything along the others is a row:

    (batch, classes)                    axis 1
    (batch, tokens, classes)            the last
    (batch, classes, height, width)     axis 1, also of volumes

Nothing tells class scores of tokens or positions from other tensors of their rank, so these have to be asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from onnxptq.errors import UsageError
from onnxptq.ranks import Ranks
from onnxptq.types import CanonicalModel

LossKind = Literal["kl", "relative"]
LossChoice = Literal["auto", "kl", "relative"]

_CLASS_AXES: Mapping[int, int] = {2: 1, 3: 2, 4: 1, 5: 1}
"""The axis of the classes, by the rank of the scores."""

_LEFT_OUT = -1e100
"""The logarithm of a probability of 0: no score comes near it, and unlike -inf it may be subtracted from itself."""


def choose_loss(outputs: Mapping[str, torch.Tensor], asked: LossChoice = "auto") -> LossKind:
    """The loss that is ``asked`` for; ``auto`` is ``kl`` if every float output is a matrix of at least two columns,
    as class logits are, else ``relative``.

    Raises:
        UsageError: ``kl`` is asked for and an output has no axis of at least two classes.
    """
    floats = {name: value for name, value in outputs.items() if value.is_floating_point()}
    if asked == "kl":
        for name, value in floats.items():
            axis = _CLASS_AXES.get(value.ndim)
            if axis is None or value.shape[axis] < 2:
                raise UsageError(
                    f"Output '{name}' has shape {list(value.shape)}: kl compares scores of at least two classes, "
                    "along the last axis of three and along axis 1 of two, four or five.",
                    "Ask for output_loss relative, or leave it out.",
                )
    if asked != "auto":
        return asked
    are_matrices = all(value.ndim == 2 and value.shape[1] > 1 for value in floats.values())
    return "kl" if floats and are_matrices else "relative"


def class_axis(scores: torch.Tensor) -> int:
    """The axis of the classes of scores that ``kl`` can compare."""
    return _CLASS_AXES[scores.ndim]


def rows_of(scores: torch.Tensor) -> int:
    """How many distributions class scores hold."""
    return scores.numel() // scores.shape[class_axis(scores)]


def asked_loss(model: CanonicalModel, asked: LossChoice) -> LossChoice:
    """The loss to ask for: boxes and scores that enter a selection are no class logits, whatever their shape."""
    return "relative" if asked == "auto" and model.boundary else asked


class OutputLoss:
    """Sums of one loss over batches.

    Args:
        outputs: the float outputs to compare.
        probabilities: those among them that hold probabilities.

    Raises:
        UsageError: there is nothing to compare.
    """

    def __init__(
        self, kind: LossKind, outputs: Sequence[str], *, probabilities: frozenset[str] = frozenset()
    ) -> None:
        if not outputs:
            raise UsageError(
                "No output of the model holds floats, so the effect of quantizing a block cannot be measured.",
                "Add a float output (logits, scores) to the model, or choose a method without scores.",
            )
        self._kind = kind
        self._outputs = tuple(outputs)
        self._probabilities = probabilities
        self._sums = dict.fromkeys(outputs, 0.0)
        self._scales = dict.fromkeys(outputs, 0.0)

    def add(self, reference: Mapping[str, torch.Tensor], changed: Mapping[str, torch.Tensor]) -> None:
        """Add one batch; outputs that are not in ``changed`` equal the reference."""
        for name in self._outputs:
            fp = reference[name]
            q = changed.get(name, fp)
            if self._kind == "kl":
                is_probability = name in self._probabilities
                if q is not fp:
                    self._sums[name] += as_noise(divergence(fp, q, is_probability=is_probability))
                self._scales[name] += rows_of(fp)
                continue
            wide = fp.double()
            energy = float(numbers_of(wide).square().sum())
            # Another shape (a different number of detections) counts as wholly wrong.
            same = fp.shape == q.shape
            self._sums[name] += as_noise(error_of(q.double(), wide).square().sum()) if same else energy
            self._scales[name] += energy

    def sum_over(self, ranks: Ranks) -> None:
        """Add up what every one of ``ranks`` has added."""
        total = ranks.sum(np.array([[self._sums[n], self._scales[n]] for n in self._outputs], np.float64))
        for name, (part, scale) in zip(self._outputs, total.tolist(), strict=True):
            self._sums[name], self._scales[name] = part, scale

    def value(self) -> float:
        """The loss over everything added; an output that is zero throughout is compared with 1."""
        return sum(self._sums[name] / (self._scales[name] or 1.0) for name in self._outputs)


def numbers_of(values: torch.Tensor) -> torch.Tensor:
    """``values`` with 0 in place of NaN and Inf."""
    return torch.where(torch.isfinite(values), values, 0.0)


def error_of(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """``found - wanted``, 0 where ``wanted`` is NaN or Inf."""
    return torch.where(torch.isfinite(wanted), found - wanted, 0.0)


def as_noise(total: torch.Tensor) -> float:
    """A sum of errors; NaN, of a network that has lost a number, is as bad as can be."""
    value = float(total)
    return math.inf if math.isnan(value) else value


def divergence(
    fp: torch.Tensor, q: torch.Tensor, *, is_probability: bool, temperature: float = 1.0
) -> torch.Tensor:
    """The sum over rows of sum_c p_c (log p_c - log q_c); logits are divided by the temperature before."""
    known = torch.isfinite(fp)
    log_p, log_q = (_logarithms(value, known, is_probability, temperature) for value in (fp, q))
    return (log_p.exp() * (log_p - log_q)).sum()


def _logarithms(
    value: torch.Tensor, known: torch.Tensor, is_probability: bool, temperature: float
) -> torch.Tensor:
    # Double precision: two nearly equal distributions cancel to the square of their difference.
    wide = value.double()
    if is_probability:
        wide = wide.clamp_min(torch.finfo(torch.float32).tiny).log()
    scores = torch.where(known, wide / temperature, _LEFT_OUT)
    return torch.log_softmax(scores, dim=class_axis(wide))
