"""From a recipe's budget to bits per pack: costs are measured, the allocator decides, the plan says why.

It starts from a solver that has begun, that is, from the network quantized at equal bits everywhere: its
scores make the packs, and the reconstruction later works on the same packs.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from onnxptq import reporting
from onnxptq.allocate.choices import Allocation, AverageBits, PackChoices, TotalLoss, WeightBytes
from onnxptq.allocate.exact import allocate
from onnxptq.allocate.greedy import allocate_greedily
from onnxptq.allocate.monotone import monotone
from onnxptq.bit_costs import BitPlacing, Costs, measure_costs, weight_bytes
from onnxptq.bit_plan import MEGABYTE, BitPlan, build_bit_plan
from onnxptq.calibrate.observers import Observer
from onnxptq.calibrate.products import choose_softmax_ranges
from onnxptq.calibrate.ranges import choose_ranges
from onnxptq.errors import BudgetError
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.save import save_graph
from onnxptq.packing import SCORING_SAMPLES, Packing, find_packing, scored, torch_device
from onnxptq.placing import Selectors, placement_request, storage_notes
from onnxptq.qdq import insert_quantizers
from onnxptq.recipe import Recipe, Target
from onnxptq.reconstruct.branches import largest_branches
from onnxptq.samples import Draw
from onnxptq.solving import FOCUS_SAMPLES, Solver
from onnxptq.targets import TARGETS
from onnxptq.types import CanonicalModel, QParams, QuantPlan
from onnxptq.validate.changed import changed_tensors

TELLING_SAMPLES = 32
"""With fewer, costs of packs that are close to each other change places from sample to sample."""

_SLACK = 256
"""Bytes by which annotations may grow with digits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """Packs with their scores, and what each costs at each number of bits."""

    packing: Packing
    costs: Costs


def survey_bits(solver: Solver) -> Survey:
    """Score the blocks of the solver's network and measure its packs at every number of bits.

    Raises:
        UnsupportedOperatorError: a node cannot be lowered; raised before anything runs.
        UsageError: no samples, or no output to compare.
    """
    recipe = solver.recipe
    device = torch_device()
    (samples,) = Draw(solver.everything).take((0, SCORING_SAMPLES))
    model, plan, start = solver.model, solver.plan, solver.start
    options: dict[str, Any] = {"device": device, "progress": solver.progress, "ranks": solver.ranks}
    packing = find_packing(model, plan, start, samples, recipe, **options)
    packing = scored(packing, model, plan, start, samples, recipe, **options)
    costs = measure_costs(
        model,
        packing.packs,
        packing.sensitivities,
        _placing(solver),
        solver.samples.trial,
        loss=recipe.output_loss,
        **options,
    )
    return Survey(packing=packing, costs=costs)


def costs_note(solver: Solver) -> str:
    """That costs were measured on few samples; empty where they were not."""
    count = len(solver.samples.trial)
    if count >= TELLING_SAMPLES:
        return ""
    # A quarter of the data may be set apart for trials; where that is not what limits them, samples are large.
    more = " More calibration samples make it surer." if count >= len(solver.everything) // 4 else ""
    return (
        f"What bits cost was measured on {count} samples, with fewer than {TELLING_SAMPLES} the choice between packs "
        f"that cost nearly the same is chance.{more}"
    )


def choose_bits(solver: Solver, survey: Survey, source: CanonicalModel) -> BitPlan:
    """The bits of every pack within the recipe's budget, by costs that never rise with bits.

    Args:
        source: the model that the user gave, in canonical form.

    Raises:
        BudgetError: it cannot be reached.
    """

    def plan(allocation: Allocation) -> BitPlan:
        return build_bit_plan(
            solver.model,
            survey.packing.packs,
            survey.packing.sensitivities,
            choices,
            allocation,
            source=source,
            recipe=solver.recipe,
        )

    recipe, choices = solver.recipe, [monotone(pack) for pack in survey.costs.packs]
    fixed = [_at(pack, recipe.activation_bits) for pack in choices]
    if recipe.max_size is not None:
        draft = plan(allocate(fixed, WeightBytes(sys.maxsize)))
        beside = _bytes_beside_weights(solver, survey.packing, draft)
        return plan(_within_size(fixed, recipe.max_size, beside, recipe.target, source.opset))
    if recipe.max_loss is not None:
        return plan(allocate(fixed, TotalLoss(recipe.max_loss)))
    return plan(_at_average(choices, recipe))


def _at_average(choices: Sequence[PackChoices], recipe: Recipe) -> Allocation:
    assert recipe.average_bits is not None
    if recipe.allocator == "greedy":
        return allocate_greedily(choices, recipe.average_bits)
    assert recipe.average_of_activations is not None
    return allocate(choices, AverageBits(recipe.average_bits, recipe.average_of_activations))


def _at(pack: PackChoices, bits: int) -> PackChoices:
    """``pack`` with its activations at ``bits``, or as near as the target executes."""
    nearest = min(pack.activations, key=lambda c: (abs(c.bits - bits), -c.bits), default=None)
    return replace(pack, activations=() if nearest is None else (nearest,))


def _bytes_beside_weights(solver: Solver, packing: Packing, draft: BitPlan) -> int:
    """Bytes of the file, annotations and all branches that it may get included, less those of its quantized weights.

    Args:
        draft: any plan of the same packs; its text is as long as that of the final one but for some digits.
    """
    model, plan = solver.model, solver.plan
    start = solver.start
    if "branch" in solver.recipe.low_rank_choices:
        start = replace(start, branches=largest_branches(GraphIndex(model.graph), plan))
    changed = changed_tensors(
        model, solver.samples.correction[0], work_dir=solver.scratch, provider=solver.recipe.provider
    )
    whole = save_graph(
        insert_quantizers(model.graph, plan, start),
        solver.scratch / "start.onnx",
        model_metadata=reporting.model_annotations(model, plan, solver.recipe, draft, changed),
        node_metadata=reporting.node_annotations(model, plan, packing, draft, start.branches),
    )
    return whole - weight_bytes(model, plan) + _SLACK


def _within_size(
    choices: Sequence[PackChoices], megabytes: float, beside: int, target: Target, opset: int
) -> Allocation:
    try:
        return allocate(choices, WeightBytes(max(0, int(megabytes * MEGABYTE) - beside)))
    except BudgetError as error:
        least = beside + sum(min(c.size for c in p.weights) for p in choices if p.weights)
        raise BudgetError(
            f"A file of {megabytes:g} MB is out of reach for {target}: the least is "
            f"{least / MEGABYTE:.3f} MB, of which {beside / MEGABYTE:.3f} MB are not quantized weights.",
            " ".join(["Allow a larger size.", *storage_notes(target, opset)]),
        ) from error


def _placing(solver: Solver) -> BitPlacing:
    """The recipe's placement, and ranges by its observer, at other numbers of bits."""
    recipe, model = solver.recipe, solver.model
    selectors = Selectors(model)
    request = placement_request(selectors, recipe, solver.statistics.uncalibrated)

    def ranges(plan: QuantPlan) -> Mapping[str, QParams]:
        found = choose_ranges(plan, solver.statistics, _observer(recipe), solver.overrides)
        if recipe.observer != "auto":
            return found
        focused = choose_softmax_ranges(
            model, plan, found, solver.samples.correction[:FOCUS_SAMPLES], provider=recipe.provider
        )
        return {**found, **{name: focus.qparams for name, focus in focused.items()}}

    return BitPlacing(
        plan_at=lambda bits: TARGETS[recipe.target](
            selectors.index, replace(request, weight_bits=bits, activation_bits=bits)
        ),
        ranges=ranges,
        pinned=frozenset(request.bits_of),
    )


def _observer(recipe: Recipe) -> Observer:
    return Observer(
        name="mse" if recipe.observer == "auto" else recipe.observer, percentile=recipe.percentile
    )
