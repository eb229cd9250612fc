"""Decomposed layer normalization in every spelling becomes one node; look-alikes do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.graph.passes import fuse_layer_norm
from tests.unit.graph.graph_helpers import apply, build, node, random

# Two float32 formulas of the same quantity: a handful of roundings of 6e-8 each, against the largest output.
ROUNDING = 2e-6
C = 8


def mean(source: str, target: str, axes: Sequence[int], opset: int) -> onnx.NodeProto:
    if opset >= 18:
        return node("ReduceMean", f"{source} axes", target)
    return node("ReduceMean", source, target, axes=list(axes))


def layer_norm(
    *,
    square: str = "pow",
    quotient: str = "div",
    affine: str = "both",
    axes: Sequence[int] = (-1,),
    opset: int = 17,
    twice: bool = False,
    parameter: tuple[int, ...] = (C,),
    outputs: Sequence[str] = ("y",),
    extra: Sequence[onnx.NodeProto] = (),
) -> onnx.ModelProto:
    nodes = [mean("x", "m", axes, opset), node("Sub", "x m", "d")]
    centred = "d"
    if twice:
        nodes += [mean("x", "m2", axes, opset), node("Sub", "x m2", "d2")]
        centred = "d2"
    nodes.append(node("Pow", "d two", "sq") if square == "pow" else node("Mul", "d d", "sq"))
    nodes += [
        mean("sq", "v", axes, opset),
        node("Add", "eps v" if twice else "v eps", "ve"),
        node("Sqrt", "ve", "s"),
    ]
    last = {"none": "y", "scale": "q", "both": "q"}[affine]
    if quotient == "div":
        nodes.append(node("Div", f"{centred} s", last))
    else:
        nodes += [node("Reciprocal", "s", "r"), node("Mul", f"r {centred}", last)]
    if affine != "none":
        nodes.append(node("Mul", "q g" if square == "pow" else "g q", "y" if affine == "scale" else "t"))
    if affine == "both":
        nodes.append(node("Add", "t b", "y"))
    weights = {
        "two": np.array(2, np.float32),
        "eps": np.array(1e-3, np.float32),
        "g": random(*parameter, seed=1),
        "b": random(*parameter, seed=2),
        "axes": np.array(axes),
    }
    return build([*nodes, *extra], {"x": ["n", 5, C]}, outputs, weights, opset=opset)


@pytest.mark.parametrize("opset", [17, 18, 20])
@pytest.mark.parametrize("affine", ["none", "scale", "both"])
@pytest.mark.parametrize("square", ["pow", "mul"])
@pytest.mark.parametrize("quotient", ["div", "reciprocal"])
def test_fused(tmp_path: Path, square: str, quotient: str, affine: str, opset: int) -> None:
    model = layer_norm(square=square, quotient=quotient, affine=affine, opset=opset)
    count, ops, graph = apply(model, fuse_layer_norm.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"LayerNormalization": 1})
    assert graph.nodes[0].attrs["epsilon"] == pytest.approx(1e-3)
    assert len(graph.nodes[0].inputs) == (3 if affine == "both" else 2)


@pytest.mark.parametrize("axes", [(2,), (-1,), (1, 2), (-2, -1)], ids=str)
def test_axes(tmp_path: Path, axes: tuple[int, ...]) -> None:
    parameter = (C,) if len(axes) == 1 else (5, C)
    count, ops, _ = apply(
        layer_norm(axes=axes, parameter=parameter), fuse_layer_norm.run, tmp_path, tolerance=ROUNDING
    )
    assert (count, ops) == (1, {"LayerNormalization": 1})


def test_centred_twice(tmp_path: Path) -> None:
    count, ops, _ = apply(layer_norm(twice=True), fuse_layer_norm.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"LayerNormalization": 1})


def test_a_parameter_of_another_shape_stays_outside(tmp_path: Path) -> None:
    model = layer_norm(parameter=(5, 1))
    count, ops, _ = apply(model, fuse_layer_norm.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"LayerNormalization": 1, "Mul": 1, "Add": 1})


def test_a_chain_of_two(tmp_path: Path) -> None:
    first = layer_norm(affine="both", outputs=("y",))
    renamed = onnx.compose.add_prefix(first, "second_")
    merged = onnx.compose.merge_models(first, renamed, io_map=[("y", "second_x")])
    merged = onnx.shape_inference.infer_shapes(merged)
    count, ops, _ = apply(merged, fuse_layer_norm.run, tmp_path, tolerance=2 * ROUNDING)
    assert (count, ops) == (2, {"LayerNormalization": 2})


@pytest.mark.parametrize(
    "model",
    [
        layer_norm(axes=(1,), parameter=(1,)),
        layer_norm(extra=[node("Neg", "d", "u")], outputs=("y", "u")),
        layer_norm(extra=[node("Neg", "ve", "u")], outputs=("y", "u")),
        layer_norm(outputs=("y", "s")),
        layer_norm(outputs=("y", "d")),
        layer_norm(opset=16),
    ],
    ids=[
        "wrong axis",
        "second reader of d",
        "second reader of v",
        "output in the middle",
        "d is output",
        "old opset",
    ],
)
def test_declined(tmp_path: Path, model: onnx.ModelProto) -> None:
    count, ops, _ = apply(model, fuse_layer_norm.run, tmp_path, tolerance=0)
    assert count == 0
    assert ops["ReduceMean"] == 2


def test_rms_norm_and_sums_are_not_layer_norm(tmp_path: Path) -> None:
    rms = build(
        [
            node("Pow", "x two", "sq"),
            node("ReduceMean", "sq", "v", axes=[-1]),
            node("Add", "v eps", "ve"),
            node("Sqrt", "ve", "s"),
            node("Div", "x s", "y"),
        ],
        {"x": ["n", C]},
        ["y"],
        {"two": np.array(2, np.float32), "eps": np.array(1e-3, np.float32)},
    )
    assert apply(rms, fuse_layer_norm.run, tmp_path, tolerance=0)[0] == 0
