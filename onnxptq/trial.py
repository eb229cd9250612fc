"""Trying solutions on the whole network: the distance of its outputs from the float ones, on a few samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from onnxptq.graph.save import save_graph
from onnxptq.qdq import insert_quantizers
from onnxptq.runtime import Provider, Session, open_transient
from onnxptq.types import Array, CanonicalModel, QuantPlan, Sample, Solution

CEILING_DB = 100.0
"""Scores stop here: beyond it two outputs differ by float rounding only."""


class Trial:
    """Scores plans and their solutions.

    Args:
        samples: inputs on which outputs are compared; chosen among the calibration samples.
        reference: the float model whose outputs are wanted; None for ``model`` itself.
    """

    def __init__(
        self,
        model: CanonicalModel,
        samples: Sequence[Sample],
        scratch: Path,
        provider: Provider,
        *,
        reference: Path | None = None,
    ) -> None:
        self._model = model
        self._samples = samples
        self._path = scratch / "trial.onnx"
        self._provider = provider
        session = Session(reference or model.path, provider=provider)
        self._references = [session.run(sample) for sample in samples]

    def score(self, plan: QuantPlan, solution: Solution) -> float:
        """Mean over the float outputs of their signal-to-noise ratio, in dB."""
        return self._mean_over_outputs(
            plan, solution, False, lambda reference: (_energy(reference), _squared_error)
        )

    def rank(self, plan: QuantPlan, solution: Solution, *, exact: bool = False) -> float:
        """The same, but class scores are weighed by what they decide.

        For logits z with p = softmax(z) the ratio is Var_p(z) / (2 KL(p || p_quantized)): an error counts where
        it moves probability between classes, and not where all logits shift or a hopeless class changes.

        Args:
            exact: run quantizers as written. Needed where weights are in float: onnxruntime's integer kernels
                would quantize them on their own, per tensor.
        """
        return self._mean_over_outputs(
            plan,
            solution,
            exact,
            lambda reference: (
                (_spread(reference), _twice_divergence)
                if _are_class_scores(reference)
                else (_energy(reference), _squared_error)
            ),
        )

    def _mean_over_outputs(
        self,
        plan: QuantPlan,
        solution: Solution,
        exact: bool,
        measure: Callable[[Array], tuple[float, Callable[[Array, Array], float]]],
    ) -> float:
        session = open_transient(
            self._path,
            lambda path: save_graph(insert_quantizers(self._model.graph, plan, solution), path),
            provider=self._provider,
            exact=exact,
            fused=exact,
        )
        signal: dict[str, list[float]] = {}
        noise: dict[str, list[float]] = {}
        for sample, reference in zip(self._samples, self._references, strict=True):
            for name, value in session.run(sample).items():
                expected = reference[name]
                if np.issubdtype(expected.dtype, np.floating) and expected.shape == value.shape:
                    power, distance = measure(expected)
                    signal.setdefault(name, []).append(power)
                    noise.setdefault(name, []).append(distance(expected, value))
        scores = [_decibel(math.fsum(signal[name]), math.fsum(noise[name])) for name in signal]
        return math.fsum(scores) / len(scores) if scores else 0.0


def _energy(values: Array) -> float:
    flat = values.reshape(-1).astype(np.float64)
    return float(flat @ flat)


def _squared_error(reference: Array, value: Array) -> float:
    return _energy(reference.astype(np.float64) - value)


def _are_class_scores(values: Array) -> bool:
    return values.ndim == 2 and values.shape[1] >= 2


def _log_softmax(values: Array) -> Array:
    shifted = values.astype(np.float64) - values.max(axis=1, keepdims=True)
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
