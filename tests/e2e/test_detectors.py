"""Detectors that hold their own suppression: what two of them find differs in number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import onnxptq
from onnxptq.errors import QualityGateError
from onnxptq.recipe import Recipe
from onnxptq.validate.wording import verdict
from tests.unit.detector_nets import one_stage, two_stages

FEW_BITS: dict[str, Any] = {"weight_bits": 4, "activation_bits": 4}


@pytest.fixture(scope="module")
def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 3, 16, 16)).astype(np.float32)} for _ in range(40)]


def quantized(
    build: Callable[[], onnx.ModelProto], feeds: list[dict[str, np.ndarray]], folder: Path, **recipe: Any
) -> onnxptq.Result:
    onnx.save(build(), str(folder / "net.onnx"))
    return onnxptq.quantize(
        folder / "net.onnx",
        folder / "out.onnx",
        calibration=feeds,
        recipe=Recipe(**{"target": "simulate", **recipe}),
        work_dir=folder / "work",
    )


@pytest.mark.parametrize(
    "recipe", [{}, {"target": "ort-cpu"}, FEW_BITS, {**FEW_BITS, "effort": "balanced"}], ids=str
)
@pytest.mark.parametrize("build", [one_stage, two_stages])
def test_they_are_quantized_and_judged_in_front_of_it(
    build: Callable[[], onnx.ModelProto],
    recipe: dict[str, Any],
    feeds: list[dict[str, np.ndarray]],
    tmp_path: Path,
) -> None:
    report = quantized(build, feeds, tmp_path, **recipe).report
    outputs = {output.name: output for output in report.outputs}
    assert outputs["found"].is_selected
    assert outputs["found"].resized > 0
    bits = recipe.get("weight_bits", 8)
    for name in ("boxes", "scores"):
        assert not outputs[name].is_selected
        assert (outputs[name].sqnr_db or 0.0) > {8: 25.0, 4: 10.0}[bits]
    assert report.parity is not None
    assert report.parity.max_steps == 0.0
    # The file has the user's outputs and no others, and runs.
    session = ort.InferenceSession(str(tmp_path / "out.onnx"))
    assert [o.name for o in session.get_outputs()] == [t.name for t in build().graph.output]
    assert session.run(None, feeds[0])[0].shape[2] == 4
    assert "boxes" in verdict(report).text or "scores" in verdict(report).text or "r2" in verdict(report).text


def test_layers_behind_it_take_part_in_the_choice_of_bits(
    feeds: list[dict[str, np.ndarray]], tmp_path: Path
) -> None:
    """Without a loss of their own all of them would get the fewest."""
    plan = quantized(two_stages, feeds, tmp_path, average_bits=4).report.bit_plan
    assert plan is not None
    bits = {row.end: row.weight_bits for row in plan.packs}
    assert max(b for end, b in bits.items() if end in ("hidden", "classes") and b is not None) > 2


def test_gates_hold_against_what_can_be_compared(feeds: list[dict[str, np.ndarray]], tmp_path: Path) -> None:
    quantized(one_stage, feeds, tmp_path)
    found = onnxptq.validate(tmp_path / "net.onnx", tmp_path / "out.onnx", data=feeds[:8], min_sqnr=25.0)
    assert {output.name for output in found.outputs} == {"found", "boxes", "scores"}
    assert any(note.startswith("Rows of found are what each model selects") for note in found.notes)
    with pytest.raises(QualityGateError, match=r"Output '(boxes|scores)'"):
        onnxptq.validate(tmp_path / "net.onnx", tmp_path / "out.onnx", data=feeds[:8], min_sqnr=60.0)
