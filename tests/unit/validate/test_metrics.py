"""The streaming metrics against one-shot numpy in double precision."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxptq.errors import FeedError, OutputCheckError
from onnxptq.validate import metrics
from onnxptq.validate.metrics import OutputMeter, OutputMetrics, QualityMeter, comparable

FLOATS = st.floats(-1e4, 1e4, width=32)


def _meter(pairs: list[tuple[np.ndarray, np.ndarray]], **options: bool) -> OutputMetrics:
    meter = OutputMeter("y", **options)
    for reference, quantized in pairs:
        meter.update(reference, quantized)
    return meter.result()


@st.composite
def _batches(draw: st.DrawFn) -> list[tuple[np.ndarray, np.ndarray]]:
    columns = draw(st.integers(2, 9))
    rows = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    # Few distinct values, so that ties are common.
    values = st.one_of(FLOATS, st.sampled_from([0.0, 1.0, 2.0]))
    make = lambda n: draw(hnp.arrays(np.float32, (n, columns), elements=values))  # noqa: E731
    return [(make(n), make(n)) for n in rows]


@settings(max_examples=80, deadline=None)
@given(_batches())
def test_against_brute_force(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    result = _meter(pairs)
    r = np.concatenate([a for a, _ in pairs]).astype(np.float64)
    q = np.concatenate([b for _, b in pairs]).astype(np.float64)
    signal, noise = math.fsum((r**2).ravel()), math.fsum(((r - q) ** 2).ravel())
    assert result.elements == r.size
    assert result.rows == len(r)
    # 1e-9: sums of at most 200 doubles lose a few of their 53 bits.
    if noise == 0:
        assert result.sqnr_db == math.inf
    elif signal == 0:
        assert result.sqnr_db == -math.inf
    else:
        assert result.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=1e-8)
    if np.any(r) and np.any(q):
        cosine = math.fsum((r * q).ravel()) / math.sqrt(signal) / math.sqrt(math.fsum((q**2).ravel()))
        assert result.cosine == pytest.approx(cosine, abs=1e-9)
    assert result.max_abs_error == np.abs(r - q).max()
    ranked = [sorted(range(q.shape[1]), key=lambda c, row=row: (-row[c], c)) for row in q]
    firsts = [min(range(r.shape[1]), key=lambda c, row=row: (-row[c], c)) for row in r]
    assert result.top1_agreement == np.mean([f == order[0] for f, order in zip(firsts, ranked, strict=True)])
    top5 = np.mean([f in order[:5] for f, order in zip(firsts, ranked, strict=True)])
    assert result.top5_agreement == (top5 if r.shape[1] > 5 else None)


@settings(max_examples=40, deadline=None)
@given(_batches(), st.randoms(use_true_random=False))
def test_order_and_batching_do_not_matter(pairs: list[tuple[np.ndarray, np.ndarray]], random: object) -> None:
    whole = _meter([(np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs]))])
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    parts = _meter(shuffled)
    for name in ("elements", "rows", "top1_agreement", "top5_agreement", "max_abs_error"):
        assert getattr(parts, name) == getattr(whole, name)
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-12, abs=1e-9)
    assert parts.cosine == pytest.approx(whole.cosine, rel=1e-12, abs=1e-12)


def test_large_tensors_are_taken_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    pair = [(rng.normal(size=(3, 7, 11)).astype(np.float32), rng.normal(size=(3, 7, 11)).astype(np.float32))]
    whole = _meter(pair)
    monkeypatch.setattr(metrics, "_BLOCK", 10)
    parts = _meter(pair)
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db, abs=1e-9)
    assert parts.max_abs_error == whole.max_abs_error
    assert parts.elements == whole.elements


def test_small_differences_of_large_values_keep_double_precision() -> None:
    """In single precision 1e4 + 1e-3 is off by 2 %, and the sum of a million such squares by more."""
    r = np.full((1, 1000, 1000), 1e4, np.float32)
    q = r.copy()
    q[0, 0, 0] += np.float32(0.125)
    assert _meter([(r, q)]).sqnr_db == pytest.approx(10 * math.log10(1e14 / 0.125**2), abs=1e-9)


def test_integers_and_booleans_are_compared_for_equality() -> None:
    ints = _meter([(np.array([[1, 2, 3, 4]]), np.array([[1, 2, 0, 4]]))])
    assert ints.equal_fraction == 0.75
    assert ints.sqnr_db is None
    assert ints.top1_agreement is None
    assert _meter([(np.array([True, False]), np.array([True, True]))]).equal_fraction == 0.5


def test_only_matrices_of_floats_are_class_scores() -> None:
    ones = np.ones((2, 3, 4), np.float32)
    assert _meter([(ones, ones)]).top1_agreement is None
    assert _meter([(ones, ones)], is_scores=True).top1_agreement == 1.0
    assert _meter([(ones[0], ones[0])]).top1_agreement == 1.0
    assert _meter([(ones[0], ones[0])], is_scores=False).top1_agreement is None
    assert _meter([(ones[0, :, :1], ones[0, :, :1])]).top1_agreement is None


def test_values_that_are_not_finite_are_counted() -> None:
    r = np.array([[1.0, np.nan, 3.0, np.inf]], np.float32)
    q = np.array([[1.0, 2.0, np.nan, np.inf]], np.float32)
    result = _meter([(r, q)])
    assert result.nonfinite == 3
    assert result.nonfinite_reference == 2
    assert result.lost == 1
    assert math.isnan(result.sqnr_db or 0.0)
    assert math.isnan(result.cosine or 0.0)


def test_values_that_the_reference_itself_has_lost_are_left_out() -> None:
    r = np.array([[1.0, np.nan, 3.0, -np.inf, -2.0]], np.float32)
    for there in (np.nan, np.inf, 7.0):
        q = np.array([[1.5, there, 3.0, np.nan, -1.0]], np.float32)
        result = _meter([(r, q)], is_scores=False)
        assert (result.nonfinite, result.nonfinite_reference, result.lost) == (2, 2, 0)
        assert result.sqnr_db == pytest.approx(10 * math.log10(14 / 1.25))
        assert result.max_abs_error == 1.0
        assert result.cosine == pytest.approx(12.5 / math.sqrt(14 * 12.25))
    nothing = _meter([(np.full((1, 2), np.nan, np.float32), np.ones((1, 2), np.float32))])
    assert math.isnan(nothing.sqnr_db or 0.0)
    assert nothing.is_void
    assert nothing.top1_agreement is None


def test_rows_without_a_rank_are_no_agreement() -> None:
    r = np.array([[np.nan, 1.0], [0.0, 1.0], [0.0, 1.0]], np.float32)
    q = np.array([[np.nan, 1.0], [0.0, 1.0], [1.0, 0.0]], np.float32)
    assert _meter([(r, q)]).top1_agreement == 0.5


@pytest.mark.parametrize("place", [0, 7])
def test_a_row_that_the_quantized_model_has_lost_agrees_with_nothing(place: int) -> None:
    """Wherever the NaN is: a comparison with it is False, and the first maximum of numpy is the first NaN."""
    r = np.eye(8, dtype=np.float32)[[0, 1, 7]]
    q = r.copy()
    q[:2, place] = np.nan
    meter = OutputMeter("y")
    meter.update(r, q, np.array([0, 1, 7]))
    result = meter.result()
    assert result.top1_agreement == result.top5_agreement == result.quantized_accuracy == pytest.approx(1 / 3)
    assert result.reference_accuracy == 1.0
    other = OutputMeter("y")
    other.update(q, r, np.array([0, 1, 7]))
    assert other.result().reference_accuracy == pytest.approx(1 / 3)
    assert other.result().quantized_accuracy == 1.0


@pytest.mark.parametrize(
    ("labels", "named"), [([0, 1, 4, 9], "f, sample 2: 4 .*and 1 more"), ([0, -1], "f, sample 1: -1 ")]
)
def test_labels_that_are_no_class(labels: list[int], named: str) -> None:
    scores = {name: np.ones((len(labels), count), np.float32) for name, count in (("small", 3), ("other", 4))}
    pairs = [(name, name) for name in scores]
    meter = QualityMeter(pairs, labels=np.array(labels), origin="f, sample {}".format)
    with pytest.raises(FeedError, match=f"{named}.*") as refused:
        meter.update(scores, scores)
    assert "which has 4" in refused.value.message


@pytest.mark.parametrize("most", [9, 4])
def test_labels_belong_to_the_outputs_that_have_all_their_classes(most: int) -> None:
    outputs = {"boxes": np.ones((2, 4), np.float32), "scores": np.eye(2, 10, dtype=np.float32)}
    meter = QualityMeter([("boxes", "boxes"), ("scores", "scores")], labels=np.array([0, most]))
    meter.update(outputs, outputs)
    boxes, scores = meter.results()
    assert boxes.reference_accuracy is None
    assert scores.reference_accuracy == 0.5


def test_nothing_was_added_to_an_empty_output() -> None:
    empty = np.zeros((0, 4), np.float32)
    result = _meter([(empty, empty)])
    assert result.elements == 0
    assert result.top1_agreement is None


def test_labels_follow_the_rows() -> None:
    rng = np.random.default_rng(1)
    r, q = rng.normal(size=(2, 10, 6)).astype(np.float32)
    labels = rng.integers(0, 6, 10)
    meter = QualityMeter([("a", "b"), ("map", "map")], labels=labels)
    cuts = [0, 1, 4, 10]
    for i, j in pairwise(cuts):
        image = np.ones((j - i, 2, 2, 2), np.float32)
        meter.update({"a": r[i:j], "map": image}, {"b": q[i:j], "map": image})
    result, other = meter.results()
    assert result.reference_accuracy == np.mean(r.argmax(1) == labels)
    assert result.quantized_accuracy == np.mean(q.argmax(1) == labels)
    assert result.labelled == 10
    assert other.labelled == 0


def test_too_few_labels() -> None:
    meter = QualityMeter([("a", "a")], labels=np.array([1]))
    value = np.ones((2, 3), np.float32)
    with pytest.raises(FeedError, match="fewer labels"):
        meter.update({"a": value}, {"a": value})


def test_different_shapes_are_refused() -> None:
    with pytest.raises(OutputCheckError, match=r"'y' has shape \[2\]"):
        OutputMeter("y").update(np.ones(3, np.float32), np.ones(2, np.float32))


def test_samples_with_other_numbers_of_rows_are_left_out_behind_a_selection() -> None:
    meter = QualityMeter([("y", "y"), ("z", "z")], selected=["y"])
    one = {"y": np.ones((2, 4), np.float32), "z": np.ones(3, np.float32)}
    meter.update(one, {"y": np.ones((3, 4), np.float32), "z": one["z"]})
    found, other = meter.results()
    assert (found.is_selected, found.resized, found.sqnr_db, found.is_void) == (True, 1, None, True)
    assert (other.is_selected, other.resized, other.sqnr_db) == (False, 0, np.inf)
    meter.update(one, {"y": 2 * one["y"], "z": one["z"]})
    found, _ = meter.results()
    assert (found.resized, found.elements, found.sqnr_db, found.is_void) == (1, 8, 0.0, False)
    assert found.top1_agreement is None
    assert comparable(meter.results()) == [meter.results()[1]]
    with pytest.raises(OutputCheckError):
        meter.update(one, {"y": one["y"][0], "z": one["z"]})


@pytest.mark.parametrize(("other", "cosine", "sqnr_db"), [(0.0, 1.0, math.inf), (1.0, 0.0, -math.inf)])
def test_zeros_have_the_direction_of_zeros_alone(other: float, cosine: float, sqnr_db: float) -> None:
    result = _meter([(np.zeros(4, np.float32), np.full(4, other, np.float32))])
    assert (result.cosine, result.sqnr_db) == (cosine, sqnr_db)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e15])
def test_decibels_do_not_depend_on_the_size(size: float) -> None:
    r = np.float64([3.0, 4.0]) * size
    assert _meter([(r, 1.01 * r)]).sqnr_db == pytest.approx(40.0)
