"""The steps of a run, one function each, as :mod:`onnxptq.pipeline` calls them.

A step joins stages that do not know each other and keeps time, notes and caches; it decides nothing that a
stage could decide.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import yaml

from onnxptq import reporting
from onnxptq.bit_plan import MEGABYTE, BitPlan, planned_bits, read_bit_plan
from onnxptq.calibrate import cache
from onnxptq.calibrate.feeds import ImagePreprocess, open_feeds, read_labels, split_holdout
from onnxptq.calibrate.products import Focus
from onnxptq.calibrate.run import DEFAULT_GROUP_BYTES, Calibration, calibrate
from onnxptq.comparison import missed_gate, resolve_preprocess
from onnxptq.equalize.run import equalize
from onnxptq.errors import FeedError, OutputPathError, QualityGateError
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.save import save_graph
from onnxptq.packing import Packing, PackSolution
from onnxptq.placing import observer_overrides, placement_request, require_quantizers
from onnxptq.publish import claimed_folder, space_errors, write_texts
from onnxptq.qdq import insert_quantizers
from onnxptq.ranks import ALONE, Ranks
from onnxptq.recipe import Recipe
from onnxptq.rooting import root_weights
from onnxptq.rotate.run import rotate
from onnxptq.runtime import count_kernels, runtime_version
from onnxptq.samples import ListFeeds, pick_samples
from onnxptq.shift.run import shift
from onnxptq.solving import Samples, Solver, draw_samples
from onnxptq.targets import TARGETS, WRITTEN_OUT, candidate_tensors
from onnxptq.types import CanonicalModel, Feeds, InputSpec, Progress, QuantPlan, Solution
from onnxptq.validate.compare import Comparison, compare
from onnxptq.validate.latency import Latency, measure_latency
from onnxptq.validate.parity import Parity, check_parity
from onnxptq.validate.report import DataFacts, ModelFacts, OutputFacts, Report, StageTime
from onnxptq.validate.structure import check_structure
from onnxptq.version import __version__

PARITY_SAMPLES = 2
"""Held-out samples on which every quantized edge is compared with its simulation."""

RELAXATIONS = 3
"""How often more nodes may be left in float to reach the floor: what each gains is only predicted."""

LAYER_SAMPLES = 4
"""Held-out samples on which every inner tensor is compared with the float network."""


COMPENSATED_BITS = 10
"""The nearest rounding that makes as little noise as 8 bits with compensated rounding (9 to 12 dB less)."""


@dataclass(slots=True)
class Run:
    """The settings of one run and what it has noted so far."""

    recipe: Recipe
    work_dir: Path
    scratch: Path
    progress: Progress | None
    ranks: Ranks = ALONE
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    bit_plan: BitPlan | None = None
    bits: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def group_bytes(self) -> int:
        """Bytes of activations held at once."""
        return DEFAULT_GROUP_BYTES if self.recipe.max_memory is None else self.recipe.max_memory << 20

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the time of a block to ``seconds[name]``."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def note(self, text: str) -> None:
        """Keep a remark for the report and say it."""
        if text not in self.notes:
            self.notes.append(text)
            if self.progress:
                self.progress.message(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """Calibration samples, held-out samples (None where there are none), and labels of the latter."""

    calibration: Feeds
    samples: Samples
    heldout: Feeds | None
    labels: npt.NDArray[Any] | None
    preprocess: ImagePreprocess | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A form of the model with its statistics, its plan, and a solver that has begun."""

    model: CanonicalModel
    statistics: Calibration
    plan: QuantPlan
    solver: Solver


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """The final plan with its parameters, and how packs were solved, where they were; ``packing`` is there where
    packs were scored or solved, ``focuses`` where ranges of softmax outputs were chosen by their products,
    ``nearest``, the solution by rounding to nearest, where packs bettered it."""

    plan: QuantPlan
    solution: Solution
    nearest: Solution | None
    focuses: Mapping[str, Focus]
    packed: PackSolution | None
    packing: Packing | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What was proven and measured of a written file; quality is None where nothing was held out."""

    parity: Parity
    quality: Comparison | None
    layers: Comparison | None
    nearest_layers: Comparison | None
    latency: Latency
    kernels: Mapping[str, int] | None


@contextmanager
def start(
    recipe: Recipe, work_dir: str | Path | None, progress: Progress | None, ranks: Ranks = ALONE
) -> Iterator[Run]:
    """A run with a work folder for caches and a scratch folder that is removed at the end.

    Raises:
        OutputPathError: the work folder cannot be made.
    """
    folder = Path(work_dir) if work_dir is not None else cache.default_work_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputPathError(
            f"The work folder '{folder}' cannot be written: {error.strerror or error}.",
            "Choose another with --work-dir.",
        ) from error
    with space_errors(folder), claimed_folder(folder, "onnxptq-run-") as scratch:
        yield Run(recipe=recipe, work_dir=folder, scratch=scratch, progress=progress, ranks=ranks)


def canonical_model(run: Run, source: Path) -> CanonicalModel:
    """The user's model in canonical form.

    Raises:
        UnsupportedOperatorError: the recipe needs torch, and an operator has no form in it.
        RecipeError: the recipe's plan is not for this model.
    """
    with run.timed("canonicalize"):
        model = canonicalize(
            source,
            run.scratch,
            opset=run.recipe.opset,
            simplify=run.recipe.simplify,
            expanded=WRITTEN_OUT[run.recipe.target],
            progress=run.progress,
        )
    for note in model.notes:
        run.note(note)
    if run.recipe.needs_torch:
        from onnxptq.lowering import require_supported

        require_supported(model.graph)
    if run.recipe.plan is not None:
        apply_bit_plan(run, model, read_bit_plan(Path(run.recipe.plan)), Path(run.recipe.plan))
    return model


def open_data(
    run: Run, model: CanonicalModel, calibration: object, evaluation: object | None, labels: object | None
) -> Data:
    """Calibration and held-out samples. Without evaluation data a part of the calibration data is held out."""
    recipe = run.recipe
    with run.timed("open data"):
        preprocess = picture_preprocess(run, model.inputs, (calibration, evaluation))
        feeds: Feeds = open_feeds(
            calibration,
            model.inputs,
            preprocess=preprocess,
            spool_dir=run.scratch,
            limit=recipe.samples,
            seed=recipe.seed,
        )
        heldout: Feeds | None
        if evaluation is not None:
            heldout = open_feeds(evaluation, model.inputs, preprocess=preprocess, spool_dir=run.scratch)
        elif recipe.holdout > 0:
            feeds, heldout = split_holdout(feeds, recipe.holdout)
        else:
            heldout = None
        if heldout is None:
            run.note("No sample was held out, so no quality is reported; give --eval or more samples.")
            if labels is not None:
                raise FeedError("Labels were given, but there are no held-out samples.", "Give --eval.")
        return Data(
            calibration=feeds,
            samples=draw_samples(feeds),
            heldout=heldout,
            labels=None if labels is None or heldout is None else read_labels(labels, heldout),  # type: ignore[arg-type]
            preprocess=preprocess,
        )


def picture_preprocess(
    run: Run, inputs: tuple[InputSpec, ...], sources: tuple[object, ...]
) -> ImagePreprocess | None:
    """The recipe's picture options over a guess from the input's shape; a guess that may be used is said."""
    found = resolve_preprocess(inputs, run.recipe.preprocess)
    are_folders = any(isinstance(source, str | Path) and Path(source).is_dir() for source in sources)
    if found is not None and not run.recipe.preprocess and are_folders:
        run.note(f"Pictures: {found.describe(is_guessed=True)}")
    return found


def prepared(run: Run, model: CanonicalModel, data: Data) -> Prepared:
    """The model with its channels rotated, rescaled, shifted, or as they are: what quantizes best to begin with.

    What rotations leave is rescaled before they are compared, and what is best of these is shifted. Where rescaled
    channels are good enough, nothing else is tried.
    """
    reference, model = model.path, _rooted(run, model, data)
    if run.recipe.method == "rtn":
        return _prepared(run, model, data, reference)
    base, found = model, _rescaled(run, model, data, reference, run.scratch)
    if run.recipe.tries_rotation and not found.solver.is_enough:
        rotated = _rotated(run, model, data)
        if rotated is not model:
            other = _rescaled(run, rotated, data, reference, rotated.path.parent)
            if _better(run, found, other, "rotated channels") is other:
                base, found = rotated, other
    if found.model is not base and not found.solver.is_enough:
        found = _better(run, _prepared(run, base, data, reference), found, "rescaled channels")
    if run.recipe.tries_shift and not found.solver.is_enough:
        shifted = _shifted(run, found.model, data)
        if shifted is not found.model:
            found = _better(run, found, _prepared(run, shifted, data, reference), "shifted channels")
    return found


def _rooted(run: Run, model: CanonicalModel, data: Data) -> CanonicalModel:
    """The model with softmax weights as powers of their roots, where the recipe asks for it."""
    if run.recipe.softmax_root == 1:
        return model
    with run.timed("root"):
        rooted, summary = root_weights(
            model,
            run.recipe.softmax_root,
            data.samples.correction[0],
            work_dir=run.scratch,
            provider=run.recipe.provider,
        )
    run.note(summary.summary)
    return rooted


def _rescaled(run: Run, model: CanonicalModel, data: Data, reference: Path, work_dir: Path) -> Prepared:
    """The model with rescaled channels, where the recipe allows it and anything can be gained."""
    if not run.recipe.equalize:
        return _prepared(run, model, data, reference)
    with run.timed("equalize"):
        equalized, summary = equalize(
            model,
            ListFeeds(data.samples.equalizing),
            work_dir=work_dir,
            tensors=candidate_tensors(GraphIndex(model.graph)),
            symmetric=run.recipe.target == "tensorrt",
            weight_bits=COMPENSATED_BITS if run.recipe.compensate else 8,
            samples=len(data.samples.equalizing),
            provider=run.recipe.provider,
            group_bytes=run.group_bytes,
            progress=run.progress,
        )
    run.note(summary.summary)
    return _prepared(run, equalized, data, reference)


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


def _shifted(run: Run, model: CanonicalModel, data: Data) -> CanonicalModel:
    with run.timed("shift"):
        shifted, summary = shift(
            model,
            ListFeeds(data.samples.equalizing),
            work_dir=model.path.parent,
            provider=run.recipe.provider,
            group_bytes=run.group_bytes,
        )
    run.note(summary.summary)
    return shifted


def _better(run: Run, plain: Prepared, changed: Prepared, what: str) -> Prepared:
    with run.timed("solve"):
        before, after = plain.solver.prospect(), changed.solver.prospect()
    kept = "kept" if after > before else "dropped"
    run.note(f"The {what} were {kept}: {before:.2f} dB without, {after:.2f} dB with them.")
    return changed if after > before else plain


def _prepared(run: Run, model: CanonicalModel, data: Data, reference: Path) -> Prepared:
    statistics = calibration(run, model, data)
    placed = plan(run, model, statistics)
    tensors = frozenset(q.tensor for q in placed.quantizers if q.role == "activation")
    solver = Solver(
        model=model,
        plan=placed,
        statistics=statistics,
        recipe=run.recipe,
        overrides=observer_overrides(model, GraphIndex(model.graph), run.recipe, tensors),
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
            run.note(f"Calibration is reused from '{run.work_dir}' (same model, data and settings).")
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


def plan(run: Run, model: CanonicalModel, statistics: Calibration) -> QuantPlan:
    """Where quantizers go for the recipe's target.

    Raises:
        SelectorError: a pattern matches nothing. Also see :func:`onnxptq.placing.require_quantizers`.
    """
    with run.timed("place"):
        placed = _placing(run, model, statistics)({})
        require_quantizers(placed, model, run.recipe)
        return placed


def apply_bit_plan(run: Run, model: CanonicalModel, plan: BitPlan, path: Path) -> None:
    """Place everything from now on at the plan's bits.

    Raises:
        RecipeError: the plan is not for this model.
    """
    run.bits = planned_bits(plan, model, path, (run.recipe.weight_bits, run.recipe.activation_bits))
    run.bit_plan = plan


def allocated(run: Run, source: CanonicalModel, form: Prepared) -> Prepared:
    """``form`` with bits chosen per pack, where the recipe sets a budget."""
    if not run.recipe.bit_budget or not form.plan.quantizers:
        return form
    # It imports torch, which a run at equal bits may do without.
    from onnxptq.allocating import choose_bits, survey_bits

    with run.timed("allocate"):
        survey = survey_bits(form.solver)
        chosen = choose_bits(form.solver, survey, source.fingerprint)
        apply_bit_plan(run, source, chosen, Path("plan.yaml"))
        run.note(reporting.bit_plan_note(chosen))
    placed = plan(run, form.model, form.statistics)
    with run.timed("solve"):
        solver = replace(form.solver.replanned(placed, {}), packing=survey.packing)
        solver.begin()
    return replace(form, plan=placed, solver=solver)


def _placing(
    run: Run, model: CanonicalModel, statistics: Calibration
) -> Callable[[Mapping[str, str]], QuantPlan]:
    """The plan as a function of the nodes to leave in float beyond those that the recipe names, with reasons."""
    index = GraphIndex(model.graph)
    request = placement_request(model, index, run.recipe, statistics.uncalibrated, run.bits)
    place = TARGETS[run.recipe.target]
    return lambda declined: place(index, replace(request, declined={**request.declined, **declined}))


def solved(run: Run, form: Prepared) -> Solved:
    """The parameters of every quantizer of the plan, or of one that leaves in float what spoils the outputs."""
    model, solver = form.model, form.solver
    with run.timed("solve"):
        found = solver.finish()
        best = solver, found
        placed = _placing(run, model, form.statistics)
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
        return Solved(
            plan=solver.plan,
            solution=found,
            nearest=None if solver.packed is None or found is solver.start else solver.start,
            focuses=solver.focuses,
            packed=solver.packed,
            packing=_packing(solver),
        )


def _note_all(run: Run, solver: Solver) -> None:
    for note in solver.notes:
        run.note(f"After that: {note}" if solver.declined else note)


def _packing(solver: Solver) -> Packing | None:
    return solver.packing if solver.packed is None else solver.packed.packing


def write(run: Run, model: CanonicalModel, solved: Solved, path: Path) -> None:
    """Write the QDQ file with its provenance, and what was decided about each node."""
    plan, solution = solved.plan, solved.solution
    with run.timed("write"):
        save_graph(
            insert_quantizers(model.graph, plan, solution),
            path,
            model_metadata=reporting.model_annotations(model, plan, run.recipe, run.bit_plan),
            node_metadata=reporting.node_annotations(model, plan, solved.packing, run.bit_plan),
        )


def check(
    run: Run,
    source: CanonicalModel,
    model: CanonicalModel,
    solved: Solved,
    path: Path,
    data: Data,
) -> Checks:
    """Prove the written file and measure it.

    Raises:
        OutputCheckError: the file is not what was planned, or does not compute what was simulated.
    """
    provider, plan, solution = run.recipe.provider, solved.plan, solved.solution
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
            provider=provider,
            group_bytes=run.group_bytes,
        )
    quality = layers = nearest = None
    if data.heldout is not None:
        with run.timed("measure quality"):
            quality = compare(
                source.source,
                path,
                data.heldout,
                labels=data.labels,
                provider=provider,
                work_dir=run.scratch,
                progress=run.progress,
            )
            some = ListFeeds(pick_samples(data.heldout, LAYER_SAMPLES))
            layers = _layers(run, model, path, some)
            if solved.nearest is not None:
                baseline = run.scratch / "nearest.onnx"
                save_graph(insert_quantizers(model.graph, plan, solved.nearest), baseline)
                nearest = _layers(run, model, baseline, some)
    with run.timed("measure latency"):
        latency = measure_latency(source.source, path, proof[0], provider=provider)
        kernels = count_kernels(path, run.scratch) if provider == "cpu" else None
    return Checks(
        parity=parity,
        quality=quality,
        layers=layers,
        nearest_layers=nearest,
        latency=latency,
        kernels=kernels,
    )


def _layers(run: Run, model: CanonicalModel, path: Path, feeds: Feeds) -> Comparison:
    """Every inner tensor of a quantized file beside the float one's."""
    return compare(
        model.path,
        path,
        feeds,
        layers=True,
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
    sizes = reporting.size_rows(model, plan, model.source_bytes, size)
    note = reporting.larger_note(model.source_bytes, size, sizes)
    if note:
        run.note(note)
    allowed = run.recipe.max_size
    if allowed is not None and size > allowed * MEGABYTE:
        run.note(f"The file takes {size / MEGABYTE:.3f} MB, more than the {allowed:g} MB that were allowed.")
    outputs = () if checks.quality is None else checks.quality.outputs
    missed = missed_gate(outputs, min_sqnr=run.recipe.min_sqnr, min_agreement=run.recipe.min_agreement)
    if missed is not None:
        run.note(f"The output was not kept: {missed.message}")
    recipe = yaml.safe_load(run.recipe.to_yaml())
    if data.preprocess is not None:
        recipe["preprocess"] = data.preprocess.model_dump(mode="json", exclude_none=True)
    return Report(
        model=ModelFacts(
            path=str(model.source),
            fingerprint=model.fingerprint,
            opset=model.opset,
            parameters=reporting.parameters(model),
            bytes=model.source_bytes,
        ),
        output=OutputFacts(path=str(target), bytes=size, sha256=reporting.file_sha256(written), note=note),
        target=plan.target,
        method=run.recipe.method,
        recipe=recipe,
        calibration=DataFacts(description=data.calibration.description, count=len(data.calibration)),
        heldout=None
        if data.heldout is None
        else DataFacts(description=data.heldout.description, count=len(data.heldout)),
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
        notes=tuple(run.notes),
        blocks=() if solved.packing is None else reporting.block_scores(model, solved.packing),
        packs=() if packed is None else reporting.pack_outcomes(model, packed.outcomes),
        softmax=reporting.softmax_rows(model, plan, solution, solved.focuses),
        bit_plan=None if run.bit_plan is None else reporting.bit_plan_facts(run.bit_plan),
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
    if solved.packed is not None:
        shutil.rmtree(solved.packed.checkpoints, ignore_errors=True)


def require_quality(run: Run, report: Report, folder: Path | None) -> None:
    """Hold the outputs against the recipe's gates; ``folder`` is where the report was written.

    Raises:
        QualityGateError: a gate is missed, or cannot be judged because nothing was held out.
    """
    missed = missed_gate(report.outputs, min_sqnr=run.recipe.min_sqnr, min_agreement=run.recipe.min_agreement)
    if missed is not None:
        seen = "" if folder is None else f" See '{folder / 'report.html'}'."
        raise QualityGateError(missed.message, f"{missed.remedy}{seen}")
