"""The real layouts of the testbed, each read in the way that a user would try first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxptq.calibrate.feeds import ImagePreprocess, open_feeds, read_labels, split_holdout
from onnxptq.types import InputSpec


@pytest.mark.parametrize(
    ("data", "shape", "options", "labels", "count"),
    [
        (
            "imagenet/val",
            ("b", 3, 224, 224),
            {"resize": "none", "scale": 1, "mean": 127, "std": 128},
            "labels.json",
            375,
        ),
        ("flowers/calib", ("b", 3, 224, 224), None, "folders", 255),
        ("cifar10_jpeg/train.npz", ("b", 3, 32, 32), {}, "train.npz", 500),
        ("modelnet10/test.npz", ("b", 1024, 3), None, "test.npz", 454),
        ("coco/calib", (1, 3, 352, 352), {"resize": "exact", "color": "BGR"}, None, 64),
    ],
    ids=["imagenet", "flowers", "cifar", "modelnet", "coco"],
)
def test_layout(
    testbed: Path,
    tmp_path: Path,
    data: str,
    shape: tuple[int | str, ...],
    options: dict[str, object] | None,
    labels: str | None,
    count: int,
) -> None:
    spec = InputSpec(name="x", dtype=np.dtype(np.float32), shape=shape)
    preprocess = None if options is None else ImagePreprocess.from_options(options)
    path = testbed / "data" / data
    feeds = open_feeds(path, [spec], preprocess=preprocess, spool_dir=tmp_path)
    assert len(feeds) == count
    part = open_feeds(path, [spec], preprocess=preprocess, spool_dir=tmp_path, limit=10)
    assert [sample["x"].shape for sample in part] == [(1, *shape[1:])] * 10
    kept, held = split_holdout(part)
    assert (len(kept), len(held or ())) == (8, 2)
    if labels is not None:
        found = read_labels(labels if labels == "folders" else path.parent / labels, feeds)
        assert found is not None
        assert len(found) == count
        assert len(set(found.tolist())) > 1
