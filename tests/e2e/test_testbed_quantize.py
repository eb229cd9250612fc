"""Real networks and real data through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.e2e.command import Finished, process

AGREEMENT = 0.97
"""Share of equal top-1 that a correct 8-bit network keeps; placement or range errors fall far below."""


@pytest.fixture
def cifar(testbed: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """Calibration and test pictures as the model reads them, and labels."""
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    for part, count in (("train", 64), ("test", 400)):
        with np.load(testbed / f"data/cifar10_jpeg/{part}.npz") as stored:
            pictures = (stored["images"][:count].astype(np.float32) / 255 - mean) / deviation
            np.savez(tmp_path / f"{part}.npz", x=np.ascontiguousarray(pictures.transpose(0, 3, 1, 2)))
            np.save(tmp_path / "labels.npy", stored["labels"][:count])
    return tmp_path / "train.npz", tmp_path / "test.npz", tmp_path / "labels.npy"


def _report(done: Finished) -> dict[str, object]:
    assert done.code == 0, done.err
    assert done.err == ""
    report: dict[str, object] = json.loads(done.out)
    parity = report["parity"]
    assert isinstance(parity, dict)
    assert parity["max_steps"] == 0
    assert all(edge["max_steps"] == 0 for edge in parity["edges"])
    return report


def _quantize(model: Path, calib: Path, evaluation: Path, labels: Path, folder: Path) -> dict[str, object]:
    return _report(
        process(
            *("quantize", model, "--calib", calib, "--eval", evaluation, "--labels", labels),
            *("-o", folder / "net.int8.onnx", "--work-dir", folder / "work", "--json"),
            *("--min-agreement", AGREEMENT),
            limit=300,
        )
    )


def test_resnet20(testbed: Path, cifar: tuple[Path, Path, Path], tmp_path: Path) -> None:
    report = _quantize(testbed / "models/resnet20_cifar10.onnx", *cifar, tmp_path)
    (scores,) = report["outputs"]  # type: ignore[misc]
    assert scores["labelled"] == 400
    assert scores["top1_agreement"] >= AGREEMENT
    # Within 1.5 points on 400 pictures, of which one is a quarter of a point.
    assert abs(scores["reference_accuracy"] - scores["quantized_accuracy"]) < 0.015
    assert report["output"]["bytes"] < 0.4 * report["model"]["bytes"]  # type: ignore[index]


def test_pointnet(testbed: Path, tmp_path: Path) -> None:
    names = json.loads((testbed / "data/modelnet10/classes.json").read_text())
    for part, count in (("train", 48), ("test", 120)):
        with np.load(testbed / f"data/modelnet10/{part}.npz") as stored:
            chosen = np.linspace(0, len(stored["points"]) - 1, count).astype(int)
            np.savez(tmp_path / f"{part}.npz", x=stored["points"][chosen])
            np.save(tmp_path / "labels.npy", stored["labels"][chosen])
    assert len(names) == 10
    report = _quantize(
        testbed / "models/pointnet_modelnet40.onnx",
        tmp_path / "train.npz",
        tmp_path / "test.npz",
        tmp_path / "labels.npy",
        tmp_path,
    )
    scores = report["outputs"][0]  # type: ignore[index]
    assert scores["top1_agreement"] >= AGREEMENT
    assert scores["labelled"] == 120
