"""Costs that fall with bits: what few samples measure does not always, and a solver would take the noise at its word.

The nearest costs, in least squares, that no number of bits raises, by pooling adjacent violators (isotonic
regression).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from scipy.optimize import isotonic_regression

from onnxptq.allocate.choices import Choice, PackChoices


def monotone(pack: PackChoices) -> PackChoices:
    """``pack`` with costs of weights, and on their own of activations, that never rise with bits."""
    return replace(pack, weights=_falling(pack.weights), activations=_falling(pack.activations))


def _falling(choices: Sequence[Choice]) -> tuple[Choice, ...]:
    if not choices:
        return ()
    ordered = sorted(choices, key=lambda choice: choice.bits)
    costs = isotonic_regression([choice.cost for choice in ordered], increasing=False).x
    return tuple(replace(choice, cost=float(cost)) for choice, cost in zip(ordered, costs, strict=True))
