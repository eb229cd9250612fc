"""What only chooses is told from what is also a value, whatever lies between."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.graph.choosing import only_chooses
from onnxptq.graph.index import GraphIndex
from tests.unit.small_nets import Net, graph_of

POINTS, NEAR = 6, 3


def _distances(net: Net) -> str:
    """|p|^2 - 2 p p^T, the order of squared distances, [1, 6, 6], its product named "product"."""
    turned = net.op("Transpose", "turned", "x", perm=[0, 2, 1])
    product = net.op("MatMul", "product", "x", turned)
    lengths = net.op("ReduceSum", "lengths", net.op("Mul", "squares", "x", "x"), net.constant("last", [2]))
    row = net.op("Transpose", "row", lengths, perm=[0, 2, 1])
    return net.op(
        "Sub", "distances", row, net.op("Mul", "twice", product, net.constant("two", np.float32(2)))
    )


def _neighbours(kind: str) -> onnx.ModelProto:
    net = Net()
    distances = _distances(net)
    outputs = []
    count = net.constant("count", [NEAR])
    if kind == "arg min":
        near = net.op("ArgMin", "near", distances, axis=-1, keepdims=0)
    else:
        net.op("TopK", "closest", distances, count, outputs=["near"], largest=0)
        near = "near"
    if kind == "flat":
        flat = net.op("Reshape", "flat", "x", net.constant("rows", [-1, 4]))
        moved = net.op("Add", "moved", near, net.constant("offset", np.zeros((1, 1, 1), np.int64)))
        taken = net.op("Gather", "taken", flat, moved, axis=0)
    elif kind == "elements":
        long = net.op("Reshape", "long", near, net.constant("column", [1, POINTS * NEAR, 1]))
        wide = net.op("Expand", "wide", long, net.constant("shape", [1, POINTS * NEAR, 4]))
        taken = net.op("GatherElements", "taken", "x", wide, axis=1)
    elif kind == "by position":
        taken = net.op("GatherND", "taken", "x", net.op("Unsqueeze", "u", near, net.constant("end", [-1])),
                       batch_dims=1)  # fmt: skip
    else:
        taken = net.op("Gather", "taken", "x", near, axis=1)
    if kind == "distances too":
        taken = net.op("Add", "both", net.op("ReduceMax", "far", "closest"), taken)
    elif kind == "product too":
        taken = net.op("Add", "both", net.op("ReduceMax", "far", "product"), taken)
    elif kind == "positions too":
        taken = net.op(
            "Add", "both", net.op("ReduceMax", "far", net.op("Cast", "as float", near, to=1)), taken
        )
    elif kind == "seen":
        outputs = ["closest"]
    elif kind == "shape too":
        size = net.op("Shape", "size", near)
        taken = net.op(
            "Reshape", "again", taken, net.op("Concat", "sizes", size, net.constant("c", [4]), axis=0)
        )
    return net.proto({"x": [1, POINTS, 4]}, [net.linear("y", taken, 4, 8), *outputs])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("plain", True),
        ("arg min", True),
        ("flat", True),
        ("elements", True),
        ("by position", True),
        ("shape too", True),
        ("distances too", False),
        ("product too", False),
        ("positions too", False),
        ("seen", False),
    ],
)
def test_a_search_for_neighbours(kind: str, expected: bool, tmp_path: Path) -> None:
    index = GraphIndex(graph_of(_neighbours(kind), tmp_path))
    assert only_chooses(index, "product") is expected
    assert not only_chooses(index, "taken")


def test_the_classes_that_a_network_answers_with_are_not_a_choice(tmp_path: Path) -> None:
    net = Net()
    scores = net.op("MatMul", "scores", "x", net.op("Transpose", "turned", "x", perm=[0, 2, 1]))
    winner = net.op("Cast", "y", net.op("ArgMax", "winner", scores, axis=-1), to=1)
    index = GraphIndex(graph_of(net.proto({"x": [1, 6, 4]}, [winner]), tmp_path))
    assert not only_chooses(index, "scores")


def test_what_nobody_reads_chooses_nothing(tmp_path: Path) -> None:
    net = Net()
    net.op("MatMul", "loose", "x", net.op("Transpose", "turned", "x", perm=[0, 2, 1]))
    index = GraphIndex(graph_of(net.proto({"x": [1, 6, 4]}, [net.linear("y", "x", 4, 2)]), tmp_path))
    assert not only_chooses(index, "loose")
