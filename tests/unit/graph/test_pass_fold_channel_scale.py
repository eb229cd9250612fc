"""A factor per output channel goes into the linear layer in front, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.graph.passes import fold_channel_scale
from tests.unit.graph.graph_helpers import apply, build, node, random

ROUNDING = 1e-6
"""Relative: single precision rounds the weight times its factor once."""

WEIGHTS = {
    "w": random(6, 4, seed=1), "b": random(4, seed=2), "s": random(4, seed=3),
    "k": random(4, 6, 1, 1, seed=4), "s4": random(4, 1, 1, seed=5), "one": random(1, 6, 1, seed=6),
}  # fmt: skip

LINEAR = [node("MatMul", "x w", "m"), node("Add", "b m", "a")]


def net(nodes: list[onnx.NodeProto], output: str, shape: list[int | str]) -> onnx.ModelProto:
    used = {name for n in nodes for name in n.input}
    return build(nodes, {"x": shape}, [output], {k: v for k, v in WEIGHTS.items() if k in used})


FOLDED = {
    "matmul and add": net([*LINEAR, node("Mul", "a s", "y")], "y", [1, "n", 6]),
    "matmul": net([node("MatMul", "x w", "m"), node("Mul", "s m", "y")], "y", [1, "n", 6]),
    "gemm": net([node("Gemm", "x w b", "m"), node("Mul", "m s", "y")], "y", ["n", 6]),
    "gemm transposed": net([node("Gemm", "x w", "m", transA=1), node("Mul", "m s", "y")], "y", [6, "n"]),
    "conv": net([node("Conv", "x k b", "m"), node("Mul", "s4 m", "y")], "y", [1, 6, 2, "n"]),
}


@pytest.mark.parametrize("model", FOLDED.values(), ids=FOLDED)
def test_a_factor_behind_a_linear_layer_is_folded(model: onnx.ModelProto, tmp_path: Path) -> None:
    count, ops, _ = apply(model, fold_channel_scale.run, tmp_path, tolerance=ROUNDING)
    assert count == 1
    assert ops["Mul"] == 0


DECLINED = {
    "another reader": net([*LINEAR, node("Mul", "a s", "z"), node("Add", "z a", "y")], "y", [1, "n", 6]),
    "one per row": net([*LINEAR, node("Mul", "a one", "y")], "y", [1, 6, 6]),
    "no linear layer": net([node("Relu", "x", "r"), node("Mul", "r s", "y")], "y", [1, "n", 4]),
    "shared weight": net(
        [*LINEAR, node("Mul", "a s", "z"), node("MatMul", "x w", "o"), node("Add", "o z", "y")],
        "y", [1, "n", 6],
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", DECLINED.values(), ids=DECLINED)
def test_anything_else_stays(model: onnx.ModelProto, tmp_path: Path) -> None:
    count, ops, _ = apply(model, fold_channel_scale.run, tmp_path, tolerance=0)
    assert count == 0
    assert ops["Mul"] == 1


def test_two_factors_in_a_row_fold_one_by_one(tmp_path: Path) -> None:
    model = net([*LINEAR, node("Mul", "a s", "z"), node("Mul", "z s", "y")], "y", [1, "n", 6])
    count, _, graph = apply(model, fold_channel_scale.run, tmp_path, tolerance=ROUNDING)
    assert count == 1
    assert fold_channel_scale.run(graph) == 1
    np.testing.assert_array_equal([n.op for n in graph.nodes], ["MatMul", "Add"])
