"""Calibration, checks and packs on an NVIDIA GPU, against the same on the processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import onnxptq
from onnxptq.calibrate.run import calibrate
from onnxptq.errors import EnvironmentMismatchError
from onnxptq.runtime import Provider, Session
from onnxptq.types import Sample
from tests.e2e.pack_nets import NETS
from tests.unit.small_nets import canonical

pytestmark = pytest.mark.gpu

TF32 = 2e-3
"""Matrix products with 10 bits of mantissa differ from float32 by up to 2^-11 per factor; over the largest value."""


def _require(name: str) -> None:
    import onnxruntime

    if name not in onnxruntime.get_available_providers():
        pytest.skip(f"onnxruntime offers no {name}")


@pytest.fixture(scope="module")
def cuda() -> Provider:
    _require("CUDAExecutionProvider")
    return "cuda"


@pytest.fixture(scope="module")
def tensorrt(tmp_path_factory: pytest.TempPathFactory) -> Provider:
    """The provider is listed wherever onnxruntime-gpu is; TensorRT's own libraries come from elsewhere."""
    _require("TensorrtExecutionProvider")
    path, _ = _written("residual, fixed batch", tmp_path_factory.mktemp("engine"))
    try:
        Session(path, provider="tensorrt")
    except EnvironmentMismatchError as error:
        pytest.skip(error.message)
    return "tensorrt"


def _written(kind: str, folder: Path, count: int = 24) -> tuple[Path, list[Sample]]:
    build, shapes = NETS[kind]
    path = folder / "float.onnx"
    onnx.save(build(), path)
    rng = np.random.default_rng(0)
    samples = [
        {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        for _ in range(count)
    ]
    return path, samples


def _outputs(path: Path, samples: list[Sample], provider: Provider, *, exact: bool) -> list[np.ndarray]:
    session = Session(path, provider=provider, exact=exact)
    return [value for sample in samples for value in session.run(sample).values()]


def _noise(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Squared error over squares."""
    noise = sum(float(np.square(f - w).sum()) for f, w in zip(found, wanted, strict=True))
    return noise / sum(float(np.square(w).sum()) for w in wanted)


@pytest.mark.parametrize("kind", NETS)
def test_statistics_are_those_of_the_processor(kind: str, cuda: Provider, tmp_path: Path) -> None:
    build, _ = NETS[kind]
    _, samples = _written(kind, tmp_path)
    model = canonical(build(), tmp_path)
    names = [t.name for node in model.graph.nodes for t in node.outputs if t.dtype == np.float32]
    here, there = (calibrate(model, samples, names, provider=p).statistics for p in ("cpu", cuda))
    assert here.keys() == there.keys()
    for name, wanted in here.items():
        found = there[name]
        assert found.elements == wanted.elements
        near = TF32 * wanted.absmax
        assert found.minimum == pytest.approx(wanted.minimum, abs=near), name
        assert found.maximum == pytest.approx(wanted.maximum, abs=near), name


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt", "simulate"])
def test_files_made_there_hold_everywhere(kind: str, target: str, cuda: Provider, tmp_path: Path) -> None:
    """Parity has been checked on the GPU by the time there is a file; the outputs are those of the processor too."""
    path, samples = _written(kind, tmp_path)
    out = tmp_path / "quantized.onnx"
    recipe = onnxptq.Recipe(target=target, provider=cuda)
    report = onnxptq.quantize(path, out, calibration=samples, recipe=recipe, work_dir=tmp_path).report
    assert report.quantized
    wanted = _outputs(path, samples, "cpu", exact=True)
    here, there = (_noise(_outputs(out, samples, p, exact=True), wanted) for p in ("cpu", cuda))
    # Values that float noise moves across a rounding border change by one step, as many up as down.
    assert there == pytest.approx(here, rel=0.2)


@pytest.mark.parametrize("kind", ["residual, fixed batch", "attention", "windows"])
def test_packs_are_learnt_there(
    kind: str, cuda: Provider, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch was built for the processor")
    path, samples = _written(kind, tmp_path, count=48)
    wanted = _outputs(path, samples, "cpu", exact=True)
    noise = {}
    providers: tuple[Provider, ...] = ("cpu", cuda)
    for provider in providers:
        out = tmp_path / f"{provider}.onnx"
        recipe = onnxptq.Recipe(
            target="simulate", weight_bits=4, activation_bits=4, effort="balanced", provider=provider
        )
        torch.cuda.reset_peak_memory_stats()
        with monkeypatch.context() as patch:
            if provider == "cpu":
                patch.setattr(torch.cuda, "is_available", lambda: False)
            onnxptq.quantize(path, out, calibration=samples, recipe=recipe, work_dir=tmp_path / provider)
        assert (torch.cuda.max_memory_allocated() > 0) == (provider == cuda)
        noise[provider] = _noise(_outputs(out, samples, "cpu", exact=True), wanted)
    # Two ways of the same few hundred steps. Seeds alone differ by up to 1.2 dB, on the network with attention: 2 dB.
    assert noise[cuda] < noise["cpu"] * 1.58


def test_the_same_bytes_twice(cuda: Provider, tmp_path: Path) -> None:
    path, samples = _written("residual, fixed batch", tmp_path)
    recipe = onnxptq.Recipe(target="simulate", weight_bits=4, activation_bits=4, provider=cuda)
    found = []
    for run in ("a", "b"):
        out = tmp_path / f"{run}.onnx"
        onnxptq.quantize(path, out, calibration=samples, recipe=recipe, work_dir=tmp_path / f"work_{run}")
        found.append(out.read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", NETS)
def test_tensorrt_builds_an_engine_of_the_file(kind: str, tensorrt: Provider, tmp_path: Path) -> None:
    path, samples = _written(kind, tmp_path)
    out = tmp_path / "quantized.onnx"
    onnxptq.quantize(
        path, out, calibration=samples, recipe=onnxptq.Recipe(target="tensorrt"), work_dir=tmp_path
    )
    wanted = _outputs(path, samples, "cpu", exact=True)
    meant, built = (
        _noise(_outputs(out, samples, provider, exact=exact), wanted)
        for provider, exact in (("cpu", True), (tensorrt, False))
    )
    # The engine may round at other places (fused sums), not lose the network: 3 dB.
    assert built < 2 * meant + 1e-6
