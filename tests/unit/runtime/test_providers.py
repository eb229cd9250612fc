"""What is asked of the execution providers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from onnxptq.runtime import Session


def test_exact_arithmetic_on_a_gpu_has_whole_mantissas(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Recorder:
        def __init__(self, *given: Any, providers: list[Any]) -> None:
            assert len(given) == 2
            asked.append(providers)

        def get_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

        def get_inputs(self) -> list[Any]:
            return []

        get_outputs = get_inputs

    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", Recorder)
    Session(Path("m.onnx"), provider="cuda", exact=True)
    Session(Path("m.onnx"), provider="cuda")
    Session(Path("m.onnx"), provider="cuda", tuned=True)
    searched = {"cudnn_conv_algo_search": "HEURISTIC"}
    assert asked == [
        [("CUDAExecutionProvider", {**searched, "use_tf32": "0"}), "CPUExecutionProvider"],
        [("CUDAExecutionProvider", searched), "CPUExecutionProvider"],
        [("CUDAExecutionProvider", {}), "CPUExecutionProvider"],
    ]
