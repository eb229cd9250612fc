"""The order of the runs and the arithmetic of the ratio, with a clock of our own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxptq.reporting import slower_note
from onnxptq.validate import latency
from onnxptq.validate.latency import Latency, measure_latency

FEED = {"x": np.zeros((4, 3), np.float32)}


class _Clock:
    """Time passes only while a session runs."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[str] = []

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()

    class Fake:
        def __init__(self, model: Path, **_: Any) -> None:
            self.name = model.name

        def run(self, _: Any) -> None:
            clock.runs.append(self.name)
            # The machine slows down steadily; "b" always takes half the time of "a" at that moment.
            slow = 1 + 0.05 * len(clock.runs)
            clock.now += slow * {"a": 0.010, "b": 0.005}[self.name]

    monkeypatch.setattr(latency, "Session", Fake)
    monkeypatch.setattr(latency.time, "perf_counter", clock.perf_counter)
    return clock


def test_pairs_alternate_after_a_warm_up(clock: _Clock) -> None:
    measure_latency(Path("a"), Path("b"), FEED, pairs=4)
    assert clock.runs == ["a", "b"] * 3 + ["a", "b", "b", "a", "a", "b", "b", "a"]


def test_the_ratio_survives_a_machine_that_slows_down(clock: _Clock) -> None:
    result = measure_latency(Path("a"), Path("b"), FEED, pairs=20, seconds=60.0)
    # Within a pair the machine slows by 5 % of the start at most, once in favour of each model.
    assert result.ratio == pytest.approx(0.5, rel=0.02)
    assert result.ratio_low <= result.ratio <= result.ratio_high
    assert (result.pairs, result.batch, result.threads, result.provider) == (20, 4, 0, "cpu")
    assert result.reference_ms > result.quantized_ms > 0


def test_slow_models_are_run_less_often(clock: _Clock) -> None:
    result = measure_latency(Path("a"), Path("b"), FEED, pairs=20, seconds=0.25)
    # A pair takes 15 ms to begin with: it is the clock that ends this, not the number of pairs.
    assert 5 < result.pairs < 15
    assert measure_latency(Path("a"), Path("b"), FEED, pairs=20, seconds=0.0).pairs == 5


def test_one_pair_has_no_quartiles(clock: _Clock) -> None:
    with pytest.raises(ValueError, match="two pairs"):
        measure_latency(Path("a"), Path("b"), FEED, pairs=1)


def test_progress_reaches_its_total_although_time_runs_out(clock: _Clock) -> None:
    left = {}

    class Heard:
        def start(self, title: str, total: int) -> Callable[[], None]:
            left[title] = total

            def step() -> None:
                left[title] -= 1

            return step

        def message(self, text: str) -> None:
            raise AssertionError(text)

    found = measure_latency(Path("a"), Path("b"), FEED, pairs=20, seconds=0.01, progress=Heard())
    assert found.pairs == 5
    assert left == {"measure latency": 0}


@pytest.mark.parametrize(
    ("target", "ratio", "low", "float_ms", "is_told"),
    [
        ("ort-cpu", 1.5, 1.4, 2.0, True),
        ("ort-cpu", 1.5, 1.0, 2.0, False),  # a quarter of the pairs says otherwise
        ("ort-cpu", 0.6, 0.5, 2.0, False),
        ("ort-cpu", 1.5, 1.4, 0.2, False),  # a tenth of a millisecond
        ("tensorrt", 1.5, 1.4, 2.0, False),  # onnxruntime is not what runs it
    ],
)
def test_a_file_that_is_slower_than_float_is_told(
    target: str, ratio: float, low: float, float_ms: float, is_told: bool
) -> None:
    found = Latency(
        reference_ms=float_ms,
        quantized_ms=ratio * float_ms,
        ratio=ratio,
        ratio_low=low,
        ratio_high=2 * ratio,
        pairs=20,
        batch=1,
        threads=0,
        provider="cpu",
    )
    kernels = {"QLinearConv": 7, "QuantizeLinear": 2, "DequantizeLinear": 3, "HardSigmoid": 4}
    note = slower_note(target, found, kernels)
    assert bool(note) == is_told
    if is_told:
        assert "1.50 times" in note
        assert "7 integer kernels it runs 5 conversions and 4 float" in note
    assert slower_note(target, found, None) == ""
