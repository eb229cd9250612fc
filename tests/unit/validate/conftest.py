"""Quantized files shared by the tests of ``onnxptq.validate``; tests change copies only."""

from __future__ import annotations

import onnx
import pytest

from onnxptq.targets import PlacementRequest
from tests.unit.validate.written_model import Written, network, samples, write


@pytest.fixture(scope="session")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """For onnxruntime on a CPU: int8 weights, int32 biases, a quantized graph output, and a sum left in float."""
    folder = tmp_path_factory.mktemp("int8")
    onnx.save(network(), str(folder / "network.onnx"))
    request = PlacementRequest(declined={"sum": "asked for"})
    return write(folder / "network.onnx", folder, "ort-cpu", request, samples(3))


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """4-bit weights, 3-bit activations behind Clips, float biases."""
    folder = tmp_path_factory.mktemp("narrow")
    onnx.save(network(), str(folder / "network.onnx"))
    request = PlacementRequest(weight_bits=4, activation_bits=3)
    return write(folder / "network.onnx", folder, "simulate", request, samples(3))
