"""Channels shifted by default, from the file to the proof that the written one computes what was simulated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxptq
from tests.unit.small_nets import attention_block, vit_mlp


@pytest.mark.parametrize(
    ("build", "where", "added", "gain_db"),
    [
        # Half as wide steps behind the Gelu are worth 6 dB, of a noise that is not the only one.
        (vit_mlp, "behind activations", ["Sub"], 1.0),
        # Random values have no mean to speak of: little to win, and little to lose.
        (attention_block, "in attention", [], -0.5),
    ],
)
def test_shifts_of_symmetric_grids(
    build: Callable[[], onnx.ModelProto], where: str, added: list[str], gain_db: float, tmp_path: Path
) -> None:
    model = build()
    onnx.save(model, str(tmp_path / "net.onnx"))
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    rng = np.random.default_rng(0)
    samples = [{model.graph.input[0].name: rng.standard_normal(shape).astype(np.float32)} for _ in range(32)]
    found: dict[bool, tuple[float, list[str]]] = {}
    for is_shifted in (False, True):
        recipe = onnxptq.Recipe(target="tensorrt", enough=None, shift=None if is_shifted else False)
        output = tmp_path / f"{is_shifted}.onnx"
        report = onnxptq.quantize(
            tmp_path / "net.onnx", output, calibration=samples, recipe=recipe, work_dir=tmp_path / "work"
        ).report
        assert report.parity is not None
        assert report.parity.max_steps == 0.0
        assert any(f"Shifted {where}" in note for note in report.notes) == is_shifted
        sqnr = report.outputs[0].sqnr_db
        assert sqnr is not None
        found[is_shifted] = sqnr, sorted(node.op_type for node in onnx.load(str(output)).graph.node)
    assert found[True][1] == sorted([*found[False][1], *added])
    assert found[True][0] - found[False][0] > gain_db
