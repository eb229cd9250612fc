"""Equations become the products that they are, whatever the letters and their order."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.graph.attention import find_attention
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import find_linears
from onnxptq.graph.passes import lower_einsum
from tests.unit.graph.graph_helpers import apply, build, node, random

SIZES = {"b": 2, "h": 3, "i": 4, "j": 5, "k": 6, "d": 6, "m": 7, "n": 4}
# The kernels sum six products in orders of their own.
SUMS = 1e-6


def _shape(letters: str) -> list[int | str]:
    return ["batch" if c == "b" else SIZES[c] for c in letters]


def _einsum(equation: str, *, is_weight: bool = False, opset: int = 17) -> onnx.ModelProto:
    left, right = equation.replace(" ", "").split("->")[0].split(",")
    inputs = {"x": _shape(left), "w": _shape(right)}
    weights = {}
    if is_weight:
        del inputs["w"]
        weights = {"w": random(*(SIZES[c] for c in right))}
    return build([node("Einsum", "x w", "y", equation=equation)], inputs, ["y"], weights, opset=opset)


@pytest.mark.parametrize(
    ("equation", "transposes"),
    [
        ("bhid,bhdj->bhij", 0),
        ("bhid,bhjd->bhij", 1),
        ("bihd,bjhd->bhij", 2),
        ("b h i j, b h j d -> b i h d", 1),
        ("bhdi,bhjd->bhji", 3),
        ("ik,kj", 0),
        ("ik,jk->ij", 1),
        ("bik,kj->bij", 0),
        ("bhik,kj->bhij", 0),
        ("bhik,kj->bjhi", 1),
        ("kj,bik->bij", 0),
        ("mhik,hmkj->hmij", 1),
    ],
)
def test_products(equation: str, transposes: int, tmp_path: Path) -> None:
    count, ops, graph = apply(_einsum(equation), lower_einsum.run, tmp_path, tolerance=SUMS)
    assert count == 1
    assert ops == Counter({"MatMul": 1, "Transpose": transposes}) - Counter({"Transpose": 0})
    assert next(n for n in graph.nodes if n.op == "MatMul").name == "n_y"


@pytest.mark.parametrize(
    ("equation", "ops"),
    [
        ("bmnd,bmnd->bmd", {"Mul": 1, "ReduceSum": 1}),
        ("bmnd,bdmn->bdm", {"Mul": 1, "ReduceSum": 1, "Transpose": 2}),
        ("bmnd,bmnd->b", {"Mul": 1, "ReduceSum": 1}),
        ("bmn,bmn->bmn", {"Mul": 1}),
        ("bmn,bmn->bnm", {"Mul": 1, "Transpose": 1}),
    ],
)
def test_weighted_sums(equation: str, ops: dict[str, int], tmp_path: Path) -> None:
    count, found, _ = apply(_einsum(equation), lower_einsum.run, tmp_path, tolerance=SUMS)
    assert (count, dict(found)) == (1, ops)


@pytest.mark.parametrize("equation", ["bik,kj->bij", "bik,jk->bij", "bhik,jk->bhij"])
def test_layers(equation: str, tmp_path: Path) -> None:
    count, ops, graph = apply(_einsum(equation, is_weight=True), lower_einsum.run, tmp_path, tolerance=SUMS)
    assert (count, ops) == (1, {"MatMul": 1})
    (layer,) = find_linears(GraphIndex(graph))
    assert tuple(layer.weight.shape) == (6, 5)


@pytest.mark.parametrize(
    "equation",
    [
        "bhik,hkj->bhij",  # one matrix per head: rows of two letters
        "bik,k->bi",  # a vector
        "bikd,bkdj->bij",  # two letters summed
        "ik,mj->ij",  # a sum over one operand
        "i,j->ij",  # nothing is summed
    ],
)
def test_declined(equation: str, tmp_path: Path) -> None:
    count, ops, _ = apply(_einsum(equation), lower_einsum.run, tmp_path, tolerance=0)
    assert (count, ops) == (0, {"Einsum": 1})


def test_other_numbers_of_operands_are_declined(tmp_path: Path) -> None:
    one = build([node("Einsum", "x", "y", equation="ij->ji")], {"x": [2, 3]}, ["y"])
    ellipsis = build([node("Einsum", "x x", "y", equation="...i,...i->...")], {"x": [2, 3]}, ["y"])
    diagonal = build([node("Einsum", "x x", "y", equation="ii,ij->ij")], {"x": [3, 3]}, ["y"])
    for model in (one, ellipsis, diagonal, _einsum("ik,kj", opset=12)):
        count, ops, _ = apply(model, lower_einsum.run, tmp_path, tolerance=0)
        assert (count, ops) == (0, {"Einsum": 1})


def test_an_axis_of_one_that_stands_for_more_is_declined(tmp_path: Path) -> None:
    model = build([node("Einsum", "x w", "y", equation="ik,kj->ij")], {"x": [4, 1], "w": [6, 5]}, ["y"])
    assert apply(model, lower_einsum.run, tmp_path, tolerance=0)[0] == 0


def test_attention_written_in_equations_is_found(tmp_path: Path) -> None:
    nodes = [
        node("Einsum", "x wq", "q", equation="bnd,dhe->bhne"),
        node("Einsum", "x k", "s", equation="bnd,bmd->bnm"),
        node("Softmax", "s", "p", axis=-1),
        node("Einsum", "p x", "y", equation="bnm,bmd->bnd"),
        node("ReduceSum", "q", "z", keepdims=0),
    ]
    model = build(nodes, {"x": ["n", 4, 6], "k": ["n", 4, 6]}, ["y", "z"], {"wq": random(6, 2, 3)})
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    graph = canonicalize(path, tmp_path).graph
    (found,) = find_attention(GraphIndex(graph))
    assert found.form == "product"
    assert [score.op for score in found.scores] == ["MatMul"]
    # Two letters of its own on both sides: that layer stays an equation.
    assert [n.op for n in graph.nodes].count("Einsum") == 1


def test_vector_attention_written_in_equations_is_found(tmp_path: Path) -> None:
    nodes = [
        node("Softmax", "x", "p", axis=2),
        node("Einsum", "p v", "y", equation="bmnf,bmnf->bmf"),
    ]
    model = build(nodes, {"x": ["n", 4, 3, 6], "v": ["n", 4, 3, 6]}, ["y"])
    path = tmp_path / "net.onnx"
    onnx.save(model, path)
    (found,) = find_attention(GraphIndex(canonicalize(path, tmp_path).graph))
    assert found.form == "weighted sum"
    assert np.array_equal([found.weights_index], [0])
