"""Every model of the testbed, lowered: equal to onnxruntime on another batch size, with finite gradients.

Half-precision initializers are widened first, as the testbed's own script does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from onnx import numpy_helper

from onnxptq.lowering import check_supported, lower
from onnxptq.runtime import Session

MODELS = (
    "efficientnet_lite0.onnx",
    "fastestdet.onnx",
    "pointnet_modelnet40.onnx",
    "resnet20_cifar10.onnx",
    "vits14_flowers.fp16w.onnx",
)
TOLERANCE = 1e-4
"""Largest difference relative to the largest output: float32 sums in another order over tens of layers."""


def _load(path: Path) -> onnx.ModelProto:
    model = onnx.load(str(path))
    for initializer in model.graph.initializer:
        if initializer.data_type == onnx.TensorProto.FLOAT16:
            wide = numpy_helper.to_array(initializer).astype(np.float32)
            initializer.CopyFrom(numpy_helper.from_array(wide, initializer.name))
    return model


def _graph(model: onnx.ModelProto) -> gs.Graph:
    graph = gs.import_onnx(model)
    for i, node in enumerate(graph.nodes):
        node.name = node.name or f"{node.op}_{i}"
    return graph


@pytest.mark.parametrize("name", MODELS)
def test_model_equals_onnxruntime(name: str, testbed: Path) -> None:
    model = _load(testbed / "models" / name)
    graph = _graph(model)
    assert check_supported(graph) == ()
    module = lower(graph, inputs=[t.name for t in graph.inputs], outputs=[t.name for t in graph.outputs])
    rng = np.random.default_rng(0)
    feed = {
        t.name: rng.normal(size=[d if isinstance(d, int) else 3 for d in t.shape]).astype(np.float32)
        for t in graph.inputs
    }
    want = Session(model.SerializeToString(), threads=1).run(feed)
    values = {n: torch.from_numpy(v).requires_grad_(True) for n, v in feed.items()}
    weights = module.parameters_for([n for n in module.constants if module.constant(n).is_floating_point()])
    found = module(values)
    for output, value in want.items():
        got = found[output].detach().numpy()
        assert got.shape == value.shape
        assert np.abs(got - value).max() <= TOLERANCE * np.abs(value).max()
    torch.stack([value.square().mean() for value in found.values()]).sum().backward()
    for label, leaf in {**values, **weights}.items():
        assert leaf.grad is None or torch.isfinite(leaf.grad).all(), label
    assert all(v.grad is not None and v.grad.any() for v in values.values())
    assert sum(w.grad is not None and bool(w.grad.any()) for w in weights.values()) > 0.9 * len(weights)
