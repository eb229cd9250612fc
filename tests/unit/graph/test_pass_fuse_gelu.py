"""GELU in the spellings of the exporters, and expressions that only resemble it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.graph.passes import fuse_gelu
from tests.unit.graph.graph_helpers import apply, build, node

# onnxruntime's Erf is a float32 approximation with an absolute error near 1e-7 of its own in both forms.
ROUNDING = 3e-6
CONSTANTS = {
    "half": 0.5,
    "one": 1.0,
    "two": 2.0,
    "three": 3.0,
    "root": math.sqrt(2),
    "inverse": 1 / math.sqrt(2),
    "k": math.sqrt(2 / math.pi),
    "c": 0.044715,
    "off": 1.5,
}

ERF = {
    "legacy": [
        node("Div", "x root", "a"),
        node("Erf", "a", "e"),
        node("Add", "e one", "u"),
        node("Mul", "x u", "p"),
        node("Mul", "p half", "y"),
    ],
    "dynamo": [
        node("Mul", "x half", "h"),
        node("Mul", "x inverse", "a"),
        node("Erf", "a", "e"),
        node("Add", "e one", "u"),
        node("Mul", "h u", "y"),
    ],
    "half last on the factor": [
        node("Mul", "inverse x", "a"),
        node("Erf", "a", "e"),
        node("Add", "one e", "u"),
        node("Mul", "half u", "p"),
        node("Mul", "p x", "y"),
    ],
    "divided by two": [
        node("Div", "x root", "a"),
        node("Erf", "a", "e"),
        node("Add", "e one", "u"),
        node("Mul", "u x", "p"),
        node("Div", "p two", "y"),
    ],
}
TANH = {
    "pow": [
        node("Pow", "x three", "x3"),
        node("Mul", "x3 c", "t"),
        node("Add", "x t", "s"),
        node("Mul", "s k", "a"),
        node("Tanh", "a", "f"),
        node("Add", "f one", "u"),
        node("Mul", "x half", "h"),
        node("Mul", "h u", "y"),
    ],
    "products": [
        node("Mul", "x x", "x2"),
        node("Mul", "x x2", "x3"),
        node("Mul", "c x3", "t"),
        node("Add", "t x", "s"),
        node("Mul", "k s", "a"),
        node("Tanh", "a", "f"),
        node("Add", "one f", "u"),
        node("Mul", "x u", "p"),
        node("Mul", "p half", "y"),
    ],
    "factored": [
        node("Mul", "x c", "cx"),
        node("Mul", "cx x", "cx2"),
        node("Add", "cx2 one", "q"),
        node("Mul", "x k", "kx"),
        node("Mul", "kx q", "a"),
        node("Tanh", "a", "f"),
        node("Add", "f one", "u"),
        node("Mul", "x half", "h"),
        node("Mul", "h u", "y"),
    ],
}


def model(
    nodes: Sequence[onnx.NodeProto], outputs: Sequence[str] = ("y",), opset: int = 20
) -> onnx.ModelProto:
    # The relu in front makes x an inner tensor, as it is in a network.
    first = node("Mul", "input two", "x")
    weights = {name: np.array(value, np.float32) for name, value in CONSTANTS.items()}
    return build([first, *nodes], {"input": ["n", 64]}, list(outputs), weights, opset=opset)


@pytest.mark.parametrize("form", ERF)
def test_erf(tmp_path: Path, form: str) -> None:
    count, ops, graph = apply(model(ERF[form]), fuse_gelu.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"Mul": 1, "Gelu": 1})
    assert graph.nodes[1].attrs.get("approximate", "none") == "none"


@pytest.mark.parametrize("form", TANH)
def test_tanh(tmp_path: Path, form: str) -> None:
    count, ops, graph = apply(model(TANH[form]), fuse_gelu.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"Mul": 1, "Gelu": 1})
    assert graph.nodes[1].attrs["approximate"] == "tanh"


def replaced(nodes: Sequence[onnx.NodeProto], old: str, new: str) -> list[onnx.NodeProto]:
    result = []
    for original in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(original)
        copy.input[:] = [new if name == old else name for name in copy.input]
        result.append(copy)
    return result


@pytest.mark.parametrize(
    "case",
    [
        model(ERF["legacy"], opset=19),
        model(replaced(ERF["legacy"], "root", "off")),
        model(replaced(ERF["legacy"], "half", "off")),
        model(replaced(ERF["legacy"], "one", "off")),
        model(replaced(TANH["pow"], "c", "half")),
        model(replaced(TANH["pow"], "three", "two")),
        model([*ERF["legacy"], node("Neg", "u", "z")], ["y", "z"]),
        model([*ERF["dynamo"], node("Neg", "h", "z")], ["y", "z"]),
        model(ERF["legacy"], ["y", "p"]),
        model(TANH["pow"], ["y", "a"]),
    ],
    ids=[
        "old opset",
        "wrong divisor",
        "wrong half",
        "wrong one",
        "wrong cubic",
        "square instead of cube",
        "second reader of the factor",
        "second reader of x/2",
        "output in the middle",
        "argument is output",
    ],
)
def test_declined(tmp_path: Path, case: onnx.ModelProto) -> None:
    count, ops, _ = apply(case, fuse_gelu.run, tmp_path, tolerance=0)
    assert count == 0
    assert ops["Gelu"] == 0
