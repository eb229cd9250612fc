"""The solvers against every possible choice of small instances, and the paper's greedy against its rules."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxptq.allocate.choices import (
    Allocation,
    AverageBits,
    Choice,
    PackChoices,
    TotalLoss,
    WeightBytes,
)
from onnxptq.allocate.exact import allocate
from onnxptq.allocate.greedy import allocate_greedily
from onnxptq.allocate.monotone import monotone
from onnxptq.errors import BudgetError

BITS = (2, 3, 4, 5, 6, 8)


def pack(
    index: int,
    weights: Sequence[float],
    activations: Sequence[float],
    *,
    n: int = 10,
    m: int = 10,
    omega: float = 1.0,
    bits: Sequence[int] = BITS,
) -> PackChoices:
    """Costs at ``bits``, in order; weights take n x bits / 8 bytes, rounded up."""
    return PackChoices(
        pack=index,
        omega=omega,
        weight_elements=n if weights else 0,
        activation_elements=m if activations else 0,
        weights=tuple(
            Choice(bits=b, cost=c, size=-(-n * b // 8)) for b, c in zip(bits, weights, strict=bool(weights))
        ),
        activations=tuple(
            Choice(bits=b, cost=c) for b, c in zip(bits, activations, strict=bool(activations))
        ),
    )


costs = st.one_of(
    st.sampled_from([0.0, 1e-3, 0.5]),  # ties
    st.floats(-8, 2).map(lambda e: 10.0**e),
)


@st.composite
def instances(draw: st.DrawFn, most: int = 4) -> list[PackChoices]:
    count = draw(st.integers(1, most))
    bits = sorted(draw(st.sets(st.sampled_from(BITS), min_size=2, max_size=4)))
    result = []
    for index in range(count):
        lists = [
            draw(st.lists(costs, min_size=len(bits), max_size=len(bits))) if draw(st.integers(0, 5)) else []
            for _ in range(2)
        ]
        sizes = [draw(st.integers(1, 100_000)) for _ in range(2)]
        result.append(pack(index, lists[0], lists[1], n=sizes[0], m=sizes[1], bits=bits))
    return result


def combinations(packs: Sequence[PackChoices], part: str) -> Iterator[list[Choice | None]]:
    return map(list, itertools.product(*(getattr(p, part) or (None,) for p in packs)))


def cost(chosen: Sequence[Choice | None]) -> float:
    return math.fsum(c.cost for c in chosen if c)


def size(chosen: Sequence[Choice | None]) -> int:
    return sum(c.size for c in chosen if c)


def used_bits(elements: Sequence[int], chosen: Sequence[Choice | None]) -> int:
    return sum(n * c.bits for n, c in zip(elements, chosen, strict=True) if c)


def check_consistent(packs: Sequence[PackChoices], found: Allocation) -> None:
    """Every number of an allocation follows from its bits."""
    both = list(zip(packs, found.bits, strict=True))
    weights = [next((c for c in p.weights if c.bits == b.weights), None) for p, b in both]
    activations = [next((c for c in p.activations if c.bits == b.activations), None) for p, b in both]
    assert [b.pack for b in found.bits] == [p.pack for p in packs]
    assert [w is None for w in weights] == [not p.weights for p in packs]
    assert [a is None for a in activations] == [not p.activations for p in packs]
    assert found.cost == pytest.approx(cost([*weights, *activations]), rel=1e-12)
    assert found.weight_bytes == size(weights)
    for average, elements, chosen in (
        (found.average_weight_bits, [p.weight_elements for p in packs], weights),
        (found.average_activation_bits, [p.activation_elements for p in packs], activations),
    ):
        assert average * sum(elements) == pytest.approx(used_bits(elements, chosen))


@given(instances(), st.floats(2.0, 8.0), st.floats(2.0, 8.0))
def test_averages_against_every_choice(packs: list[PackChoices], w: float, a: float) -> None:
    best = []
    for part, limit in (("weights", w), ("activations", a)):
        elements = [getattr(p, f"{part[:-1]}_elements") for p in packs]
        within = [
            cost(c)
            for c in combinations(packs, part)
            if used_bits(elements, c) <= limit * sum(elements) * (1 + 1e-12)
        ]
        best.append(min(within, default=None))
    if None in best:
        with pytest.raises(BudgetError, match="the least is"):
            allocate(packs, AverageBits(w, a))
        return
    found = allocate(packs, AverageBits(w, a))
    check_consistent(packs, found)
    assert found.average_weight_bits <= w * (1 + 1e-9)
    assert found.average_activation_bits <= a * (1 + 1e-9)
    # Costs span ten decades; the solver's absolute gap is 1e-11 of the largest.
    largest = max((c.cost for p in packs for c in (*p.weights, *p.activations)), default=0.0)
    assert found.cost == pytest.approx(sum(b for b in best if b is not None), rel=1e-9, abs=2e-11 * largest)


@given(instances(), st.floats(0.0, 1.0))
def test_bytes_against_every_choice(packs: list[PackChoices], share: float) -> None:
    sizes = [size(c) for c in combinations(packs, "weights")]
    limit = int(0.9 * min(sizes) + share * (1.1 * max(sizes) - 0.9 * min(sizes)))
    within = [cost(c) for c in combinations(packs, "weights") if size(c) <= limit]
    if not within:
        with pytest.raises(BudgetError, match=f"the least is {min(sizes):,} bytes"):
            allocate(packs, WeightBytes(limit))
        return
    found = allocate(packs, WeightBytes(limit))
    check_consistent(packs, found)
    assert found.weight_bytes <= limit
    rest = sum(min((c.cost for c in p.activations), default=0.0) for p in packs)
    largest = max((c.cost for p in packs for c in p.weights), default=0.0)
    assert found.cost == pytest.approx(min(within) + rest, rel=1e-9, abs=2e-11 * largest)


@given(instances(most=3), st.floats(-0.1, 1.1))
def test_loss_against_every_choice(packs: list[PackChoices], share: float) -> None:
    pairs = [
        (cost([*w, *a]), size(w))
        for w in combinations(packs, "weights")
        for a in combinations(packs, "activations")
    ]
    losses = [loss for loss, _ in pairs]
    limit = min(losses) + share * (max(losses) - min(losses))
    if limit < min(losses):
        with pytest.raises(BudgetError, match="the least"):
            allocate(packs, TotalLoss(limit))
        return
    found = allocate(packs, TotalLoss(limit))
    check_consistent(packs, found)
    assert found.cost <= limit * (1 + 1e-12)
    # Choices whose loss meets the limit to within the solver's tolerance may be missed.
    spread = max(losses) - min(losses)
    safe = [s for loss, s in pairs if loss <= limit - 1e-6 * spread]
    assert found.weight_bytes >= min(s for loss, s in pairs if loss <= limit * (1 + 1e-12))
    if safe:
        assert found.weight_bytes <= min(safe)


@settings(max_examples=20)
@given(instances(), st.floats(2.5, 6.0))
def test_same_question_same_answer(packs: list[PackChoices], average: float) -> None:
    budget = AverageBits(average, average)
    try:
        first = allocate(packs, budget)
    except BudgetError:
        return
    assert all(allocate([replace(p) for p in packs], budget) == first for _ in range(3))


def test_equal_costs_take_the_fewest_bits() -> None:
    flat = pack(0, [0.5] * 6, [0.0] * 6)
    falling = pack(1, [6, 5, 4, 3, 2, 1], [6, 5, 4, 3, 2, 1])
    found = allocate([flat, falling], AverageBits(8, 8))
    assert (found.bits[0].weights, found.bits[0].activations) == (2, 2)
    assert (found.bits[1].weights, found.bits[1].activations) == (8, 8)


def test_an_average_is_met_exactly_where_it_can_be() -> None:
    """Ten elements at 2 and ten at 4 bits average 3: the limit itself is allowed."""
    steep = pack(0, [100, 50, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0])
    mild = pack(1, [1, 0.9, 0.8, 0, 0, 0], [1, 0, 0, 0, 0, 0])
    found = allocate([steep, mild], AverageBits(3.0, 3.0))
    assert [b.weights for b in found.bits] == [4, 2]
    assert found.average_weight_bits == 3.0
    # Weights and activations do not lend each other bits.
    assert [b.activations for b in found.bits] == [3, 3]
    assert allocate([steep, mild], AverageBits(8.0, 2.0)).average_activation_bits == 2.0


def test_a_limit_is_kept_below_the_precision_of_the_solver() -> None:
    """Raising one of two packs takes one bit of 6 000 000 000 too much."""
    n = 10**9
    packs = [pack(i, [1.0, 0.0], [], n=n, bits=(2, 4)) for i in range(2)]
    short = allocate(packs, AverageBits((6 * n - 1) / (2 * n), 8.0))
    assert [b.weights for b in short.bits] == [2, 2]
    assert sorted(b.weights or 0 for b in allocate(packs, AverageBits(3.0, 8.0)).bits) == [2, 4]


@pytest.mark.parametrize("seed", range(6))
def test_dozens_of_packs_against_dynamic_programming(seed: int) -> None:
    """Unstructured costs over five decades: large enough that the solver has to branch."""
    rng = np.random.default_rng(seed)
    packs = [
        pack(i, np.sort(10.0 ** rng.uniform(-5, 0, 6))[::-1].tolist(), [], n=int(rng.integers(1, 60)))
        for i in range(40)
    ]
    limit = int(3.3 * sum(p.weight_elements for p in packs))
    best = np.zeros(limit + 1)  # the least cost with at most so many bits
    for p in packs:
        rest = np.full(limit + 1, np.inf)
        for c in p.weights:
            bits = p.weight_elements * c.bits
            rest[bits:] = np.minimum(rest[bits:], best[: limit + 1 - bits] + c.cost)
        best = rest
    found = allocate(packs, AverageBits(3.3, 8.0))
    check_consistent(packs, found)
    assert found.average_weight_bits <= 3.3
    assert found.cost == pytest.approx(best[limit], rel=1e-9)


def test_many_packs() -> None:
    """120 packs with convex costs: no single exchange of one step up against one step down helps."""
    packs = [
        pack(i, [(1 + i % 7) * 4.0 ** (-b) for b in BITS], [(1 + i % 5) * 4.0 ** (-b) for b in BITS], n=1 + i)
        for i in range(120)
    ]
    found = allocate(packs, AverageBits(4.0, 4.0))
    check_consistent(packs, found)
    assert found.average_weight_bits <= 4.0
    at = [BITS.index(b.weights or 0) for b in found.bits]
    room = 4 * sum(p.weight_elements for p in packs) - used_bits(
        [p.weight_elements for p in packs], [p.weights[k] for p, k in zip(packs, at, strict=True)]
    )
    for (p, up), (q, down) in itertools.permutations(zip(packs, at, strict=True), 2):
        if up + 1 < len(BITS) and down > 0:
            gain = p.weights[up].cost - p.weights[up + 1].cost
            loss = q.weights[down - 1].cost - q.weights[down].cost
            more = p.weight_elements * (BITS[up + 1] - BITS[up])
            less = q.weight_elements * (BITS[down] - BITS[down - 1])
            assert more - less > room or gain <= loss * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_costs_must_be_numbers(value: float) -> None:
    with pytest.raises(ValueError, match="pack 3 costs"):
        allocate([pack(3, [value, 1, 1, 1, 1, 1], [])], AverageBits(4, 4))


def test_budgets_out_of_reach_say_what_is_reachable() -> None:
    packs = [pack(0, [3, 2, 1, 0.5, 0.4, 0.25], [1, 1, 1, 1, 1, 0.5])]
    with pytest.raises(BudgetError, match=r"1\.5 bits over weights cannot be reached: the least is 2\.") as e:
        allocate(packs, AverageBits(1.5, 8))
    assert e.value.exit_code == 2
    with pytest.raises(BudgetError, match="over activations cannot be reached"):
        allocate(packs, AverageBits(8, 1.5))
    with pytest.raises(BudgetError, match=r"2 bytes do not hold .* the least is 3 bytes"):
        allocate(packs, WeightBytes(2))
    with pytest.raises(BudgetError, match=r"the least, with the most bits everywhere, is 0\.75"):
        allocate(packs, TotalLoss(0.7))


def test_the_greedy_follows_the_paper() -> None:
    """High at both ends; raised by Omega while the average stays within (mid + high) / 2."""
    flat = [1.0] * 6
    omegas = [0.1, 1.0, 5.0, 3.0, 9.0, 0.2]
    packs = [pack(i, flat, flat, omega=omega) for i, omega in enumerate(omegas)]
    found = allocate_greedily(packs, 3)
    # 6 packs at 3.5 bits: three at 4. The ends take two, the most sensitive inner one the third.
    assert [b.weights for b in found.bits] == [4, 3, 3, 3, 4, 4]
    assert [b.activations for b in found.bits] == [b.weights for b in found.bits]
    assert found.average_weight_bits == 3.5
    # A large pack that does not fit is passed over; a smaller one behind it may fit.
    packs[4] = replace(packs[4], weight_elements=1000)
    assert [b.weights for b in allocate_greedily(packs, 4).bits] == [6, 6, 6, 6, 4, 6]


def test_the_greedy_has_three_targets() -> None:
    with pytest.raises(BudgetError, match=r"3, 4, 6 bits, not for 3\.5"):
        allocate_greedily([pack(0, [1] * 6, [1] * 6)], 3.5)
    with pytest.raises(BudgetError, match="Pack 0 was not measured at 6 bits"):
        allocate_greedily([pack(0, [1], [1], bits=(8,))], 4)


def test_costs_that_rise_with_bits_are_pooled() -> None:
    costs = {2: 0.5, 3: 0.1, 4: 0.3, 5: 0.02, 6: 0.01, 8: 0.03}
    measured = tuple(Choice(bits=bits, cost=cost, size=bits) for bits, cost in costs.items())
    pack = PackChoices(
        pack=7, omega=1.0, weight_elements=10, activation_elements=0, weights=measured[::-1], activations=()
    )
    found = monotone(pack)
    assert [(c.bits, c.size) for c in found.weights] == [(bits, bits) for bits in costs]
    assert [c.cost for c in found.weights] == pytest.approx([0.5, 0.2, 0.2, 0.02, 0.02, 0.02])
    assert found.activations == ()
    assert monotone(found) == found


def test_of_equally_good_bits_of_activations_the_fewest_are_taken() -> None:
    """Where they cost no bytes, nothing else tells them apart."""
    packs = [pack(0, [0.3, 0.2, 0.1, 0.1, 0.1, 0.1], [0.4, 0.2, 0.1, 0.1, 0.1, 0.1])]
    assert [b.activations for b in allocate(packs, WeightBytes(1000)).bits] == [4]


def test_an_average_is_met_where_its_product_falls_short_by_a_rounding() -> None:
    """4.35 x 100 is 434.99999999999994 in floating point."""
    packs = [pack(0, [0.0, 0.0], [], n=65, bits=(4, 5)), pack(1, [1.0, 0.0], [], n=35, bits=(4, 5))]
    assert [b.weights for b in allocate(packs, AverageBits(4.35, 8.0)).bits] == [4, 5]


def test_the_greedy_counts_elements_of_activations_too() -> None:
    """Without them the second pack would fit."""
    flat, sizes = [1.0] * 6, ((1, 100), (2, 10), (20, 10), (1, 100))
    packs = [pack(i, flat, flat, n=n, m=m, omega=9.0 if i == 1 else 1.0) for i, (n, m) in enumerate(sizes)]
    assert [b.weights for b in allocate_greedily(packs, 4).bits] == [6, 4, 4, 6]
