"""Held-out parts, labels, fingerprints."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onnxptq.calibrate.feeds import (
    ImagePreprocess,
    RecordFeeds,
    open_feeds,
    read_labels,
    split_holdout,
    without_shared,
)
from onnxptq.errors import FeedError
from onnxptq.types import Feeds, InputSpec, Sample

F32 = np.dtype(np.float32)
X = InputSpec(name="x", dtype=F32, shape=("b", 1))
PICTURE = InputSpec(name="x", dtype=F32, shape=("b", 3, 4, 4))
UNUSED = Path("unused-spool")


def feeds_of(values: list[int], batch: int | str = "b") -> RecordFeeds:
    data = np.array(values, np.float32)[:, None]
    return open_feeds(data, [InputSpec(name="x", dtype=F32, shape=(batch, 1))], spool_dir=UNUSED)


def contents(feeds: Feeds | None) -> list[int]:
    return [int(v) for sample in feeds or () for v in sample["x"].ravel()]


class Plain:
    """The least that Feeds asks for."""

    fingerprint = "f"
    description = "plain"

    def __init__(self, values: list[int]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Sample]:
        return ({"x": np.array([[v]], np.float32)} for v in self.values)


class TestHoldout:
    @settings(max_examples=200, deadline=None)
    @given(
        values=st.lists(st.integers(0, 12), min_size=1, max_size=30),
        fraction=st.sampled_from([0.01, 0.2, 0.5, 0.99]),
        maximum=st.integers(1, 8),
        is_plain=st.booleans(),
    )
    def test_disjoint_by_content_and_complete(
        self, values: list[int], fraction: float, maximum: int, is_plain: bool
    ) -> None:
        feeds: Feeds = Plain(values) if is_plain else feeds_of(values)
        kept, held = split_holdout(feeds, fraction, maximum)
        assert len(kept) >= 1
        if len(set(values)) < 2:
            assert held is None
            assert contents(kept) == values
            return
        assert held is not None
        assert len(held) >= 1
        assert not set(contents(kept)) & set(contents(held))
        assert sorted(contents(kept) + contents(held)) == sorted(values)
        if any(values.count(v) == 1 for v in values):
            assert len(held) <= min(maximum, max(1, round(fraction * len(values))))
        assert contents(split_holdout(feeds, fraction, maximum)[1]) == contents(held)
        assert len({feeds.fingerprint, kept.fingerprint, held.fingerprint}) == 3

    def test_spread_over_the_whole_source(self) -> None:
        kept, held = split_holdout(feeds_of(list(range(100))), 0.05)
        assert contents(held) == [10, 30, 50, 70, 90]
        assert len(kept) == 95
        assert held is not None
        assert "held out" in held.description
        assert "95 samples of 100" in kept.description

    def test_batches_are_split_by_sample(self) -> None:
        kept, held = split_holdout(feeds_of(list(range(10)), batch=4), 0.3)
        assert contents(held) == [1, 5, 8, 8]
        assert contents(kept) == [0, 2, 3, 4, 6, 7, 9, 9]

    def test_nothing_asked_for(self) -> None:
        assert split_holdout(feeds_of([1, 2]), 0.0)[1] is None
        assert split_holdout(feeds_of([1, 2]), maximum=0)[1] is None
        for fraction in (1.0, -0.1, float("nan")):
            with pytest.raises(FeedError, match="fraction"):
                split_holdout(feeds_of([1, 2]), fraction)


class TestShared:
    @settings(max_examples=100, deadline=None)
    @given(
        evaluation=st.lists(st.integers(0, 9), min_size=1, max_size=12),
        calibration=st.lists(st.integers(0, 9), min_size=1, max_size=12),
        is_plain=st.booleans(),
    )
    def test_what_calibration_holds_as_well_is_left_out(
        self, evaluation: list[int], calibration: list[int], is_plain: bool
    ) -> None:
        known: Feeds = Plain(calibration) if is_plain else feeds_of(calibration)
        kept, shared = without_shared(feeds_of(evaluation), known)
        wanted = [value for value in evaluation if value not in calibration]
        assert contents(kept) == wanted
        assert shared == len(evaluation) - len(wanted)
        assert (kept is None) == (not wanted)

    def test_single_samples_count_where_the_model_has_a_fixed_batch(self) -> None:
        kept, shared = without_shared(feeds_of([5, 1, 6, 2, 7], batch=2), feeds_of([1, 2, 3, 4], batch=2))
        assert shared == 2
        assert contents(kept) == [5, 6, 7, 7]

    def test_contents_count_whatever_holds_them(self, tmp_path: Path) -> None:
        pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
        for i, picture in enumerate(pixels):
            Image.fromarray(picture).save(tmp_path / f"{i}.png")
        guess = ImagePreprocess.guess(PICTURE)
        files, arrays = (
            open_feeds(source, [PICTURE], preprocess=guess, spool_dir=UNUSED)
            for source in (tmp_path, pixels[1:])
        )
        kept, shared = without_shared(files, arrays)
        assert shared == 1
        assert kept is not None
        assert list(kept.sample_ids) == ["0.png"]
        assert "calibration samples left out" in kept.description

    def test_labels_stay_with_their_samples(self) -> None:
        kept, _ = without_shared(feeds_of([4, 5, 6, 7]), feeds_of([4, 6]))
        assert kept is not None
        assert list(read_labels([40, 50, 60, 70], kept)) == [50, 70]  # type: ignore[arg-type]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for i, name in enumerate(("tulip/a.png", "daisy/b.png", "rose/c.png", "daisy/d.png")):
        path = tmp_path / "flowers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (i * 10, 0, 0)).save(path)
    return tmp_path / "flowers"


def opened(folder: Path, **options: Any) -> RecordFeeds:
    return open_feeds(folder, [PICTURE], spool_dir=UNUSED, **options)


class TestLabels:
    """Samples in order: daisy/b, daisy/d, rose/c, tulip/a."""

    def test_folders_number_the_classes_of_the_whole_source(self, pictures: Path) -> None:
        labels = read_labels("folders", opened(pictures))
        assert labels is not None
        assert labels.dtype == np.int64
        assert labels.tolist() == [0, 0, 1, 2]
        part = read_labels("folders", opened(pictures).subset([3]))
        assert part is not None
        assert part.tolist() == [2]

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("l.json", json.dumps({"daisy/b.png": 5, "daisy/d.png": 6, "rose/c.png": 7, "tulip/a.png": 8})),
            ("l.json", json.dumps({"b.png": 5, "d.png": 6, "c.png": 7, "a.png": 8, "other.png": 1})),
            ("l.json", json.dumps({"calib": {"b.png": 5, "d.png": 6}, "val": {"c.png": 7, "a.png": 8}})),
            ("l.json", "[5, 6, 7, 8]"),
            ("l.csv", "path,label\ndaisy/b.png,5\ndaisy/d.png, 6\nrose/c.png,7\ntulip/a.png,8\n"),
            ("l.csv", '"b.png",5\n"d.png",6\n"c.png",7\n"a.png",8\n'),
            ("l.txt", "b.png 5\nd.png 6\nc.png 7\na.png 8\n"),
            ("l.txt", "5\n6\n7\n8\n"),
        ],
        ids=["paths", "names", "nested", "list", "header", "quoted", "spaces", "alone"],
    )
    def test_text_files(self, pictures: Path, name: str, text: str) -> None:
        path = pictures.parent / name
        path.write_text(text)
        labels = read_labels(path, opened(pictures))
        assert labels is not None
        assert labels.tolist() == [5, 6, 7, 8]
        part = read_labels(str(path), opened(pictures, limit=2))
        assert part is not None
        assert part.tolist() == [6, 8]

    def test_arrays(self, pictures: Path) -> None:
        values = np.array([5, 6, 7, 8], np.uint8)
        np.save(pictures.parent / "l.npy", values[:, None])
        np.savez_compressed(pictures.parent / "l.npz", images=np.zeros(3), labels=values)
        for source in (pictures.parent / "l.npy", pictures.parent / "l.npz", values, [5, 6, 7, 8]):
            labels = read_labels(source, opened(pictures).subset([2, 0]))
            assert labels is not None
            assert labels.tolist() == [7, 5]
        assert read_labels(None, opened(pictures)) is None

    def test_repeated_samples_repeat_their_labels(self) -> None:
        labels = read_labels([3, 4, 5], feeds_of([0, 1, 2], batch=2))
        assert labels is not None
        assert labels.tolist() == [3, 4, 5, 5]

    @pytest.mark.parametrize(
        ("name", "text", "expected"),
        [
            ("l.json", '{"daisy/b.png": 5}', "no label for 'daisy/d.png'"),
            ("l.json", '{"x/b.png": 5, "y/b.png": 6}', "stands for several labels"),
            ("l.json", "[1, 2]", r"labels of shape \(2,\); the data hold 4"),
            ("l.json", '{"b.png": "daisy"}', "'daisy' is no class index"),
            ("l.json", '{"b.png": 1.5}', "1.5 is no class index"),
            ("l.json", "{", "cannot be read as labels"),
            ("l.json", "3", "neither an object nor a list"),
            ("l.csv", "b.png,1\nd.png,x\n", "line 2: 'x' is no class index"),
            ("l.csv", "b.png,1\n2\n", "only some lines name"),
            ("l.xml", "", "unknown kind of label file"),
            ("l.npz", "", "cannot be read as labels"),
        ],
    )
    def test_mistakes(self, pictures: Path, name: str, text: str, expected: str) -> None:
        path = pictures.parent / name
        path.write_text(text)
        with pytest.raises(FeedError, match=expected) as caught:
            read_labels(path, opened(pictures))
        assert caught.value.remedy

    def test_missing_file_key_and_folders(self, pictures: Path) -> None:
        np.savez(pictures.parent / "l.npz", images=np.zeros(3))
        with pytest.raises(FeedError, match="no key 'labels', only 'images'"):
            read_labels(pictures.parent / "l.npz", opened(pictures))
        with pytest.raises(FeedError, match="cannot be read as labels"):
            read_labels(pictures.parent / "none.json", opened(pictures))
        with pytest.raises(FeedError, match="lies in no class folder"):
            read_labels("folders", opened(pictures / "daisy"))
        with pytest.raises(FeedError, match="samples that are files"):
            read_labels("folders", Plain([1]))


class TestFingerprint:
    def test_independent_of_the_place(self, pictures: Path, tmp_path: Path) -> None:
        first = opened(pictures).fingerprint
        shutil.copytree(pictures, tmp_path / "elsewhere")
        assert opened(tmp_path / "elsewhere").fingerprint == first
        assert opened(pictures).fingerprint == first
        assert len(first) == hashlib.sha256().digest_size * 2

    def test_depends_on_contents_order_choice_and_preprocessing(self, pictures: Path) -> None:
        feeds = opened(pictures)
        found = {
            feeds.fingerprint,
            opened(pictures, limit=3).fingerprint,
            feeds.subset([1, 0, 2, 3]).fingerprint,
            opened(pictures, preprocess=ImagePreprocess(mean=(0.5,))).fingerprint,
        }
        Image.new("RGB", (4, 4), (1, 2, 3)).save(pictures / "rose" / "c.png")
        assert len(found | {opened(pictures).fingerprint}) == 5

    def test_is_lazy(self, pictures: Path) -> None:
        feeds = opened(pictures)
        (pictures / "rose" / "c.png").unlink()
        with pytest.raises(FeedError, match=r"c\.png"):
            feeds.fingerprint  # noqa: B018

    def test_arrays_and_batching(self) -> None:
        assert feeds_of([1, 2, 3]).fingerprint == feeds_of([1, 2, 3]).fingerprint
        assert (
            len({feeds_of([1, 2, 3], b).fingerprint for b in ("b", 2, 3)} | {feeds_of([1, 2, 4]).fingerprint})
            == 4
        )


def test_labels_in_memory_that_are_no_classes() -> None:
    with pytest.raises(FeedError, match=r": 0\.333 is no class index"):
        read_labels(np.array([1.0, 0.333]), feeds_of([1, 2]))
