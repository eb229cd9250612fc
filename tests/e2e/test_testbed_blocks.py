"""Blocks of the testbed's models: how many, where they end, and that they compose to the network exactly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch

from onnxptq.graph.canonicalize import canonicalize
from onnxptq.lowering import lower
from onnxptq.lowering.network import BlockNetwork
from onnxptq.partition.blocks import find_blocks, verify_blocks
from onnxptq.partition.describe import describe_blocks
from onnxptq.types import CanonicalModel

# Blocks by kind, in order of their first letters: stem, units, head.
SHAPES = {
    "resnet20_cifar10": "p" + "f" * 9 + "p",
    "efficientnet_lite0": "pppfpfpffpffpfffppp",
    "pointnet_modelnet40": "p" * 8,
    "vits14_flowers": "p" + "j" * 12 + "p",
    "fastestdet": "pffffr" + "f" * 10 + "rpfpf",
}


def _prepared(testbed: Path, name: str, folder: Path) -> CanonicalModel:
    source = testbed / "models" / f"{name}.onnx"
    if not source.exists():
        model = onnx.load(str(testbed / "models" / f"{name}.fp16w.onnx"))
        for initializer in model.graph.initializer:
            if initializer.data_type == onnx.TensorProto.FLOAT16:
                wide = onnx.numpy_helper.to_array(initializer).astype(np.float32)
                initializer.CopyFrom(onnx.numpy_helper.from_array(wide, initializer.name))
        source = folder / f"{name}.onnx"
        onnx.save(model, str(source))
    return canonicalize(source, folder)


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_of_testbed_model(name: str, testbed: Path, tmp_path: Path) -> None:
    model = _prepared(testbed, name, tmp_path)
    graph: gs.Graph = model.graph
    blocks = find_blocks(graph)
    verify_blocks(graph, blocks)
    assert "".join(block.kind[0] for block in blocks) == SHAPES[name]
    assert sum(row.weights for row in describe_blocks(blocks, model)) > 0
    rng = np.random.default_rng(0)
    feed = {
        spec.name: torch.from_numpy(
            rng.normal(size=[d if isinstance(d, int) else 2 for d in spec.shape]).astype(np.float32)
        )
        for spec in model.inputs
    }
    network = BlockNetwork(graph, blocks)
    between = tuple(name for block in blocks for name in block.outputs)
    with torch.no_grad():
        whole = lower(graph, inputs=tuple(feed), outputs=between)(feed)
    found = network.run(feed)
    assert all(torch.equal(found[name], whole[name]) for name in between)
    assert set(network.outputs) == set(model.outputs)
