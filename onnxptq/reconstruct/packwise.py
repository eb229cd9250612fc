"""The stage that solves pack after pack, each on what the finished packs in front of it compute.

For one pack: its layers are rounded in closed form (:mod:`onnxptq.reconstruct.sequential`), then weights,
scales and biases are learnt together (:mod:`onnxptq.reconstruct.training`), then everything is hardened and
the samples move on. The next pack sees hard weights only. At the end the scales and biases of all packs may be learnt
on the network's outputs (:mod:`onnxptq.reconstruct.tuning`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from onnxptq.graph.boundary import find_selection, selected_within
from onnxptq.graph.index import GraphIndex, probability_outputs
from onnxptq.lowering.network import BlockNetwork, Values
from onnxptq.lowering.output_loss import asked_loss
from onnxptq.lowering.quantized import quantizing_hooks, set_hooks
from onnxptq.memory import return_memory
from onnxptq.quantizers.low_rank import Factors
from onnxptq.ranks import ALONE, Ranks
from onnxptq.reconstruct.branches import branched
from onnxptq.reconstruct.checkpoint import Checkpoints, Finished
from onnxptq.reconstruct.fisher import fisher_weights
from onnxptq.reconstruct.initial import with_bias_grids
from onnxptq.reconstruct.layer_noise import layer_noise
from onnxptq.reconstruct.learning import Learning
from onnxptq.reconstruct.low_rank import correct_pack
from onnxptq.reconstruct.objective import Objective, norms_of
from onnxptq.reconstruct.pack_data import UNIT, PackData, most_together, run_all
from onnxptq.reconstruct.pack_quantizers import PackQuantizers
from onnxptq.reconstruct.rank_search import RankChoice, choose_ranks
from onnxptq.reconstruct.sequential import rounded, solve_layers
from onnxptq.reconstruct.suffix import Suffix, wanted_outputs
from onnxptq.reconstruct.training import train
from onnxptq.reconstruct.tuning import tune
from onnxptq.reconstruct.vault import Vault
from onnxptq.types import (
    CanonicalModel,
    LayerRank,
    Pack,
    PackOutcome,
    Progress,
    QuantPlan,
    Sample,
    Solution,
    started,
)

FISHER_SAMPLES = 128
"""Calibration samples that tell how much the elements of outputs matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Where and within what the work is done.

    Attributes:
        together: per pack, the most samples that run in one pass.
        tuned_together: the same for the whole network, where it is tuned.
        cache_bytes: values of samples at the ends of packs that stay in memory; more goes to files.
        scratch: folder of these files.
        checkpoints: where finished packs are kept, None for nowhere.
        device: of torch.
    """

    together: Sequence[int]
    tuned_together: int = 1
    cache_bytes: int
    scratch: Path
    checkpoints: Checkpoints | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconstruction:
    """The solved network, and what happened to each pack that had something to learn, and to all together."""

    solution: Solution
    outcomes: tuple[PackOutcome, ...]
    tuning: PackOutcome | None = None


def reconstruct(
    model: CanonicalModel,
    plan: QuantPlan,
    solution: Solution,
    packs: Sequence[Pack],
    samples: Sequence[Sample],
    settings: Learning,
    resources: Resources,
    *,
    whole: Pack | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Reconstruction:
    """Solve all packs in order. Same arguments, same result.

    Args:
        solution: where to start; rounding to nearest will do.
        settings: with 0 steps, rounding in closed form is all that is done.
        whole: all packs together, to be tuned in the end where ``settings`` say so; None leaves that out.
        ranks: processes that share the samples. Sums and gradients are added up, so the result is that of one process
            up to the order of float sums.

    Raises:
        UnsupportedOperatorError: a node cannot be lowered; raised before any work.
    """
    given = (model, plan, solution, tuple(packs), settings, resources, whole, seed)
    return ranks.run(_reconstructed, *given, samples=samples, progress=progress)


def _reconstructed(
    ranks: Ranks,
    model: CanonicalModel,
    plan: QuantPlan,
    solution: Solution,
    packs: Sequence[Pack],
    settings: Learning,
    resources: Resources,
    whole: Pack | None,
    seed: int,
    *,
    samples: Sequence[Sample] = (),
    progress: Progress | None = None,
) -> Reconstruction:
    """On every rank; ``samples`` are those of rank 0, which hands them out and keeps the checkpoints."""
    network = BlockNetwork(model.graph, packs, judged=model.judged, device=resources.device)
    index = GraphIndex(model.graph)
    vault = Vault(resources.scratch, resources.cache_bytes)
    count = ranks.broadcast(len(samples))
    numbers = ranks.share(count, UNIT)
    floats = _handed_out(ranks, samples, count, network.inputs)
    quants = [dict(values) for values in floats]
    if not (settings.is_tuned and settings.steps):
        whole = None
    # Held apart from those that the first packs read and forget.
    inputs = [{n: vault.keep(v.detach()) for n, v in values.items()} for values in floats if whole]
    importance: Mapping[str, torch.Tensor] = {}
    if settings.steps and settings.weighting > 0.0:
        own = dict(zip(numbers, floats, strict=True))
        importance = _importance(model, network, own, settings, seed, ranks)
    wanted = None
    if settings.steps and settings.is_global:
        asked = asked_loss(model, settings.output_loss)
        wanted = wanted_outputs(network, floats, probability_outputs(model.graph), vault.keep, ranks, asked)
    # The same samples judge everywhere: at the end no gradient has seen them.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    start, state = solution, Finished(solution=solution, settled=frozenset(), outcome=None)
    outcomes: list[PackOutcome] = []
    selection = find_selection(model.graph)
    tick = started(progress, "solve packs", len(packs))
    for position, pack in enumerate(packs):
        # What the quantized network selects does not belong to what the float one selects, row by row.
        reads = quants if selection.nodes.isdisjoint(pack.nodes) else floats
        limit = resources.together[position] if wanted is None or wanted.is_joinable else 1
        together = most_together(network, position, floats, limit, ranks)
        after = run_all(network, position, floats, together, vault.keep)
        return_memory()
        data = PackData(
            network,
            position,
            floats,
            reads,
            after,
            together,
            importance,
            ranks,
            count,
            incomparable=selected_within(index, pack.nodes, selection),
            spare=vault.spare,
        )
        suffix = None if wanted is None else Suffix(data, wanted)
        generator = torch.Generator().manual_seed((seed << 20) + position)
        solve = functools.partial(
            _solved, index, pack, plan, start, state, data, settings, generator, suffix, order
        )
        state = _recalled(position, state, solve, resources.checkpoints, ranks)
        if state.outcome is not None:
            outcomes.append(state.outcome)
        set_hooks(network.modules[position], quantizing_hooks(model.graph, pack, plan, state.solution))
        return_memory()
        moved = run_all(network, position, reads, together, vault.keep)
        return_memory()
        network.modules[position].clear_hooks()
        later = network.read_behind(position)
        _move_on(floats, after, later, vault)
        _move_on(quants, moved, later, vault)
        tick()
    tuning = None
    if whole is not None:
        tuned = functools.partial(
            tune,
            model,
            whole,
            plan,
            state,
            inputs,
            settings,
            order=order,
            limit=resources.tuned_together,
            generator=torch.Generator().manual_seed((seed << 20) + len(packs)),
            ranks=ranks,
            count=count,
            keep=vault.keep,
            device=resources.device,
            progress=progress,
        )
        state = _recalled(len(packs), state, tuned, resources.checkpoints, ranks)
        tuning = state.outcome
    solution = with_bias_grids(model.graph, plan, state.solution)
    return Reconstruction(solution=solution, outcomes=tuple(outcomes), tuning=tuning)


def _move_on(values: Sequence[Values], found: Sequence[Values], later: Collection[str], vault: Vault) -> None:
    """Take in what a pack has written for each sample, and forget what no later one reads."""
    for held, new in zip(values, found, strict=True):
        held.update(new)
        for name in [name for name in held if name not in later]:
            vault.forget(held.pop(name))


def _importance(
    model: CanonicalModel,
    network: BlockNetwork,
    samples: Mapping[int, Values],
    settings: Learning,
    seed: int,
    ranks: Ranks,
) -> Mapping[str, torch.Tensor]:
    """How much the elements of outputs count, from the first of this rank's ``samples``, by number."""
    few = {number: values for number, values in samples.items() if number < FISHER_SAMPLES}
    weights = fisher_weights(network, few, probability_outputs(model.graph), seed, ranks)
    return {name: value.pow(settings.weighting) for name, value in weights.items()}


def _handed_out(ranks: Ranks, samples: Sequence[Sample], count: int, inputs: Sequence[str]) -> list[Values]:
    """This rank's part of the samples of rank 0."""
    parts = [
        [samples[i] for i in ranks.share(count, UNIT, rank=rank)] for rank in range(ranks.size) if samples
    ]
    return [
        {name: torch.from_numpy(np.array(sample[name])) for name in inputs}
        for sample in ranks.scatter(parts or None)
    ]


def _recalled(
    position: int,
    state: Finished,
    solve: Callable[[], Finished],
    checkpoints: Checkpoints | None,
    ranks: Ranks,
) -> Finished:
    """What follows ``state`` at ``position``, from the checkpoints of rank 0 where it is known."""
    store = checkpoints if ranks.rank == 0 else None
    known = None if store is None else store.load(position, state.solution, state.settled)
    known = ranks.broadcast(known)
    if known is None:
        known = solve()
        if store is not None:
            store.save(position, state.solution, state.settled, known)
    return known


def _solved(
    index: GraphIndex,
    pack: Pack,
    plan: QuantPlan,
    start: Solution,
    state: Finished,
    data: PackData,
    settings: Learning,
    generator: torch.Generator,
    suffix: Suffix | None,
    order: Sequence[int],
) -> Finished:
    solution = state.solution

    def quantizers(terms: Mapping[str, Sequence[Factors]]) -> PackQuantizers:
        return PackQuantizers(
            index,
            pack,
            data.module,
            plan,
            solution,
            settings,
            settled=state.settled,
            corrections=terms,
            device=data.network.device,
        )

    judges = order[: settings.judges(len(data))] or order
    objective = Objective(data, norms_of(data, judges))

    def noise(solution: Solution) -> float:
        """Noise over signal of the pack's outputs on the samples that judge, or on all."""
        set_hooks(data.module, quantizing_hooks(index.graph, pack, plan, solution))
        found, _ = objective.measured(judges)
        data.module.clear_hooks()
        return found

    writes_floats = bool(objective.norms.variance)
    before = after = noise(solution) if writes_floats else 0.0
    choices: Mapping[str, RankChoice] = {}
    if settings.weights == "low-rank":
        solution, corrections = correct_pack(
            index, pack, plan, solution, data, rank=max(settings.ranks), settled=state.settled
        )
        corrections = data.ranks.broadcast(corrections)
        choices = choose_ranks(corrections, quantizers, data, settings, generator)
    elif settings.is_closed_form_first:
        solution = solve_layers(
            index,
            pack,
            plan,
            solution,
            data,
            branched if settings.adds_branches else rounded,
            settled=state.settled,
            has_floats=settings.adds_branches,
        )
    learned = quantizers({name: (choice.factors,) for name, choice in choices.items()})
    ids, steps = learned.learned_ids(), 0
    noises: Mapping[str, tuple[float, float]] = {}
    if settings.steps and not learned.is_empty:
        _, after, steps = train(data, learned, settings, generator, suffix, order=order)
        # Other processors may have rounded otherwise.
        learned.restore(data.ranks.broadcast(learned.state()))
        solution = learned.hardened()
        noises = layer_noise(index, pack, plan, data, choices, start=start, solution=solution)
    elif writes_floats:
        after = noise(solution)
    outcome = None
    if writes_floats and not learned.is_empty:
        outcome = PackOutcome(
            pack=pack.index,
            blocks=len(pack.blocks),
            before=before,
            after=after,
            steps=steps,
            ranks=_layer_ranks(choices, noises),
        )
    data.module.clear_hooks()
    return Finished(solution=solution, settled=state.settled | ids, outcome=outcome)


def _layer_ranks(
    choices: Mapping[str, RankChoice], noises: Mapping[str, tuple[float, float]]
) -> tuple[LayerRank, ...]:
    """What was chosen for each weight, and its layer's noise before and after."""
    return tuple(
        LayerRank(
            weight=name,
            rank=choice.factors.rank,
            candidates=choice.candidates,
            shares=choice.shares,
            before=noises[name][0],
            after=noises[name][1],
        )
        for name, choice in choices.items()
        if name in noises
    )
