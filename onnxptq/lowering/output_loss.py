"""How far the output of a changed network is from that of the float network.

    kl         mean over rows of sum_c p_c (log p_c - log q_c),  p = softmax of the float logits
    relative   sum over outputs of  sum ||o_q - o_fp||^2 / sum ||o_fp||^2,  both sums over all samples

Both are zero with zero gradient at the float network. Only outputs that hold floats are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from onnxptq.errors import UsageError
from onnxptq.ranks import Ranks
from onnxptq.types import CanonicalModel

LossKind = Literal["kl", "relative"]
LossChoice = Literal["auto", "kl", "relative"]


def choose_loss(outputs: Mapping[str, torch.Tensor], asked: LossChoice = "auto") -> LossKind:
    """The loss that is ``asked`` for; ``auto`` is ``kl`` if every float output is a matrix of at least two columns,
    as class logits are, else ``relative``.

    Raises:
        UsageError: ``kl`` is asked for and an output is no such matrix.
    """
    floats = {name: value for name, value in outputs.items() if value.is_floating_point()}
    others = [name for name, value in floats.items() if value.ndim != 2 or value.shape[1] < 2]
    if asked == "kl" and others:
        raise UsageError(
            f"Output '{others[0]}' has shape {list(floats[others[0]].shape)}: kl compares matrices of class scores.",
            "Ask for output_loss relative, or leave it out.",
        )
    if asked != "auto":
        return asked
    return "kl" if floats and not others else "relative"


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
                self._sums[name] += (
                    0.0 if q is fp else float(divergence(fp, q, is_probability=is_probability))
                )
                self._scales[name] += fp.shape[0]
                continue
            wide = fp.double()
            energy = float(wide.square().sum())
            # Another shape (a different number of detections) counts as wholly wrong.
            same = fp.shape == q.shape
            self._sums[name] += float((q.double() - wide).square().sum()) if same else energy
            self._scales[name] += energy

    def sum_over(self, ranks: Ranks) -> None:
        """Add up what every one of ``ranks`` has added."""
        total = ranks.sum(np.array([[self._sums[n], self._scales[n]] for n in self._outputs], np.float64))
        for name, (part, scale) in zip(self._outputs, total.tolist(), strict=True):
            self._sums[name], self._scales[name] = part, scale

    def value(self) -> float:
        """The loss over everything added; an output that is zero throughout is compared with 1."""
        return sum(self._sums[name] / (self._scales[name] or 1.0) for name in self._outputs)


def divergence(
    fp: torch.Tensor, q: torch.Tensor, *, is_probability: bool, temperature: float = 1.0
) -> torch.Tensor:
    """The sum over rows of sum_c p_c (log p_c - log q_c); logits are divided by the temperature before."""
    log_p, log_q = (_logarithms(value, is_probability, temperature) for value in (fp, q))
    return (log_p.exp() * (log_p - log_q)).sum()


def _logarithms(value: torch.Tensor, is_probability: bool, temperature: float) -> torch.Tensor:
    # Double precision: two nearly equal distributions cancel to the square of their difference.
    wide = value.double()
    if is_probability:
        wide = wide.clamp_min(torch.finfo(torch.float32).tiny).log()
    return torch.log_softmax(wide / temperature, dim=1)
