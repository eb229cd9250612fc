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

from onnxptq.graph.boundary import Selection, find_selection, selected_within
from onnxptq.graph.index import GraphIndex, probability_outputs
from onnxptq.lowering.network import BlockNetwork, Values
from onnxptq.lowering.output_loss import asked_loss
from onnxptq.lowering.quantized import quantizing_hooks, set_hooks
from onnxptq.memory import return_memory
from onnxptq.quantizers.low_rank import Factors
from onnxptq.ranks import ALONE, Ranks
from onnxptq.reconstruct.branches import branched
from onnxptq.reconstruct.channels import channel_axes
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
from onnxptq.reconstruct.sequential import begun, rounded, solve_layers
from onnxptq.reconstruct.suffix import Suffix, Wanted, wanted_outputs
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
    job = _begun(ranks, model, plan, solution, packs, settings, resources, seed, samples)
    is_tuned = whole is not None and settings.is_tuned and settings.steps > 0
    # Held apart from those that the first packs read and forget.
    inputs = [{n: job.vault.keep(v.detach()) for n, v in values.items()} for values in job.floats if is_tuned]
    state = Finished(solution=solution, settled=frozenset(), outcome=None)
    outcomes: list[PackOutcome] = []
    tick = started(progress, "solve packs", len(packs))
    for position in range(len(packs)):
        state = _advanced(job, position, state)
        if state.outcome is not None:
            outcomes.append(state.outcome)
        tick()
    tuning = None
    if is_tuned:
        assert whole is not None
        state = _tuned(job, whole, inputs, state, progress)
        tuning = state.outcome
    solution = with_bias_grids(model.graph, plan, state.solution)
    return Reconstruction(solution=solution, outcomes=tuple(outcomes), tuning=tuning)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Job:
    """What all packs are solved with, on one rank.

    ``floats`` and ``quants`` hold this rank's samples at the ends of packs, as :class:`PackData` takes them, and move
    on with every pack. ``count`` samples are on all ranks, ``order`` says which of them judge: the same everywhere,
    so that at the end no gradient has seen them. ``wanted`` are the network's outputs where they count in every pack.
    """

    model: CanonicalModel
    plan: QuantPlan
    start: Solution
    packs: Sequence[Pack]
    settings: Learning
    resources: Resources
    seed: int
    ranks: Ranks
    network: BlockNetwork
    index: GraphIndex
    selection: Selection
    vault: Vault
    floats: Sequence[Values]
    quants: Sequence[Values]
    count: int
    order: Sequence[int]
    importance: Mapping[str, torch.Tensor]
    wanted: Wanted | None

    def generator(self, position: int) -> torch.Generator:
        """The random stream of a pack, or of what follows the last."""
        return torch.Generator().manual_seed((self.seed << 20) + position)


def _begun(
    ranks: Ranks,
    model: CanonicalModel,
    plan: QuantPlan,
    start: Solution,
    packs: Sequence[Pack],
    settings: Learning,
    resources: Resources,
    seed: int,
    samples: Sequence[Sample],
) -> _Job:
    network = BlockNetwork(model.graph, packs, judged=model.judged, device=resources.device)
    vault = Vault(resources.scratch, resources.cache_bytes)
    count = ranks.broadcast(len(samples))
    floats = _handed_out(ranks, samples, count, network.inputs)
    importance: Mapping[str, torch.Tensor] = {}
    if settings.steps and settings.weighting > 0.0:
        own = dict(zip(ranks.share(count, UNIT), floats, strict=True))
        importance = _importance(model, network, own, settings, seed, ranks)
    wanted = None
    if settings.steps and settings.is_global:
        asked = asked_loss(model, settings.output_loss)
        wanted = wanted_outputs(network, floats, probability_outputs(model.graph), vault.keep, ranks, asked)
    return _Job(
        model=model,
        plan=plan,
        start=start,
        packs=packs,
        settings=settings,
        resources=resources,
        seed=seed,
        ranks=ranks,
        network=network,
        index=GraphIndex(model.graph),
        selection=find_selection(model.graph),
        vault=vault,
        floats=floats,
        quants=[dict(values) for values in floats],
        count=count,
        order=torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist(),
        importance=importance,
        wanted=wanted,
    )


def _advanced(job: _Job, position: int, state: Finished) -> Finished:
    """What follows ``state`` once the pack at ``position`` is solved; the samples move on behind it."""
    pack, network, vault = job.packs[position], job.network, job.vault
    # What the quantized network selects does not belong to what the float one selects, row by row.
    reads = job.quants if job.selection.nodes.isdisjoint(pack.nodes) else job.floats
    limit = job.resources.together[position] if job.wanted is None or job.wanted.is_joinable else 1
    together = most_together(network, position, job.floats, limit, job.ranks)
    after = run_all(network, position, job.floats, together, vault.keep)
    return_memory()
    data = PackData(
        network,
        position,
        job.floats,
        reads,
        after,
        together,
        job.importance,
        job.ranks,
        job.count,
        incomparable=selected_within(job.index, pack.nodes, job.selection),
        spare=vault.spare,
    )
    state = _recalled(job, position, state, lambda: _solved(job, pack, state, data))
    set_hooks(network.modules[position], quantizing_hooks(job.model.graph, pack, job.plan, state.solution))
    return_memory()
    moved = run_all(network, position, reads, together, vault.keep)
    return_memory()
    network.modules[position].clear_hooks()
    later = network.read_behind(position)
    _move_on(job.floats, after, later, vault)
    _move_on(job.quants, moved, later, vault)
    return state


def _tuned(
    job: _Job, whole: Pack, inputs: Sequence[Values], state: Finished, progress: Progress | None
) -> Finished:
    """What follows ``state`` once scales and biases are learnt on the outputs that belong to ``inputs``."""
    end = len(job.packs)
    tuned = functools.partial(
        tune,
        job.model,
        whole,
        job.plan,
        state,
        inputs,
        job.settings,
        order=job.order,
        limit=job.resources.tuned_together,
        generator=job.generator(end),
        ranks=job.ranks,
        count=job.count,
        keep=job.vault.keep,
        device=job.resources.device,
        progress=progress,
    )
    return _recalled(job, end, state, tuned)


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
    names = (name for block in network.blocks for name in block.outputs)
    weights = fisher_weights(
        network,
        few,
        probability_outputs(model.graph),
        seed,
        ranks,
        axes=channel_axes(GraphIndex(model.graph), names),
        asked=asked_loss(model, settings.output_loss),
    )
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


def _recalled(job: _Job, position: int, state: Finished, solve: Callable[[], Finished]) -> Finished:
    """What follows ``state`` at ``position``, from the checkpoints of rank 0 where it is known."""
    store = job.resources.checkpoints if job.ranks.rank == 0 else None
    known = None if store is None else store.load(position, state.solution, state.settled)
    known = job.ranks.broadcast(known)
    if known is None:
        known = solve()
        if store is not None:
            store.save(position, state.solution, state.settled, known)
    return known


def _solved(job: _Job, pack: Pack, state: Finished, data: PackData) -> Finished:
    """What follows ``state`` once ``pack`` is solved."""
    index, plan, settings = job.index, job.plan, job.settings
    generator = job.generator(data.position)
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

    judges = job.order[: settings.judges(len(data))] or job.order
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
        solve = begun if settings.steps else rounded
        solution = solve_layers(
            index,
            pack,
            plan,
            solution,
            data,
            branched if settings.adds_branches else solve,
            settled=state.settled,
            has_floats=settings.adds_branches,
        )
    learned = quantizers({name: (choice.factors,) for name, choice in choices.items()})
    ids, steps = learned.learned_ids(), 0
    noises: Mapping[str, tuple[float, float]] = {}
    if settings.steps and not learned.is_empty:
        suffix = None if job.wanted is None else Suffix(data, job.wanted)
        _, after, steps = train(data, learned, settings, generator, suffix, order=job.order)
        # Other processors may have rounded otherwise.
        learned.restore(data.ranks.broadcast(learned.state()))
        solution = learned.hardened()
        noises = layer_noise(index, pack, plan, data, choices, start=job.start, solution=solution)
    elif writes_floats:
        after = noise(solution)
    # NaN is no gain either. The loss at the network's outputs may be worth more noise here, and published methods
    # judge by nothing that they have not seen.
    if settings.held_out > 0.0 and job.wanted is None and not after <= before:
        solution, after, noises = state.solution, before, {}
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
