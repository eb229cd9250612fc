"""Real and generated networks, written for every target: what is simulated is what the file computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.targets import PlacementRequest
from onnxptq.types import Sample
from onnxptq.validate.parity import check_parity
from onnxptq.validate.structure import check_structure
from tests.unit.validate.written_model import Written, network, samples, write

SETTINGS = [
    ("ort-cpu", PlacementRequest()),
    ("tensorrt", PlacementRequest()),
    ("simulate", PlacementRequest()),
    ("simulate", PlacementRequest(weight_bits=4, activation_bits=4)),
    ("simulate", PlacementRequest(weight_bits=3, activation_bits=6)),
]
IDS = ["ort-cpu", "tensorrt", "W8A8", "W4A4", "W3A6"]


def _prove(written: Written, feeds: tuple[Sample, ...], folder: Path) -> None:
    check_structure(written.path, written.model, written.plan, written.solution)
    parity = check_parity(written.path, written.model, written.plan, written.solution, feeds, work_dir=folder)
    assert parity.max_steps == 0.0
    assert {edge.quantizer_id for edge in parity.edges} == {q.quantizer_id for q in written.plan.quantizers}
    assert all(edge.elements > 0 for edge in parity.edges)


@pytest.mark.parametrize(("target", "request_"), SETTINGS, ids=IDS)
def test_a_generated_network(target: str, request_: PlacementRequest, tmp_path: Path) -> None:
    onnx.save(network(), str(tmp_path / "network.onnx"))
    written = write(tmp_path / "network.onnx", tmp_path, target, request_, samples(4))
    # Other samples than the calibrated ones, and wider, so that values are clipped.
    _prove(written, tuple({"x": 2 * s["x"]} for s in samples(3, seed=9)), tmp_path)


def _pictures(testbed: Path, count: int) -> tuple[Sample, ...]:
    with np.load(testbed / "data/cifar10_jpeg/test.npz") as stored:
        pictures = stored["images"][:count].astype(np.float32) / 255
    mean, deviation = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    pictures = ((pictures - mean) / deviation).transpose(0, 3, 1, 2)
    return tuple({"x": np.ascontiguousarray(picture[None])} for picture in pictures)


@pytest.mark.parametrize(("target", "request_"), SETTINGS, ids=IDS)
def test_resnet20(testbed: Path, target: str, request_: PlacementRequest, tmp_path: Path) -> None:
    feeds = _pictures(testbed, 12)
    source = testbed / "models/resnet20_cifar10.onnx"
    name = onnx.load(str(source), load_external_data=False).graph.input[0].name
    feeds = tuple({name: feed["x"]} for feed in feeds)
    written = write(source, tmp_path, target, request_, feeds[:8])
    _prove(written, feeds[8:], tmp_path)
