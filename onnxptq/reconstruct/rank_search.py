"""The ranks of a pack's low-rank corrections, found by gradient (AILoC of AIQViT, arXiv 2502.04628).

Every layer computes with the sum of its candidates, each weighed by its share softmax(alpha) and dropped with
probability ``DROP`` (see :mod:`onnxptq.quantizers.low_rank`). Steps alternate: the candidates follow the loss on one
half of the samples, alpha that on the other half, where a candidate that learnt its half by heart does worse. The
rank of a layer is the candidate with the largest alpha. A rank costs nothing at run time; it regularises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from onnxptq.quantizers.low_rank import Factors, LowRankWeight
from onnxptq.reconstruct.learning import Learning
from onnxptq.reconstruct.objective import Norms, noise_over_signal, norms_of
from onnxptq.reconstruct.pack_data import PackData
from onnxptq.reconstruct.pack_quantizers import PackQuantizers
from onnxptq.reconstruct.training import draws, parameters_of

DROP = 0.1
"""Probability with which a candidate is left out of a step."""

ALPHA_RATE = 0.03
"""Adam's rate for alpha: 100 steps of one sign change a share by a factor of 20."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankChoice:
    """The correction of one layer, cut to the chosen rank, and the final share of every candidate."""

    factors: Factors
    candidates: tuple[int, ...]
    shares: tuple[float, ...]


def choose_ranks(
    corrections: Mapping[str, Factors],
    make: Callable[[Mapping[str, Sequence[Factors]]], PackQuantizers],
    data: PackData,
    settings: Learning,
    generator: torch.Generator,
) -> Mapping[str, RankChoice]:
    """A rank for every layer; without steps to search by, the largest candidate.

    Args:
        corrections: of the largest rank, by weight tensor.
        make: the pack's quantizers with these candidates.
    """
    terms = {
        name: [factors.truncated(rank) for rank in _clipped(settings.ranks, factors.rank)]
        for name, factors in corrections.items()
    }
    shares: Mapping[str, tuple[float, ...]] = {}
    if settings.search_steps and any(len(candidates) > 1 for candidates in terms.values()):
        shares = _searched(make(terms), data, settings, generator)
    found = {}
    for name, candidates in terms.items():
        if name not in shares:
            candidates = candidates[-1:]
        own = shares.get(name, (1.0,))
        ranks = tuple(factors.rank for factors in candidates)
        found[name] = RankChoice(factors=candidates[own.index(max(own))], candidates=ranks, shares=own)
    return found


def _clipped(candidates: Sequence[int], largest: int) -> list[int]:
    return sorted({min(rank, largest) for rank in candidates})


def _searched(
    learned: PackQuantizers, data: PackData, settings: Learning, generator: torch.Generator
) -> Mapping[str, tuple[float, ...]]:
    """The final share of every candidate, by weight tensor; none where the pack writes integers only."""
    weights = {name: w for name, w in learned.weights.items() if isinstance(w, LowRankWeight)}
    order = torch.randperm(len(data), generator=generator).tolist()
    middle = -(-len(order) // 2)
    pupils, judges = order[:middle], order[middle:] or order
    norms = norms_of(data, order)
    if not norms.variance:
        return {}
    inner = torch.optim.Adam([p for w in weights.values() for p in w.latents], settings.latent_rate)
    outer = torch.optim.Adam([w.alpha for w in weights.values()], ALPHA_RATE)
    lessons = draws(pupils, settings.batch, settings.search_steps, generator)
    exams = draws(judges, settings.batch, settings.search_steps, generator)
    for lesson, exam in zip(lessons, exams, strict=True):
        for weight in weights.values():
            weight.drop(DROP, generator)
        _step(inner, data, lesson, norms)
        for weight in weights.values():
            weight.drop(0.0, generator)
        _step(outer, data, exam, norms)
    shares = {name: tuple(weight.shares().detach().cpu().tolist()) for name, weight in weights.items()}
    return data.ranks.broadcast(shares)


def _step(optimizer: torch.optim.Optimizer, data: PackData, chosen: Sequence[int], norms: Norms) -> None:
    optimizer.zero_grad(set_to_none=True)
    for part in data.chunks(chosen):
        found = data.module(data.quantized(part))
        loss = noise_over_signal(found, data.targets(part), norms) * (len(part) / len(chosen))
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]
    data.ranks.sum_gradients(parameters_of(optimizer))
    optimizer.step()
