"""Networks with operators that torch has no form of: the layers around them are learnt, they stay in float."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import onnxptq
from onnxptq.errors import UnsupportedOperatorError
from onnxptq.recipe import Recipe
from tests.e2e.command import process
from tests.unit.foreign_nets import BUILT, model_of

FEW_BITS: dict[str, Any] = {"target": "simulate", "weight_bits": 4, "activation_bits": 6, "holdout": 0.25}


@pytest.fixture
def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 5, 8)).astype(np.float32)} for _ in range(24)]


def quantized(kind: str, feeds: list[dict[str, np.ndarray]], folder: Path, **recipe: Any) -> onnxptq.Result:
    onnx.save(model_of(kind), str(folder / "net.onnx"))
    return onnxptq.quantize(
        folder / "net.onnx",
        folder / "out.onnx",
        calibration=feeds,
        recipe=Recipe(**{**FEW_BITS, **recipe}),
        work_dir=folder / "work",
    )


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in BUILT),
        ("If", {"method": "pack-ptq"}),
        ("NonMaxSuppression", {"method": "pack-ptq"}),
        ("GRU", {"method": "aiqvit"}),
        ("LSTM", {"method": "pack-ptq", "loss": "global-local"}),
        ("LSTM", {"effort": "balanced"}),
    ],
)
def test_layers_around_it_are_solved(
    kind: str, settings: dict[str, Any], feeds: list[dict[str, np.ndarray]], tmp_path: Path
) -> None:
    report = quantized(kind, feeds, tmp_path, **settings).report
    assert any(
        note.startswith("Nothing is learnt through what has no torch form") and f"({kind})" in note
        for note in report.notes
    )
    assert report.packs
    assert report.parity is not None
    assert report.parity.max_steps == 0.0
    assert kind in {node.op_type for node in onnx.load(str(tmp_path / "out.onnx")).graph.node}


def test_each_side_learns_and_nothing_learns_through(
    feeds: list[dict[str, np.ndarray]], tmp_path: Path
) -> None:
    report = quantized("LSTM", feeds, tmp_path, method="pack-ptq").report
    assert len(report.blocks) == 3
    assert [(pack.pack, pack.blocks) for pack in report.packs] == [(0, 1), (2, 1)]
    assert all(pack.steps > 0 for pack in report.packs)


@pytest.mark.parametrize("options", [["--average-bits", "4"], ["--max-loss", "0.01"]])
def test_bits_per_pack(options: list[str], feeds: list[dict[str, np.ndarray]], tmp_path: Path) -> None:
    onnx.save(model_of("GRU"), str(tmp_path / "net.onnx"))
    np.savez(tmp_path / "data.npz", x=np.concatenate([feed["x"] for feed in feeds])[:, None])
    given = tmp_path / "net.onnx", "-o", tmp_path / "out.onnx", "--calib", tmp_path / "data.npz"
    found = process("quantize", *given, "-t", "simulate", *options)
    assert found.code == 0, found.err


def test_refused_where_that_was_asked_for(feeds: list[dict[str, np.ndarray]], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"LSTM version 14 \(node 'r'\)") as caught:
        quantized("LSTM", feeds, tmp_path, method="pack-ptq", unknown_operators="refuse")
    assert caught.value.exit_code == 3
    assert "--unknown-operators float" in caught.value.remedy
    assert not (tmp_path / "out.onnx").exists()
    report = quantized("LSTM", feeds, tmp_path, unknown_operators="refuse").report
    assert any(
        note.startswith("Layers are rounded one by one and not pack by pack: r:") for note in report.notes
    )
