"""What a pack can be quantized at and what that costs, what a user may spend, and what was decided.

Weights and activations of a pack are two choices, each with its own measured cost: the loss at the network's
output with only these weights (or only these activations) quantized and everything else in float,

    c_j(b_w, b_a) = c_j^w(b_w) + c_j^a(b_a),      total loss = sum_j c_j

Both sums are an assumption. The loss is quadratic near the float network, so errors add up there as far as
they are not correlated; at very few bits, where the quadratic form ends, a sum is only an order of merit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A number of bits, its measured cost, and the bytes that weights take in the file at it (activations: 0)."""

    bits: int
    cost: float
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PackChoices:
    """What one pack can be given.

    Attributes:
        pack: its index.
        omega: mean sensitivity of its blocks, by which the greedy allocator ranks.
        weight_elements: elements of its quantized weights.
        activation_elements: elements per sample of the tensors that it reads quantized.
        weights, activations: the candidates; empty where it quantizes no weights (or no activations).
    """

    pack: int
    omega: float
    weight_elements: int
    activation_elements: int
    weights: tuple[Choice, ...]
    activations: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class AverageBits:
    """sum_j n_j b_j <= average sum_j n_j, over weights and, on its own, over activations."""

    weights: float
    activations: float


@dataclass(frozen=True, slots=True)
class WeightBytes:
    """At most so many bytes of quantized weights in the file; the bits of activations cost nothing."""

    limit: int


@dataclass(frozen=True, slots=True)
class TotalLoss:
    """Total cost at most ``limit``, with as few bytes of weights as that allows."""

    limit: float


Budget = AverageBits | WeightBytes | TotalLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class PackBits:
    """Bits of one pack; None where it quantizes no weights (or no activations)."""

    pack: int
    weights: int | None
    activations: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The decision: bits per pack, in order, with the sum of their costs, the true averages over elements
    (0 where there are none), and the bytes of weights."""

    bits: tuple[PackBits, ...]
    cost: float
    average_weight_bits: float
    average_activation_bits: float
    weight_bytes: int


def allocation(
    packs: Sequence[PackChoices], weights: Sequence[Choice | None], activations: Sequence[Choice | None]
) -> Allocation:
    """The decision that takes ``weights[i]`` and ``activations[i]`` for ``packs[i]``."""
    chosen = [c for c in (*weights, *activations) if c is not None]
    return Allocation(
        bits=tuple(
            PackBits(pack=p.pack, weights=_bits(w), activations=_bits(a))
            for p, w, a in zip(packs, weights, activations, strict=True)
        ),
        cost=sum(c.cost for c in chosen),
        average_weight_bits=_average([p.weight_elements for p in packs], weights),
        average_activation_bits=_average([p.activation_elements for p in packs], activations),
        weight_bytes=sum(c.size for c in chosen),
    )


def _bits(choice: Choice | None) -> int | None:
    return None if choice is None else choice.bits


def _average(elements: Sequence[int], chosen: Sequence[Choice | None]) -> float:
    return average_bits([(n, c.bits) for n, c in zip(elements, chosen, strict=True) if c is not None])


def average_bits(entries: Sequence[tuple[int, int]]) -> float:
    """The average over all elements, of numbers of elements and their bits; 0 for no element."""
    total = sum(n for n, _ in entries)
    return sum(n * bits for n, bits in entries) / total if total else 0.0
