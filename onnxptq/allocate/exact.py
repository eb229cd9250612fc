"""The best bits within a budget: a multiple-choice knapsack, solved exactly by HiGHS.

    min  sum_jc v_jc x_jc    s.t.  sum_jc u_jc x_jc <= limit,   sum_c x_jc = 1,   x_jc in {0, 1}

    budget          value v              used u
    average bits    cost                 elements x bits    (weights and activations: two problems)
    size            cost                 bytes
    loss            bytes                cost

A choice that neither costs nor uses less than another one of its pack is left out beforehand, so that among
equally good choices of a pack the one that uses least is taken. The solver works in floating point: what it
returns is held against the limit exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from onnxptq.allocate.choices import (
    Allocation,
    AverageBits,
    Budget,
    Choice,
    PackChoices,
    TotalLoss,
    WeightBytes,
    allocation,
)
from onnxptq.errors import BudgetError

_OBJECTIVE = 1e5
"""Largest coefficient of the objective: HiGHS stops within 1e-6 of the best, so within 1e-11 of the largest."""

_TOLERANCE = 1e-7
"""By how much HiGHS may exceed a limit."""

_TRIES = 8


@dataclass(frozen=True, slots=True)
class _Option:
    choice: Choice
    value: float
    used: float


def allocate(packs: Sequence[PackChoices], budget: Budget) -> Allocation:
    """The bits with the least cost (for a loss budget: the fewest bytes) within ``budget``.

    Raises:
        BudgetError: nothing that can be chosen fits; the message says what the least is.
        ValueError: a cost is negative or not finite.
    """
    for pack in packs:
        for choice in (*pack.weights, *pack.activations):
            if not (math.isfinite(choice.cost) and choice.cost >= 0.0):
                raise ValueError(f"pack {pack.pack} costs {choice.cost} at {choice.bits} bits")
    match budget:
        case AverageBits(weights, activations):
            return allocation(
                packs,
                _at_average("weights", weights, [(p.weight_elements, p.weights) for p in packs]),
                _at_average(
                    "activations", activations, [(p.activation_elements, p.activations) for p in packs]
                ),
            )
        case WeightBytes(limit):
            return _within_bytes(packs, limit)
        case TotalLoss(limit):
            return _within_loss(packs, limit)


def _at_average(
    what: str, average: float, groups: Sequence[tuple[int, Sequence[Choice]]]
) -> list[Choice | None]:
    total = sum(n for n, choices in groups if choices)
    least = sum(n * min(c.bits for c in choices) for n, choices in groups if choices)
    # The sums are integers; the small part keeps 3 of 10 elements within an average of 0.3.
    limit = math.floor(average * total * (1.0 + 1e-12))
    if least > limit:
        raise BudgetError(
            f"An average of {average:g} bits over {what} cannot be reached: the least is {least / total:.3g}.",
            "Ask for a higher average.",
        )
    return _choose([[_Option(c, c.cost, n * c.bits) for c in choices] for n, choices in groups], limit)


def _within_bytes(packs: Sequence[PackChoices], limit: int) -> Allocation:
    least = sum(min(c.size for c in p.weights) for p in packs if p.weights)
    if least > limit:
        raise BudgetError(
            f"{limit:,} bytes do not hold the quantized weights: the least is {least:,} bytes.",
            "Allow a larger size.",
        )
    weights = _choose([[_Option(c, c.cost, c.size) for c in p.weights] for p in packs], limit)
    best = [min(p.activations, key=lambda c: (c.cost, c.bits), default=None) for p in packs]
    return allocation(packs, weights, best)


def _within_loss(packs: Sequence[PackChoices], limit: float) -> Allocation:
    groups = [p.weights for p in packs] + [p.activations for p in packs]
    least = math.fsum(min(c.cost for c in choices) for choices in groups if choices)
    if least > limit:
        raise BudgetError(
            f"A loss of {limit:.3g} cannot be reached: the least, with the most bits everywhere, is {least:.3g}.",
            "Allow a larger loss.",
        )
    chosen = _choose([[_Option(c, c.size, c.cost) for c in choices] for choices in groups], limit)
    return allocation(packs, chosen[: len(packs)], chosen[len(packs) :])


def _choose(groups: Sequence[Sequence[_Option]], limit: float) -> list[Choice | None]:
    """One option per group (None for an empty group): least sum of values with sum of used <= limit.

    The least possible sum of ``used`` is within ``limit``.
    """
    kept = [_efficient(group) for group in groups]
    open_groups = [i for i, options in enumerate(kept) if len(options) > 1]
    chosen = [options[0] if options else None for options in kept]
    if open_groups:
        fixed = [o.used for i, o in enumerate(chosen) if o is not None and i not in open_groups]
        picks = _solve([kept[i] for i in open_groups], limit, fixed)
        for i, pick in zip(open_groups, picks, strict=True):
            chosen[i] = kept[i][pick]
    return [None if option is None else option.choice for option in chosen]


def _efficient(options: Sequence[_Option]) -> list[_Option]:
    """Options that no other one equals or beats in both respects, by rising use and falling value."""
    kept: list[_Option] = []
    for option in sorted(options, key=lambda o: (o.used, o.value, o.choice.bits)):
        if not kept or option.value < kept[-1].value:
            kept.append(option)
    return kept


def _solve(groups: Sequence[Sequence[_Option]], limit: float, fixed: Sequence[float]) -> list[int]:
    """The position of the chosen option in each group; ``fixed`` is used up already."""
    room = limit - math.fsum([*fixed, *(options[0].used for options in groups)])
    if math.fsum(options[-1].used - options[0].used for options in groups) <= room:
        return [len(options) - 1 for options in groups]
    # Only what exceeds the least of each group is at stake: small numbers lose no digits to large ones.
    extra = np.array([float(o.used - options[0].used) for options in groups for o in options])
    objective = np.array([float(o.value - options[-1].value) for options in groups for o in options])
    objective *= _OBJECTIVE / objective.max()
    unit = extra.max()
    owner = np.repeat(np.arange(len(groups)), [len(options) for options in groups])
    rows = csr_array(
        (
            np.concatenate([np.ones(owner.size), extra / unit]),
            (
                np.concatenate([owner, np.full(owner.size, len(groups))]),
                np.tile(np.arange(owner.size), 2),
            ),
        ),
        shape=(len(groups) + 1, owner.size),
    )
    starts = np.cumsum([0, *(len(options) for options in groups[:-1])])
    low = np.array([*np.ones(len(groups)), -np.inf])
    allowed = max(0.0, room / unit)
    for _ in range(_TRIES):
        found = milp(
            objective,
            constraints=LinearConstraint(rows, low, np.array([*np.ones(len(groups)), allowed])),
            integrality=np.ones(owner.size),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        assert found.x is not None, found.message
        picks = [
            int(np.argmax(found.x[start : start + len(options)]))
            for start, options in zip(starts, groups, strict=True)
        ]
        spent = math.fsum([*fixed, *(options[i].used for i, options in zip(picks, groups, strict=True))])
        if spent <= limit:
            return picks
        # Over by less than the solver's tolerance: ask for that much less.
        allowed = max(0.0, allowed - (spent - limit) / unit - _TOLERANCE)
    return [0] * len(groups)
