"""Nodes without a torch form, run by onnxruntime in between: the same values as in onnxruntime, and no gradient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
import torch

from onnxptq.errors import UnsupportedOperatorError
from onnxptq.graph.surgeon import import_graph
from onnxptq.lowering import check_supported, lower, require_supported, unsupported_nodes
from onnxptq.lowering.joining import can_be_joined
from tests.unit.foreign_nets import BUILT, model_of


def graph_of(model: onnx.ModelProto) -> gs.Graph:
    return import_graph(model, Path())


@pytest.fixture
def feed() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((1, 5, 8)).astype(np.float32)


@pytest.mark.parametrize("kind", BUILT)
def test_the_network_computes_what_onnxruntime_computes(kind: str, feed: np.ndarray) -> None:
    model = model_of(kind)
    graph = graph_of(model)
    assert [gap.op for gap in check_supported(graph)] == [kind]
    assert unsupported_nodes(graph) == ()
    (expected,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": feed})
    module = lower(graph, inputs=["x"], outputs=["y"])
    for scale in (1.0, 2.0):
        (expected,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": scale * feed})
        found = module({"x": torch.from_numpy(scale * feed)})["y"].detach().numpy()
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # two orders of summation


@pytest.mark.parametrize("kind", ["LSTM", "Loop"])
def test_gradients_end_there(kind: str, feed: np.ndarray) -> None:
    module = lower(graph_of(model_of(kind)), inputs=["x"], outputs=["y"])
    weights = module.parameters_for(["fc.w", "y.w"])
    module({"x": torch.from_numpy(feed)})["y"].square().sum().backward()
    assert weights["fc.w"].grad is None
    behind = weights["y.w"].grad
    assert behind is not None
    assert float(behind.abs().max()) > 0.0


def test_what_it_reads_can_be_hooked(feed: np.ndarray) -> None:
    module = lower(graph_of(model_of("LSTM")), inputs=["x"], outputs=["r"])
    plain = module({"x": torch.from_numpy(feed)})["r"]
    for tensor, index in (("front", 0), ("r.w", 1)):
        module.set_hook(tensor, "r", index, lambda value: 0.5 * value)
        assert not torch.equal(module({"x": torch.from_numpy(feed)})["r"], plain)
        module.clear_hooks()
    assert torch.equal(module({"x": torch.from_numpy(feed)})["r"], plain)


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("RandomNormalLike", "drawn at random"),
        ("SequenceConstruct", "is no tensor of numbers"),
        ("StringNormalizer", "is no tensor of numbers"),
        ("Frobnicate", "ONNX does not define it"),
    ],
)
def test_what_cannot_stand_between_tensors_is_refused(op: str, reason: str) -> None:
    x, y = gs.Variable("x", np.float32), gs.Variable("y", np.float32)
    graph = gs.Graph(nodes=[gs.Node(op, "it", {}, [x], [y])], inputs=[x], outputs=[y], opset=17)
    with pytest.raises(UnsupportedOperatorError, match=reason):
        require_supported(graph)
    with pytest.raises(UnsupportedOperatorError, match=reason):
        lower(graph, inputs=["x"], outputs=["y"])


def test_it_is_refused_where_that_was_asked_for() -> None:
    graph = graph_of(model_of("GRU"))
    require_supported(graph)
    with pytest.raises(UnsupportedOperatorError, match=r"GRU version 14 \(node 'r'\)"):
        require_supported(graph, may_run_foreign=False)


def test_sequences_are_not_joined_along_time(feed: np.ndarray) -> None:
    """The first axis of the recurrent node is time, which is also the first axis of the network's input."""
    other = feed[:, ::-1].copy()
    pair = [{"x": torch.from_numpy(value)} for value in (feed, other)]
    module = lower(graph_of(model_of("LSTM")), inputs=["x"], outputs=["y"])
    assert not can_be_joined(module, pair)
    layer = lower(graph_of(model_of("LSTM")), inputs=["x"], outputs=["front"])
    assert can_be_joined(layer, pair)


def test_samples_without_detections_are_not_joined() -> None:
    pair = [{"x": torch.zeros(1, 3)}, {"x": torch.zeros(1, 3)}]
    assert not can_be_joined(lambda values: {"y": values["x"][:0]}, pair)
    assert can_be_joined(lambda values: {"y": values["x"][:, :2]}, pair)
