"""What is asked of the execution providers."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import onnxruntime
import pytest

from onnxptq.errors import EnvironmentMismatchError
from onnxptq.runtime import Session, require_runtime


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


class _Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds an onnxruntime that cannot be loaded."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def find_spec(self, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name == "onnxruntime" else None

    def exec_module(self, _: ModuleType) -> None:
        raise self.error


@pytest.mark.parametrize("error", [ImportError, OSError])
def test_a_runtime_that_cannot_be_loaded(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "libcublasLt.so.12: cannot open shared object file: No such file or directory"
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.setattr(sys, "meta_path", [_Broken(error(reason)), *sys.meta_path])
    with pytest.raises(EnvironmentMismatchError, match=r"libcublasLt\.so\.12") as caught:
        require_runtime()
    assert "pip install" in caught.value.remedy
    assert caught.value.exit_code == 2
