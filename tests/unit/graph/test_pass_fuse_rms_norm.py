"""RMS normalization in every spelling becomes one node, and is found where there is none; look-alikes are not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.normalizations import find_normalizations
from onnxptq.graph.passes import fuse_rms_norm
from onnxptq.graph.surgeon import import_graph
from tests.unit.graph.graph_helpers import apply, build, node, random

# Two float32 formulas of the same quantity: a handful of roundings of 6e-8 each, against the largest output.
ROUNDING = 2e-6
C = 8
INVERSES = {
    "divided": [node("Sqrt", "ve", "s")],
    "reciprocal": [node("Sqrt", "ve", "s"), node("Reciprocal", "s", "r")],
    "one over": [node("Sqrt", "ve", "s"), node("Div", "one s", "r")],
    "power": [node("Pow", "ve minus_half", "r")],
    "root of the reciprocal": [node("Reciprocal", "ve", "s"), node("Sqrt", "s", "r")],
}


def rms_norm(
    *,
    square: str = "pow",
    inverse: str = "reciprocal",
    scale: str = "after",
    axis: int = -1,
    opset: int = 23,
    gamma: Sequence[int] = (C,),
    epsilon: Sequence[int] = (),
    outputs: Sequence[str] = ("y",),
    extra: Sequence[onnx.NodeProto] = (),
) -> onnx.ModelProto:
    nodes = [
        node("Pow", "x two", "sq") if square == "pow" else node("Mul", "x x", "sq"),
        node("ReduceMean", "sq", "v", axes=[axis]) if opset < 18 else node("ReduceMean", "sq axes", "v"),
        node("Add", "v eps", "ve"),
        *INVERSES[inverse],
    ]
    read, last = ("xg" if scale == "before" else "x"), ("q" if scale == "after" else "y")
    if scale == "before":
        nodes.append(node("Mul", "g x", "xg"))
    nodes.append(
        node("Div", f"{read} s", last) if inverse == "divided" else node("Mul", f"{read} r", last),
    )
    if scale == "after":
        nodes.append(node("Mul", "q g", "y"))
    weights = {
        "one": np.array(1, np.float32),
        "two": np.array(2, np.float32),
        "minus_half": np.array(-0.5, np.float32),
        "eps": np.full(epsilon, 1e-3, np.float32),
        "axes": np.array([axis]),
        "g": random(*gamma, seed=1),
    }
    return build([*nodes, *extra], {"x": ["n", 5, C]}, outputs, weights, opset=opset)


@pytest.mark.parametrize("scale", ["none", "before", "after"])
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("square", ["pow", "mul"])
def test_fused(tmp_path: Path, square: str, inverse: str, scale: str) -> None:
    model = rms_norm(square=square, inverse=inverse, scale=scale, axis=2)
    count, ops, graph = apply(model, fuse_rms_norm.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"RMSNormalization": 1})
    assert graph.nodes[0].attrs["epsilon"] == pytest.approx(1e-3)


@pytest.mark.parametrize("scale", ["none", "before", "after"])
@pytest.mark.parametrize("inverse", INVERSES)
@pytest.mark.parametrize("opset", [13, 17, 18, 22])
def test_found_where_there_is_no_operator(tmp_path: Path, opset: int, inverse: str, scale: str) -> None:
    graph = import_graph(rms_norm(inverse=inverse, scale=scale, opset=opset), tmp_path)
    assert fuse_rms_norm.run(graph) == 0
    (found,) = find_normalizations(GraphIndex(graph))
    assert (found.node.outputs[0].name, found.source) == ("y", "x")
    assert (found.scale is None) == (scale == "none")
    if found.scale is not None:
        assert found.scale.inputs[found.scale_index].name == "g"


def test_gamma_of_another_shape_stays_outside(tmp_path: Path) -> None:
    count, ops, _ = apply(rms_norm(gamma=(5, 1)), fuse_rms_norm.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"RMSNormalization": 1, "Mul": 1})


@pytest.mark.parametrize(
    "model",
    [
        rms_norm(axis=1),
        rms_norm(gamma=(5, 1), scale="before"),
        rms_norm(extra=[node("Neg", "sq", "u")], outputs=("y", "u")),
        rms_norm(extra=[node("Neg", "ve", "u")], outputs=("y", "u")),
        rms_norm(extra=[node("Neg", "xg", "u")], outputs=("y", "u"), scale="before"),
        rms_norm(outputs=("y", "s")),
        rms_norm(outputs=("y", "r")),
        rms_norm(epsilon=(1, 1, 1, 1), scale="none"),
        rms_norm(axis=0),
    ],
    ids=[
        "tokens",
        "scale per token before",
        "squares read",
        "mean read",
        "scaled read",
        "root is an output",
        "inverse is an output",
        "more dimensions",
        "batch",
    ],
)
def test_declined(tmp_path: Path, model: onnx.ModelProto) -> None:
    before = [n.op_type for n in model.graph.node]
    count, ops, _ = apply(model, fuse_rms_norm.run, tmp_path, tolerance=0)
    assert count == 0
    assert sum(ops.values()) == len(before)
