"""From a plan to its solution by packs: cut the network, score its blocks, pack them, reconstruct pack by pack.

Nothing here is heavy by itself: the stages do the work, this joins them within a memory budget.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onnxptq.errors import MemoryBudgetError
from onnxptq.graph.index import GraphIndex, is_constant
from onnxptq.lowering import foreign_nodes
from onnxptq.lowering.network import BlockNetwork
from onnxptq.partition.blocks import find_blocks
from onnxptq.partition.pack import PackMemory, pack_blocks, pack_memory, whole_network
from onnxptq.partition.score import score_blocks
from onnxptq.ranks import ALONE, Ranks
from onnxptq.recipe import Effort, Recipe
from onnxptq.reconstruct.checkpoint import Checkpoints
from onnxptq.reconstruct.learning import BALANCED, FAST, PAPER, Learning
from onnxptq.reconstruct.pack_quantizers import unfocused
from onnxptq.reconstruct.packwise import Resources, reconstruct
from onnxptq.reconstruct.rounding import round_shared
from onnxptq.reconstruct.sequential import MAX_WIDTH, ROUNDING_DAMPING
from onnxptq.types import (
    Block,
    CanonicalModel,
    Pack,
    PackOutcome,
    Progress,
    QuantPlan,
    Sample,
    Sensitivity,
    Solution,
)
from onnxptq.version import __version__

SCORING_SAMPLES = 32
"""Calibration samples on which blocks are scored."""

DEFAULT_MEMORY = 2 << 30
"""Bytes for activations where the user states no budget; half of it may hold samples between packs."""

FISHER_EXPONENT = 0.5
"""Half way, on a logarithmic scale, between equal weights and those of the Fisher information, which a few dozen
samples do not tell exactly."""

MOST_TOGETHER = 64
"""Samples in one pass, at most: beyond it nothing runs faster."""

PASS_BYTES = 64 << 20
"""Activations of one pass where nothing is learnt: larger ones leave the processor's cache, and the system fills
fresh pages for them. Learning takes what the budget leaves: between small passes the allocator keeps twice that."""

_ADAROUND: Mapping[str, Any] = {
    "weights": "adaround",
    "is_closed_form_first": False,
    "latent_rate": 3e-2,
    "weight_scale_rate": 0.0,
    "bias_rate": 0.0,
}

_METHODS: Mapping[str, Mapping[str, Any]] = {
    "brecq": {**_ADAROUND, "mixing": 0.0},
    "qdrop": {**_ADAROUND, "mixing": 0.5},
    "adaround": {**_ADAROUND, "mixing": 0.0, "activation_scale_rate": 0.0},
    "aiqvit": {"weights": "straight-through", "is_closed_form_first": False, "mixing": 0.0, "bias_rate": 0.0},
}
"""How the published methods differ from the settings of an effort."""

_LOW_RANK: Mapping[Effort, Mapping[str, Any]] = {
    "balanced": {"search_steps": 60, "steps": 240},
    "paper": {"search_steps": 2_000, "steps": 6_000, "batch": 24, "passes": None},
}
"""Steps where weights are learnt through low-rank corrections: those of the search come first."""

_ANY = 1_000
"""Live tensors at a cut: wherever it falls."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How the network was packed: ``sensitivities`` are empty where packs were not chosen by them.

    ``alone`` are blocks that are packs of their own whatever their scores.
    """

    blocks: tuple[Block, ...]
    sensitivities: tuple[Sensitivity, ...]
    packs: tuple[Pack, ...]
    alone: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PackSolution:
    """A network solved by packs; ``checkpoints`` may be deleted once its file is written.

    ``tuning`` tells what learning scales and biases on the outputs did; ``untuned`` is why that was not tried.
    """

    packing: Packing
    solution: Solution
    outcomes: tuple[PackOutcome, ...]
    checkpoints: Path
    tuning: PackOutcome | None = None
    untuned: str = ""


def learning(recipe: Recipe) -> Learning:
    """The settings of the reconstruction that a recipe asks for."""
    chosen: Mapping[Effort, Learning] = {"fast": FAST, "balanced": BALANCED, "paper": PAPER}
    found = chosen[recipe.reconstruction_effort]
    if recipe.loss == "fisher":
        found = replace(found, weighting=FISHER_EXPONENT)
    found = replace(found, **_METHODS.get(recipe.method, {}))
    if recipe.reconstruction_effort == "paper" and found.weights == "adaround":
        # A few hundred steps need larger ones than the 20 000 that were published.
        found = replace(found, latent_rate=PAPER.latent_rate)
    if recipe.merges_low_rank:
        found = replace(found, weights="low-rank", **_LOW_RANK[recipe.reconstruction_effort])
        if recipe.low_rank_candidates:
            found = replace(found, ranks=recipe.low_rank_candidates)
    if recipe.steps is not None:
        found = _lengthened(found, recipe.steps)
    return replace(
        found,
        is_global=recipe.loss == "global-local",
        output_loss=recipe.output_loss,
        is_tuned=recipe.tunes,
        adds_branches=recipe.low_rank == "branch",
        is_easy_first=recipe.is_easy_first,
        focuses_softmax=recipe.learns_focus,
    )


def focus_notes(model: CanonicalModel, plan: QuantPlan, start: Solution, recipe: Recipe) -> tuple[str, ...]:
    """Where both ends of softmax ranges were to be learnt and their grids do not allow it."""
    reasons = Counter(unfocused(GraphIndex(model.graph), plan, start)) if recipe.learns_focus else {}
    return tuple(
        f"Of {count} softmax ranges the scale alone is learnt and not both ends (--focus): {reason}."
        for reason, count in reasons.items()
    )


def _lengthened(settings: Learning, steps: int) -> Learning:
    """``steps`` in all, of which a search for ranks keeps its share; samples are taken as many times more often.
    Where that is less, tuning takes no more."""
    usual = settings.search_steps + settings.steps
    searching = settings.search_steps * steps // usual
    passes = None if settings.passes is None else settings.passes * steps / usual
    return replace(
        settings,
        search_steps=searching,
        steps=steps - searching,
        passes=passes,
        tuning_steps=min(settings.tuning_steps, steps),
    )


def torch_device() -> str:
    """Where torch runs the network: on a GPU where it has one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def find_packing(
    model: CanonicalModel,
    plan: QuantPlan,
    start: Solution,
    samples: Sequence[Sample],
    recipe: Recipe,
    *,
    device: str,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Packing:
    """Blocks, their scores, and packs that follow from them.

    Packs are single blocks, unscored, where nothing is learnt, the method has it so, or ``auto`` cannot score them.
    """
    if recipe.method == "adaround":
        blocks = find_blocks(model.graph, max_linears=1, max_live=_ANY, join=False)
    else:
        blocks = find_blocks(model.graph)
    packing = Packing(
        blocks=blocks, sensitivities=(), packs=_singles(blocks), alone=_standing_alone(model, blocks)
    )
    if recipe.method in _METHODS or recipe.reconstruction_effort == "fast":
        return packing
    if recipe.method == "auto" and not _has_floats(model):
        return packing
    packing = scored(
        packing, model, plan, start, samples, recipe, device=device, progress=progress, ranks=ranks
    )
    return replace(packing, packs=_packs(packing, recipe.max_pack_blocks))


def scored(
    packing: Packing,
    model: CanonicalModel,
    plan: QuantPlan,
    start: Solution,
    samples: Sequence[Sample],
    recipe: Recipe,
    *,
    device: str,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Packing:
    """``packing`` with scores of its blocks, where packs did not need them."""
    if packing.sensitivities:
        return packing
    scores = score_blocks(
        model,
        packing.blocks,
        plan,
        start,
        samples[:SCORING_SAMPLES],
        loss=recipe.output_loss,
        memory=_memory(recipe) // 2,
        device=device,
        progress=progress,
        ranks=ranks,
    )
    return replace(packing, sensitivities=scores)


def solve_by_packs(
    model: CanonicalModel,
    plan: QuantPlan,
    start: Solution,
    samples: Sequence[Sample],
    recipe: Recipe,
    *,
    scratch: Path,
    work_dir: Path,
    packing: Packing | None = None,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> PackSolution:
    """Reconstruct the network pack by pack. An interrupted call goes on behind its last finished pack.

    Args:
        start: ranges, and weights rounded to nearest.
        samples: all calibration samples; their order has no effect as long as it is the same.
        work_dir: keeps finished packs.
        packing: found before, for other bits of the same network; None finds it.
        ranks: processes that share the samples.

    Raises:
        UnsupportedOperatorError: a node cannot be lowered; raised before any long work.
        MemoryBudgetError: a single block needs more than ``recipe.max_memory``.
    """
    device = torch_device()
    if packing is None:
        packing = find_packing(
            model, plan, start, samples, recipe, device=device, progress=progress, ranks=ranks
        )
    settings = learning(recipe)
    sizes = _sizes(model, packing, samples[0])
    packing, needs = _within(model, plan, packing, sizes, len(samples), settings, recipe)
    if settings.is_global:
        # The loss at the outputs keeps what the packs behind compute.
        behind = accumulate(reversed([need.activations for need in needs]))
        needs = [replace(n, activations=a) for n, a in zip(needs, reversed(list(behind)), strict=True)]
    spare = _memory(recipe) // 2
    most = spare if settings.steps else PASS_BYTES
    together = [_together(need, min(most, spare - need.parameters)) for need in needs]
    whole = whole_network(packing.packs) if settings.is_tuned else None
    tuned_together, untuned = 0, ""
    if whole is not None and not _has_floats(model):
        whole, untuned = None, "Scales and biases were not learnt on the outputs: none of them holds floats."
    if whole is not None:
        need = pack_memory(whole, plan, *sizes, samples=len(samples), batch=1, keeps_integers=True)
        tuned_together = _together(need, spare - need.parameters)
        if need.activations + need.parameters > spare:
            whole, untuned = None, _unfit(need, spare)
    if settings.is_closed_form_first:
        start = round_shared(
            model,
            plan,
            start,
            samples,
            max_width=MAX_WIDTH,
            damping=ROUNDING_DAMPING,
            provider=recipe.provider,
            progress=progress,
        )
    folder = work_dir / "packs" / _key(model, plan, start, samples, packing, settings, recipe, device)
    found = reconstruct(
        model,
        plan,
        start,
        packing.packs,
        samples,
        settings,
        Resources(
            together=together,
            tuned_together=tuned_together,
            cache_bytes=spare,
            scratch=scratch,
            checkpoints=Checkpoints(folder),
            device=device,
        ),
        whole=whole,
        seed=recipe.seed,
        progress=progress,
        ranks=ranks,
    )
    return PackSolution(
        packing=packing,
        solution=found.solution,
        outcomes=found.outcomes,
        checkpoints=folder,
        tuning=found.tuning,
        untuned=untuned,
    )


def _has_floats(model: CanonicalModel) -> bool:
    """Whether an output holds floats, on which alternatives can be compared."""
    judged = [tensor for tensor in model.graph.outputs if tensor.name in model.judged]
    return any(np.issubdtype(tensor.dtype, np.floating) for tensor in judged)


def _unfit(need: PackMemory, spare: int) -> str:
    """Why the network is not tuned as a whole."""
    taken = (need.activations + need.parameters) / 2**20
    return (
        f"Scales and biases were not learnt on the outputs: one sample takes {taken:.0f} MiB, half of the budget is "
        f"{spare / 2**20:.0f} MiB (--max-memory {int(2 * taken) + 1} would do)."
    )


def _together(need: PackMemory, most: int) -> int:
    """Samples in one pass of ``most`` bytes: a power of two, so that passes end where the samples of a process do."""
    count = min(MOST_TOGETHER, most // max(1, need.activations))
    return 1 << count.bit_length() - 1 if count > 0 else 1


def _memory(recipe: Recipe) -> int:
    return DEFAULT_MEMORY if recipe.max_memory is None else recipe.max_memory << 20


def _singles(blocks: Sequence[Block]) -> tuple[Pack, ...]:
    unscored = [
        Sensitivity(
            block=block.index, loss=0.0, squared_error=0.0, absolute_error=0.0, curvature=0.0, omega=0.0
        )
        for block in blocks
    ]
    return pack_blocks(blocks, unscored, max_pack_blocks=1)


def _sizes(
    model: CanonicalModel, packing: Packing, sample: Sample
) -> tuple[Mapping[str, int], Mapping[str, int]]:
    """Elements of every tensor for one sample, and of every initializer."""
    network = BlockNetwork(model.graph, packing.blocks)
    sizes = network.measure({name: torch.from_numpy(np.array(sample[name])) for name in network.inputs})
    weights = {
        tensor.name: int(np.prod(tensor.shape))
        for node in model.graph.nodes
        for tensor in node.inputs
        if is_constant(tensor)
    }
    return sizes, weights


def _within(
    model: CanonicalModel,
    plan: QuantPlan,
    packing: Packing,
    sizes: tuple[Mapping[str, int], Mapping[str, int]],
    samples: int,
    settings: Learning,
    recipe: Recipe,
) -> tuple[Packing, list[PackMemory]]:
    """The packing, or one of smaller packs, whose every pack runs on one sample within the budget."""
    budget = _memory(recipe) // 2
    longest = max(len(pack.blocks) for pack in packing.packs)
    for limit in range(longest, 0, -1):
        packs = packing.packs if limit == longest else _packs(packing, limit)
        needs = [pack_memory(pack, plan, *sizes, samples=samples, batch=1) for pack in packs]
        worst = max(range(len(packs)), key=lambda i: needs[i].activations + needs[i].parameters)
        need = needs[worst].activations + needs[worst].parameters
        if need <= budget or not settings.steps:
            return replace(packing, packs=packs), needs
    ends = " to ".join(
        model.user_name(names[0]) for names in (packs[worst].inputs, packs[worst].outputs) if names
    )
    raise MemoryBudgetError(
        f"The block from {ends} alone needs {need / 2**20:.0f} MiB to be reconstructed, "
        f"and half of the budget is {budget / 2**20:.0f} MiB.",
        f"Give --max-memory {int(2 * need / 2**20) + 1} or more, or choose --effort fast.",
    )


def _packs(packing: Packing, most: int | None) -> tuple[Pack, ...]:
    """Packs of at most ``most`` blocks by the scores."""
    return pack_blocks(packing.blocks, packing.sensitivities, max_pack_blocks=most, alone=packing.alone)


def _standing_alone(model: CanonicalModel, blocks: Sequence[Block]) -> tuple[int, ...]:
    """The first and the last block, and those with an operator that no gradient passes: what is in front of it would
    learn nothing beside it."""
    foreign = foreign_nodes(model.graph)
    stopping = [block.index for block in blocks if not foreign.isdisjoint(block.nodes)]
    ends = [0, len(blocks) - 1] if len(blocks) > 2 else []
    return tuple(sorted({*ends, *stopping}))


def _key(
    model: CanonicalModel,
    plan: QuantPlan,
    start: Solution,
    samples: Sequence[Sample],
    packing: Packing,
    settings: Learning,
    recipe: Recipe,
    device: str,
) -> str:
    """A hash of all that the result depends on."""
    hasher = hashlib.sha256()

    def add(*parts: object) -> None:
        hasher.update(repr(parts).encode())

    add(__version__, torch.__version__, device, model.fingerprint, settings, recipe.seed, _memory(recipe))
    add([pack.nodes for pack in packing.packs], plan.target)
    for quantizer in plan.quantizers:
        qparams = start.qparams[quantizer.quantizer_id]
        add(quantizer, qparams.qtype, qparams.granularity)
        hasher.update(qparams.scale.tobytes() + qparams.zero_point.tobytes())
    # The model's own weights are known by its fingerprint.
    for name, value in sorted(start.weights.items()):
        add(name)
        hasher.update(np.ascontiguousarray(value).tobytes())
    for sample in samples:
        for name in sorted(sample):
            add(name, sample[name].shape, sample[name].dtype.str)
            hasher.update(np.ascontiguousarray(sample[name]).tobytes())
    return hasher.hexdigest()[:24]
