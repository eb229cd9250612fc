"""Counterparts are found by structure where that is unambiguous, and not guessed where it is not."""

from __future__ import annotations

from pathlib import Path

import onnx

from onnxptq.graph.names import name_nodes, user_names
from onnxptq.graph.surgeon import import_graph
from onnxptq.graph.weights import structure_only
from tests.unit.graph.graph_helpers import build, node, random


def chain(names: dict[str, str], branch: bool = False) -> onnx.ModelProto:
    nodes = [node("MatMul", "x w", "a"), node("Relu", "a", "b"), node("Softmax", "b", "c", axis=1)]
    nodes += [node("Relu", "a", "d")] if branch else []
    nodes.append(node("Add", "c d" if branch else "c c", "y"))
    model = build(nodes, {"x": ["n", 4]}, ["y"], {"w": random(4, 3)})
    for n in model.graph.node:
        n.input[:] = [names.get(i, i) for i in n.input]
        n.output[:] = [names.get(o, o) for o in n.output]
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    return model


def mapped(names: dict[str, str], tmp_path: Path, branch: bool = False) -> dict[str, str]:
    reference = structure_only(chain({}, branch))
    return user_names(reference, import_graph(chain(names, branch), tmp_path), {})


def test_renamed_tensors_are_found(tmp_path: Path) -> None:
    assert mapped({"b": "gen_1", "c": "gen_2"}, tmp_path) == {"gen_1": "b", "gen_2": "c"}
    assert mapped({"w": "gen_3"}, tmp_path) == {"gen_3": "w"}
    assert mapped({}, tmp_path) == {}


def test_two_candidates_are_no_counterpart(tmp_path: Path) -> None:
    reference, other = chain({}, True), chain({"b": "gen_1", "d": "gen_2"}, True)
    other.graph.node[-1].op_type = "Mul"
    other.graph.node[2].op_type = "Hardmax"
    assert user_names(structure_only(reference), import_graph(other, tmp_path), {}) == {}


def test_the_output_of_a_fused_operator_gets_the_last_name(tmp_path: Path) -> None:
    """Softmax(Relu(.)) as one unknown operator, whose output has a new name."""
    fused = chain({"c": "gen"})
    relu, softmax = fused.graph.node[1], fused.graph.node[2]
    softmax.CopyFrom(node("Erf", "a", "gen"))
    fused.graph.node.remove(relu)
    assert user_names(structure_only(chain({})), import_graph(fused, tmp_path), {}) == {"gen": "c"}


def test_other_attributes_are_no_counterpart(tmp_path: Path) -> None:
    reference = chain({})
    other = chain({"c": "gen"})
    next(n for n in other.graph.node if n.op_type == "Softmax").attribute[0].i = 0
    other.graph.node[-1].op_type = "Mul"
    assert user_names(structure_only(reference), import_graph(other, tmp_path), {}) == {}


def test_node_names() -> None:
    graph = chain({}).graph
    for n, name in zip(graph.node, ["", "Relu_0", "Relu_0", ""], strict=True):
        n.name = name
    graph.node[3].op_type = "Relu"
    assert name_nodes(graph, unnamed=False) == ["Relu_0"]
    assert [n.name for n in graph.node] == ["", "Relu_0", "Relu_0_0", ""]
    assert name_nodes(graph) == []
    assert [n.name for n in graph.node] == ["MatMul_0", "Relu_0", "Relu_0_0", "Relu_1"]
    before = [n.name for n in graph.node]
    name_nodes(graph)
    assert [n.name for n in graph.node] == before
