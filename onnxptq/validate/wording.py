"""How numbers and judgements of a report are put into words, the same on the terminal and in the page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from onnxptq.types import Skip
from onnxptq.validate.metrics import OutputMetrics, comparable
from onnxptq.validate.report import Report

Rank = Literal["good", "fair", "poor"]
Level = Literal[Rank, "unknown"]

_GOOD = (0.99, 30.0)
_FAIR = (0.97, 20.0)
_CLOSE_SCORES = 20.0
_POOR_SCORES = 10.0
_FEW = 100
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_INTEGER_KERNELS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeLSTM",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "NhwcMaxPool",
        "QAttention",
        "QGemm",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One sentence about the quality, and how good it is."""

    level: Level
    text: str


def verdict(report: Report) -> Verdict:
    """The quality in one sentence, judged by the worst output.

    Class scores are judged by top-1 agreement, other floats by SQNR, integers by the fraction that is equal.
    Good is 99 % or 30 dB, fair 97 % or 20 dB: what 8-bit models of common networks reach with and without
    care. Class scores below 20 dB are fair at best, and poor below 10 dB, where the error is a third of the signal:
    first places that survive it by luck say nothing about the next input. Fewer than 100 inputs are said. What was
    measured on random data is not judged.
    """
    found = _judged(report)
    if report.heldout is not None and report.heldout.is_random:
        return Verdict(level="unknown", text=f"Random data, which say nothing of real inputs. {found.text}")
    if report.calibration.is_random:
        return Verdict(level=found.level, text=f"Calibrated on random data. {found.text}")
    return found


def _judged(report: Report) -> Verdict:
    if not report.outputs:
        return Verdict(level="unknown", text="The quality was not measured: no inputs were held out.")
    outputs = comparable(report.outputs)
    levels = {i: _level(output) for i, output in enumerate(outputs) if not output.is_void}
    if not levels:
        reason = (
            "the two models never find equally many results"
            if any(output.resized for output in outputs)
            else "the float model's own outputs are NaN or Inf"
        )
        return Verdict(level="unknown", text=f"The quality cannot be told: {reason}.")
    worst = min(levels, key=lambda i: (_ORDER.index(levels[i]), _decibels_of(outputs[i])))
    level = levels[worst]
    text = {
        "good": "Very close to the float model",
        "fair": "Close to the float model",
        "poor": "Clearly different from the float model",
    }[level]
    where = f" (output {outputs[worst].name})" if len(report.outputs) > 1 else ""
    count = 0 if report.heldout is None else report.heldout.count
    basis = f", on only {count} {'input' if count == 1 else 'inputs'}" if 0 < count < _FEW else ""
    return Verdict(level=level, text=f"{text}: {headline(outputs[worst])}{where}{basis}.")


def _decibels_of(output: OutputMetrics) -> float:
    """What tells outputs of one level apart."""
    return math.inf if output.sqnr_db is None or math.isnan(output.sqnr_db) else output.sqnr_db


def _level(output: OutputMetrics) -> Rank:
    if output.lost:
        return "poor"
    if output.top1_agreement is not None and output.sqnr_db is not None:
        return min(_level_of_shares(output), _ceiling(output.sqnr_db), key=_ORDER.index)
    return _level_of_shares(output)


_ORDER: tuple[Rank, ...] = ("poor", "fair", "good")


def _ceiling(sqnr_db: float) -> Rank:
    """The best that can be said of class scores of this SQNR."""
    if sqnr_db >= _CLOSE_SCORES:
        return "good"
    return "fair" if sqnr_db >= _POOR_SCORES else "poor"


def _level_of_shares(output: OutputMetrics) -> Rank:
    fraction = output.top1_agreement if output.top1_agreement is not None else output.equal_fraction
    value, bounds = (
        (fraction, (_GOOD[0], _FAIR[0]))
        if fraction is not None
        else (
            output.sqnr_db if output.sqnr_db is not None else math.nan,
            (_GOOD[1], _FAIR[1]),
        )
    )
    if value >= bounds[0]:
        return "good"
    # A share of few samples says little: "poor" needs a distance of two standard errors.
    doubt = 0.0 if fraction is None else 2.0 * math.sqrt(_FAIR[0] * (1.0 - _FAIR[0]) / max(1, output.rows))
    return "fair" if value + doubt >= bounds[1] else "poor"


def headline(output: OutputMetrics) -> str:
    """The numbers of one output in a few words."""
    if output.lost:
        return f"{output.lost} values are NaN or Inf that are numbers in the float model"
    if output.is_void and output.resized:
        return f"never equally many results ({output.resized} inputs)"
    if output.is_void:
        return "all values are NaN or Inf in the float model already"
    parts = []
    if output.top1_agreement is not None:
        parts.append(f"{percent(output.top1_agreement)} same top-1 class")
    if output.quantized_accuracy is not None and output.reference_accuracy is not None:
        parts.append(
            f"accuracy {percent(output.quantized_accuracy)} (float {percent(output.reference_accuracy)})"
        )
    if output.sqnr_db is not None:
        parts.append(f"SQNR {decibels(output.sqnr_db)}")
    if output.equal_fraction is not None:
        parts.append(f"{percent(output.equal_fraction)} equal")
    if output.resized:
        parts.append(
            f"{output.resized} inputs left out, for which the two models find different numbers of results"
        )
    if output.nonfinite_reference:
        parts.append(
            f"{output.nonfinite_reference} values left out, which are NaN or Inf in the float model too"
        )
    return ", ".join(parts)


def percent(value: float | None) -> str:
    """A fraction as a percentage; rounded down to below 100 % unless it is exactly that."""
    if value is None:
        return "–"
    shown = f"{100 * value:.2f}"
    return "99.99 %" if shown == "100.00" and value < 1.0 else f"{shown} %"


def decibels(value: float | None) -> str:
    """An SQNR; infinite where the values are equal."""
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "equal" if value > 0 else "no signal"
    return f"{value:.1f} dB"


def size(value: float) -> str:
    """Bytes with a decimal unit."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value:.0f} bytes"


def number(value: float | None) -> str:
    """A float with four significant digits."""
    return "–" if value is None else f"{value:.4g}"


def count(value: int | None) -> str:
    """A whole number with separators."""
    return "–" if value is None else f"{value:,}"


def span(ends: Sequence[float]) -> str:
    """One number where both ends are equal, else both."""
    low, high = ends
    return number(low) if low == high else f"{number(low)} … {number(high)}"


def seconds(value: float) -> str:
    """A duration."""
    if value >= 60:
        return f"{int(value // 60)} min {value % 60:.0f} s"
    return f"{value:.1f} s" if value >= 0.1 else f"{1e3 * value:.0f} ms"


def speed(ratio: float) -> str:
    """A latency ratio (quantized / float) in words."""
    if 0.97 <= ratio <= 1.03:
        return "as fast as the float model"
    return f"{1 / ratio:.2f} x as fast" if ratio < 1 else f"{ratio:.2f} x as slow"


def skips_by_reason(skips: Sequence[Skip]) -> list[tuple[str, list[str]]]:
    """What was declined, most frequent reason first."""
    found: dict[str, list[str]] = {}
    for skip in skips:
        found.setdefault(skip.reason, []).append(skip.site)
    return sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))


def count_by_grid(report: Report) -> list[tuple[str, int]]:
    """Number of quantizers by role, bits and granularity, most frequent first."""
    kinds = Counter(
        f"{row.bits}-bit {_PLURAL.get(row.role, row.role)}, {row.granularity.split(' (')[0]}"
        for row in report.quantized
    )
    return sorted(kinds.items(), key=lambda item: (-item[1], item[0]))


_PLURAL = {"activation": "activations", "weight": "weights", "bias": "biases"}


def kernel_kind(op: str) -> Literal["integer", "conversion", "float"]:
    """What a kernel that onnxruntime executes computes in."""
    if op in _CONVERSIONS:
        return "conversion"
    return "integer" if op.startswith("QLinear") or op in _INTEGER_KERNELS else "float"


def kernel_counts(kernels: Mapping[str, int]) -> dict[str, int]:
    """Executed nodes by kind."""
    found = {"integer": 0, "float": 0, "conversion": 0}
    for op, count in kernels.items():
        found[kernel_kind(op)] += count
    return found


def parity_line(report: Report) -> str:
    """What the parity check showed."""
    parity = report.parity
    if parity is None:
        return "Not checked."
    same = "all equal to the simulation" if parity.max_steps == 0 else f"within {parity.max_steps:.3g} steps"
    return f"{parity.elements:,} values on {len(parity.edges)} quantized edges: {same}"
