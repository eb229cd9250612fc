"""The exact form of a model that quantizes best: its channels rotated, rescaled, shifted, or as they are.

All forms compute the same function. Each is calibrated, placed and begun to be solved before it is judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from onnxptq.bit_plan import BitPlan, executed, planned_bits
from onnxptq.calibrate import cache
from onnxptq.calibrate.products import HELD_BYTES, choose_root
from onnxptq.calibrate.run import Calibration, calibrate
from onnxptq.equalize.run import find_rescaling
from onnxptq.graph.attention import find_attention
from onnxptq.graph.index import GraphIndex
from onnxptq.placing import Selectors, observer_overrides, placement_request, require_quantizers
from onnxptq.recipe import Recipe
from onnxptq.rooting import root_weights
from onnxptq.rotate.run import rotate
from onnxptq.running import Data, NoteRank, Run
from onnxptq.runtime import runtime_version
from onnxptq.samples import ListFeeds
from onnxptq.shift.attention import Grids
from onnxptq.shift.run import shift
from onnxptq.solving import Solver
from onnxptq.targets import SYMMETRIC, TARGETS, candidate_tensors
from onnxptq.types import CanonicalModel, QuantPlan, ShiftedPlace
from onnxptq.version import __version__

COMPENSATED_BITS = 10
"""The nearest rounding that makes as little noise as 8 bits with compensated rounding (9 to 12 dB less)."""


FORM_MARGIN_DB = 0.5
"""What another form must gain with few bits: it is judged before packs are solved, which changes more than that."""

LEAST_TELLING_DB = -6.0
"""With few bits a form below this is not taken: outputs with four times as much noise as signal tell nothing about
the network once its packs are solved."""

_DEPLOYED_BITS = 8
"""Of activations on targets that integer kernels run."""

ROOT_SAMPLES = 8
"""Calibration samples whose attention chooses the root of softmax weights: the gaps between orders are wide."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A form of the model with its statistics, its plan, and a solver that has begun."""

    model: CanonicalModel
    statistics: Calibration
    plan: QuantPlan
    solver: Solver


def prepared(run: Run, model: CanonicalModel, data: Data) -> Prepared:
    """The model with its channels rotated, rescaled, shifted, or as they are: what quantizes best to begin with.

    What rotations leave is rescaled before they are compared, and what is best of these is shifted. Where rescaled
    channels are good enough, nothing else is tried.
    """
    reference, model = model.path, _rooted(run, model, data)
    if run.recipe.method == "rtn":
        return _rescaled(run, model, data, reference, run.scratch)
    base, found = model, _rescaled(run, model, data, reference, run.scratch)
    if run.recipe.tries_rotation and not found.solver.is_enough:
        rotated = _rotated(run, model, data)
        if rotated is not model:
            other = _rescaled(run, rotated, data, reference, rotated.path.parent)
            if _better(run, found, other, "rotated channels") is other:
                base, found = rotated, other
    if found.model is not base and not found.solver.is_enough:
        found = _better(run, _prepared(run, base, data, reference), found, "rescaled channels")
    for where in _shifted_places(run.recipe, found):
        if not found.solver.is_enough:
            shifted = _shifted(run, found, data, where)
            if shifted is not found.model:
                other = _prepared(run, shifted, data, reference)
                # In attention the noise of the products has judged, over all their rows; a few outputs say less.
                if where != "in attention":
                    other = _better(run, found, other, f"channels shifted {where}")
                found = other
    return found


def _shifted_places(recipe: Recipe, form: Prepared) -> Iterator[ShiftedPlace]:
    if recipe.tries_subtraction and recipe.target in SYMMETRIC:
        yield "behind activations"
    if recipe.tries_shift:
        yield "between layers"
    producer = GraphIndex(form.model.graph).producer
    sources = (producer(q.tensor) for q in form.plan.quantizers if q.role == "activation")
    if recipe.shifts_values and any(node is not None and node.op == "Softmax" for node in sources):
        yield "in attention"


def _rooted(run: Run, model: CanonicalModel, data: Data) -> CanonicalModel:
    """The model with softmax weights as powers of their roots, where the recipe asks for it or that serves best."""
    order = _root_order(run, model, data)
    if order == 1:
        return model
    with run.timed("root"):
        rooted, summary = root_weights(
            model,
            order,
            data.samples.correction[0],
            work_dir=run.scratch,
            provider=run.recipe.provider,
        )
    run.note(summary.summary)
    return rooted


def _root_order(run: Run, model: CanonicalModel, data: Data) -> int:
    recipe = run.recipe
    if not recipe.tries_roots or not find_attention(GraphIndex(model.graph)):
        return recipe.softmax_root or 1
    placed = plan(run, Selectors(model), Calibration(statistics={}, samples=0))
    with run.timed("root"):
        found = choose_root(
            model,
            placed,
            data.samples.correction[:ROOT_SAMPLES],
            provider=recipe.provider,
            group_bytes=min(HELD_BYTES, run.group_bytes),
            progress=run.progress,
        )
    if found.noise_db:
        listed = ", ".join(f"{order}: {-noise:.1f}" for order, noise in found.noise_db.items())
        run.note(
            f"Softmax weights by their root of order {found.order} (dB of the products by order: {listed})."
        )
    return found.order


def _rescaled(run: Run, model: CanonicalModel, data: Data, reference: Path, work_dir: Path) -> Prepared:
    """The model with rescaled channels, where the recipe allows it and anything can be gained."""
    if not run.recipe.tries_rescaling:
        return _prepared(run, model, data, reference)
    with run.timed("equalize"):
        rescaling = find_rescaling(
            model,
            ListFeeds(data.samples.equalizing),
            work_dir=work_dir,
            tensors=candidate_tensors(GraphIndex(model.graph)),
            symmetric=run.recipe.target in SYMMETRIC,
            weight_bits=COMPENSATED_BITS if run.recipe.compensates else 8,
            samples=len(data.samples.equalizing),
            provider=run.recipe.provider,
            group_bytes=run.group_bytes,
            progress=run.progress,
        )
        # With few bits what is enough is out of reach, and a baseline is not asked whether it is.
        is_asked = not run.recipe.is_low_bit and run.recipe.method != "rtn"
        is_judged = rescaling.needs_judging or run.recipe.enough is None or not is_asked
        equalized, summary = rescaling.judged() if is_judged else rescaling.proposed()
    found = _prepared(run, equalized, data, reference)
    if not is_judged and not found.solver.is_enough:
        with run.timed("equalize"):
            better, summary = rescaling.judged()
        if better is not equalized:
            found = _prepared(run, better, data, reference)
    run.note(summary.summary)
    return found


def _rotated(run: Run, model: CanonicalModel, data: Data) -> CanonicalModel:
    folder = run.scratch / "rotated"
    folder.mkdir(exist_ok=True)
    with run.timed("rotate"):
        rotated, summary = rotate(
            model,
            ListFeeds(data.samples.correction[:1]),
            work_dir=folder,
            seed=run.recipe.seed,
            provider=run.recipe.provider,
        )
    run.note(summary.summary)
    return rotated


def _shifted(run: Run, form: Prepared, data: Data, where: ShiftedPlace) -> CanonicalModel:
    known = form.solver.start.qparams
    with run.timed("shift"):
        shifted, summary = shift(
            form.model,
            ListFeeds(data.samples.equalizing),
            work_dir=form.model.path.parent,
            where=where,
            grids=Grids(
                qparams={
                    q.tensor: known[q.quantizer_id] for q in form.plan.quantizers if q.role == "activation"
                },
                symmetric=run.recipe.target in SYMMETRIC,
            ),
            provider=run.recipe.provider,
            group_bytes=run.group_bytes,
        )
    if summary.tensors or summary.reason or where == "between layers":
        run.note(summary.summary)
    return shifted


def _better(run: Run, plain: Prepared, changed: Prepared, what: str) -> Prepared:
    with run.timed("solve"):
        before, after = plain.solver.prospect(), changed.solver.prospect()
    is_better, asked = after > before, ""
    if is_better and run.recipe.is_low_bit:
        is_better = after > max(before + FORM_MARGIN_DB, LEAST_TELLING_DB)
        asked = (
            f"; with few bits {FORM_MARGIN_DB:g} dB more are asked for, and at least {LEAST_TELLING_DB:g} dB"
        )
    found = f"{before:.2f} dB without, {after:.2f} dB with them"
    run.note(f"The {what} were kept: {found}." if is_better else f"The {what} were dropped: {found}{asked}.")
    return changed if is_better else plain


def _prepared(run: Run, model: CanonicalModel, data: Data, reference: Path) -> Prepared:
    statistics, selectors = calibration(run, model, data), Selectors(model)
    placed = plan(run, selectors, statistics)
    tensors = frozenset(q.tensor for q in placed.quantizers if q.role == "activation")
    solver = Solver(
        model=model,
        plan=placed,
        statistics=statistics,
        recipe=run.recipe,
        overrides=observer_overrides(selectors, run.recipe, tensors),
        samples=data.samples,
        everything=data.calibration,
        scratch=run.scratch,
        work_dir=run.work_dir,
        reference=reference,
        progress=run.progress,
        ranks=run.ranks,
    )
    with run.timed("solve"):
        solver.begin()
    return Prepared(model=model, statistics=statistics, plan=placed, solver=solver)


def calibration(run: Run, model: CanonicalModel, data: Data) -> Calibration:
    """Statistics of every tensor that some target may quantize, from the cache where they are known."""
    recipe = run.recipe
    histogram = recipe.observer != "minmax" or any(
        rule.observer not in (None, "minmax") for rule in recipe.rules
    )
    with run.timed("calibrate"):
        tensors = candidate_tensors(GraphIndex(model.graph))
        key = cache.cache_key(
            __version__,
            runtime_version(),
            recipe.provider,
            model.fingerprint,
            data.calibration.fingerprint,
            histogram,
            tensors,
            *sorted(data.samples.apart),
        )
        known = cache.load_calibration(run.work_dir, key)
        if known is not None:
            run.note(
                f"Calibration is reused from '{run.work_dir}' (same model, data and settings).", NoteRank.LAST
            )
            return known
        result = calibrate(
            model,
            data.calibration,
            tensors,
            apart=data.samples.apart,
            histogram=histogram,
            provider=recipe.provider,
            group_bytes=run.group_bytes,
            progress=run.progress,
            ranks=run.ranks,
        )
        cache.save_calibration(run.work_dir, key, result)
    return result


def plan(run: Run, selectors: Selectors, statistics: Calibration) -> QuantPlan:
    """Where quantizers go for the recipe's target.

    Raises:
        SelectorError: a pattern matches nothing. Also see :func:`onnxptq.placing.require_quantizers`.
    """
    with run.timed("place"):
        placed = placement(run, selectors, statistics)({})
        require_quantizers(placed, selectors.model, run.recipe)
        return placed


def require_choices(run: Run, selectors: Selectors) -> None:
    """Refuse, before any data are read, what the recipe's patterns make impossible.

    Raises:
        SelectorError, TargetIllegalError, UnsupportedModelError: as :func:`plan`, or the pattern of a rule matches
            nothing.
    """
    placed = plan(run, selectors, Calibration(statistics={}, samples=0))
    tensors = frozenset(q.tensor for q in placed.quantizers if q.role == "activation")
    observer_overrides(selectors, run.recipe, tensors)


def placement(
    run: Run, selectors: Selectors, statistics: Calibration
) -> Callable[[Mapping[str, str]], QuantPlan]:
    """The plan as a function of the nodes to leave in float beyond those that the recipe names, with reasons."""
    request = placement_request(selectors, run.recipe, statistics.uncalibrated, run.bits)
    place = TARGETS[run.recipe.target]
    return lambda declined: place(
        selectors.index, replace(request, declined={**request.declined, **declined})
    )


def apply_bit_plan(run: Run, model: CanonicalModel, plan: BitPlan, path: Path) -> None:
    """Place everything from now on at the plan's bits.

    Raises:
        RecipeError: the plan is not for this model.
    """
    run.bits = planned_bits(plan, model, path, (run.recipe.weight_bits, run.recipe.activation_bits))
    run.bit_plan = executed(plan, None if run.recipe.target == "simulate" else _DEPLOYED_BITS)
