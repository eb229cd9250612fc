"""From a plan and its statistics to a solution: alternatives are measured on the network, the best one is kept.

Every decision is taken on calibration samples by the distance of the network's outputs from the float ones
(:mod:`onnxptq.trial`), never on held-out data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from onnxptq.calibrate.observers import Observer
from onnxptq.calibrate.products import HELD_BYTES, Focus, choose_softmax_ranges
from onnxptq.calibrate.ranges import choose_ranges
from onnxptq.calibrate.run import Calibration
from onnxptq.calibrate.select import CANDIDATES, label, select_observer
from onnxptq.graph.attention import find_mixed_weights
from onnxptq.graph.index import GraphIndex, outputs_behind
from onnxptq.listing import listed
from onnxptq.qdq import insert_quantizers
from onnxptq.ranks import ALONE, Ranks
from onnxptq.recipe import LowRank, Recipe
from onnxptq.reconstruct.bias import correct_biases
from onnxptq.reconstruct.initial import initial_solution, weight_grids
from onnxptq.reconstruct.rounding import round_in_closed_form
from onnxptq.relaxing import find_relaxation, measure_noise
from onnxptq.samples import Draw
from onnxptq.trial import Quality, Trial
from onnxptq.types import (
    GRAPH_OUTPUT,
    CanonicalModel,
    Feeds,
    PackOutcome,
    Progress,
    QParams,
    QuantPlan,
    Sample,
    Solution,
)

if TYPE_CHECKING:
    from onnxptq.packing import Packing, PackSolution

TRIAL_ELEMENTS = 1_250_000
"""Input elements on which alternatives are compared: 8 colour pictures of 224 x 224, or many small samples."""

TRIAL_SAMPLES = (8, 128)
"""Fewest and most calibration samples of a comparison, whatever their size."""

CORRECTION_SAMPLES = (8, 32)
"""The same for correcting biases and compensating roundings."""

EQUALIZING_SAMPLES = 32
"""Calibration samples that channels are rescaled by, at most; eight of them judge the result."""

FLOOR_MARGIN_DB = 1.5
"""By how much a relaxed plan aims above the floor: other data than the trial's will score a little less."""

FOCUS_SAMPLES = 24
"""Calibration samples whose attention matrices choose the ranges of softmax outputs: with few, strong attention that
they lack is clipped."""

FEW_BITS = 4
"""Activations of up to so many bits take their ranges from :data:`AT_FEW_BITS`, whatever the trial says: rounding to
nearest spoils the outputs so much then that what is left tells nothing about the network once it is solved."""

AT_FEW_BITS = Observer(name="mse", norm=2.0)

TELLING_DB = 0.1
"""A loss of less is not worth a sentence."""

WIDTH_AT_8_BITS = 1280
"""Widest layer whose 8-bit weights are rounded with compensation: wider ones cost minutes and gain little."""

WIDTH_BELOW = 8192
"""The same for narrower weights, where it decides between a working network and a broken one."""

BRANCH_MARGIN_DB = 0.5
"""By how much branches must be better than the alternatives to be worth the time that they take whenever the network
runs."""

_PLAIN = "nearest rounding"
_COMPENSATED = "compensated rounding"
_PACKS = "packs"
_LOW_RANK: Mapping[LowRank, str] = {
    "off": _PACKS,
    "merge": f"{_PACKS} with merged corrections",
    "branch": f"{_PACKS} with branches",
}
"""Names of the alternatives that are solved by packs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Calibration samples with a task: those that alternatives are compared on, and those that correct.

    Samples for ``equalizing`` begin with those for ``correction``. ``apart`` gives the positions of ``trial``
    among all samples, where they do not overlap with the others.
    """

    trial: Sequence[Sample]
    correction: Sequence[Sample]
    equalizing: Sequence[Sample]
    apart: frozenset[int]


@dataclass(slots=True, kw_only=True)
class Solver:
    """Finds the solution of one plan: ``begin`` once, then ``finish``.

    Outputs are compared with those of the model at ``reference``, of which ``model`` may be another form (None:
    it is the same). ``declined`` names the nodes that ``plan`` leaves in float to reach the floor. ``notes``
    collects what was measured and decided; ``focuses`` are the ranges of softmax outputs that were chosen by the
    products that read them, by quantizer id; ``packed`` is how packs were solved, where they won, and ``packing``
    the packs to take, None for those that the plan suggests. ``checkpoints`` are all folders with finished packs. The
    float network is run once, at the first comparison.
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
    ranks: Ranks = ALONE
    declined: Mapping[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    focuses: Mapping[str, Focus] = field(default_factory=dict)
    start: Solution = field(default_factory=lambda: Solution(qparams={}))
    packing: Packing | None = None
    packed: PackSolution | None = None
    checkpoints: list[Path] = field(default_factory=list)
    _grids: Mapping[str, QParams] = field(default_factory=dict)
    _known_trial: Trial | None = None
    _start_quality: Quality | None = None
    _float_rank: float | None = None
    _reached: Quality | None = None
    _noise: Mapping[str, float] = field(default_factory=dict)

    def begin(self) -> None:
        """Choose ranges and round to nearest: ``start`` is then set."""
        if not self.plan.quantizers:
            return
        self._grids = weight_grids(self.model.graph, self.plan)
        if self.recipe.method == "rtn":
            self.start = self._initial(
                choose_ranges(self.plan, self.statistics, _named(self.recipe), self.overrides)
            )
            return
        self.start = self._initial(self._ranges())

    def rank(self) -> float:
        """Quality of ``start``, to compare different forms of one model; infinite where nothing is quantized."""
        return self._starting().rank if self.plan.quantizers else math.inf

    @property
    def is_enough(self) -> bool:
        """Whether ``start`` reaches what the recipe calls enough."""
        enough = self.recipe.enough
        return enough is not None and (not self.plan.quantizers or self._starting().level >= enough)

    def _starting(self) -> Quality:
        if self._start_quality is None:
            self._start_quality = self._trial().quality(self.plan, self.start)
        return self._start_quality

    @property
    def reached(self) -> float:
        """What ``finish`` reached, in dB on the trial samples."""
        return math.inf if self._reached is None else self._reached.score

    def prospect(self) -> float:
        """What forms of one model are compared by: the mean of ``rank`` and of the rank with float weights.

        Weights rounded to nearest make noise that a later compensation removes for the most part; by itself it
        would hide what the activations gain.
        """
        return self.rank() if self._float_rank is None else (self.rank() + self._float_rank) / 2

    def finish(self) -> Solution:
        """The best solution that the recipe's method allows."""
        if not self.plan.quantizers:
            return self.start
        if self.recipe.method == "rtn":
            return self._baseline()
        return self._improved()

    def _baseline(self) -> Solution:
        """Nearest rounding, and corrected biases where they are asked for, whether they help or not."""
        if not self.recipe.corrects_biases:
            return self.start
        found = self._corrected(self.start)
        count = sum(value is not self.start.weights.get(name) for name, value in found.weights.items())
        self.notes.append(f"{count} biases were corrected on {len(self.samples.correction)} samples.")
        return found

    def replanned(self, plan: QuantPlan, declined: Mapping[str, str]) -> Solver:
        """A solver that has not begun, for the plan that leaves ``declined`` in float besides."""
        return replace(
            self,
            plan=plan,
            declined=declined,
            notes=[],
            focuses={},
            start=Solution(qparams={}),
            packed=None,
            _start_quality=None,
            _float_rank=None,
            _reached=None,
        )

    def _trial(self) -> Trial:
        if self._known_trial is None:
            self._known_trial = Trial(
                self.model,
                self.samples.trial,
                self.scratch,
                self.recipe.provider,
                reference=self.reference,
                outputs=self._spoiled(),
            )
        return self._known_trial

    def _spoiled(self) -> frozenset[str]:
        """The outputs that quantizers of the plan come before."""
        sites = [site for quantizer in self.plan.quantizers for site in quantizer.sites]
        behind = outputs_behind(GraphIndex(self.model.graph), {site.consumer for site in sites})
        return behind | {site.tensor for site in sites if site.consumer == GRAPH_OUTPUT}

    def relax(self, found: Solution, plan_of: Callable[[str], QuantPlan]) -> Mapping[str, str]:
        """More nodes to leave in float, with reasons, because the outputs stay below the recipe's floor.

        Args:
            found: what ``finish`` returned just before.
            plan_of: the plan that quantizes one node alone.
        """
        floor = self.recipe.least_db
        if floor is None or self._reached is None:
            return {}
        reached, aim = self._reached.score, floor + FLOOR_MARGIN_DB
        if reached >= (aim if self.declined else floor):
            return {}
        trial = self._trial()
        if not self._noise:
            readers = {s.consumer for q in self.plan.quantizers for s in q.sites} - {GRAPH_OUTPUT}
            self._noise = measure_noise(
                plan_of,
                sorted(readers),
                found,
                lambda plan, solution: trial.quality(plan, solution).score,
                self.progress,
            )
        more = find_relaxation(self._noise, self.declined, floor=aim, reached=reached)
        self.notes.append(
            f"The outputs reached {reached:.2f} dB on calibration samples, "
            + (f"short of {aim:g} dB: " if self.declined else f"below the floor of {floor:g} dB: ")
            + (
                f"{len(self.declined) + len(more)} of {len(self._noise)} nodes are left in float."
                if more
                else "too many nodes share in the noise for leaving more in float."
            )
        )
        return more

    def _initial(self, activations: Mapping[str, QParams]) -> Solution:
        return initial_solution(self.model.graph, self.plan, activations, self._grids)

    def _ranges(self) -> Mapping[str, QParams]:
        """Parameters of every activation."""
        if self.recipe.observer != "auto":
            return choose_ranges(self.plan, self.statistics, _named(self.recipe), self.overrides)
        focused = self._focused()
        # Fitted without the trial samples, so that clipping what calibration has not seen shows; with float
        # weights, so that their noise does not hide that of the activations.
        fitting = replace(self.statistics, statistics=self.statistics.fitting)
        activations = replace(
            self.plan, quantizers=tuple(q for q in self.plan.quantizers if q.role == "activation")
        )
        few = replace(
            activations, quantizers=tuple(q for q in activations.quantizers if q.qtype.bits <= FEW_BITS)
        )

        def solved(statistics: Calibration, candidate: Observer) -> Solution:
            ranges = choose_ranges(activations, statistics, candidate, self.overrides)
            narrow = choose_ranges(few, statistics, AT_FEW_BITS, self.overrides)
            return Solution(qparams={**ranges, **narrow, **focused})

        candidates = CANDIDATES if len(few.quantizers) < len(activations.quantizers) else (AT_FEW_BITS,)
        solutions = {candidate: solved(fitting, candidate) for candidate in candidates}
        rank = self._trial().adjustable(activations, solutions[candidates[0]])
        selected = select_observer(
            lambda candidate, count: rank(solutions[candidate], count),
            len(self.samples.trial),
            candidates,
            progress=self.progress,
        )
        self._float_rank = selected.scores[label(selected.observer)]
        self.notes.append(selected.summary)
        return solved(self.statistics, selected.observer).qparams

    def _focused(self) -> Mapping[str, QParams]:
        """Parameters of the softmax outputs whose observer no rule names."""
        ruled = {q.quantizer_id for q in self.plan.quantizers if q.tensor in self.overrides}
        allowed = self.recipe.max_memory
        found = choose_softmax_ranges(
            self.model,
            self.plan,
            choose_ranges(self.plan, self.statistics, Observer(name="minmax"), self.overrides),
            self.samples.equalizing[:FOCUS_SAMPLES],
            provider=self.recipe.provider,
            group_bytes=HELD_BYTES if allowed is None else min(HELD_BYTES, allowed << 20),
            progress=self.progress,
        )
        self.focuses = {name: focus for name, focus in found.items() if name not in ruled}
        lost = [
            10 * math.log10(f.from_zero / f.free) for f in self.focuses.values() if f.is_held and f.free > 0
        ]
        if lost and max(lost) >= TELLING_DB:
            self.notes.append(
                f"{self.plan.target} has no zero point for softmax ranges that begin above 0: those would leave up "
                f"to {max(lost):.1f} dB less noise in the products."
            )
        read = {site.consumer for quantizer in self.plan.quantizers for site in quantizer.sites}
        mixed = find_mixed_weights(GraphIndex(self.model.graph))
        self.notes += [f"{entry.note}." for entry in mixed if entry.product.name in read]
        return {name: focus.qparams for name, focus in self.focuses.items()}

    def _can_be_lowered(self) -> bool:
        """Whether torch can run the network; only ``auto`` has another way where it cannot."""
        # Importing torch takes longer than quantizing a small network without it.
        from onnxptq.lowering import check_supported, unsupported_nodes

        may_run_foreign = self.recipe.unknown_operators == "float"
        refused = unsupported_nodes(self.model.graph, may_run_foreign=may_run_foreign)
        if refused and self.recipe.method == "auto":
            self.notes.append(
                f"Layers are rounded one by one and not pack by pack: {refused[0].node}: {refused[0].reason}"
            )
            return False
        gaps = check_supported(self.model.graph)
        if gaps:
            names = listed([f"{gap.node} ({gap.op})" for gap in gaps])
            self.notes.append(f"Nothing is learnt through what has no torch form: {names}.")
        return True

    def _by_packs(self, low_rank: LowRank, packed: dict[str, PackSolution]) -> Solution:
        """The network solved by packs, which ``packed`` keeps under the name of the alternative."""
        from onnxptq.packing import focus_notes, solve_by_packs

        (everything,) = Draw(self.everything).take((0, len(self.everything)))
        found = solve_by_packs(
            self.model,
            self.plan,
            self.start,
            everything,
            self.recipe.updated(low_rank=low_rank),
            scratch=self.scratch,
            work_dir=self.work_dir,
            packing=next((other.packing for other in packed.values()), self.packing),
            progress=self.progress,
            ranks=self.ranks,
        )
        if not packed:
            self.notes.extend(focus_notes(self.model, self.plan, self.start, self.recipe))
        self.checkpoints.append(found.checkpoints)
        self.packed = packed[_LOW_RANK[low_rank]] = found
        # Where several alternatives are solved, each has something of its own to tell.
        label = f"{_LOW_RANK[low_rank]}: " if len(self.recipe.low_rank_choices) > 1 else ""
        if found.untuned:
            self.notes.append(label + found.untuned)
        if found.tuning is not None:
            self.notes.append(label + _told(found.tuning))
        return found.solution

    def _improved(self) -> Solution:
        """The best of what is tried: one alternative after the other until the outputs are good enough."""
        solutions = {_PLAIN: self.start}
        qualities = {_PLAIN: self._starting()}
        best = _PLAIN
        packed: dict[str, PackSolution] = {}
        for name, found in self._alternatives(packed):
            enough = self.recipe.enough
            if not name.startswith(_PACKS) and enough is not None and qualities[best].level >= enough:
                self.notes.append(f"Nothing more was tried: {enough:g} dB on calibration samples are enough.")
                break
            solutions[name] = found()
            qualities[name] = self._trial().quality(self.plan, solutions[name])
            # Of equals packs: where no output holds floats nothing can be compared, and they were asked for.
            best = max(
                qualities, key=lambda known: (qualities[known].rank - self._margin(known), known in packed)
            )
        listed = ", ".join(f"{name} {quality.rank:.2f}" for name, quality in qualities.items())
        self.notes.append(f"Weights by {best} (dB on calibration samples: {listed}).")
        highest = max(qualities, key=lambda known: qualities[known].rank)
        if highest != best:
            self.notes.append(
                f"Branches gain less than {self._margin(highest):g} dB, which their run time is not worth."
            )
        self._reached = qualities[best]
        self.packed = packed.get(best)
        return solutions[best]

    def _margin(self, name: str) -> float:
        """What an alternative must be better by."""
        is_asked_for = self.recipe.low_rank == "branch"
        return BRANCH_MARGIN_DB if name == _LOW_RANK["branch"] and not is_asked_for else 0.0

    def _alternatives(self, packed: dict[str, PackSolution]) -> Sequence[tuple[str, Callable[[], Solution]]]:
        """What may be better than nearest rounding, the cheapest for what it gains first."""
        if self.recipe.is_solved_by_packs and self._can_be_lowered():
            return [
                (_LOW_RANK[choice], functools.partial(self._by_packs, choice, packed))
                for choice in self.recipe.low_rank_choices
            ]
        compensated = functools.cache(self._compensated)
        found: list[tuple[str, Callable[[], Solution]]] = []
        if self.recipe.corrects_biases:
            found.append((f"{_PLAIN} and corrected biases", lambda: self._corrected(self.start)))
        if self.recipe.compensates:
            found.append((_COMPENSATED, compensated))
        if self.recipe.corrects_biases and self.recipe.compensates:
            found.append((f"{_COMPENSATED} and corrected biases", lambda: self._corrected(compensated())))
        return found

    def _compensated(self) -> Solution:
        return round_in_closed_form(
            self.model,
            self.plan,
            self.start,
            self.samples.correction,
            max_width=WIDTH_AT_8_BITS if self.recipe.weight_bits == 8 else WIDTH_BELOW,
            provider=self.recipe.provider,
            progress=self.progress,
        )

    def _corrected(self, solution: Solution) -> Solution:
        return correct_biases(
            self.model,
            self.plan,
            solution,
            self.samples.correction,
            insert=insert_quantizers,
            work_dir=self.scratch,
            provider=self.recipe.provider,
            progress=self.progress,
        )


def _told(tuning: PackOutcome) -> str:
    """What came of learning scales and biases on the outputs."""
    if tuning.after >= tuning.before:
        return (
            f"Scales and biases were learnt on the outputs in {tuning.steps} steps and dropped: unseen samples gain "
            "nothing."
        )
    return (
        f"Scales and biases were learnt on the outputs in {tuning.steps} steps: noise over signal "
        f"{tuning.before:.4g} before, {tuning.after:.4g} after."
    )


def draw_samples(feeds: Feeds, progress: Progress | None = None) -> Samples:
    """Trial samples, as many as make a comparison both telling and cheap, and others that correct."""
    draw = Draw(feeds, progress)
    elements = sum(value.size for value in next(iter(feeds)).values())
    fitting = TRIAL_ELEMENTS // max(1, elements)
    count, correcting = (min(high, max(low, fitting)) for low, high in (TRIAL_SAMPLES, CORRECTION_SAMPLES))
    # A quarter of the data at most is set apart; with hardly any data, it serves both ends.
    apart = min(count, len(feeds) // 4)
    trial, others = draw.take((0, apart or count), (apart, max(correcting, EQUALIZING_SAMPLES)))
    return Samples(
        trial=trial,
        correction=others[:correcting],
        equalizing=others[:EQUALIZING_SAMPLES],
        apart=frozenset(draw.order[:apart]),
    )


def _named(recipe: Recipe) -> Observer:
    assert recipe.observer != "auto"
    return Observer(name=recipe.observer, percentile=recipe.percentile)
