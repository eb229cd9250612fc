"""Every way in which a file's branches may be others than the solution's is caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import helper, numpy_helper

from onnxptq.errors import OutputCheckError
from onnxptq.graph.branches import branch_graph, make_branch
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import find_linears
from onnxptq.graph.save import save_graph
from onnxptq.qdq import insert_quantizers
from onnxptq.types import Branch
from onnxptq.validate import branches
from onnxptq.validate.parity import check_parity
from onnxptq.validate.structure import check_structure
from tests.unit.validate.written_model import Written

Corrupt = Callable[[onnx.ModelProto], None]
BRANCHED = ("conv1", "conv2", "head")


@pytest.fixture(params=["int8", "narrow"])
def branched(request: pytest.FixtureRequest, tmp_path: Path) -> Written:
    """Branches beside a convolution of each kind (one writes a quantized graph output) and the Gemm."""
    written: Written = request.getfixturevalue(request.param)
    rng = np.random.default_rng(0)
    parts = {}
    for layer in find_linears(GraphIndex(written.model.graph)):
        if layer.node.name in BRANCHED:
            channels = layer.weight.shape[layer.axis]
            width = int(np.prod(layer.weight.shape)) // channels
            shapes = ((channels, 2), (2, width))
            left, right = (0.1 * rng.standard_normal(s).astype(np.float32) for s in shapes)
            parts[layer.node.name] = make_branch(layer, left, right, before=0.1, after=0.05)
    solution = replace(written.solution, branches=parts)
    path = tmp_path / "branched.onnx"
    save_graph(insert_quantizers(written.model.graph, written.plan, solution), path)
    return replace(written, path=path, solution=solution)


def _node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def _change(model: onnx.ModelProto, name: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    value = numpy_helper.to_array(tensor).copy()
    value.flat[0] = np.nextafter(value.flat[0], np.float32(np.inf))
    tensor.CopyFrom(numpy_helper.from_array(value, name))


def constant_off_by_one_ulp(model: onnx.ModelProto) -> None:
    _change(model, "conv1_branch_down_weight")


def other_constant_off_by_one_ulp(model: onnx.ModelProto) -> None:
    _change(model, "head_branch_up_weight")


def reads_the_float_tensor(model: onnx.ModelProto) -> None:
    _node(model, "conv1_branch_down").input[0] = "r0"


def other_padding(model: onnx.ModelProto) -> None:
    """The shapes still fit: one row above is taken off, and one is added below."""
    for attribute in _node(model, "conv1_branch_down").attribute:
        if attribute.name == "pads":
            attribute.ints[:] = [0, 1, 2, 1]


def sum_becomes_difference(model: onnx.ModelProto) -> None:
    _node(model, "conv1_branch_Add").op_type = "Sub"


def sum_is_bypassed(model: onnx.ModelProto) -> None:
    """What followed the sum reads the layer alone."""
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == "c1":
                node.input[i] = "conv1_branch_Input"


def activation_between(model: onnx.ModelProto) -> None:
    up = _node(model, "conv1_branch_up")
    position = list(model.graph.node).index(up)
    extra = helper.make_node("Relu", [up.input[0]], ["extra"], name="extra")
    up.input[0] = "extra"
    model.graph.node.insert(position, extra)


CORRUPTIONS = [
    (constant_off_by_one_ulp, "'conv1' holds other constants"),
    (other_constant_off_by_one_ulp, "'head' holds other constants"),
    (reads_the_float_tensor, "'conv1' computes with other operators"),
    (other_padding, "'conv1' computes with other operators"),
    (sum_becomes_difference, "'conv1' is not added"),
    (sum_is_bypassed, "'conv1' is not added"),
    (activation_between, "'conv1' is not made of two operators"),
]


def test_what_was_written_passes(branched: Written, tmp_path: Path) -> None:
    check_structure(branched.path, branched.model, branched.plan, branched.solution)
    parity = check_parity(
        branched.path, branched.model, branched.plan, branched.solution, branched.samples, work_dir=tmp_path
    )
    assert {row.node for row in parity.branches} == set(BRANCHED)
    assert all(row.elements > 0 and row.difference < 1e-6 for row in parity.branches)


@pytest.mark.parametrize(("corrupt", "message"), CORRUPTIONS, ids=lambda v: getattr(v, "__name__", None))
def test_structure_catches(branched: Written, corrupt: Corrupt, message: str, tmp_path: Path) -> None:
    model = onnx.load(str(branched.path))
    corrupt(model)
    path = tmp_path / "corrupted.onnx"
    onnx.save(model, str(path))
    with pytest.raises(OutputCheckError, match=message):
        check_structure(path, branched.model, branched.plan, branched.solution)


def test_structure_catches_a_missing_branch_and_one_too_many(branched: Written) -> None:
    parts = dict(branched.solution.branches)
    less = replace(branched.solution, branches={"conv1": parts["conv1"]})
    with pytest.raises(OutputCheckError, match=r"holds node '(conv2|head)_branch"):
        check_structure(branched.path, branched.model, branched.plan, less)
    more = replace(branched.solution, branches={**parts, "conv0": parts["conv1"]})
    with pytest.raises(OutputCheckError, match="'conv0' is not added"):
        check_structure(branched.path, branched.model, branched.plan, more)


def test_parity_catches_other_values(
    branched: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a kernel computed one branch otherwise than its operators say."""

    def louder(graph: gs.Graph, node: gs.Node, branch: Branch) -> gs.Graph:
        factor = np.float32(1.001 if node.name == "conv2" else 1.0)
        return branch_graph(graph, node, replace(branch, up=branch.up * factor))

    monkeypatch.setattr(branches, "branch_graph", louder)
    with pytest.raises(OutputCheckError, match="'conv2' computes other values than the simulation"):
        check_parity(
            branched.path,
            branched.model,
            branched.plan,
            branched.solution,
            branched.samples,
            work_dir=tmp_path,
        )
