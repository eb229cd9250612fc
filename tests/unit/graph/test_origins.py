"""What became of the nodes of the user's file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.origins import FOLDED, PASSIVE, UNUSED
from onnxptq.types import CanonicalModel, UserNode
from tests.unit.graph.graph_helpers import block_function, build, node, random


def canonical(folder: Path, model: onnx.ModelProto) -> CanonicalModel:
    onnx.save(model, folder / "model.onnx")
    return canonicalize(folder / "model.onnx", folder)


def _homes(model: CanonicalModel) -> dict[str, tuple[str, ...]]:
    present = {n.name for n in model.graph.nodes}
    assert all(home in present for user in model.user_nodes for home in user.homes)
    assert all(bool(user.homes) != bool(user.reason) for user in model.user_nodes)
    return {user.name: user.homes for user in model.user_nodes}


def _reasons(model: CanonicalModel) -> dict[str, str]:
    return {user.name: user.reason for user in model.user_nodes if user.reason}


def test_a_batch_norm_is_part_of_its_layer_and_constants_are_gone(tmp_path: Path) -> None:
    nodes = [
        node("Transpose", "v", "w", perm=[1, 0, 2, 3]),
        node("Conv", "x w", "c"),
        node("BatchNormalization", "c gamma beta mean var", "n"),
        node("Identity", "n", "same"),
        node("Relu", "same", "y"),
        node("Sqrt", "n", "unread"),
    ]
    weights = {"v": random(2, 3, 1, 1), "gamma": random(3), "beta": random(3), "mean": random(3)}
    weights["var"] = np.ones(3, np.float32)
    result = canonical(tmp_path, build(nodes, {"x": ["n", 2, 4, 4]}, ["y"], weights))
    names = [n.name for n in nodes]
    assert _homes(result) == {
        names[0]: (),
        names[1]: (names[1],),
        names[2]: (names[1],),
        names[3]: (),
        names[4]: (names[4],),
        names[5]: (),
    }
    assert _reasons(result) == {names[0]: FOLDED, names[3]: PASSIVE, names[5]: UNUSED}
    assert result.user_nodes[2] == UserNode(
        name=names[2], op="BatchNormalization", outputs=("n",), homes=(names[1],)
    )


def test_fused_nodes_are_parts_of_what_they_were_fused_into(tmp_path: Path) -> None:
    nodes = [
        node("Div", "x root", "d"),
        node("Erf", "d", "e"),
        node("Add", "e one", "a"),
        node("Mul", "x a", "m"),
        node("Mul", "m half", "g"),
        node("Relu", "g", "y"),
    ]
    weights = {"root": np.array(2.0**0.5, np.float32), "one": np.array(1.0, np.float32)}
    weights["half"] = np.array(0.5, np.float32)
    result = canonical(tmp_path, build(nodes, {"x": ["n", 4]}, ["y"], weights, opset=20))
    (gelu,) = (n.name for n in result.graph.nodes if n.op == "Gelu")
    homes = _homes(result)
    assert [homes[n.name] for n in nodes] == [(gelu,)] * 5 + [(nodes[5].name,)]
    assert nodes[5].name not in result.node_labels()


def _with_a_function() -> onnx.ModelProto:
    graph = helper.make_graph(
        [
            helper.make_node("Block", ["x", "w"], ["h"], "first", domain="own"),
            helper.make_node("Block", ["h", "w"], ["y"], "second", domain="own"),
        ],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [onnx.numpy_helper.from_array(random(4, 4), "w")],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    return helper.make_model(graph, opset_imports=domains, functions=[block_function()], ir_version=8)


def test_a_function_is_all_that_it_holds_and_its_inner_tensors_are_parts_of_its_output(
    tmp_path: Path,
) -> None:
    result = canonical(tmp_path, _with_a_function())
    first, second = (result.graph.nodes[:2], result.graph.nodes[2:])
    assert _homes(result) == {
        "first": tuple(n.name for n in first),
        "second": tuple(n.name for n in second),
    }
    inner = [n.outputs[0].name for n in result.graph.nodes if n.op == "MatMul"]
    assert [result.user_name(name) for name in inner] == ["part 1 of h", "part 1 of y"]
    assert result.user_name("h") == "h"
    labels = result.node_labels()
    assert set(labels) == {n.name for n in result.graph.nodes}
    assert labels[first[0].name] == f"{first[0].name} (part of first)"
    assert labels[second[1].name].endswith(" (part of second)")
