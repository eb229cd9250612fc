"""Which nodes count as linear layers, and what is read from them."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import Linear, find_linears
from onnxptq.graph.surgeon import import_graph
from tests.unit.graph.graph_helpers import build, node, random


def linears(model: onnx.ModelProto, tmp_path: Path) -> tuple[Linear, ...]:
    return find_linears(GraphIndex(import_graph(model, tmp_path)))


CASES = {
    "conv": ([node("Conv", "x w b", "y", group=2)], ["n", 4, 9], {"w": (6, 2, 3), "b": (6,)}, 0, 2),
    "conv without bias": ([node("Conv", "x w", "y")], ["n", 4, 9], {"w": (6, 4, 3)}, 0, 1),
    "conv transpose": ([node("ConvTranspose", "x w", "y", group=2)], ["n", 4, 9], {"w": (4, 3, 3)}, 1, 2),
    "gemm": ([node("Gemm", "x w b", "y")], ["n", 4], {"w": (4, 5), "b": (5,)}, 1, 1),
    "gemm transposed": ([node("Gemm", "x w b", "y", transB=1)], ["n", 4], {"w": (5, 4), "b": (5,)}, 0, 1),
    "matmul": ([node("MatMul", "x w", "y")], ["n", 3, 4], {"w": (4, 5)}, 1, 1),
    "batched matmul": ([node("MatMul", "x w", "y")], [2, 3, 4], {"w": (2, 4, 5)}, 2, 1),
    "matmul add": (
        [node("MatMul", "x w", "m"), node("Add", "m b", "y")],
        ["n", 4],
        {"w": (4, 5), "b": (5,)},
        1,
        1,
    ),
    "add matmul": (
        [node("MatMul", "x w", "m"), node("Add", "b m", "y")],
        ["n", 4],
        {"w": (4, 5), "b": (1, 5)},
        1,
        1,
    ),
    "weight on the left": ([node("MatMul", "w x", "y")], [4, 7], {"w": (5, 4)}, 0, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_found(tmp_path: Path, case: str) -> None:
    nodes, shape, weights, axis, group = CASES[case]
    model = build(nodes, {"x": shape}, ["y"], {k: random(*v) for k, v in weights.items()})
    (linear,) = linears(model, tmp_path)
    assert linear.node.name == nodes[0].name
    assert (linear.input.name, linear.weight.name, linear.output.name) == ("x", "w", "y")
    assert linear.node.inputs[linear.weight_index] is linear.weight
    assert (linear.axis, linear.group) == (axis, group)
    if "b" in weights:
        assert linear.bias is not None
        assert linear.bias_node is not None
        assert linear.bias_node.name == nodes[-1].name
        assert linear.bias_node.inputs[linear.bias_index] is linear.bias
    else:
        assert linear.bias is None
        assert linear.bias_node is None


MATMUL = node("MatMul", "x w", "m")
NO_BIAS = {
    "not along the channels": ([MATMUL, node("Add", "m b", "y")], ["y"], (3, 1)),
    "per position": ([MATMUL, node("Add", "m b", "y")], ["y"], (3, 5)),
    "scalar": ([MATMUL, node("Add", "m b", "y")], ["y"], ()),
    "rank grows": ([MATMUL, node("Add", "m b", "y")], ["y"], (1, 1, 1, 5)),
    "another reader": ([MATMUL, node("Add", "m b", "y"), node("Relu", "m", "z")], ["y", "z"], (5,)),
    "graph output": ([MATMUL, node("Add", "m b", "y")], ["y", "m"], (5,)),
    "not an add": ([MATMUL, node("Sub", "m b", "y")], ["y"], (5,)),
    "twice": ([MATMUL, node("Add", "m m", "t"), node("Add", "t b", "y")], ["y"], (5,)),
}


@pytest.mark.parametrize("case", NO_BIAS)
def test_not_a_bias(tmp_path: Path, case: str) -> None:
    nodes, outputs, shape = NO_BIAS[case]
    model = build(nodes, {"x": ["n", 3, 4]}, outputs, {"w": random(4, 5), "b": random(*shape)})
    (linear,) = linears(model, tmp_path)
    assert linear.bias is None
    assert linear.output.name == "m"


def test_products_of_activations_and_computed_weights_are_no_layers(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x x", "m"), node("Relu", "w", "r"), node("MatMul", "m r", "y")]
    assert linears(build(nodes, {"x": [4, 4]}, ["y"], {"w": random(4, 4)}), tmp_path) == ()
