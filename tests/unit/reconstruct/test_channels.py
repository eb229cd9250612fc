"""The axis of channels in the layouts that exporters write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.surgeon import import_graph
from onnxptq.reconstruct.channels import channel_axes
from tests.unit.rotate.rotate_nets import Blocks


def _maps(net: Blocks) -> Sequence[str]:
    """Channels in front, then behind, as in Swin."""
    x = net.op("Relu", "front", net.conv("stem", "x", (8, 3, 1, 1), pads=[0] * 4))
    y = net.op("Transpose", "behind", x, perm=[0, 2, 3, 1])
    y = net.op("Add", "sum", y, net.mlp("mlp", net.norm("norm", y, 8), 8))
    return [net.op("Reshape", "rows", y, net.ints("s", 1, 16, 8))]


def _points(net: Blocks) -> Sequence[str]:
    """A kernel of one place over points, as in PointNet, and a layer that reads from the left."""
    x = net.op("Reshape", "points", "x", net.ints("s", 1, 3, 16))
    y = net.op("Relu", "wide", net.op("Conv", "conv", x, net.weight("w", 8, 3, 1)))
    return [net.op("MatMul", "left", net.weight("l", 5, 8), y)]


def _read(net: Blocks) -> Sequence[str]:
    """Only what reads the tensor tells."""
    y = net.op("Sigmoid", "gate", net.op("Transpose", "moved", "x", perm=[0, 2, 3, 1]))
    return [net.op("MatMul", "y", y, net.weight("w", 3, 5))]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (_maps, {"front": 1, "behind": 3, "sum": 3, "rows": 2}),
        (_points, {"points": 1, "wide": 1, "left": 1}),
        (_read, {"moved": 3, "gate": 3, "y": 3}),
    ],
)
def test_the_axis_is_told_by_the_operators_around(
    build: Callable[[Blocks], Sequence[str]], expected: dict[str, int], tmp_path: Path
) -> None:
    net = Blocks(opset=20)
    outputs = build(net)
    index = GraphIndex(import_graph(net.proto({"x": [1, 3, 4, 4]}, list(outputs)), tmp_path))
    assert channel_axes(index, expected) == expected


def test_nothing_is_told_where_nothing_has_channels(tmp_path: Path) -> None:
    net = Blocks()
    y = net.op("Sin", "y", net.op("Relu", "r", "x"))
    assert channel_axes(GraphIndex(import_graph(net.proto({"x": [1, 3, 4]}, [y]), tmp_path)), ["r"]) == {}
