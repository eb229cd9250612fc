"""What ``import onnxptq`` offers, and what it does not load."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import onnxptq

PUBLIC = {
    "ImagePreprocess",
    "OnnxPtqError",
    "Recipe",
    "Result",
    "__version__",
    "inspect",
    "quantize",
    "sensitivity",
    "validate",
}

HEAVY = ("torch", "onnxruntime", "matplotlib", "onnxsim", "pydantic", "rich", "onnx")


def test_the_public_names_are_pinned() -> None:
    assert set(onnxptq.__all__) == PUBLIC
    assert list(onnxptq.__all__) == sorted(onnxptq.__all__)
    for name in PUBLIC:
        assert getattr(onnxptq, name) is not None


def test_every_package_is_installed() -> None:
    root = Path(__file__).resolve().parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(p.parent.relative_to(root).parts) for p in (root / "onnxptq").rglob("__init__.py")}
    assert set(settings["packages"]) == {*found, *settings["package-dir"]}


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="'frobnicate'"):
        onnxptq.frobnicate  # noqa: B018


def test_every_public_function_is_documented() -> None:
    for name in PUBLIC - {"__version__"}:
        assert inspect.getdoc(getattr(onnxptq, name)), name


def _loaded(code: str) -> set[str]:
    program = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split()) & set(HEAVY)


@pytest.mark.parametrize("name", sorted(PUBLIC - {"__version__", "OnnxPtqError"}))
def test_no_submodule_takes_the_place_of_a_public_name(name: str) -> None:
    import onnxptq.pipeline
    import onnxptq.validate.compare

    assert sys.modules["onnxptq.validate.compare"]
    assert sys.modules["onnxptq.pipeline"]
    assert callable(getattr(onnxptq, name))


def test_importing_loads_nothing_heavy() -> None:
    assert _loaded("import onnxptq") == set()


def test_the_command_line_answers_before_torch_is_loaded() -> None:
    assert not {"torch", "onnxruntime", "matplotlib"} & _loaded("import onnxptq.cli.main")


def test_a_recipe_needs_no_runtime() -> None:
    assert not {"torch", "onnxruntime", "onnx"} & _loaded("from onnxptq import Recipe; Recipe()")
