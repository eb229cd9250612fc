"""From a plan and its statistics to a solution: alternatives are measured on the network, the best one is kept.

Every decision is taken on calibration samples by the distance of the network's outputs from the float ones
(:mod:`onnxptq.trial`), never on held-out data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from onnxptq.calibrate.observers import Observer
from onnxptq.calibrate.products import choose_softmax_ranges
from onnxptq.calibrate.ranges import choose_ranges
from onnxptq.calibrate.run import Calibration
from onnxptq.calibrate.select import label, select_observer
from onnxptq.lowering import check_supported
from onnxptq.packing import PackSolution, solve_by_packs
from onnxptq.qdq import insert_quantizers
from onnxptq.recipe import Recipe
from onnxptq.reconstruct.bias import correct_biases
from onnxptq.reconstruct.initial import initial_solution, weight_grids
from onnxptq.reconstruct.rounding import round_in_closed_form
from onnxptq.relaxing import find_relaxation
from onnxptq.samples import Draw
from onnxptq.trial import Trial
from onnxptq.types import CanonicalModel, Feeds, Progress, QParams, QuantPlan, Sample, Solution

TRIAL_ELEMENTS = 2_500_000
"""Input elements on which alternatives are compared: 16 colour pictures of 224 x 224, or many small samples."""

TRIAL_SAMPLES = (8, 128)
"""Fewest and most calibration samples of a comparison, whatever their size."""

CORRECTION_SAMPLES = 32
"""Calibration samples that correct biases and compensate roundings."""

FLOOR_MARGIN_DB = 1.0
"""By how much a relaxed plan aims above the floor: other data than the trial's will score a little less."""

FOCUS_SAMPLES = 2
"""Calibration samples whose attention matrices choose the ranges of softmax outputs."""

WIDTH_AT_8_BITS = 1280
"""Widest layer whose 8-bit weights are rounded with compensation: wider ones cost minutes and gain little."""

WIDTH_BELOW = 8192
"""The same for narrower weights, where it decides between a working network and a broken one."""

_PLAIN = "nearest rounding"


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Calibration samples with a task: those that alternatives are compared on, and those that correct.

    ``apart`` gives the positions of the former among all samples, where the two do not overlap.
    """

    trial: Sequence[Sample]
    correction: Sequence[Sample]
    apart: frozenset[int]


@dataclass(slots=True, kw_only=True)
class Solver:
    """Finds the solution of one plan: ``begin`` once, then ``finish``.

    Outputs are compared with those of the model at ``reference``, of which ``model`` may be another form (None:
    it is the same). ``notes`` collects what was measured and decided; ``packed`` is how packs were solved, where
    they were. The float network is run once, at the first comparison.
    """

    model: CanonicalModel
    plan: QuantPlan
    statistics: Calibration
    recipe: Recipe
    overrides: Mapping[str, Observer]
    samples: Samples
    everything: Feeds
    scratch: Path
    work_dir: Path
    reference: Path | None = None
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)
    start: Solution = field(default_factory=lambda: Solution(qparams={}))
    packed: PackSolution | None = None
    _known_trial: Trial | None = None
    _known_rank: float | None = None
    _float_rank: float | None = None

    def begin(self) -> None:
        """Choose ranges and round to nearest: ``start`` is then set."""
        if not self.plan.quantizers:
            return
        grids = weight_grids(self.model.graph, self.plan)
        if self.recipe.method == "rtn":
            self.start = self._initial(self.statistics, _named(self.recipe), {}, grids)
            return
        observer, focused = self._ranges()
        self.start = self._initial(self.statistics, observer, focused, grids)

    def rank(self) -> float:
        """Quality of ``start``, to compare different forms of one model."""
        if self._known_rank is None:
            self._known_rank = self._trial().rank(self.plan, self.start)
        return self._known_rank

    def prospect(self) -> float:
        """What forms of one model are compared by: the mean of ``rank`` and of the rank with float weights.

        Weights rounded to nearest make noise that a later compensation removes for the most part; by itself it
        would hide what the activations gain.
        """
        return self.rank() if self._float_rank is None else (self.rank() + self._float_rank) / 2

    def finish(self) -> Solution:
        """The best solution that the recipe's method allows."""
        if self.recipe.method == "rtn" or not self.plan.quantizers:
            return self.start
        if self.recipe.is_solved_by_packs and self._can_be_lowered():
            return self._best({_PLAIN: self.start, "packs": self._by_packs()})
        return self._best(self._alternatives())

    def replanned(self, plan: QuantPlan) -> Solver:
        """A solver that has not begun, for another plan of the same model."""
        return replace(
            self,
            plan=plan,
            notes=[],
            start=Solution(qparams={}),
            packed=None,
            _known_rank=None,
            _float_rank=None,
        )

    def _trial(self) -> Trial:
        if self._known_trial is None:
            self._known_trial = Trial(
                self.model, self.samples.trial, self.scratch, self.recipe.provider, reference=self.reference
            )
        return self._known_trial

    def relax(self, found: Solution, plan_of: Callable[[str], QuantPlan]) -> Mapping[str, str]:
        """Nodes to leave in float, with reasons, because the outputs stay below the recipe's floor.

        Args:
            found: what ``finish`` returned.
            plan_of: the plan that quantizes one node alone.
        """
        floor = self.recipe.least_db
        if floor is None or self.recipe.method == "rtn":
            return {}
        trial = self._trial()
        reached = trial.score(self.plan, found)
        if reached >= floor:
            return {}
        readers = {s.consumer for q in self.plan.quantizers if q.role == "weight" for s in q.sites}
        declined = find_relaxation(
            plan_of,
            sorted(readers),
            found,
            trial.score,
            floor=floor + FLOOR_MARGIN_DB,
            reached=reached,
            progress=self.progress,
        )
        self.notes.append(
            f"The outputs reached {reached:.2f} dB on calibration samples, below the floor of {floor:g} dB: "
            + (
                f"{len(declined)} of {len(readers)} weighted nodes are left in float."
                if declined
                else "too many nodes share in the noise for leaving some in float."
            )
        )
        return declined

    def _initial(
        self,
        statistics: Calibration,
        observer: Observer,
        focused: Mapping[str, QParams],
        grids: Mapping[str, QParams],
    ) -> Solution:
        ranges = choose_ranges(self.plan, statistics, observer, self.overrides)
        return initial_solution(self.model.graph, self.plan, {**ranges, **focused}, grids)

    def _ranges(self) -> tuple[Observer, Mapping[str, QParams]]:
        if self.recipe.observer != "auto":
            return _named(self.recipe), {}
        focused = choose_softmax_ranges(
            self.model,
            self.plan,
            choose_ranges(self.plan, self.statistics, Observer(name="minmax"), self.overrides),
            self.samples.correction[:FOCUS_SAMPLES],
            provider=self.recipe.provider,
            progress=self.progress,
        )
        # Fitted without the trial samples, so that clipping what calibration has not seen shows; with float
        # weights, so that their noise does not hide that of the activations.
        fitting = replace(self.statistics, statistics=self.statistics.fitting)
        activations = replace(
            self.plan, quantizers=tuple(q for q in self.plan.quantizers if q.role == "activation")
        )

        def quality(candidate: Observer) -> float:
            ranges = choose_ranges(activations, fitting, candidate, self.overrides)
            return self._trial().rank(activations, Solution(qparams={**ranges, **focused}), exact=True)

        observer, scores = select_observer(quality, progress=self.progress)
        self._float_rank = max(scores.values())
        listed = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
        self.notes.append(f"Ranges by {label(observer)} (dB on calibration samples: {listed}).")
        return observer, focused

    def _can_be_lowered(self) -> bool:
        """Whether torch can run the network; only ``auto`` has another way where it cannot."""
        gaps = check_supported(self.model.graph)
        if gaps and self.recipe.method == "auto":
            self.notes.append(
                f"Layers are rounded one by one and not pack by pack: {gaps[0].node}: {gaps[0].reason}"
            )
            return False
        return True

    def _by_packs(self) -> Solution:
        self.packed = solve_by_packs(
            self.model,
            self.plan,
            self.start,
            Draw(self.everything).take(0, len(self.everything)),
            self.recipe,
            scratch=self.scratch,
            work_dir=self.work_dir,
            progress=self.progress,
        )
        return self.packed.solution

    def _alternatives(self) -> dict[str, Solution]:
        """Solutions worth trying, by name, the plain one first."""
        samples = self.samples.correction
        found = {_PLAIN: self.start}
        if self.recipe.compensate:
            found["compensated rounding"] = round_in_closed_form(
                self.model,
                self.plan,
                self.start,
                samples,
                max_width=WIDTH_AT_8_BITS if self.recipe.weight_bits == 8 else WIDTH_BELOW,
                provider=self.recipe.provider,
                progress=self.progress,
            )
        if self.recipe.correct_bias:
            for name, solution in tuple(found.items()):
                found[f"{name} and corrected biases"] = correct_biases(
                    self.model,
                    self.plan,
                    solution,
                    samples,
                    insert=insert_quantizers,
                    work_dir=self.scratch,
                    provider=self.recipe.provider,
                    progress=self.progress,
                )
        return found

    def _best(self, alternatives: Mapping[str, Solution]) -> Solution:
        if len(alternatives) == 1:
            return next(iter(alternatives.values()))
        scores = {
            name: self.rank() if name == _PLAIN else self._trial().rank(self.plan, solution)
            for name, solution in alternatives.items()
        }
        chosen = max(scores, key=lambda name: scores[name])
        listed = ", ".join(f"{name} {score:.2f}" for name, score in scores.items())
        self.notes.append(f"Weights by {chosen} (dB on calibration samples: {listed}).")
        return alternatives[chosen]


def draw_samples(feeds: Feeds) -> Samples:
    """Trial samples, as many as make a comparison both telling and cheap, and others that correct."""
    draw = Draw(feeds)
    elements = sum(value.size for value in next(iter(feeds)).values())
    low, high = TRIAL_SAMPLES
    count = min(high, max(low, TRIAL_ELEMENTS // max(1, elements)))
    # A quarter of the data at most is set apart; with hardly any data, it serves both ends.
    apart = min(count, len(feeds) // 4)
    return Samples(
        trial=draw.take(0, apart or count),
        correction=draw.take(apart, CORRECTION_SAMPLES),
        apart=frozenset(draw.order[:apart]),
    )


def _named(recipe: Recipe) -> Observer:
    assert recipe.observer != "auto"
    return Observer(name=recipe.observer, percentile=recipe.percentile)
