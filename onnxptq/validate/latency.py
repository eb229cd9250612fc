"""Latency of two models on the same feed, measured so that a noisy machine disturbs both alike.

The models alternate in pairs A B, B A, A B, ... A pair gives one ratio; its two runs are a moment apart, so
that slow changes of the machine's speed cancel. The median of the ratios is reported with its quartiles.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from onnxptq.runtime import Provider, Session
from onnxptq.types import Progress, Sample, started

_WARM_UP = 3

_FEWEST_PAIRS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Milliseconds per run (medians) and quantized / reference (median and quartiles; below 1 is faster).

    ``batch`` is the first dimension of the feed (None where its inputs have none); ``threads`` is 0 for
    onnxruntime's own choice.
    """

    reference_ms: float
    quantized_ms: float
    ratio: float
    ratio_low: float
    ratio_high: float
    pairs: int
    batch: int | None
    threads: int
    provider: str


def measure_latency(
    reference: Path,
    quantized: Path,
    sample: Sample,
    *,
    pairs: int = 20,
    seconds: float = 0.6,
    provider: Provider = "cpu",
    threads: int = 0,
    progress: Progress | None = None,
) -> Latency:
    """Time both models on ``sample``, with all optimizations; memory arena and spinning off as in ``Session``.

    Args:
        pairs: largest number of interleaved pairs, at least 2; each model runs once in each.
        seconds: once this much time is spent no further pair is begun, but five are measured in any case.

    Raises:
        EnvironmentMismatchError, InvalidModelError: as ``runtime.Session``.
    """
    if pairs < 2:
        raise ValueError("at least two pairs are needed")
    sessions = (
        Session(reference, provider=provider, threads=threads, tuned=True),
        Session(quantized, provider=provider, threads=threads, tuned=True),
    )
    tick = started(progress, "measure latency", pairs)
    begin = time.perf_counter()
    for number in range(_WARM_UP):
        if number == 0 or time.perf_counter() - begin < seconds / 4:
            for session in sessions:
                session.run(sample)
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        if pair >= _FEWEST_PAIRS and time.perf_counter() - begin > seconds:
            break
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            start = time.perf_counter()
            sessions[which].run(sample)
            times[which].append(1e3 * (time.perf_counter() - start))
        tick()
    for _ in range(pairs - len(times[0])):
        tick()
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Latency(
        reference_ms=statistics.median(times[0]),
        quantized_ms=statistics.median(times[1]),
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
        pairs=len(ratios),
        batch=next((value.shape[0] for value in sample.values() if value.ndim), None),
        threads=threads,
        provider=provider,
    )
