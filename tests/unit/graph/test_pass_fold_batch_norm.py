"""Batch norm folding: every layer it folds into, and every case that it must leave alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.graph.passes import fold_batch_norm
from tests.unit.graph.graph_helpers import apply, build, node, random

# Folding changes the order of float32 roundings: about sqrt(fan-in) of them, each 6e-8 relative.
ROUNDING = 2e-6


def norm_weights(channels: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(channels)
    return {
        "gamma": rng.uniform(-2, 2, channels).astype(np.float32),
        "beta": random(channels, seed=1),
        "mean": random(channels, seed=2),
        "var": rng.uniform(0.05, 3, channels).astype(np.float32),
    }


NORM = node("BatchNormalization", "z gamma beta mean var", "y", epsilon=1e-3)


@pytest.mark.parametrize("has_bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("group", [1, 2], ids=["plain", "grouped"])
@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_convolutions(tmp_path: Path, op: str, rank: int, group: int, has_bias: bool) -> None:
    weight = random(6, 4 // group, *[3] * rank) if op == "Conv" else random(4, 6 // group, *[3] * rank)
    weights = {"w": weight, **norm_weights(6)} | ({"b": random(6, seed=3)} if has_bias else {})
    conv = node(op, "x w b" if has_bias else "x w", "z", group=group)
    model = build([conv, NORM], {"x": ["n", 4, *[5] * rank]}, ["y"], weights)
    count, ops, graph = apply(model, fold_batch_norm.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {op: 1})
    assert graph.nodes[0].outputs[0].name == "y"


@pytest.mark.parametrize("attrs", [{}, {"transB": 1}, {"alpha": 0.5, "beta": 3.0}], ids=str)
@pytest.mark.parametrize("bias", [None, (5,), (1, 5), (1,)], ids=str)
def test_gemm(tmp_path: Path, attrs: dict[str, float], bias: tuple[int, ...] | None) -> None:
    weights = {"w": random(5, 4) if attrs.get("transB") else random(4, 5), **norm_weights(5)}
    if bias is not None:
        weights["b"] = random(*bias, seed=4)
    gemm = node("Gemm", "x w b" if bias is not None else "x w", "z", **attrs)
    model = build([gemm, NORM], {"x": ["n", 4]}, ["y"], weights)
    count, ops, _ = apply(model, fold_batch_norm.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"Gemm": 1})


@pytest.mark.parametrize("bias_first", [False, True])
def test_matmul_with_add(tmp_path: Path, bias_first: bool) -> None:
    weights = {"w": random(4, 5), "b": random(5), **norm_weights(5)}
    nodes = [node("MatMul", "x w", "m"), node("Add", "b m" if bias_first else "m b", "z"), NORM]
    model = build(nodes, {"x": ["n", 4]}, ["y"], weights)
    count, ops, _ = apply(model, fold_batch_norm.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"MatMul": 1, "Add": 1})


def test_matmul_without_add_gets_one(tmp_path: Path) -> None:
    model = build(
        [node("MatMul", "x w", "z"), NORM], {"x": ["n", 4]}, ["y"], {"w": random(4, 5), **norm_weights(5)}
    )
    count, ops, _ = apply(model, fold_batch_norm.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"MatMul": 1, "Add": 1})


def test_a_weight_that_two_layers_share_is_copied(tmp_path: Path) -> None:
    weights = {"w": random(4, 4, 3), **norm_weights(4)}
    nodes = [node("Conv", "x w", "z", pads=[1, 1]), NORM, node("Conv", "y w", "u", pads=[1, 1])]
    model = build(nodes, {"x": ["n", 4, 6]}, ["u"], weights)
    count, _, graph = apply(model, fold_batch_norm.run, tmp_path, tolerance=ROUNDING)
    assert count == 1
    first, second = (n.inputs[1] for n in graph.nodes)
    assert first.name != second.name
    np.testing.assert_array_equal(second.values, weights["w"])


def layers(case: str) -> onnx.ModelProto:
    """One model per reason to decline."""
    weights = {"w": random(4, 4, 3), **norm_weights(4)}
    conv = node("Conv", "x w", "z", pads=[1, 1])
    inputs: dict[str, list[int | str]] = {"x": ["n", 4, 6]}
    if case == "second reader":
        return build([conv, NORM, node("Neg", "z", "u")], inputs, ["y", "u"], weights)
    if case == "graph output":
        return build([conv, NORM], inputs, ["y", "z"], weights)
    if case == "computed weight":
        del weights["w"]
        return build([conv, NORM], {**inputs, "w": [4, 4, 3]}, ["y"], weights)
    if case == "standalone":
        return build([node("Relu", "x", "z"), NORM], inputs, ["y"], weights)
    if case == "three-dimensional matmul":
        # Axis 1 holds the channels of the norm, the MatMul writes its own on axis 2.
        return build([node("MatMul", "x v", "z"), NORM], inputs, ["y"], {**weights, "v": random(6, 4)})
    raise AssertionError(case)


@pytest.mark.parametrize(
    "case", ["second reader", "graph output", "computed weight", "standalone", "three-dimensional matmul"]
)
def test_declined(tmp_path: Path, case: str) -> None:
    count, ops, _ = apply(layers(case), fold_batch_norm.run, tmp_path, tolerance=0)
    assert count == 0
    assert ops["BatchNormalization"] == 1
