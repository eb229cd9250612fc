"""From statistics to parameters: scale groups, overrides, the choice of an observer, and the cache."""

from __future__ import annotations

import errno
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from onnxptq.calibrate.cache import cache_key, default_work_dir, load_calibration, save_calibration
from onnxptq.calibrate.observers import Observer
from onnxptq.calibrate.ranges import choose_ranges
from onnxptq.calibrate.run import Calibration
from onnxptq.calibrate.select import CANDIDATES, label, select_observer
from onnxptq.calibrate.statistics import StatisticsBuilder, TensorStatistics
from onnxptq.errors import OutputPathError
from onnxptq.quantizers.affine import range_of
from onnxptq.types import PerTensor, QType, Quantizer, QuantPlan, Skip

MINMAX = Observer(name="minmax")


def _statistics(*values: float, histogram: bool = True) -> TensorStatistics:
    builder = StatisticsBuilder(histogram=histogram)
    builder.update(np.array(values, np.float32))
    result = builder.result()
    assert result is not None
    return result


def _calibration(**tensors: TensorStatistics) -> Calibration:
    return Calibration(statistics=tensors, samples=3)


def _quantizer(tensor: str, group: str | None = None) -> Quantizer:
    return Quantizer(
        quantizer_id=tensor,
        tensor=tensor,
        role="activation",
        qtype=QType.unsigned(8),
        granularity=PerTensor(),
        symmetric=False,
        sites=(),
        scale_group=group or tensor,
    )


def _plan(*quantizers: Quantizer) -> QuantPlan:
    return QuantPlan(target="x", quantizers=quantizers)


def test_a_group_takes_the_member_that_holds_the_others() -> None:
    found = choose_ranges(
        _plan(_quantizer("a", "g"), _quantizer("b", "g"), _quantizer("c")),
        _calibration(a=_statistics(-1.0, 4.0), b=_statistics(0.0, 3.0), c=_statistics(0.0, 1.0)),
        MINMAX,
    )
    assert found["a"] is found["b"]
    assert found["a"].scale == np.float32(5 / 255)
    assert found["c"].scale < found["a"].scale


def test_a_group_without_such_a_member_takes_all_of_them() -> None:
    found = choose_ranges(
        _plan(_quantizer("a", "g"), _quantizer("b", "g")),
        _calibration(a=_statistics(0.0, 10.0), b=_statistics(-6.0, 1.0)),
        MINMAX,
    )
    low, high = range_of(found["a"])
    assert low <= -6.0 + 0.5 * found["a"].scale
    assert high >= 10.0 - 0.5 * found["a"].scale


def test_zero_counts_as_a_value_of_every_range() -> None:
    """A tensor far from 0 needs more of the grid than one that is wider and has 0 in it, so its observer decides."""
    calibration = _calibration(a=_statistics(10.0, *[10.5] * 98, 11.0), b=_statistics(-1.0, *[0.0] * 98, 2.0))
    plan, few = (
        _plan(_quantizer("a", "g"), _quantizer("b", "g")),
        Observer(name="percentile", percentile=50.0),
    )
    low, high = range_of(choose_ranges(plan, calibration, few, {"a": MINMAX})["a"])
    assert (float(low), float(high)) == pytest.approx((-1.0, 11.0), abs=0.05)


def test_bounds_of_a_quantizer_stop_a_margin() -> None:
    observer, calibration = Observer(name="minmax", margin=2.0), _calibration(a=_statistics(0.0, 4.0))
    for bounds, high in ((None, 8.0), ((0.0, 6.0), 6.0)):
        found = choose_ranges(_plan(replace(_quantizer("a"), bounds=bounds)), calibration, observer)
        assert float(range_of(found["a"])[1]) == pytest.approx(high)


def test_of_equal_ranges_the_tensor_with_more_values_leads() -> None:
    many = _statistics(*np.linspace(-1, 1, 50), 100.0)
    few = _statistics(-1.0, 100.0)
    for names in (("a", "b"), ("b", "a")):
        observer = Observer(name="percentile", percentile=90.0)
        pair = dict(zip(names, (many, few), strict=True))
        found = choose_ranges(
            _plan(*(_quantizer(n, "g") for n in sorted(pair))), _calibration(**pair), observer
        )
        assert range_of(found["a"])[1] < 10.0


def test_overrides_name_tensors() -> None:
    values = (*np.linspace(-1, 1, 100), 50.0)
    calibration = _calibration(a=_statistics(*values), b=_statistics(*values))
    found = choose_ranges(
        _plan(_quantizer("a"), _quantizer("b")),
        calibration,
        MINMAX,
        {"b": Observer(name="percentile", percentile=90.0)},
    )
    assert range_of(found["a"])[1] >= 49.0
    assert range_of(found["b"])[1] < 5.0


def test_the_best_candidate_wins_and_the_first_of_equals() -> None:
    scores = dict(zip(CANDIDATES, (1.0, 3.0, 2.0, 3.0), strict=True))
    found = select_observer(lambda o, _: scores[o], 8)
    assert found.observer is CANDIDATES[1]
    assert {**found.scores, **found.behind} == {label(o): s for o, s in scores.items()}


def test_only_the_better_half_sees_the_remaining_samples() -> None:
    # The third leads on the first samples and loses to the second on all of them.
    early = dict(zip(CANDIDATES, (1.0, 4.0, 5.0, 2.0), strict=True))
    late = {**early, CANDIDATES[1]: 4.5, CANDIDATES[2]: 3.0}
    seen: list[tuple[int, int]] = []

    def evaluate(candidate: Observer, count: int) -> float:
        seen.append((CANDIDATES.index(candidate), count))
        return (late if count == 12 else early)[candidate]

    found = select_observer(evaluate, 12)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3), (1, 12), (2, 12)]
    assert found.observer is CANDIDATES[1]
    assert list(found.scores.values()) == [4.5, 3.0]
    assert list(found.behind.values()) == [1.0, 2.0]
    first, second, third, last = map(label, CANDIDATES)
    assert found.summary == (
        f"Ranges by {second} (4.50 dB on calibration samples; {third} 3.00; behind on fewer of them: {first} 1.00, "
        f"{last} 2.00)."
    )


def test_one_candidate_is_alone_in_the_summary() -> None:
    found = select_observer(lambda *_: 7.0, 3, CANDIDATES[:1])
    assert found.summary == f"Ranges by {label(CANDIDATES[0])} (7.00 dB on calibration samples)."


def test_of_three_candidates_two_see_all_samples() -> None:
    seen: list[tuple[str, int]] = []

    def evaluate(observer: Observer, samples: int) -> float:
        seen.append((label(observer), samples))
        return float(CANDIDATES.index(observer))

    assert select_observer(evaluate, 16, CANDIDATES[:3]).observer is CANDIDATES[2]
    first, second, third = (label(c) for c in CANDIDATES[:3])
    assert seen == [(first, 4), (second, 4), (third, 4), (second, 16), (third, 16)]


def test_scores_that_are_not_numbers_never_win() -> None:
    found = select_observer(lambda o, _: float("nan") if o.name != "minmax" else -1.0, 8)
    assert found.observer.name == "minmax"


@pytest.mark.parametrize("histogram", [True, False])
def test_calibrations_survive_the_cache(tmp_path: Path, histogram: bool) -> None:
    wanted = Calibration(
        statistics={
            "a/b": _statistics(-1e-40, 0.1, histogram=histogram),
            "c": _statistics(3e38, histogram=histogram),
        },
        samples=7,
        skips=(Skip(site="s", reason="r"),),
        uncalibrated={"s": "r"},
    )
    save_calibration(tmp_path, "k", wanted)
    found = load_calibration(tmp_path, "k")
    assert found is not None
    assert (found.samples, found.skips, found.uncalibrated) == (7, wanted.skips, {"s": "r"})
    for name, one in wanted.statistics.items():
        other = found.statistics[name]
        assert (one.minimum, one.maximum, one.elements, one.exponent) == (
            other.minimum,
            other.maximum,
            other.elements,
            other.exponent,
        )
        np.testing.assert_array_equal(one.counts, other.counts)
        # numpy takes an empty array for equal to None.
        assert (other.counts is None) == (not histogram)
    assert [p.name for p in tmp_path.iterdir()] == ["calibration-k.npz"]


def test_an_absent_or_damaged_cache_is_no_cache(tmp_path: Path) -> None:
    assert load_calibration(tmp_path, "k") is None
    save_calibration(tmp_path, "k", _calibration(a=_statistics(1.0, 2.0)))
    path = tmp_path / "calibration-k.npz"
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(150):
        broken = bytearray(whole)
        if rng.random() < 0.3:
            broken = broken[: rng.randrange(len(whole))]
        else:
            for _ in range(rng.randrange(1, 4)):
                broken[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(broken)
        load_calibration(tmp_path, "k")  # any outcome but an exception


def test_keys_depend_on_every_part() -> None:
    keys = {cache_key("a", 1, True, None), cache_key("a", 1, False, None), cache_key("a", 2, True, ["b"])}
    assert len(keys) == 3
    assert cache_key("a", ("x", "y")) == cache_key("a", ["x", "y"])


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputPathError, match="absent"):
        save_calibration(tmp_path / "absent", "k", _calibration(a=_statistics(1.0)))

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OutputPathError, match="No space left"):
        save_calibration(tmp_path, "k", _calibration(a=_statistics(1.0)))
    assert list(tmp_path.iterdir()) == []


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ONNXPTQ_CACHE", str(tmp_path / "a"))
    assert default_work_dir() == tmp_path / "a"
    monkeypatch.delenv("ONNXPTQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_work_dir() == tmp_path / "onnxptq"
