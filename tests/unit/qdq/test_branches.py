"""Branches as they are written: names, edges and constants, as text that can be reviewed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.graph.branches import make_branch
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import find_linears
from onnxptq.graph.save import save_graph
from onnxptq.qdq import insert_quantizers
from onnxptq.types import GRAPH_OUTPUT, Solution
from tests.unit.reconstruct.pack_cases import Case, case
from tests.unit.small_nets import Net

WRITTEN = """\
QuantizeLinear x_QuantizeLinear: x x_scale x_zero_point -> x_QuantizeLinear_Output
DequantizeLinear x_DequantizeLinear: x_QuantizeLinear_Output x_scale x_zero_point -> x_DequantizeLinear_Output
Conv c: x_DequantizeLinear_Output c.w_DequantizeLinear_Output c.b -> c_branch_Input
Conv c_branch_down: x_DequantizeLinear_Output c_branch_down_weight[2, 3, 3, 3] -> c_branch_down_Output
Conv c_branch_up: c_branch_down_Output c_branch_up_weight[6, 2, 1, 1] -> c_branch_up_Output
Add c_branch_Add: c_branch_Input c_branch_up_Output -> c
Relu r: c -> r
GlobalAveragePool p: r -> p
Flatten f: p -> f
QuantizeLinear f_QuantizeLinear: f f_scale f_zero_point -> f_QuantizeLinear_Output
DequantizeLinear f_DequantizeLinear: f_QuantizeLinear_Output f_scale f_zero_point -> f_DequantizeLinear_Output
MatMul y.mm: f_DequantizeLinear_Output y.w_DequantizeLinear_Output -> y.mm_branch_Input
MatMul y.mm_branch_down: f_DequantizeLinear_Output y.mm_branch_down_weight[6, 2] -> y.mm_branch_down_Output
MatMul y.mm_branch_up: y.mm_branch_down_Output y.mm_branch_up_weight[2, 4] -> y.mm_branch_up_Output
Add y.mm_branch_Add: y.mm_branch_Input y.mm_branch_up_Output -> y.mm
Add y: y.mm y.b -> y
"""


def _network() -> onnx.ModelProto:
    net = Net()
    x = net.op("Relu", "r", net.conv("c", "x", (6, 3, 3, 3), strides=[2, 2]))
    x = net.op("Flatten", "f", net.op("GlobalAveragePool", "p", x))
    return net.proto({"x": ["n", 3, 8, 8]}, [net.linear("y", x, 6, 4)])


def _branched(folder: Path) -> tuple[Case, Solution]:
    made = case(_network(), folder, weight_bits=4, activation_bits=8)
    rng = np.random.default_rng(0)
    parts = {}
    for layer in find_linears(GraphIndex(made.model.graph)):
        channels = layer.weight.shape[layer.axis]
        width = int(np.prod(layer.weight.shape)) // channels
        left, right = (rng.standard_normal(s).astype(np.float32) for s in ((channels, 2), (2, width)))
        parts[layer.node.name] = make_branch(layer, left, right, before=0.1, after=0.05)
    return made, replace(made.start, branches=parts)


def _saved(made: Case, solution: Solution, path: Path) -> onnx.GraphProto:
    save_graph(insert_quantizers(made.model.graph, made.plan, solution), path)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(str(path)).graph


def test_a_branch_reads_what_its_layer_reads_and_joins_in_front_of_the_bias(tmp_path: Path) -> None:
    made, solution = _branched(tmp_path)
    graph = _saved(made, solution, tmp_path / "written.onnx")
    shapes = {t.name: list(t.dims) for t in graph.initializer}

    def read(name: str) -> str:
        return f"{name}{shapes[name]}" if "_branch_" in name and name in shapes else name

    constants = {f"{name}_DequantizeLinear" for name in ("c.w", "y.w")}
    text = "".join(
        f"{n.op_type} {n.name}: {' '.join(map(read, n.input))} -> {' '.join(n.output)}\n"
        for n in graph.node
        if n.name not in constants
    )
    assert text == WRITTEN
    down, up = (next(n for n in graph.node if n.name == f"c_branch_{part}") for part in ("down", "up"))
    layer = next(n for n in graph.node if n.name == "c")
    assert sorted(map(str, down.attribute)) == sorted(map(str, layer.attribute))
    assert not up.attribute


def test_names_that_the_model_has_taken_get_a_number(tmp_path: Path) -> None:
    net = Net()
    x = net.op("Relu", "y.mm_branch_down", "x")
    proto = net.proto({"x": ["n", 6]}, [net.linear("y", x, 6, 4)])
    made = case(proto, tmp_path, weight_bits=4, activation_bits=8)
    (layer,) = find_linears(GraphIndex(made.model.graph))
    branch = make_branch(
        layer, np.ones((4, 1), np.float32), np.ones((1, 6), np.float32), before=1.0, after=0.5
    )
    graph = _saved(made, replace(made.start, branches={"y.mm": branch}), tmp_path / "written.onnx")
    names = [n.name for n in graph.node]
    assert len(set(names)) == len(names)
    assert "y.mm_branch_down_1" in names


def test_the_model_is_left_as_it_is(tmp_path: Path) -> None:
    made, solution = _branched(tmp_path)
    before = [(n.name, [t.name for t in (*n.inputs, *n.outputs)]) for n in made.model.graph.nodes]
    insert_quantizers(made.model.graph, made.plan, solution)
    assert [(n.name, [t.name for t in (*n.inputs, *n.outputs)]) for n in made.model.graph.nodes] == before


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
def test_a_quantized_graph_output_takes_the_sum(target: str, tmp_path: Path) -> None:
    net = Net()
    proto = net.proto({"x": [1, 3, 8, 8]}, [net.conv("y", "x", (6, 3, 3, 3))])
    made = case(proto, tmp_path, target=target, weight_bits=8, activation_bits=8)
    (layer,) = find_linears(GraphIndex(made.model.graph))
    branch = make_branch(
        layer, np.ones((6, 1), np.float32), np.ones((1, 27), np.float32), before=1.0, after=0.5
    )
    graph = _saved(made, replace(made.start, branches={"y": branch}), tmp_path / "written.onnx")
    producers = {t: n for n in graph.node for t in n.output}
    is_quantized = any(s.consumer == GRAPH_OUTPUT for q in made.plan.quantizers for s in q.sites)
    total = producers["y"]
    if is_quantized:
        assert total.op_type == "DequantizeLinear"
        total = producers[producers[total.input[0]].input[0]]
    assert total.op_type == "Add"
    assert producers[total.input[0]].name == "y"
