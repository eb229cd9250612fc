"""Digits as pictures and as points: what the package ships, split by hand, the same every time."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from models import digits
from onnxptq.errors import OutputPathError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("sklearn") is None, reason="scikit-learn (the demo extra) is not installed"
)


def test_they_are_the_digits_of_the_package() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for form in ("pictures", "points"):
        labels = np.concatenate([digits.load(form, part).labels for part in ("calib", "heldout")])
        np.testing.assert_array_equal(labels, bunch.target)
    heldout = digits.load("pictures", "heldout")
    # Enlarged twofold and bilinearly, a picture keeps its mean but for what its edge repeats.
    ink = heldout.samples[:, 0] * np.float32(0.32) + np.float32(0.3)
    expected = bunch.images[-digits.HELD_OUT :] / 16
    np.testing.assert_allclose(ink.mean((1, 2)), expected.mean((1, 2)), atol=0.02)
    # In the middle of four equal pixels nothing was mixed with others.
    assert ink.min() >= -1e-6
    assert ink.max() <= 1 + 1e-6


def test_points_are_the_ink() -> None:
    ink = digits.load("points", "heldout")
    from sklearn.datasets import load_digits

    images = load_digits().images[-digits.HELD_OUT :] / 16
    column = np.round(ink.samples[..., 0] * 4 + 3.5).astype(int)
    row = np.round(3.5 - ink.samples[..., 1] * 4).astype(int)
    np.testing.assert_allclose(ink.samples[..., 2], images[np.arange(len(images))[:, None], row, column])
    for one_row, one_column, image in zip(row, column, images, strict=True):
        assert len(set(zip(one_row, one_column, strict=True))) == digits.POINTS
        left = np.ones_like(image, bool)
        left[one_row, one_column] = False
        assert image[left].max() <= image[~left].min()


def test_no_two_distances_tie() -> None:
    """Positions of equal distances would depend on the runtime."""
    p = digits.load("points", "heldout").samples[..., :2].astype(np.float64)
    for points in p:
        distances = ((points[:, None] - points[None]) ** 2).sum(-1)[np.triu_indices(len(points), 1)]
        assert np.diff(np.sort(distances)).min() > 0


@pytest.mark.parametrize(
    ("form", "shape"), [("pictures", (1, 16, 16)), ("points", (32, 3))], ids=["pictures", "points"]
)
def test_parts(form: digits.Form, shape: tuple[int, ...]) -> None:
    calib, heldout = (digits.load(form, part) for part in ("calib", "heldout"))
    assert calib.samples.shape == (1197, *shape)
    assert heldout.samples.shape == (600, *shape)
    for part in (calib, heldout):
        assert part.samples.dtype == np.float32
        assert np.bincount(part.labels, minlength=10).min() > 50
    again = digits.load(form, "heldout")
    np.testing.assert_array_equal(again.samples, heldout.samples)


def test_what_is_written_is_what_is_loaded(tmp_path: Path) -> None:
    files = digits.write(tmp_path)
    assert len(files) == 4
    with np.load(tmp_path / "points" / "calib.npz") as stored:
        loaded = digits.load("points", "calib")
        np.testing.assert_array_equal(stored["points"], loaded.samples)
        np.testing.assert_array_equal(stored["labels"], loaded.labels)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputPathError, match=r"file/pictures"):
        digits.write(tmp_path / "file")
