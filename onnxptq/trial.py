"""Trying solutions on the whole network: the distance of its outputs from the float ones, on a few samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnxptq.graph.save import save_graph
from onnxptq.qdq import insert_quantizers
from onnxptq.runtime import Provider, Session
from onnxptq.types import Array, CanonicalModel, QuantPlan, Sample, Solution

CEILING_DB = 100.0
"""Scores stop here: beyond it two outputs differ by float rounding only."""


class Trial:
    """Scores plans and their solutions.

    Args:
        samples: inputs on which outputs are compared; chosen among the calibration samples.
    """

    def __init__(
        self,
        model: CanonicalModel,
        samples: Sequence[Sample],
        scratch: Path,
        provider: Provider,
    ) -> None:
        self._model = model
        self._samples = samples
        self._path = scratch / "trial.onnx"
        self._provider = provider
        session = Session(model.path, provider=provider)
        self._references = [session.run(sample) for sample in samples]

    def score(self, plan: QuantPlan, solution: Solution) -> float:
        """Mean over the float outputs of their signal-to-noise ratio, in dB."""
        try:
            save_graph(insert_quantizers(self._model.graph, plan, solution), self._path)
            session = Session(self._path, provider=self._provider)
        finally:
            self._path.unlink(missing_ok=True)
            self._path.with_name(self._path.name + ".data").unlink(missing_ok=True)
        signal: dict[str, list[float]] = {}
        noise: dict[str, list[float]] = {}
        for sample, reference in zip(self._samples, self._references, strict=True):
            for name, value in session.run(sample).items():
                expected = reference[name]
                if np.issubdtype(expected.dtype, np.floating) and expected.shape == value.shape:
                    signal.setdefault(name, []).append(_energy(expected))
                    noise.setdefault(name, []).append(_energy(expected.astype(np.float64) - value))
        scores = [_decibel(math.fsum(signal[name]), math.fsum(noise[name])) for name in signal]
        return math.fsum(scores) / len(scores) if scores else 0.0


def _energy(values: Array) -> float:
    flat = values.reshape(-1).astype(np.float64)
    return float(flat @ flat)


def _decibel(signal: float, noise: float) -> float:
    if not math.isfinite(noise):
        return -CEILING_DB
    if signal <= 0.0 or noise <= 0.0:
        return CEILING_DB
    return min(CEILING_DB, 10.0 * math.log10(signal / noise))
