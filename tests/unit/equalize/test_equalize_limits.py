"""Clips: channels inside the bounds may grow up to them, channels that reach them stay, values seen are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxptq.equalize.run as stage
from onnxptq.equalize.limits import HEADROOM, TAILS, factor_limits
from onnxptq.equalize.observe import Spread
from onnxptq.equalize.run import find_rescaling
from onnxptq.runtime import Session
from tests.unit.equalize.equalize_helpers import Samples, canonical, equalize, observed_limits, traced
from tests.unit.graph.graph_helpers import build, node

PEAKS = np.array([6.0, 3.0, 0.5, 0.05] * 4, np.float32)


def clipped(bound: float = 6.0) -> onnx.ModelProto:
    """x -> depthwise -> Clip(0, bound) -> depthwise that undoes the ratio of the channels -> pointwise."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": PEAKS[:, None, None, None],
        "low": np.float32(0),
        "high": np.float32(bound),
        "w2": (rng.standard_normal((16, 1, 3, 3)) / PEAKS[:, None, None, None]).astype(np.float32),
        "w3": rng.standard_normal((8, 16, 1, 1)).astype(np.float32),
    }
    nodes = [
        node("Conv", "x w1", "a", group=16),
        node("Clip", "a low high", "b"),
        node("Conv", "b w2", "c", group=16),
        node("Conv", "c w3", "y"),
    ]
    return build(nodes, {"x": (1, 16, 12, 12)}, ["y"], weights)


def feeds(count: int, peak: float = 1.0) -> Samples:
    """Uniform in [-1, 1], every channel of every sample with a value of exactly ``peak``."""
    rng = np.random.default_rng(1)
    values = rng.uniform(-1, 1, (count, 1, 16, 12, 12)).astype(np.float32)
    values[..., 5, 5] = peak
    return Samples({"x": value} for value in values)


def test_channels_grow_to_the_bound_and_those_that_reach_it_stay(tmp_path: Path) -> None:
    model = canonical(clipped(), tmp_path)
    sample = next(iter(feeds(1)))
    trace = traced(model, sample)
    limits = observed_limits(model, trace, sample)
    roots = trace.classes.roots(trace.labels["b"]).reshape(-1)
    low, high = np.array([limits[root // 2] for root in roots.tolist()]).T
    np.testing.assert_allclose(np.exp(low), np.minimum(1.0, HEADROOM * PEAKS / 6.0), rtol=1e-6)
    np.testing.assert_array_equal(high, 0.0)


@pytest.mark.parametrize("inverted", [False, True])
def test_the_tighter_side_counts_and_tails_are_added(inverted: bool, tmp_path: Path) -> None:
    model = clipped()
    model.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(np.float32(-2), "low"))
    trace = traced(canonical(model, tmp_path), next(iter(feeds(1))))
    roots = np.sort(trace.classes.roots(trace.labels["b"]).reshape(-1))
    if inverted:
        trace.labels["b"] = trace.labels["b"] ^ 1
        roots ^= 1
    zero = np.zeros(16)
    spread = Spread(
        roots=roots, low=np.full(16, -0.5), high=np.full(16, 0.3), energy=zero, share=zero, density=zero,
        tail_low=np.full(16, 0.01), tail_high=np.full(16, 0.2), rarity=zero,
    )  # fmt: skip
    least = np.log(HEADROOM * max((0.3 + TAILS * 0.2) / 6, (0.5 + TAILS * 0.01) / 2))
    for ends in factor_limits(trace, {"b": spread}).values():
        assert ends == pytest.approx((0.0, -least) if inverted else (least, 0.0))


def test_a_tensor_that_was_not_observed_is_left_alone(tmp_path: Path) -> None:
    trace = traced(canonical(clipped(), tmp_path), next(iter(feeds(1))))
    assert set(factor_limits(trace, {}).values()) == {(0.0, 0.0)}


def test_small_channels_behind_a_clip_are_rescued(tmp_path: Path) -> None:
    model, samples = canonical(clipped(), tmp_path), feeds(16)
    result, done = equalize(model, samples, work_dir=tmp_path, tensors=["b"])
    # The smallest of the channels has 2 of 255 steps to begin with.
    assert done.after_db > done.before_db + 10
    assert [t.tensor for t in done.tensors] == ["b"]
    assert done.clipped == 1
    assert "1 Clips" in done.summary
    before, after = Session(model.path, threads=1), Session(result.path, threads=1)
    for sample in samples:
        wanted = before.run(sample)["y"]
        # Factors move single-precision rounding by about one unit in the last place per operator.
        np.testing.assert_allclose(after.run(sample)["y"], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_beyond_what_was_seen_the_channel_saturates(tmp_path: Path) -> None:
    """The documented price: a channel that doubles is cut at the bound that its factor moved."""
    model = canonical(clipped(), tmp_path)
    result, _ = equalize(model, feeds(16), work_dir=tmp_path, tensors=["b"])
    sample = next(iter(feeds(1, peak=2.0)))
    before, after = (Session(m.path, threads=1).run(sample)["y"] for m in (model, result))
    assert np.abs(after - before).max() > 0.1


def test_unseen_samples_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples that were set apart hold larger values: the gain on the rest does not count."""
    quiet, loud = list(feeds(16)), list(feeds(16, peak=3.0))
    _, unseen = stage._divide(16, 16)
    mixed = Samples(loud[i] if i in unseen else quiet[i] for i in range(16))
    model = canonical(clipped(20.0), tmp_path)
    result, done = equalize(model, mixed, work_dir=tmp_path, tensors=["b"])
    assert result is model
    assert done.clipped == 0


def test_what_passes_a_clip_is_never_proposed(tmp_path: Path) -> None:
    model = canonical(clipped(), tmp_path)
    rescaling = find_rescaling(model, feeds(16), work_dir=tmp_path, tensors=["b"])
    assert rescaling.needs_judging
    assert rescaling.proposed()[0] is model
    assert rescaling.judged()[0] is not model


def test_without_unseen_samples_nothing_passes_a_clip(tmp_path: Path) -> None:
    model = canonical(clipped(), tmp_path)
    result, done = equalize(model, feeds(3), work_dir=tmp_path, tensors=["b"])
    assert result is model
    assert done.tensors == ()


def test_channels_that_all_reach_the_bound_are_named(tmp_path: Path) -> None:
    model = canonical(clipped(0.01), tmp_path)
    result, done = equalize(model, feeds(8), work_dir=tmp_path, tensors=["b"])
    assert result is model
    assert [(s.site, "bounds of a Clip" in s.reason) for s in done.skips] == [("b", True)]
