"""Observers against brute force on the values themselves, not on their histogram."""

from __future__ import annotations

import time

import numpy as np
import pytest

from onnxptq.calibrate.observers import Observer, choose_qparams
from onnxptq.calibrate.statistics import HISTOGRAM_ELEMENTS, StatisticsBuilder, TensorStatistics
from onnxptq.quantizers.affine import asymmetric_qparams, fake_quantize, range_of, symmetric_qparams
from onnxptq.types import PerTensor, QParams, QType

RNG = np.random.default_rng(0)
SHAPES = {
    "normal": RNG.standard_normal(20_000),
    "relu": np.maximum(RNG.standard_normal(20_000), 0.0),
    "gelu_like": np.where((x := RNG.standard_normal(20_000) * 3) > 0, x, -0.17 * np.exp(-((x + 1) ** 2))),
    "heavy_tail": RNG.standard_t(3, 20_000),
    "one_massive_value": np.append(RNG.standard_normal(20_000), 300.0),
    "negative": -np.abs(RNG.standard_normal(20_000)),
    "far_from_zero": RNG.standard_normal(20_000) + 40.0,
    "tiny": RNG.standard_normal(20_000) * 1e-14,
    "huge": RNG.standard_normal(20_000) * 5e37,
    "constant": np.full(100, 2.5),
}
VALUES = {name: values.astype(np.float32) for name, values in SHAPES.items()}
GRIDS = [
    (QType.unsigned(8), False),
    (QType.signed(8), True),
    (QType.unsigned(4), False),
    (QType.signed(4), True),
    (QType.unsigned(2), False),
]
GRID_IDS = ["u8", "s8", "u4", "s4", "u2"]


def _statistics(values: np.ndarray) -> TensorStatistics:
    builder = StatisticsBuilder(histogram=True)
    builder.update(values)
    result = builder.result()
    assert result is not None
    return result


def _loss(values: np.ndarray, qparams: QParams, norm: float) -> float:
    # In units of the largest value, so that huge and tiny tensors neither overflow nor vanish.
    error = (values.astype(np.float64) - fake_quantize(values, qparams)) / np.abs(values).max()
    return float((np.abs(error) ** norm).sum())


def _best_by_brute_force(values: np.ndarray, qtype: QType, symmetric: bool, norm: float) -> float:
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    factors = np.concatenate([np.geomspace(0.005, 0.2, 15), np.linspace(0.22, 1.0, 28)])
    if symmetric:
        bound = max(-low, high)
        trials = [symmetric_qparams(np.asarray(bound * f), qtype, PerTensor()) for f in factors]
    else:
        lows = [low * f for f in factors] if low < 0 else [0.0]
        highs = [high * f for f in factors] if high > 0 else [0.0]
        trials = [asymmetric_qparams(a, b, qtype) for a in lows for b in highs]
    return min(_loss(values, qparams, norm) for qparams in trials)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize(("qtype", "symmetric"), GRIDS, ids=GRID_IDS)
@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_mse_is_as_good_as_a_search_over_both_ends(
    name: str, qtype: QType, symmetric: bool, norm: float
) -> None:
    values = VALUES[name][::4]
    found = choose_qparams(
        _statistics(values), qtype, symmetric=symmetric, observer=Observer(name="mse", norm=norm)
    )
    best = _best_by_brute_force(values, qtype, symmetric, norm)
    # 4 % of the loss is 0.2 dB: the search moves one end at a time and sees bin centres instead of values,
    # and the loss of a few thousand values is ragged. A constant has no error but float rounding.
    assert _loss(values, found, norm) <= best * 1.04 + 1e-9


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("percent", [99.999, 99.0, 90.0, 100.0])
def test_percentile_keeps_that_share_of_the_values(name: str, percent: float) -> None:
    values = VALUES[name]
    statistics = _statistics(values)
    observer = Observer(name="percentile", percentile=percent)
    tail = (100.0 - percent) / 2
    exact = np.percentile(values.astype(np.float64), [tail, 100 - tail], method="inverted_cdf")
    low, high = range_of(choose_qparams(statistics, QType.unsigned(8), symmetric=False, observer=observer))
    wanted_low, wanted_high = range_of(asymmetric_qparams(*exact.tolist(), QType.unsigned(8)))
    # An end is known up to one bin; the rounded zero point moves both ends by half a step.
    step = (max(exact[1], 0) - min(exact[0], 0)) / 255
    slack = statistics.bin_width + step
    assert abs(float(low) - float(wanted_low)) <= slack
    assert abs(float(high) - float(wanted_high)) <= slack


def test_percentile_leaves_out_as_much_on_either_side() -> None:
    """Where the ends fall between two values exactly."""
    statistics = _statistics(np.float32([-8.0, -2.0, 3.0, 9.0]))
    observer = Observer(name="percentile", percentile=50.0)
    found = choose_qparams(statistics, QType.unsigned(8), symmetric=False, observer=observer)
    assert [float(end) for end in range_of(found)] == pytest.approx([-2.0, 3.0], abs=0.05)


def test_symmetric_percentile_keeps_no_more_than_asked() -> None:
    statistics = _statistics(np.float32([1.0, -2.0, 3.0, -4.0]))
    observer = Observer(name="percentile", percentile=50.0)
    found = choose_qparams(statistics, QType.signed(8), symmetric=True, observer=observer)
    assert float(found.scale) * 127 == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("percent", [99.9, 95.0])
def test_symmetric_percentile_keeps_that_share_of_the_magnitudes(percent: float) -> None:
    values = VALUES["heavy_tail"]
    statistics = _statistics(values)
    observer = Observer(name="percentile", percentile=percent)
    found = choose_qparams(statistics, QType.signed(8), symmetric=True, observer=observer)
    wanted = np.percentile(np.abs(values), percent, method="inverted_cdf")
    assert float(found.scale) * 127 == pytest.approx(wanted, abs=2 * statistics.bin_width)


@pytest.mark.parametrize("name", VALUES)
def test_minmax_covers_everything(name: str) -> None:
    values = VALUES[name]
    for qtype, symmetric in GRIDS:
        found = choose_qparams(
            _statistics(values), qtype, symmetric=symmetric, observer=Observer(name="minmax")
        )
        low, high = (float(v) for v in range_of(found))
        slack = 0.501 * float(found.scale)  # the rounded zero point
        assert low <= float(values.min()) + slack
        assert high >= float(values.max()) - slack


@pytest.mark.parametrize("spike", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(("qtype", "symmetric"), GRIDS[:2], ids=GRID_IDS[:2])
def test_entropy_is_not_fooled_by_the_zeros_behind_a_relu(
    spike: float, qtype: QType, symmetric: bool
) -> None:
    """More zeros change nothing about the other values; their range must stay."""
    positive = np.abs(np.random.default_rng(1).standard_normal(20_000)).astype(np.float32)
    zeros = np.zeros(int(positive.size * spike / (1 - spike)), np.float32)
    observer = Observer(name="entropy")
    plain = choose_qparams(_statistics(positive), qtype, symmetric=symmetric, observer=observer)
    spiked = choose_qparams(
        _statistics(np.append(positive, zeros)), qtype, symmetric=symmetric, observer=observer
    )
    # The zeros share their merged bin with a few small values, which the observer leaves out as well.
    assert float(spiked.scale) == pytest.approx(float(plain.scale), rel=0.1)
    worst = choose_qparams(
        _statistics(positive), qtype, symmetric=symmetric, observer=Observer(name="minmax")
    )
    assert float(spiked.scale) > 0.5 * float(worst.scale)


@pytest.mark.parametrize("name", ["relu", "negative", "one_massive_value"])
def test_a_symmetric_grid_has_half_its_levels_for_either_sign(name: str) -> None:
    """So values and their mirror images together have the threshold that the values have alone."""
    values = np.abs(VALUES[name]) * np.sign(VALUES[name].sum())
    observer = Observer(name="entropy")
    one, both = (
        choose_qparams(_statistics(v), QType.signed(6), symmetric=True, observer=observer)
        for v in (values, np.append(values, -values))
    )
    assert float(one.scale) == pytest.approx(float(both.scale), rel=1e-3)


def test_entropy_cuts_a_single_massive_value() -> None:
    found = choose_qparams(
        _statistics(VALUES["one_massive_value"]),
        QType.signed(8),
        symmetric=True,
        observer=Observer(name="entropy"),
    )
    assert float(found.scale) * 127 < 100.0


@pytest.mark.parametrize("name", ["mse", "entropy", "percentile", "minmax"])
def test_a_tensor_of_zeros_gets_a_usable_scale(name: str) -> None:
    statistics = _statistics(np.zeros(10, np.float32))
    for qtype, symmetric in GRIDS:
        found = choose_qparams(statistics, qtype, symmetric=symmetric, observer=Observer(name=name))  # type: ignore[arg-type]
        assert 0.99 <= found.scale <= 3.01
        bounded = choose_qparams(
            statistics,
            qtype,
            symmetric=symmetric,
            observer=Observer(name=name),  # type: ignore[arg-type]
            bounds=(0.0, 6.0),
        )
        # The largest integer stands for the bound, the smallest may lie beyond its mirror image.
        assert 0.0 < bounded.scale * (qtype.qmax - int(bounded.zero_point)) <= 6.0001


@pytest.mark.parametrize("name", ["mse", "entropy"])
def test_a_tensor_takes_milliseconds(name: str) -> None:
    statistics = [_statistics(VALUES[k]) for k in ("normal", "relu", "gelu_like")]
    begin = time.process_time()
    for s in statistics:
        choose_qparams(s, QType.unsigned(8), symmetric=False, observer=Observer(name=name))  # type: ignore[arg-type]
    # Measured 2 to 7 ms per tensor; the bound leaves room for a busy machine.
    assert (time.process_time() - begin) / len(statistics) < 0.05


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_margin_widens_both_ends_up_to_the_bounds(symmetric: bool) -> None:
    statistics, qtype = _statistics(np.float32([-2.0, 4.0])), QType.signed(8)

    def ends(bounds: tuple[float, float] | None) -> list[float]:
        observer = Observer(name="minmax", margin=1.5)
        found = choose_qparams(statistics, qtype, symmetric=symmetric, observer=observer, bounds=bounds)
        return [float(end) for end in range_of(found)]

    assert ends(None) == pytest.approx([-6.0 if symmetric else -3.0, 6.0], abs=0.06)
    assert ends((-2.5, 5.0)) == pytest.approx([-5.0 if symmetric else -2.5, 5.0], abs=0.06)


def test_all_percent_are_the_extremes_whether_the_histogram_has_seen_them_or_not() -> None:
    values = np.ones(3 * HISTOGRAM_ELEMENTS, np.float32)
    values[1], values[-2] = -7.0, 9.0
    statistics = _statistics(values)
    centres, _ = statistics.bins()
    assert centres.min() > 0.0
    observer = Observer(name="percentile", percentile=100.0)
    found = choose_qparams(statistics, QType.unsigned(8), symmetric=False, observer=observer)
    assert [float(end) for end in range_of(found)] == pytest.approx([-7.0, 9.0], abs=0.04)


@pytest.mark.parametrize("name", ["relu", "negative", "constant"])
def test_percentiles_stay_within_what_was_seen(name: str) -> None:
    """A bin at an end reaches beyond it."""
    values, observer = VALUES[name], Observer(name="percentile", percentile=99.9999)
    found = choose_qparams(_statistics(values), QType.unsigned(8), symmetric=False, observer=observer)
    low, high = (float(end) for end in range_of(found))
    assert min(float(values.min()), 0.0) * (1 + 1e-6) <= low
    assert high <= max(float(values.max()), 0.0) * (1 + 1e-6)


@pytest.mark.parametrize("name", ["relu", "one_massive_value"])
def test_entropy_takes_values_of_either_sign_alike(name: str) -> None:
    values, observer = np.abs(VALUES[name]), Observer(name="entropy")
    above, below = (
        choose_qparams(_statistics(v), QType.unsigned(6), symmetric=False, observer=observer)
        for v in (values, -values)
    )
    assert float(above.scale) == pytest.approx(float(below.scale), rel=1e-3)
    assert (int(above.zero_point), int(below.zero_point)) == (0, 63)
