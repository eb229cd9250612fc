"""Rotation as a form of the model: when it is tried, and that a run keeps or drops it and says so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxptq import forming
from onnxptq.pipeline import quantize
from onnxptq.recipe import Recipe
from tests.unit.rotate.rotate_nets import one_stream


def test_the_baseline_is_not_rotated() -> None:
    assert Recipe().tries_rotation
    assert not Recipe(rotate=False).tries_rotation
    assert not Recipe(method="rtn").tries_rotation


def outlier_net(path: Path) -> Path:
    """One channel of the stream is offset by far more than the others vary: the case that rotations are made for."""
    model = one_stream("none")
    for tensor in model.graph.initializer:
        if tensor.name == "stem.b":
            value = onnx.numpy_helper.to_array(tensor).copy()
            value[3] = 20.0
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    onnx.save(model, str(path))
    return path


def run(path: Path, folder: Path, recipe: Recipe) -> Any:
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((1, 6, 16)).astype(np.float32)} for _ in range(40)]
    return quantize(
        path, calibration=feeds, recipe=recipe, work_dir=folder / "work", output=folder / "out.onnx"
    )


def test_a_stream_with_an_outlier_is_rotated_and_the_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Twenty samples are held out; the gain on them is 2.5 dB.
    recipe = Recipe(target="simulate", activation_bits=4, equalize=False, simplify=False, holdout=0.5)
    path = outlier_net(tmp_path / "net.onnx")
    report = run(path, tmp_path, recipe).report
    said = "\n".join(report.notes)
    assert "Rotated: 1 residual stream of 16 channels" in said
    assert "The rotated channels were kept" in said
    # What gains less than is asked for with few bits is dropped, with the reason.
    monkeypatch.setattr(forming, "FORM_MARGIN_DB", 90.0)
    said = "\n".join(run(path, tmp_path, recipe).report.notes)
    assert re.search(r"channels were dropped: .* with them; with few bits 90 dB more are asked for", said)
    plain = run(path, tmp_path, recipe.updated(rotate=False)).report
    assert "otat" not in "\n".join(plain.notes)
    assert report.outputs[0].sqnr_db > plain.outputs[0].sqnr_db
