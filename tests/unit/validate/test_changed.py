"""What a form of a network holds under the user's names, and is not what the user's network computes there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxptq
from onnxptq.equalize.run import find_rescaling
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.samples import ListFeeds
from onnxptq.types import CanonicalModel, Sample
from onnxptq.validate.changed import METADATA, _differ, changed_tensors, recorded
from tests.unit.small_nets import Net


def _samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    # Channels of very different sizes, so that rescaling them pays.
    wide = np.array([0.1, 1.0, 30.0], np.float32).reshape(1, 3, 1, 1)
    return [{"x": (rng.standard_normal((1, 3, 8, 8)) * wide).astype(np.float32)} for _ in range(16)]


def _source(folder: Path) -> Path:
    net = Net(seed=3)
    a = net.op("Relu", "a", net.conv("first", "x", (16, 3, 3, 3)))
    scaled = net.op("Mul", "scaled", net.conv("second", a, (8, 16, 1, 1)), net.weight("gamma", 1, 8, 1, 1))
    path = folder / "net.onnx"
    onnx.save(net.proto({"x": ["n", 3, 8, 8]}, [net.conv("last", scaled, (4, 8, 1, 1))]), str(path))
    return path


@pytest.fixture
def model(tmp_path: Path) -> CanonicalModel:
    work = tmp_path / "work"
    work.mkdir()
    return canonicalize(_source(tmp_path), work)


def test_folded_constants_change_what_stands_in_front(model: CanonicalModel, tmp_path: Path) -> None:
    assert changed_tensors(model, _samples()[0], work_dir=tmp_path) == ("second",)


def test_rescaled_channels_are_told(model: CanonicalModel, tmp_path: Path) -> None:
    form, done = find_rescaling(model, ListFeeds(_samples()), work_dir=model.path.parent).proposed()
    assert {t.tensor for t in done.tensors} >= {"a"}
    found = changed_tensors(form, _samples()[0], work_dir=tmp_path)
    assert set(found) == {"first", "a", "second"}


def test_a_written_file_says_so_and_is_believed(tmp_path: Path) -> None:
    source, written = _source(tmp_path), tmp_path / "int8.onnx"
    onnxptq.quantize(source, written, calibration=_samples(), work_dir=tmp_path / "cache")
    props = {p.key: p.value for p in onnx.load(str(written)).metadata_props}
    assert set(recorded(props)) == {"first", "a", "second"}
    found = onnxptq.validate(source, written, data=_samples(), layers=True)
    assert [layer.tensor for layer in found.layers] == ["last"]
    assert any("Not compared" in note and "first" in note for note in found.notes)
    assert "The inner tensors were compared on 8 of the 16 samples." in found.notes


@pytest.mark.parametrize("text", ["", "no json", "{}", "3", '[1, "a"]'])
def test_a_damaged_list_is_no_error(text: str) -> None:
    assert list(recorded({METADATA: text})) == (["a"] if text.startswith("[") else [])
    assert list(recorded({METADATA: json.dumps(["a", "b"])})) == ["a", "b"]
    assert list(recorded({})) == []


def test_sums_that_are_no_numbers_tell_nothing() -> None:
    """Of a masked tensor sums are infinite, or NaN where both infinities meet; the others still count."""
    before = np.array([np.nan, np.inf, 5.0])
    assert not _differ(before, before.copy(), 1e-3)
    assert not _differ(before, np.array([1.0, 2.0, 5.0]), 1e-3)
    assert _differ(before, np.array([np.nan, np.inf, 6.0]), 1e-3)
    assert _differ(np.array([1.0, 2.0, 5.0]), before, 1e-3)


def test_a_sum_that_cancels_is_held_against_the_magnitudes_of_its_terms() -> None:
    before = np.array([1e-6, 100.0, 20.0])
    assert not _differ(before, np.array([5e-2, 100.0, 20.0]), 1e-3)
    assert _differ(before, np.array([5e-1, 100.0, 20.0]), 1e-3)
