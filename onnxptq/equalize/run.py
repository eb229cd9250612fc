"""The stage: trace, observe, choose, judge, apply, check."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnxptq.equalize.apply import apply_factors
from onnxptq.equalize.factors import Choice, choose
from onnxptq.equalize.gains import channel_gains, tensors_behind
from onnxptq.equalize.limits import Limits, factor_limits
from onnxptq.equalize.observe import Spread, drawn, group_count, observe
from onnxptq.equalize.rules import RULES
from onnxptq.equalize.terms import Component, Emphasis, build_terms, components
from onnxptq.equalize.tracing import Trace, Tracer
from onnxptq.equalize.trial import Trial, is_better
from onnxptq.graph.classes import variable_of
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.tracing import Shapes
from onnxptq.runtime import Provider, Session, compare_forms, concrete_shapes, first_sample
from onnxptq.threads import in_threads
from onnxptq.types import CanonicalModel, Feeds, Progress, Sample, Skip, started

FACTOR_LIMIT = 64.0
"""Factors stay within 1/64 and 64."""

EMPHASES = (Emphasis(clipping=0.1, weights=4.0), Emphasis(clipping=1.0, weights=4.0))
"""What is tried, the most widely useful first. The first that gains on unseen samples is taken; where there are
none, the first."""

OBSERVED_ELEMENTS = 250_000_000
"""Elements of activations that are observed, as whole samples: at least twelve, at most what is given."""

CLIP_EMPHASIS = Emphasis(clipping=1.0, weights=4.0)
"""The same for channels that pass a Clip, whose factors hold within the samples seen only."""

_GROUP_BYTES = 1 << 30
_UNSEEN = 8
_FEWEST_SEEN = 12
_FEWEST = 6

Solved = Sequence[tuple[Component, Choice]]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class RescaledTensor:
    """One quantized tensor whose channels were rescaled. ``tensor`` is the user's name."""

    tensor: str
    channels: int
    smallest: float
    largest: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Equalization:
    """What was rescaled.

    ``before_db`` and ``after_db`` are the mean signal-to-noise ratios of the outputs, over samples set apart, of
    an imitation that rounds the rescalable activations and their weights; NaN where there were too
    few samples to set any apart. ``clipped`` counts the tensors behind a Clip, some of whose channels now saturate
    at a value between the calibrated extreme and the old bound. ``skips`` names the tensors that were left alone,
    and why.
    """

    tensors: tuple[RescaledTensor, ...] = ()
    clipped: int = 0
    before_db: float = float("nan")
    after_db: float = float("nan")
    skips: tuple[Skip, ...] = ()

    @property
    def summary(self) -> str:
        """One line."""
        if not self.tensors:
            return f"No activation was rescaled per channel: {len(self.skips)} cannot be, the others gain nothing."
        low = min(t.smallest for t in self.tensors)
        high = max(t.largest for t in self.tensors)
        tried = (
            f" ({self.before_db:.1f} -> {self.after_db:.1f} dB in trial)"
            if np.isfinite(self.after_db)
            else ""
        )
        clipped = (
            f"{self.clipped} Clips now saturate some channels below the old bound, beyond all calibrated values; "
            if self.clipped
            else ""
        )
        return (
            f"{len(self.tensors)} activations rescaled per channel by {low:.3g} to {high:.3g}{tried}; {clipped}"
            f"{len(self.skips)} cannot be."
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Job:
    """The request and what is read once for all of its parts. ``free_variables`` gives the variables of a tensor's
    channels that are not pinned."""

    model: CanonicalModel
    feeds: Feeds
    index: GraphIndex
    trace: Trace
    free_variables: Callable[[str], frozenset[int]]
    shapes: Shapes
    wanted: tuple[str, ...]
    symmetric: bool
    weight_bits: int
    seen: tuple[int, ...]
    unseen: tuple[int, ...]
    work_dir: Path
    provider: Provider
    group_bytes: int
    limit: float
    snap: bool


def find_rescaling(
    model: CanonicalModel,
    feeds: Feeds,
    *,
    work_dir: Path,
    tensors: Collection[str] | None = None,
    symmetric: bool = False,
    weight_bits: int = 8,
    samples: int = 32,
    limit: float = FACTOR_LIMIT,
    snap: bool = False,
    provider: Provider = "cpu",
    group_bytes: int = _GROUP_BYTES,
    progress: Progress | None = None,
) -> Rescaling:
    """How to rescale channels of activations so that quantizing them per tensor costs least; the function stays.

    Behind a Clip it stays for all values that were observed (:mod:`onnxptq.equalize.limits`).

    Args:
        model: left as it is.
        feeds: up to ``samples`` of them, evenly spread, are used, fewer where activations are large; a quarter of
            those, at most eight, only judges the result.
        work_dir: an existing folder for the new model.
        tensors: the activations that will be quantized per tensor; None for every input of a product.
        symmetric: whether their grids are symmetric about 0.
        weight_bits: grid of the weights in the imitation that judges.
        limit: factors stay within [1 / limit, limit].
        snap: only powers of two, which change no rounding in the float model.
        group_bytes: activations of one sample held at once, in bytes.

    Returns:
        The factors, as they are proposed and as unseen samples judge them.

    Raises:
        FeedError: there is no sample.
        OutputPathError: ``work_dir`` cannot be written.
    """
    sample = first_sample(feeds)
    shapes, values = concrete_shapes(model, sample, provider)
    index = GraphIndex(model.graph)
    trace = Tracer(index, shapes, values).run(RULES)
    if tensors is None:
        tensors = [product.source for product in trace.products if product.rows is not None]
    seen, unseen = _divide(len(feeds), samples)
    job = _Job(
        model=model,
        feeds=feeds,
        index=index,
        trace=trace,
        free_variables=functools.cache(functools.partial(_free_variables, trace)),
        shapes=shapes,
        wanted=tuple(name for name in dict.fromkeys(tensors) if name in trace.labels),
        symmetric=symmetric,
        weight_bits=weight_bits,
        seen=seen,
        unseen=unseen,
        work_dir=work_dir,
        provider=provider,
        group_bytes=group_bytes,
        limit=limit,
        snap=snap,
    )
    return Rescaling(job, sample, progress)


def _free_variables(trace: Trace, name: str) -> frozenset[int]:
    roots = np.unique(trace.classes.roots(trace.labels[name])).tolist()
    return frozenset(variable_of(root)[0] for root in roots if not trace.classes.is_pinned(root))


class Rescaling:
    """What was observed of a model, and the rescaled forms that follow from it (see :func:`find_rescaling`)."""

    def __init__(self, job: _Job, sample: Sample, progress: Progress | None) -> None:
        self._job = job
        self._sample = sample
        self._skips = _pinned(job)
        self._spreads: Mapping[str, Spread] = {}
        self._limits: Limits = {}
        self._exact: Sequence[Component] = ()
        self._clipped: Sequence[Component] = ()
        self._solutions: dict[Emphasis, Solved] = {}
        self._forms: dict[tuple[tuple[int, float], ...], _Form] = {}
        free = {variable for name in job.wanted for variable in job.free_variables(name)}
        if not free:
            return
        self._spreads = _observe(job, free, progress)
        self._limits = limits = factor_limits(job.trace, self._spreads)
        self._skips += _bounded(job, limits)
        gains = channel_gains(job.index, job.trace, self._spreads, job.shapes)
        terms = build_terms(job.trace, job.wanted, self._spreads, gains, symmetric=job.symmetric)
        parts = components(terms)
        self._exact = [part for part in parts if not limits.keys() & set(part.variables)]
        self._clipped = [part for part in parts if limits.keys() & set(part.variables)]

    @property
    def needs_judging(self) -> bool:
        """Whether there are channels that pass a Clip: what gains there must be seen on unseen samples."""
        return bool(self._clipped)

    def proposed(self) -> tuple[CanonicalModel, Equalization]:
        """The new model by the predicted noise alone (the old one if that gains nothing), and what was done; no
        channel that passes a Clip is touched."""
        unknown = np.full(1, np.nan)
        return self._made(self._solved(EMPHASES[0]), unknown, unknown)

    def judged(self) -> tuple[CanonicalModel, Equalization]:
        """The new model that does best on unseen samples (the old one if none gains), and what was done. Without
        samples to spare it is what is proposed."""
        trial = self._trial
        if trial is None:
            return self.proposed()
        best: Solved = ()
        before = after = trial.score({})
        for emphasis in EMPHASES:
            solved = self._solved(emphasis)
            scores = trial.score(_factors(solved)) if solved else before
            if solved and scores.mean() > before.mean():
                best, after = solved, scores
                break
        # What does not hold for every input needs unseen samples that speak for it.
        solved = _solve(self._job, self._clipped, self._limits, CLIP_EMPHASIS)
        if solved:
            scores = trial.score(_factors([*best, *solved]))
            if is_better(scores, after):
                best, after = [*best, *solved], scores
        return self._made(best, before, after)

    def _made(self, solved: Solved, before: Floats, after: Floats) -> tuple[CanonicalModel, Equalization]:
        key = tuple(sorted(_factors(solved).items()))
        if key not in self._forms:
            # A file of its own: what is known of another form stays true.
            path = self._job.work_dir / f"equalized_{len(self._forms)}.onnx"
            self._forms[key] = _apply(self._job, solved, self._sample, path)
        form = self._forms[key]
        factors = _factors(form.kept)
        if form.skips and self._trial is not None and np.isfinite(before).all():
            after = self._trial.score(factors)
        return form.model, Equalization(
            tensors=_rescaled(self._job, factors),
            clipped=_count_clipped(self._job, factors),
            before_db=float(before.mean()),
            after_db=float(after.mean()),
            skips=(*self._skips, *form.skips),
        )

    def _solved(self, emphasis: Emphasis) -> Solved:
        if emphasis not in self._solutions:
            self._solutions[emphasis] = _solve(self._job, self._exact, self._limits, emphasis)
        return self._solutions[emphasis]

    @functools.cached_property
    def _trial(self) -> Trial | None:
        return _trial(self._job, self._spreads) if self._job.unseen and self._spreads else None


def _divide(total: int, samples: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Positions of the samples to observe and of those to judge by, both spread evenly."""
    chosen = sorted(set(np.linspace(0, total - 1, min(samples, total)).round().astype(int).tolist()))
    if len(chosen) < _FEWEST:
        return tuple(chosen), ()
    count = min(_UNSEEN, max(2, len(chosen) // 4))
    apart = {chosen[(2 * i + 1) * len(chosen) // (2 * count)] for i in range(count)}
    return tuple(i for i in chosen if i not in apart), tuple(sorted(apart))


def _observe(job: _Job, free: Collection[int], progress: Progress | None) -> dict[str, Spread]:
    names = [name for name in job.wanted if job.free_variables(name)]
    sources = (product.source for product in job.trace.products if product.rows is not None)
    names += [name for name in sources if not job.free_variables(name).isdisjoint(free)]
    names += sorted(tensors_behind(job.index, job.trace))
    names += [bounds.tensor for bounds in job.trace.bounds]
    labels = {name: job.trace.labels[name] for name in dict.fromkeys(names)}
    elements = sum(math.prod(job.shapes[name]) for name in labels)
    most = max(_FEWEST_SEEN, OBSERVED_ELEMENTS // max(1, elements))
    seen = job.seen[:: -(-len(job.seen) // most)]
    count = group_count(labels, job.shapes, job.group_bytes) * len(seen)
    tick = started(progress, "equalize", count)
    return observe(
        job.model,
        job.feeds,
        labels,
        job.trace.classes,
        sizes=job.shapes,
        positions=seen,
        provider=job.provider,
        group_bytes=job.group_bytes,
        tick=tick,
    )


def _trial(job: _Job, spreads: Mapping[str, Spread]) -> Trial:
    samples = list(drawn(job.feeds, job.unseen))
    session = Session(job.model.path, provider=job.provider)
    return Trial(
        model=job.model,
        trace=job.trace,
        spreads={name: spreads[name] for name in job.wanted if name in spreads and job.free_variables(name)},
        symmetric=job.symmetric,
        weight_bits=job.weight_bits,
        samples=samples,
        references=[session.run(sample, job.model.judged) for sample in samples],
        provider=job.provider,
    )


def _solve(job: _Job, parts: Sequence[Component], limits: Limits, emphasis: Emphasis) -> Solved:
    def chosen(part: Component) -> Choice:
        return choose(part.weighed(emphasis), *part.ends(limits, job.limit), snap=job.snap)

    choices = in_threads(chosen, parts)
    return [
        (part, choice) for part, choice in zip(parts, choices, strict=True) if choice.after < choice.before
    ]


def _pinned(job: _Job) -> tuple[Skip, ...]:
    skips = []
    for name in job.wanted:
        if not job.free_variables(name):
            root = int(job.trace.classes.roots(job.trace.labels[name]).reshape(-1)[0])
            reason = f"not rescaled: {job.trace.classes.reason(root)}"
            skips.append(Skip(site=job.model.user_name(name), reason=reason))
    return tuple(skips)


def _bounded(job: _Job, limits: Limits) -> tuple[Skip, ...]:
    reason = "not rescaled: all of its channels come to the bounds of a Clip that reads or writes them"
    return tuple(
        Skip(site=job.model.user_name(name), reason=reason)
        for name in job.wanted
        if (free := job.free_variables(name)) and all(limits.get(v) == (0.0, 0.0) for v in free)
    )


def _factors(solved: Solved) -> dict[int, float]:
    return {
        v: float(x) for part, choice in solved for v, x in zip(part.variables, choice.x, strict=True) if x
    }


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Form:
    """A rescaled model, the factors that it kept, and what was left alone because the outputs would change."""

    model: CanonicalModel
    kept: Solved = ()
    skips: tuple[Skip, ...] = ()


def _apply(job: _Job, solved: Solved, sample: Sample, path: Path) -> _Form:
    """Apply what keeps the outputs; where they change, halves are searched for the sets that are to blame."""
    if not solved:
        return _Form(model=job.model)

    def applied(part: Solved) -> CanonicalModel | None:
        result = apply_factors(job.model, job.trace, _factors(part), path)
        _, reason = compare_forms(job.model.path, result.path, sample, provider=job.provider)
        return None if reason else result

    whole = applied(solved)
    if whole is not None:
        return _Form(model=whole, kept=solved)
    kept, skips = _sound(solved, lambda part: applied(part) is not None, job.model)
    rest = applied(kept) if kept else None
    return _Form(model=job.model, skips=skips) if rest is None else _Form(model=rest, kept=kept, skips=skips)


def _sound(
    solved: Solved, holds: Callable[[Solved], bool], model: CanonicalModel
) -> tuple[Solved, tuple[Skip, ...]]:
    if holds(solved):
        return solved, ()
    if len(solved) == 1:
        name = solved[0][0].terms[0].name
        return [], (Skip(site=model.user_name(name), reason="not rescaled: the float outputs would change"),)
    middle = len(solved) // 2
    halves = [_sound(half, holds, model) for half in (solved[:middle], solved[middle:])]
    return [*halves[0][0], *halves[1][0]], halves[0][1] + halves[1][1]


def _count_clipped(job: _Job, factors: Mapping[int, float]) -> int:
    names = {bounds.tensor for bounds in job.trace.bounds}
    return sum((job.trace.classes.factors(job.trace.labels[n], factors) != 1.0).any() for n in names)


def _rescaled(job: _Job, factors: Mapping[int, float]) -> tuple[RescaledTensor, ...]:
    found = []
    for name in job.wanted:
        labels = job.trace.labels[name]
        values = job.trace.classes.factors(labels, factors)
        if (values != 1.0).any():
            found.append(
                RescaledTensor(
                    tensor=job.model.user_name(name),
                    channels=labels.size,
                    smallest=float(values.min()),
                    largest=float(values.max()),
                )
            )
    return tuple(found)
