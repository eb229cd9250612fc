"""Trying solutions on the whole network: the distance of its outputs from the float ones, on a few samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.save import save_graph
from onnxptq.qdq import insert_adjustable, insert_quantizers
from onnxptq.runtime import Provider, Session, open_transient, signal_and_noise
from onnxptq.types import Array, CanonicalModel, QuantPlan, Sample, Solution

CEILING_DB = 100.0
"""Scores stop here: beyond it two outputs differ by float rounding only."""

_LEFT_OUT = -1e100
"""The logit of a class that is left out: no probability is left, and its square is a number."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Views of one distance from the float outputs, all in dB and means over the float outputs.

    ``score`` is the signal-to-noise ratio. ``level`` is the same, but class scores are weighed by what they
    decide: for logits z with p = softmax(z) the ratio is Var_p(z) / (2 KL(p || p_quantized)), so that an error
    counts where it moves probability between classes, and not where all logits shift or a hopeless class changes.
    Both are ratios of sums over the samples.

    ``rank`` is the mean of the samples' own levels, which solutions are compared by: a sum of divergences is that of
    the few samples whose class is close to lost, and tells little about others.

    Elements that are NaN or Inf in the float outputs are left out, masked classes also of the probabilities. NaN or
    Inf in place of a number is infinite noise.
    """

    score: float
    level: float
    rank: float


class Trial:
    """Measures plans and their solutions.

    Args:
        samples: inputs on which outputs are compared; chosen among the calibration samples.
        reference: the float model whose outputs are wanted; None for ``model`` itself.
        outputs: those that are compared, of ``model.judged``; all of them where none is named. What no quantizer
            comes before is always right, and would hide in a mean how far the others are off.
    """

    def __init__(
        self,
        model: CanonicalModel,
        samples: Sequence[Sample],
        scratch: Path,
        provider: Provider,
        *,
        reference: Path | None = None,
        outputs: Collection[str] = (),
    ) -> None:
        self._model = model
        self._judged = [name for name in model.judged if name in outputs] or list(model.judged)
        self._samples = samples
        self._path = scratch / "trial.onnx"
        self._provider = provider
        self._reference = reference or model.path

    def quality(self, plan: QuantPlan, solution: Solution) -> Quality:
        """The outputs in onnxruntime's default session, over all samples."""
        session = open_transient(
            self._path,
            lambda path: save_graph(insert_quantizers(self._model.graph, plan, solution), path, share=True),
            provider=self._provider,
        )
        tally = _Tally(self._model.boundary)
        for sample, reference in zip(self._samples, self._references, strict=True):
            tally.add(reference, session.run(sample, self._judged))
        return tally.quality()

    def adjustable(self, plan: QuantPlan, start: Solution) -> Callable[[Solution, int], float]:
        """Ranks of solutions that differ from ``start`` in the parameters of activations only.

        ``plan`` quantizes activations only. Quantizers run as written: onnxruntime's integer kernels would
        quantize the float weights on their own, per tensor. Where the provider allows, all solutions share one
        session, in which the parameters are inputs.

        Returns:
            A function of a solution and a number of samples, the first so many; it runs no sample twice.
        """
        tallies: dict[int, tuple[Solution, _Tally]] = {}
        opened = self._with_inputs(plan, start)

        def rank(solution: Solution, count: int) -> float:
            _, tally = tallies.setdefault(id(solution), (solution, _Tally(self._model.boundary)))
            run = opened(solution)
            for number in range(tally.samples, count):
                tally.add(self._references[number], run(self._samples[number]))
            return tally.quality().rank

        return rank

    def _with_inputs(
        self, plan: QuantPlan, start: Solution
    ) -> Callable[[Solution], Callable[[Sample], Mapping[str, Array]]]:
        def open_exact(graph: gs.Graph) -> Session:
            return open_transient(
                self._path,
                lambda path: save_graph(graph, path, share=True),
                provider=self._provider,
                exact=True,
                fused=True,
            )

        if self._provider != "cpu":
            return lambda solution: open_exact(insert_quantizers(self._model.graph, plan, solution)).run
        graph, feeds_of = insert_adjustable(self._model.graph, plan, start)
        session = open_exact(graph)

        def opened(solution: Solution) -> Callable[[Sample], Mapping[str, Array]]:
            parameters = feeds_of(solution.qparams)
            return lambda sample: session.run({**sample, **parameters})

        return opened

    @functools.cached_property
    def _references(self) -> Sequence[Mapping[str, Array]]:
        """The float outputs."""
        session = Session(self._reference, provider=self._provider)
        return [session.run(sample, self._judged) for sample in self._samples]


class _Tally:
    """Sums of signal and noise over samples, by output, for both measures of :class:`Quality`.

    ``others`` are outputs that are no class scores, whatever their shape.
    """

    def __init__(self, others: Collection[str] = ()) -> None:
        self.samples = 0
        self._others = others
        self._plain: dict[str, list[tuple[float, float]]] = {}
        self._weighed: dict[str, list[tuple[float, float]]] = {}

    def add(self, reference: Mapping[str, Array], found: Mapping[str, Array]) -> None:
        self.samples += 1
        for name, expected in reference.items():
            value = found[name]
            if np.issubdtype(expected.dtype, np.floating) and expected.shape == value.shape:
                pair = signal_and_noise(expected, value)
                self._plain.setdefault(name, []).append(pair)
                if name not in self._others and _are_class_scores(expected):
                    pair = _of_class_scores(expected, value)
                self._weighed.setdefault(name, []).append(pair)

    def quality(self) -> Quality:
        return Quality(
            score=_mean_ratio(self._plain),
            level=_mean_ratio(self._weighed),
            rank=_mean_of_ratios(self._weighed),
        )


def _mean_ratio(pairs: Mapping[str, Sequence[tuple[float, float]]]) -> float:
    """Mean over outputs of the ratio of the sums, in dB."""
    ratios = [_decibel(math.fsum(s for s, _ in own), math.fsum(n for _, n in own)) for own in pairs.values()]
    return math.fsum(ratios) / len(ratios) if ratios else 0.0


def _mean_of_ratios(pairs: Mapping[str, Sequence[tuple[float, float]]]) -> float:
    """Mean over outputs and samples of the ratio, in dB."""
    ratios = [math.fsum(_decibel(*pair) for pair in own) / len(own) for own in pairs.values()]
    return math.fsum(ratios) / len(ratios) if ratios else 0.0


def _are_class_scores(values: Array) -> bool:
    return values.ndim == 2 and values.shape[1] >= 2


def _of_class_scores(reference: Array, value: Array) -> tuple[float, float]:
    """The spread of the logits and twice their divergence, summed over rows; classes that are no number in
    ``reference`` have no probability."""
    reference, value = reference.astype(np.float64), value.astype(np.float64)
    known = np.isfinite(reference)
    if not known.any(axis=1).all():
        rows = known.any(axis=1)
        reference, value, known = reference[rows], value[rows], known[rows]
    logits = np.where(known, reference, _LEFT_OUT)
    if not np.isfinite(value[known]).all():
        return _spread(logits), math.inf
    return _spread(logits), _twice_divergence(logits, np.where(known, value, _LEFT_OUT))


def _log_softmax(values: Array) -> Array:
    shifted = values - values.max(axis=1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def _spread(logits: Array) -> float:
    probability = np.exp(_log_softmax(logits))
    mean = (probability * logits).sum(axis=1, keepdims=True)
    return float((probability * (logits - mean) ** 2).sum())


def _twice_divergence(reference: Array, value: Array) -> float:
    first, second = _log_softmax(reference), _log_softmax(value)
    return 2.0 * float((np.exp(first) * (first - second)).sum())


def _decibel(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -CEILING_DB
    if signal <= 0.0 or noise <= 0.0:
        return CEILING_DB
    return min(CEILING_DB, 10.0 * math.log10(signal / noise))
