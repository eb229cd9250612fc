"""What each pack costs at each number of bits: the loss at the network's output with it quantized alone.

For every candidate b the whole network is planned at b bits, and every pack is run twice, quantized alone:
its weights only, then its activations only, rounded to nearest. So the two costs can be added and compared
(:mod:`onnxptq.allocate.choices` says how far), and a pack may get different bits for the two.

A node whose bits the request sets by name keeps them: it takes no part in costs and averages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_graphsurgeon as gs

from onnxptq.allocate.choices import Choice, PackChoices
from onnxptq.errors import UnsupportedModelError
from onnxptq.lowering.output_loss import LossChoice
from onnxptq.partition.score import Scorer
from onnxptq.ranks import ALONE, Ranks
from onnxptq.reconstruct.initial import initial_solution
from onnxptq.types import (
    CanonicalModel,
    Pack,
    Progress,
    QParams,
    Quantizer,
    QuantPlan,
    Sample,
    Sensitivity,
    Solution,
    started,
)

CANDIDATES = (2, 3, 4, 5, 6, 8)
"""Bits that are measured, of weights and of activations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BitPlacing:
    """How quantizers are placed and activation ranges are chosen at one number of bits everywhere.

    Attributes:
        plan_at: the plan at so many bits.
        ranges: parameters of the activation quantizers of a plan.
        pinned: nodes whose bits are not up for choice.
    """

    plan_at: Callable[[int], QuantPlan]
    ranges: Callable[[QuantPlan], Mapping[str, QParams]]
    pinned: Collection[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """One PackChoices per pack, and the kind of loss that costs are (see :mod:`onnxptq.lowering.output_loss`)."""

    packs: tuple[PackChoices, ...]
    loss: str


def measure_costs(
    model: CanonicalModel,
    packs: Sequence[Pack],
    sensitivities: Sequence[Sensitivity],
    placing: BitPlacing,
    samples: Sequence[Sample],
    *,
    candidates: Sequence[int] = CANDIDATES,
    loss: LossChoice = "auto",
    device: str = "cpu",
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Costs:
    """The costs of every pack. A candidate that the target does not execute as such is not offered, nor is one that
    makes outputs NaN or Inf.

    Args:
        sensitivities: one per block of ``packs``; their mean Omega ranks packs.
        loss: as for :func:`onnxptq.partition.score.score_blocks`.
        ranks: processes that share the samples.

    Raises:
        UnsupportedOperatorError: a node cannot be lowered; raised before anything runs.
        UsageError: no samples, or no output to compare.
        UnsupportedModelError: a loss is not a number, or a pack makes outputs NaN or Inf at any number of bits.
    """
    omega = {s.block: s.omega for s in sensitivities}
    weights: list[list[Choice]] = [[] for _ in packs]
    activations: list[list[Choice]] = [[] for _ in packs]
    constants = {
        name: math.prod(map(int, t.shape))
        for name, t in model.graph.tensors().items()
        if isinstance(t, gs.Constant)
    }
    plans = {bits: placing.plan_at(bits) for bits in candidates}
    parts: list[tuple[int, list[list[Choice]], QuantPlan, Solution]] = []
    for bits, plan in plans.items():
        for role, found in (("weight", weights), ("activation", activations)):
            part = replace(plan, quantizers=tuple(_free(plan, role, placing.pinned)))
            ranges = placing.ranges(part) if role == "activation" else {}
            parts.append((bits, found, part, initial_solution(model.graph, part, ranges)))
    networks = [(part, solution) for _, _, part, solution in parts]
    given = (model, tuple(packs), tuple(samples), loss, device, networks)
    scored, sizes, kind = ranks.run(_scored, *given, progress=progress)
    spoilt: set[int] = set()
    for (bits, found, part, _), scores in zip(parts, scored, strict=True):
        for i, pack in enumerate(packs):
            own = quantizers_of(pack, part)
            if not own or any(q.qtype.bits != bits for q in own):
                continue
            if math.isinf(scores[i].loss):
                spoilt.add(i)
                continue
            size = sum(stored_bytes(constants[q.tensor], q) for q in own) if found is weights else 0
            found[i].append(Choice(bits=bits, cost=max(0.0, scores[i].loss), size=size))
    for i in sorted(spoilt):
        if not (weights[i] and activations[i]):
            raise _unusable(model, packs[i])
    last = plans[candidates[-1]]
    counts = [count_elements(pack, last, constants, sizes, placing.pinned) for pack in packs]
    offered = tuple(
        PackChoices(
            pack=pack.index,
            omega=sum(omega[b.index] for b in pack.blocks) / len(pack.blocks),
            weight_elements=counts[i][0],
            activation_elements=counts[i][1],
            weights=tuple(weights[i]),
            activations=tuple(activations[i]),
        )
        for i, pack in enumerate(packs)
    )
    return Costs(packs=offered, loss=kind)


def _unusable(model: CanonicalModel, pack: Pack) -> UnsupportedModelError:
    ends = " to ".join(", ".join(map(model.user_name, names)) for names in (pack.inputs, pack.outputs))
    return UnsupportedModelError(
        f"Quantized at any number of bits, the pack from {ends} makes outputs NaN or Inf.",
        "Leave its nodes in float (--exclude).",
    )


def _scored(
    ranks: Ranks,
    model: CanonicalModel,
    packs: Sequence[Pack],
    samples: Sequence[Sample],
    loss: LossChoice,
    device: str,
    networks: Sequence[tuple[QuantPlan, Solution]],
    *,
    progress: Progress | None = None,
) -> tuple[list[tuple[Sensitivity, ...]], Mapping[str, int], str]:
    """The scores of every pack of every network, the sizes of tensors, and the kind of loss."""
    scorer = Scorer(model, packs, samples, loss=loss, device=device, ranks=ranks)
    tick = started(progress, "measure bits", len(networks))
    scores = []
    for plan, solution in networks:
        scores.append(scorer.score(plan, solution))
        tick()
    return scores, scorer.sizes, scorer.loss


def quantizers_of(pack: Pack, plan: QuantPlan) -> list[Quantizer]:
    """The quantizers that some node of ``pack`` reads through."""
    sites = {(s.consumer, s.input_index, s.tensor) for s in pack.sites}
    return [
        q for q in plan.quantizers if any((s.consumer, s.input_index, s.tensor) in sites for s in q.sites)
    ]


def count_elements(
    pack: Pack,
    plan: QuantPlan,
    constants: Mapping[str, int],
    sizes: Mapping[str, int],
    pinned: Collection[str] = (),
) -> tuple[int, int]:
    """Elements of the quantized weights of ``pack``, and of the activations that it reads quantized.

    A tensor counts once for each pack that reads it, since each may read it at bits of its own.
    """
    weights = quantizers_of(pack, replace(plan, quantizers=tuple(_free(plan, "weight", pinned))))
    read = quantizers_of(pack, replace(plan, quantizers=tuple(_free(plan, "activation", pinned))))
    return (
        sum(constants[q.tensor] for q in weights),
        sum(sizes.get(name, 0) for name in {q.tensor for q in read}),
    )


def _free(plan: QuantPlan, role: str, pinned: Collection[str]) -> list[Quantizer]:
    """Quantizers of ``role``, at the sites of nodes that are not pinned."""
    kept = []
    for q in plan.quantizers:
        sites = tuple(s for s in q.sites if s.consumer not in pinned)
        if q.role == role and sites:
            kept.append(q if sites == q.sites else replace(q, sites=sites))
    return kept


def weight_bytes(model: CanonicalModel, plan: QuantPlan) -> int:
    """Bytes that the quantized weights of ``plan`` take in the file."""
    tensors = model.graph.tensors()
    return sum(
        stored_bytes(math.prod(map(int, tensors[q.tensor].shape)), q)
        for q in plan.quantizers
        if q.role == "weight"
    )


def stored_bytes(elements: int, quantizer: Quantizer) -> int:
    """Bytes that so many integers take in the type that stores them."""
    bits = int("".join(c for c in quantizer.qtype.storage if c.isdigit()))
    return -(-elements * bits // 8)
