"""The steps of a run, one function each, as :mod:`onnxptq.pipeline` calls them.

A step joins stages that do not know each other and keeps time, notes and caches; it decides nothing that a
stage could decide.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs
import yaml

from onnxptq import reporting
from onnxptq.bit_plan import MEGABYTE, read_bit_plan
from onnxptq.calibrate.run import Calibration
from onnxptq.comparison import missed_gate
from onnxptq.errors import QualityGateError
from onnxptq.forming import Prepared, apply_bit_plan, placement, plan, require_choices
from onnxptq.graph.boundary import without_boundary
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.save import save_graph
from onnxptq.placing import Selectors, budget_notes, selector_notes
from onnxptq.publish import write_texts
from onnxptq.qdq import insert_quantizers
from onnxptq.recipe import Recipe
from onnxptq.running import Checks, Data, NoteRank, Run, Solved
from onnxptq.runtime import count_kernels, infer_types, require_loadable
from onnxptq.samples import ListFeeds, pick_samples
from onnxptq.solving import Solver
from onnxptq.targets import WRITTEN_OUT
from onnxptq.threads import import_meanwhile
from onnxptq.types import CanonicalModel, Feeds, QuantPlan, Sample, Solution
from onnxptq.validate.changed import changed_tensors
from onnxptq.validate.compare import Comparison, compare
from onnxptq.validate.latency import Latency, measure_latency
from onnxptq.validate.parity import check_parity
from onnxptq.validate.report import DataFacts, ModelFacts, OutputFacts, Report, StageTime
from onnxptq.validate.structure import check_structure

if TYPE_CHECKING:
    from onnxptq.packing import Packing

PARITY_SAMPLES = 2
"""Held-out samples on which every quantized edge is compared with its simulation."""

RELAXATIONS = 3
"""How often more nodes may be left in float to reach the floor: what each gains is only predicted."""

REPORT_FILES = ("report.json", "report.html", "plan.yaml")
"""What a run may write into the folder of its report."""

LAYER_SAMPLES = 4
"""Held-out samples on which every inner tensor is compared with the float network."""


def canonical_model(run: Run, source: Path) -> CanonicalModel:
    """The user's model in canonical form.

    Raises:
        UnsupportedModelError: it cannot be prepared, or onnxruntime cannot load it.
        UnsupportedOperatorError: the recipe needs torch, and an operator has no form in it.
        RecipeError: the recipe's plan is not for this model.
        SelectorError: a pattern matches nothing. See :func:`onnxptq.forming.require_choices` for more.
    """
    # Native processes prepare the model, and this one would only wait for them.
    import_meanwhile(*_libraries(run.recipe))
    with run.timed("canonicalize"):
        model = canonicalize(
            source,
            run.scratch,
            opset=run.recipe.opset,
            simplify=run.recipe.simplify,
            expanded=WRITTEN_OUT[run.recipe.target],
            infer_types=infer_types,
            progress=run.progress,
        )
        # Quality and latency will need it; better now than after calibration.
        require_loadable(model, run.recipe.provider)
    selectors = Selectors(model)
    for note in model.notes:
        run.note(note, NoteRank.LAST)
    said = (
        *selector_notes(selectors, run.recipe, (run.recipe.target,)),
        *budget_notes(run.recipe, model.opset),
    )
    for note in said:
        run.note(note)
    if run.recipe.needs_torch:
        from onnxptq.lowering import require_supported

        require_supported(model.graph, may_run_foreign=run.recipe.unknown_operators == "float")
    if run.recipe.plan is not None:
        apply_bit_plan(run, model, read_bit_plan(Path(run.recipe.plan)), Path(run.recipe.plan))
    require_choices(run, selectors)
    return model


def _libraries(recipe: Recipe) -> Iterator[str]:
    """Large libraries that a run with ``recipe`` will import."""
    if recipe.tries_rescaling:
        yield "scipy.optimize"
    if recipe.is_solved_by_packs or recipe.needs_torch:
        yield "torch"


def allocated(run: Run, source: CanonicalModel, form: Prepared) -> Prepared:
    """``form`` with bits chosen per pack, where the recipe sets a budget."""
    if not run.recipe.bit_budget or not form.plan.quantizers:
        return form
    # It imports torch, which a run at equal bits may do without.
    from onnxptq.allocating import choose_bits, costs_note, survey_bits

    with run.timed("allocate"):
        survey = survey_bits(form.solver)
        chosen = choose_bits(form.solver, survey, source)
        apply_bit_plan(run, source, chosen, Path("plan.yaml"))
        for note in filter(None, (reporting.bit_plan_note(chosen), costs_note(form.solver))):
            run.note(note)
    placed = plan(run, Selectors(form.model), form.statistics)
    with run.timed("solve"):
        solver = replace(form.solver.replanned(placed, {}), packing=survey.packing)
        solver.begin()
    return replace(form, plan=placed, solver=solver)


def solved(run: Run, form: Prepared) -> Solved:
    """The parameters of every quantizer of the plan, or of one that leaves in float what spoils the outputs."""
    model, solver = form.model, form.solver
    with run.timed("solve"):
        found = solver.finish()
        best = solver, found
        placed = placement(run, Selectors(model), form.statistics)
        nodes = [node.name for node in model.graph.nodes]
        for _ in range(RELAXATIONS):
            more = solver.relax(
                found, lambda kept: placed({name: "set aside" for name in nodes if name != kept})
            )
            _note_all(run, solver)
            if not more:
                break
            declined = {**solver.declined, **more}
            solver = solver.replanned(placed(declined), declined)
            solver.begin()
            found = solver.finish()
            if solver.reached > best[0].reached:
                best = solver, found
        else:
            _note_all(run, solver)
        if best[0] is not solver:
            run.note(
                f"Back to {best[0].reached:.2f} dB with {len(best[0].declined)} of these nodes in float: "
                "more did not help."
            )
        solver, found = best
        if found.branches or run.recipe.low_rank == "branch":
            run.note(reporting.branch_note(model, solver.plan, found))
        return Solved(
            plan=solver.plan,
            solution=found,
            nearest=None if solver.packed is None or found is solver.start else solver.start,
            focuses=solver.focuses,
            packed=solver.packed,
            packing=_packing(solver),
            checkpoints=tuple(solver.checkpoints),
        )


def _note_all(run: Run, solver: Solver) -> None:
    for note in solver.notes:
        run.note(f"After that: {note}" if solver.declined else note)


def _packing(solver: Solver) -> Packing | None:
    return solver.packing if solver.packed is None else solver.packed.packing


def write(run: Run, model: CanonicalModel, solved: Solved, path: Path, sample: Sample) -> None:
    """Write the QDQ file with its provenance, what was decided about each node, and which tensors hold, on
    ``sample``, other values than the user's."""
    plan, solution = solved.plan, solved.solution
    with run.timed("write"):
        changed = changed_tensors(model, sample, work_dir=run.scratch, provider=run.recipe.provider)
        save_graph(
            _quantized(model, plan, solution),
            path,
            model_metadata=reporting.model_annotations(model, plan, run.recipe, run.bit_plan, changed),
            node_metadata=reporting.node_annotations(
                model, plan, solved.packing, run.bit_plan, solution.branches
            ),
        )


def _quantized(model: CanonicalModel, plan: QuantPlan, solution: Solution) -> gs.Graph:
    """The graph of the QDQ file, with the user's outputs."""
    return without_boundary(insert_quantizers(model.graph, plan, solution), model.outputs)


def check(
    run: Run,
    source: CanonicalModel,
    form: Prepared,
    solved: Solved,
    path: Path,
    data: Data,
) -> Checks:
    """Prove the written file and measure it.

    Raises:
        OutputCheckError: the file is not what was planned, or does not compute what was simulated.
    """
    provider, model, plan, solution = run.recipe.provider, form.model, solved.plan, solved.solution
    with run.timed("check"):
        check_structure(path, model, plan, solution)
        proof = pick_samples(data.heldout or data.calibration, PARITY_SAMPLES)
        parity = check_parity(
            path,
            model,
            plan,
            solution,
            proof,
            work_dir=run.scratch,
            elements=form.statistics.elements,
            provider=provider,
            group_bytes=run.group_bytes,
            progress=run.progress,
        )
        for note in parity.notes:
            run.note(note, NoteRank.FIRST)
    quality = layers = nearest = None
    if data.heldout is not None:
        with run.timed("measure quality"):
            quality = compare(
                source.path if source.boundary else source.reference,
                path,
                data.heldout,
                inner=source.boundary,
                selected=source.selected,
                labels=data.labels,
                origin=data.label_origin,
                provider=provider,
                work_dir=run.scratch,
                progress=run.progress,
            )
            for note in quality.notes:
                run.note(note)
            some = ListFeeds(pick_samples(data.heldout, LAYER_SAMPLES))
            layers = _layers(run, model, path, some)
            if solved.nearest is not None:
                baseline = run.scratch / "nearest.onnx"
                save_graph(_quantized(model, plan, solved.nearest), baseline)
                nearest = _layers(run, model, baseline, some)
    with run.timed("measure latency"):
        latency = measure_latency(source.reference, path, proof[0], provider=provider, progress=run.progress)
        branch_latency = _branch_latency(run, model, solved, path, proof[0])
        kernels = count_kernels(path, run.scratch) if provider == "cpu" else None
    return Checks(
        parity=parity,
        quality=quality,
        layers=layers,
        nearest_layers=nearest,
        latency=latency,
        branch_latency=branch_latency,
        kernels=kernels,
    )


def _branch_latency(
    run: Run, model: CanonicalModel, solved: Solved, path: Path, sample: Sample
) -> Latency | None:
    """The file with its branches against the same without them."""
    if not solved.solution.branches:
        return None
    bare = run.scratch / "without_branches.onnx"
    save_graph(_quantized(model, solved.plan, replace(solved.solution, branches={})), bare)
    return measure_latency(bare, path, sample, provider=run.recipe.provider)


def _layers(run: Run, model: CanonicalModel, path: Path, feeds: Feeds) -> Comparison:
    """Every inner tensor of a quantized file beside the float one's."""
    reference = model.path
    if model.boundary:
        reference = model.path.with_name(f"float_{model.path.name}")
        save_graph(without_boundary(model.graph.copy(), model.outputs), reference, share=True)
    return compare(
        reference,
        path,
        feeds,
        layers=True,
        selected=model.selected,
        provider=run.recipe.provider,
        work_dir=run.scratch,
        progress=run.progress,
    )


def report(
    run: Run,
    model: CanonicalModel,
    solved: Solved,
    statistics: Calibration,
    written: Path,
    target: Path,
    data: Data,
    checks: Checks,
) -> Report:
    """Everything that was done, declined and measured."""
    plan, solution, packed = solved.plan, solved.solution, solved.packed
    size = sum(part.stat().st_size for part in written.parent.iterdir())
    sizes = reporting.size_rows(model, plan, solution, size)
    note = reporting.larger_note(model, size, sizes)
    slower = reporting.slower_note(plan.target, checks.latency, checks.kernels)
    for told in filter(None, (note, slower)):
        run.note(told, NoteRank.FIRST)
    allowed = run.recipe.max_size
    if allowed is not None and size > allowed * MEGABYTE:
        told = f"The file takes {size / MEGABYTE:.3f} MB, more than the {allowed:g} MB that were allowed."
        run.note(told, NoteRank.FIRST)
    outputs = () if checks.quality is None else checks.quality.outputs
    missed = missed_gate(outputs, min_sqnr=run.recipe.min_sqnr, min_agreement=run.recipe.min_agreement)
    if missed is not None:
        run.note(f"The output was not kept: {missed.message}", NoteRank.FIRST)
    recipe = yaml.safe_load(run.recipe.to_yaml())
    if data.preprocess is not None:
        recipe["preprocess"] = data.preprocess.model_dump(mode="json", exclude_none=True)
    return Report(
        model=ModelFacts(
            path=str(model.source),
            fingerprint=model.source_sha256,
            opset=model.opset,
            parameters=reporting.parameters(model),
            bytes=model.source_bytes,
        ),
        output=OutputFacts(path=str(target), bytes=size, sha256=reporting.file_sha256(written), note=note),
        target=plan.target,
        method=run.recipe.method,
        recipe=recipe,
        calibration=DataFacts(
            description=data.calibration.description,
            count=len(data.calibration),
            is_random=data.is_random,
        ),
        heldout=None
        if data.heldout is None
        else DataFacts(
            description=data.heldout.description,
            count=len(data.heldout),
            is_random=data.is_heldout_random,
        ),
        quantized=reporting.quantized_rows(model, plan, solution),
        skips=reporting.user_skips(model, plan, statistics),
        tensors=()
        if checks.layers is None
        else reporting.tensor_rows(
            model,
            plan,
            solution,
            statistics,
            checks.layers.layers,
            () if checks.nearest_layers is None else checks.nearest_layers.layers,
        ),
        outputs=outputs,
        parity=checks.parity,
        latency=checks.latency,
        kernels=checks.kernels,
        sizes=sizes,
        stages=tuple(StageTime(name=name, seconds=seconds) for name, seconds in run.seconds.items()),
        peak_memory_bytes=reporting.peak_memory_bytes(),
        versions=reporting.versions(hashlib.sha256(run.recipe.to_yaml().encode()).hexdigest()),
        notes=run.notes,
        blocks=() if solved.packing is None else reporting.block_scores(model, solved.packing),
        packs=() if packed is None else reporting.pack_outcomes(model, packed.outcomes),
        tuning=None if packed is None else packed.tuning,
        softmax=reporting.softmax_rows(model, plan, solution, solved.focuses),
        bit_plan=None if run.bit_plan is None else reporting.bit_plan_facts(run.bit_plan),
        branches=reporting.branch_facts(model, solution, checks.branch_latency),
    )


def write_report(run: Run, report: Report, folder: str | Path | None) -> Path | None:
    """``report.json`` and ``report.html`` in ``folder``, if one is given, and ``plan.yaml`` where bits differ.

    Raises:
        OutputPathError: the folder cannot be written.
    """
    if folder is None:
        return None
    # It imports matplotlib, which a run without a report need not wait for.
    from onnxptq.validate.html import render_html

    place = Path(folder)
    written = json.dumps(report.to_json(), indent=2) + "\n"
    plan = {} if run.bit_plan is None else {"plan.yaml": run.bit_plan.to_yaml()}
    write_texts(place, {"report.json": written, "report.html": render_html(report), **plan})
    return place


def forget_packs(solved: Solved) -> None:
    """Remove the packs that were kept for the case of an interruption."""
    for folder in solved.checkpoints:
        shutil.rmtree(folder, ignore_errors=True)


def require_quality(run: Run, report: Report, folder: Path | None) -> None:
    """Hold the outputs against the recipe's gates; ``folder`` is where the report was written.

    Raises:
        QualityGateError: a gate is missed, or cannot be judged because nothing was held out.
    """
    missed = missed_gate(report.outputs, min_sqnr=run.recipe.min_sqnr, min_agreement=run.recipe.min_agreement)
    if missed is not None:
        seen = "" if folder is None else f" See '{folder / 'report.html'}'."
        raise QualityGateError(missed.message, f"{missed.remedy}{seen}")
