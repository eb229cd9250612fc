"""The focusing quantizer in torch is what onnxruntime computes for the nodes that are written for it: bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from onnxptq.graph.save import exposed_copy, save_graph
from onnxptq.qdq import insert_quantizers
from onnxptq.quantizers.affine import shifted_qparams, shifted_type
from onnxptq.quantizers.focusing import FocusedActivation
from onnxptq.runtime import Session
from onnxptq.types import QType, Solution
from tests.unit.small_nets import Net, canonical, planned

COUNT = 1_000_000

SETTINGS = [
    (2, 0.0, 0.25),
    (3, 0.0, 0.05),
    (3, 0.031, 0.0787),
    (4, 0.011, 0.41),
    (4, 0.2, 0.21),
    (6, 0.0007, 0.9),
    (7, 0.5, 1.0),
]
"""Bits, b1 and b2; b1 is no whole number of steps."""


@pytest.mark.parametrize(("bits", "low", "high"), SETTINGS)
def test_a_million_values(bits: int, low: float, high: float, tmp_path: Path) -> None:
    net = Net()
    proto = net.proto({"x": [1, COUNT], "v": [COUNT, 1]}, [net.op("MatMul", "y", "x", "v")])
    model = canonical(proto, tmp_path)
    plan = planned(model, "simulate", activation_bits=bits)
    qtype = shifted_type(QType.unsigned(bits))
    assert qtype is not None
    learned = FocusedActivation(shifted_qparams(0, high, qtype))
    with torch.no_grad():
        learned.low.fill_(low / high)
    qparams = learned.hardened()
    solution = Solution(qparams={q.quantizer_id: qparams for q in plan.quantizers})
    save_graph(insert_quantizers(model.graph, plan, solution), tmp_path / "written.onnx")
    name = "x_DequantizeLinear_Output"
    exposed_copy(tmp_path / "written.onnx", [name], tmp_path / "exposed.onnx")

    rng = np.random.default_rng(bits)
    step = float(qparams.scale)
    ties = (rng.integers(-2, 2**bits + 40, COUNT // 4).astype(np.float32) + np.float32(0.5)) * qparams.scale
    plain = rng.uniform(0, 1.3 * high, COUNT // 2).astype(np.float32)
    softmax = np.exp(rng.uniform(-30, 0, COUNT - ties.size - plain.size)).astype(np.float32)
    x = np.concatenate([ties, plain, softmax]).reshape(1, COUNT)
    found = Session(tmp_path / "exposed.onnx", exact=True, threads=1).run(
        {"x": x, "v": np.zeros((COUNT, 1), np.float32)}, [name]
    )[name]
    with torch.no_grad():
        wanted = learned(torch.from_numpy(x)).numpy()
    np.testing.assert_array_equal(found, wanted)
    assert len(np.unique(found)) == 2**bits
    assert found.min() == pytest.approx(min(round(low / step), 128) * step, rel=1e-5, abs=1e-9)
    assert found.max() == pytest.approx(high, abs=0.5001 * step)
