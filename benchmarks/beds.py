"""The beds: a real model, real data, and how one becomes the input of the other.

A bed's data are decoded once, by the code that ``onnxptq.quantize`` itself uses, into one ``.npy`` file of
float32 that every tool reads; so all tools see the same numbers.

The testbed folder is ``$ONNXPTQ_TESTBED`` (default ``../shared``); decoded arrays, expanded weights and
quantized files go to ``$ONNXPTQ_BENCH_CACHE`` (default ``~/.cache/onnxptq/benchmarks``) and never into the
repository. The two beds of digits need no testbed: :mod:`models` holds their networks, a package their data.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from models import digits

ROOT = Path(__file__).resolve().parent.parent

Split = Literal["calibration", "learning", "evaluation"]
Metric = Literal["top1", "map50"]

_IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

_MODELNET40 = {
    "bathtub": 1,
    "bed": 2,
    "chair": 8,
    "desk": 12,
    "dresser": 14,
    "monitor": 22,
    "night_stand": 23,
    "sofa": 30,
    "table": 33,
    "toilet": 35,
}
"""ModelNet40's number (its forty names in alphabetical order) of each of the ten classes in the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bed:
    """A model with its data; paths are relative to the testbed folder, or to the cache where ``module`` is given.

    ``learning_samples`` is for methods that solve weights, from the same folder. ``preprocess`` is what
    ``Recipe.preprocess`` takes. ``labels`` is what ``onnxptq.quantize`` takes (a path is relative to the
    testbed), None where the ground truth is boxes. ``classes`` names a JSON list with the name of each label,
    and ``model_classes`` the model's number of each name, where the two differ. ``module`` of :mod:`models` builds
    the model.
    """

    name: str
    title: str
    model: str
    input_name: str
    calibration: str
    evaluation: str
    calibration_samples: int
    learning_samples: int
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    labels: str | None = None
    classes: str | None = None
    model_classes: Mapping[str, int] = field(default_factory=dict)
    boxes: str | None = None
    metric: Metric = "top1"
    module: str = ""


def _digits(name: str, title: str, module: str, form: str, input_name: str) -> Bed:
    return Bed(
        name=name,
        title=title,
        model=f"{module}.onnx",
        input_name=input_name,
        calibration=f"{form}/calib.npz",
        evaluation=f"{form}/heldout.npz",
        calibration_samples=128,
        learning_samples=1024,
        labels=f"{form}/heldout.npz",
        module=module,
    )


BEDS: Mapping[str, Bed] = {
    bed.name: bed
    for bed in (
        Bed(
            name="efficientnet",
            title="EfficientNet-Lite0, ImageNet",
            model="models/efficientnet_lite0.onnx",
            input_name="x",
            calibration="data/imagenet/calib",
            evaluation="data/imagenet/val",
            calibration_samples=125,
            learning_samples=125,
            preprocess={
                "resize": "none",
                "size": [224, 224],
                "center_crop": True,
                "scale": 1.0,
                "mean": [127.0],
                "std": [128.0],
            },
            labels="data/imagenet/labels.json",
        ),
        Bed(
            name="resnet20",
            title="ResNet-20, CIFAR-10 (JPEG)",
            model="models/resnet20_cifar10.onnx",
            input_name="x",
            calibration="data/cifar10_jpeg/train.npz",
            evaluation="data/cifar10_jpeg/test.npz",
            calibration_samples=256,
            learning_samples=500,
            preprocess=_IMAGENET,
            labels="data/cifar10_jpeg/test.npz",
        ),
        Bed(
            name="vit",
            title="ViT-S/14, flowers",
            model="models/vits14_flowers.fp16w.onnx",
            input_name="image",
            calibration="data/flowers/calib",
            evaluation="data/flowers/test",
            calibration_samples=64,
            learning_samples=128,
            preprocess={"resize": "none", **_IMAGENET},
            labels="folders",
        ),
        Bed(
            name="pointnet",
            title="PointNet, ModelNet40",
            model="models/pointnet_modelnet40.onnx",
            input_name="x",
            calibration="data/modelnet10/train.npz",
            evaluation="data/modelnet10/test.npz",
            calibration_samples=128,
            learning_samples=500,
            labels="data/modelnet10/test.npz",
            classes="data/modelnet10/classes.json",
            model_classes=_MODELNET40,
        ),
        Bed(
            name="fastestdet",
            title="FastestDet, COCO",
            model="models/fastestdet.onnx",
            input_name="input.1",
            calibration="data/coco/calib/images",
            evaluation="data/coco/val/images",
            calibration_samples=64,
            learning_samples=64,
            preprocess={
                "resize": "exact",
                "size": [352, 352],
                "interpolation": "bilinear",
                "color": "BGR",
                "mean": [0.0],
                "std": [1.0],
            },
            boxes="data/coco/val/boxes",
            metric="map50",
        ),
        _digits("swin", "small Swin, digits", "swin_digits", "pictures", "image"),
        _digits("points", "small point transformer, digits", "point_transformer_digits", "points", "points"),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """Samples on disk: ``array`` is an ``.npy`` [count, ...], ``facts`` a JSON file with ids and labels."""

    array: Path
    facts: Path
    count: int

    def values(self) -> npt.NDArray[np.float32]:
        """All samples, mapped from disk: [count, ...]."""
        return np.load(self.array, mmap_mode="r")  # type: ignore[no-any-return]

    def ids(self) -> list[str]:
        """The name of every sample."""
        return list(json.loads(self.facts.read_text())["ids"])

    def labels(self) -> npt.NDArray[np.int64] | None:
        """The model's class of every sample, None where there are no labels."""
        found = json.loads(self.facts.read_text())["labels"]
        return None if found is None else np.asarray(found, np.int64)


def testbed_path() -> Path:
    """Where the testbed folder should be."""
    return Path(os.environ.get("ONNXPTQ_TESTBED", ROOT.parent / "shared"))


def testbed() -> Path:
    """The testbed folder.

    Raises:
        SystemExit: it does not exist.
    """
    folder = testbed_path()
    if not (folder / "models").is_dir():
        raise SystemExit(f"There is no testbed at '{folder}'; set ONNXPTQ_TESTBED.")
    return folder.resolve()


def cache_folder(*parts: str) -> Path:
    """A folder under the cache, made if absent."""
    base = os.environ.get("ONNXPTQ_BENCH_CACHE") or Path.home() / ".cache" / "onnxptq" / "benchmarks"
    folder = Path(base).joinpath(*parts)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def model_path(bed: Bed) -> Path:
    """The FP32 model; one that is built, or whose weights are stored in half precision, is put in the cache first."""
    if bed.module:
        return _built(bed)
    stored = testbed() / bed.model
    if not stored.name.endswith(".fp16w.onnx"):
        return stored
    folder = cache_folder("models")
    expanded = folder / stored.name.replace(".fp16w.onnx", ".onnx")
    if not expanded.exists():
        subprocess.run(
            [sys.executable, stored.with_name("expand.py"), folder], check=True, stdout=subprocess.DEVNULL
        )
    return expanded


def source_path(bed: Bed, split: Split) -> Path:
    """The calibration or evaluation data as a user would give them to ``onnxptq.quantize``."""
    return _data_folder(bed) / (bed.evaluation if split == "evaluation" else bed.calibration)


def _built(bed: Bed) -> Path:
    module = importlib.import_module(f"models.{bed.module}")
    # The weights are part of the name, so that a file of older ones is not taken for this one.
    path = cache_folder("models") / f"{bed.module}-{module.MANIFEST.weights.sha256[:8]}.onnx"
    if not path.exists():
        module.MODEL.build(path)
    return path


def _data_folder(bed: Bed) -> Path:
    if not bed.module:
        return testbed()
    folder = cache_folder("digits")
    if not (folder / bed.evaluation).exists():
        digits.write(folder)
    return folder


def decoded(bed: Bed, split: Split, limit: int | None = None) -> Decoded:
    """The samples of one split, decoded into the cache if they are not there yet.

    Args:
        limit: at most this many, spread evenly over the source; for calibration and learning never more than
            the bed's own number.
    """
    if split != "evaluation":
        most = bed.calibration_samples if split == "calibration" else bed.learning_samples
        limit = most if limit is None else min(limit, most)
    settings = json.dumps(
        [bed.preprocess, bed.labels, bed.classes, str(source_path(bed, split))], sort_keys=True
    )
    tag = hashlib.sha256(settings.encode()).hexdigest()[:8]
    stem = f"{bed.name}-{split}-{limit or 'all'}-{tag}"
    folder = cache_folder("data")
    array, facts = folder / f"{stem}.npy", folder / f"{stem}.json"
    if not facts.exists():
        _decode(bed, split, limit, array, facts)
    return Decoded(array=array, facts=facts, count=len(json.loads(facts.read_text())["ids"]))


def _decode(bed: Bed, split: Split, limit: int | None, array: Path, facts: Path) -> None:
    from onnxptq.calibrate.feeds import ImagePreprocess, open_feeds, read_labels
    from onnxptq.graph.specs import input_specs

    specs = input_specs(model_path(bed))
    preprocess = ImagePreprocess.from_options(bed.preprocess) if bed.preprocess else None
    with tempfile.TemporaryDirectory() as spool:
        feeds = open_feeds(
            source_path(bed, split), specs, preprocess=preprocess, spool_dir=Path(spool), limit=limit
        )
        ids = list(feeds.sample_ids)
        labels = None
        if split == "evaluation" and bed.labels is not None:
            named = bed.labels if bed.labels == "folders" else _data_folder(bed) / bed.labels
            labels = read_labels(named, feeds)
        rows = np.concatenate([sample[specs[0].name] for sample in feeds])
    if bed.classes is not None and labels is not None:
        names = json.loads((testbed() / bed.classes).read_text())
        labels = np.array([bed.model_classes[names[label]] for label in labels], np.int64)
    partial = array.with_suffix(".part.npy")
    np.save(partial, rows)
    partial.replace(array)
    facts.write_text(json.dumps({"ids": ids, "labels": None if labels is None else labels.tolist()}))
