"""The allocation of the Pack-PTQ paper (arXiv 2505.00259, as in its released code), for comparison.

    target 3: low, mid, high = 2, 3, 4        4: 3, 4, 6        6: 4, 6, 8

The first and the last pack get ``high``, all others ``mid``. Then, from the most sensitive pack (mean Omega
of its blocks) to the least, a pack is raised to ``high`` if the elements of weights and activations together
still take no more than (mid + high) / 2 bits each. Weights and activations of a pack always get equal bits.
``low`` is never given out and the budget is not the target: "3 bits" ends between 3 and 3.5.
:mod:`onnxptq.allocate.exact` solves what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxptq.allocate.choices import Allocation, Choice, PackChoices, allocation
from onnxptq.errors import BudgetError

CANDIDATES: Mapping[int, tuple[int, int, int]] = {3: (2, 3, 4), 4: (3, 4, 6), 6: (4, 6, 8)}
"""Low, mid and high bits per target."""


def allocate_greedily(packs: Sequence[PackChoices], target: float) -> Allocation:
    """The paper's bits for a target of 3, 4 or 6.

    Raises:
        BudgetError: another target, or a pack was not measured at the bits that this one needs.
    """
    if target not in CANDIDATES:
        known = ", ".join(map(str, CANDIDATES))
        raise BudgetError(
            f"The greedy allocator is defined for averages of {known} bits, not for {target:g}.",
            "Use the exact allocator, which meets any average.",
        )
    _, mid, high = CANDIDATES[int(target)]
    ends = {0, len(packs) - 1}
    bits = [high if i in ends else mid for i in range(len(packs))]
    elements = [p.weight_elements + p.activation_elements for p in packs]
    limit = sum(elements) * (mid + high)  # in half bits
    for i in sorted(range(len(packs)), key=lambda i: (-packs[i].omega, i)):
        raised = [*bits[:i], high, *bits[i + 1 :]]
        if 2 * sum(n * b for n, b in zip(elements, raised, strict=True)) <= limit:
            bits = raised
    return allocation(
        packs,
        [_at(p, p.weights, b) for p, b in zip(packs, bits, strict=True)],
        [_at(p, p.activations, b) for p, b in zip(packs, bits, strict=True)],
    )


def _at(pack: PackChoices, choices: Sequence[Choice], bits: int) -> Choice | None:
    if not choices:
        return None
    for choice in choices:
        if choice.bits == bits:
            return choice
    raise BudgetError(
        f"Pack {pack.pack} was not measured at {bits} bits, which the greedy allocator gives it.",
        "Use the exact allocator.",
    )
