"""Softmax weights as powers of their roots: the same numbers, and a tensor between 0 and 1 to quantize."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.graph.attention import find_attention
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.passes import root_softmax
from onnxptq.graph.surgeon import import_graph
from onnxptq.rooting import root_weights
from tests.unit.graph.graph_helpers import apply
from tests.unit.rotate.rotate_nets import TOKENS, Blocks, transformer
from tests.unit.small_nets import canonical, planned, random_samples

WIDTH = 8
TOLERANCE = 2e-6


def _attention(kind: str) -> onnx.ModelProto:
    net = Blocks()
    q, v = net.linear("q", "x", WIDTH, WIDTH), net.linear("v", "x", WIDTH, WIDTH)
    scores = net.op("MatMul", "qk", q, net.op("Transpose", "kt", "x", perm=[0, 2, 1]))
    if kind == "hidden":
        seen = net.constant("seen", np.tri(TOKENS, dtype=bool))
        scores = net.op("Where", "masked", seen, scores, net.constant("low", np.float32(-np.inf)))
    outputs = ["pv"]
    if kind == "transposed":
        p = net.op("Softmax", "p", net.op("Transpose", "turned", scores, perm=[0, 2, 1]), axis=1)
        p = net.op("Transpose", "pt", p, perm=[0, 2, 1])
    else:
        p = net.op("Softmax", "p", scores, axis=-1)
    if kind == "shared":
        outputs.append(net.op("Relu", "other", p))
    if kind == "safe":
        p = net.op("Where", "kept", net.op("IsNaN", "nan", p), net.constant("zero", np.float32(0)), p)
    net.op("MatMul", "pv", p, v)
    return net.proto({"x": [1, TOKENS, WIDTH]}, outputs)


@pytest.mark.parametrize("power", [2, 3, 4])
@pytest.mark.parametrize("kind", ["plain", "hidden", "safe"])
def test_the_outputs_stay(kind: str, power: int, tmp_path: Path) -> None:
    skipped: list[object] = []

    def rewrite(graph: object) -> int:
        count, skips = root_softmax.run(graph, power)
        skipped.extend(skips)
        return count

    count, ops, graph = apply(_attention(kind), rewrite, tmp_path, tolerance=TOLERANCE)
    assert (count, skipped) == (1, [])
    assert ops["Softmax"] == 0
    assert (ops["Pow"], ops["LogSoftmax"], ops["Exp"]) == (1, 1, 1)
    (found,) = find_attention(GraphIndex(graph))
    weights = "kept" if kind == "safe" else "p"
    assert (found.form, found.weights, found.root, found.power) == ("product", weights, "p_root", power)
    assert found.edge == ("p", 0)
    assert [node.name for node in found.scores] == ["qk"]


@pytest.mark.parametrize("kind", ["shared", "transposed"])
def test_weights_that_are_not_read_directly_stay(kind: str, tmp_path: Path) -> None:
    graph = import_graph(_attention(kind), tmp_path)
    before = [node.op for node in graph.nodes]
    count, (skip,) = root_softmax.run(graph, 3)
    assert count == 0
    assert skip.site == "p"
    assert "on their way to the product, or read by others" in skip.reason
    assert [node.op for node in graph.nodes] == before


def test_the_root_is_quantized_in_place_of_the_weights(tmp_path: Path) -> None:
    model = canonical(transformer(), tmp_path)
    sample = random_samples(model, 1)[0]
    rooted, summary = root_weights(model, 3, sample, work_dir=tmp_path)
    assert (summary.count, summary.skips) == (2, ())
    assert summary.difference < 1e-5
    assert rooted.fingerprint != model.fingerprint
    request = {"activation_bits": 4, "bits_of": {"block0.att.pv": (8, 5)}}
    edges = [
        {
            (s.consumer, s.input_index): q
            for q in planned(m, "simulate", **request).quantizers
            for s in q.sites
        }
        for m in (model, rooted)
    ]
    assert len(edges[0]) == len(edges[1])
    for i, bits in ((0, 5), (1, 4)):
        node = f"block{i}.att.p"
        assert edges[0][f"{node}v", 0].tensor == node
        assert (f"{node}v", 0) not in edges[1]
        assert edges[1][node, 0].tensor == f"{node}_root"
        assert edges[1][node, 0].qtype.bits == bits
        assert edges[1][f"{node}v", 1] == edges[0][f"{node}v", 1]


def test_nothing_to_do(tmp_path: Path) -> None:
    model = canonical(_attention("shared"), tmp_path)
    rooted, summary = root_weights(model, 2, random_samples(model, 1)[0], work_dir=tmp_path)
    assert rooted is model
    assert summary.summary.startswith("No softmax weights can be quantized by their root. Left: p: ")


def test_a_power_that_is_no_softmax_is_none(tmp_path: Path) -> None:
    """exp(logsoftmax(x) / 3)^2 does not sum to one."""
    model = _attention("plain")
    graph = import_graph(model, tmp_path)
    root_softmax.run(graph, 3)
    (power,) = [node for node in graph.nodes if node.op == "Pow"]
    power.inputs[1].values = np.asarray(2, np.float32)
    assert find_attention(GraphIndex(graph)) == ()
