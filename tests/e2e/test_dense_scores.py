"""Class scores of tokens and of maps, compared by their divergence where that is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxptq
from onnxptq.errors import UsageError
from onnxptq.recipe import Recipe
from tests.unit.rotate.rotate_nets import Blocks

SHAPES = {"tokens": (16, 1, 5, 8), "maps": (16, 1, 3, 6, 6)}
SOLVING: list[dict[str, Any]] = [
    {"effort": "balanced", "loss": "global-local", "tune": True},
    {"effort": "fast", "average_bits": 4.0},
]


def _network(kind: str) -> onnx.ModelProto:
    net = Blocks()
    if kind == "tokens":
        h = net.op("Relu", "h", net.linear("a", "x", 8, 12))
        return net.proto({"x": ["n", 5, 8]}, [net.linear("y", h, 12, 6)])
    h = net.op("Relu", "h", net.conv("a", "x", (12, 3, 3, 3)))
    return net.proto({"x": ["n", 3, 6, 6]}, [net.conv("y", h, (6, 12, 1, 1))])


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    onnx.save(model, str(folder / "net.onnx"))
    return folder / "net.onnx"


def _data(kind: str) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal(SHAPES[kind]).astype(np.float32)}


@pytest.mark.parametrize("kind", SHAPES)
def test_blocks_are_scored_by_it(kind: str, tmp_path: Path) -> None:
    path, data = _saved(_network(kind), tmp_path), _data(kind)
    found = {
        loss: onnxptq.sensitivity(path, calibration=data, recipe=Recipe(target="simulate", output_loss=loss))
        for loss in ("auto", "kl")
    }
    assert {name: one.loss for name, one in found.items()} == {"auto": "relative", "kl": "kl"}


@pytest.mark.parametrize("solving", SOLVING, ids=["learnt", "bits"])
@pytest.mark.parametrize("kind", SHAPES)
def test_packs_are_solved_by_it(kind: str, solving: dict[str, Any], tmp_path: Path) -> None:
    path, data = _saved(_network(kind), tmp_path), _data(kind)
    recipe = Recipe(target="simulate", method="pack-ptq", output_loss="kl", weight_bits=4, **solving)
    found = onnxptq.quantize(
        path, tmp_path / "q.onnx", calibration=data, recipe=recipe, work_dir=tmp_path / "w"
    )
    assert found.report.parity is not None
    assert found.report.parity.max_steps == 0.0
    assert found.report.outputs[0].sqnr_db is not None
    assert found.report.outputs[0].sqnr_db > 10


def test_outputs_without_classes_are_named(tmp_path: Path) -> None:
    net = Blocks()
    y = net.linear("y", "x", 8, 6)
    mean = net.op("ReduceMean", "mean", y, net.ints("axes", 0, 1), keepdims=0)
    path = _saved(net.proto({"x": ["n", 5, 8]}, [y, mean]), tmp_path)
    recipe = Recipe(target="simulate", output_loss="kl")
    with pytest.raises(
        UsageError, match=r"Output 'mean' has shape \[6\]: kl compares scores of at least two"
    ):
        onnxptq.sensitivity(path, calibration=_data("tokens"), recipe=recipe)
