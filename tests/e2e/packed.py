"""What tests of packs share: one run of the whole product, and what is read from its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import onnxptq
from onnxptq.recipe import Recipe
from onnxptq.types import Sample
from tests.e2e.pack_nets import NETS, Shapes

PLAIN: Mapping[str, Any] = {
    "simplify": False,
    "observer": "minmax",
    "equalize": False,
    "floor": None,
    "holdout": 0.25,
}


def feeds(shapes: Shapes, count: int = 24) -> list[Sample]:
    rng = np.random.default_rng(1)
    return [{n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()} for _ in range(count)]


def quantized(kind: str, folder: Path, **recipe: Any) -> onnxptq.Result:
    """The network of that name in ``NETS``."""
    build, shapes = NETS[kind]
    # Random samples through random attention: with 96 of them the closed form learns too much by heart.
    samples = feeds(shapes, 192 if kind == "attention" else 24)
    return quantized_net(build(), samples, folder, **recipe)


def quantized_net(
    model: onnx.ModelProto, samples: Sequence[Sample], folder: Path, **recipe: Any
) -> onnxptq.Result:
    folder.mkdir(exist_ok=True)
    path = folder / "net.onnx"
    onnx.save(model, str(path))
    return onnxptq.quantize(
        path,
        folder / "out.onnx",
        calibration=samples,
        recipe=Recipe(**{**PLAIN, **recipe}),
        work_dir=folder / "work",
    )


def require_proven(result: onnxptq.Result) -> None:
    """What is written is what was simulated, to the last integer."""
    parity = result.report.parity
    assert parity is not None
    assert parity.edges
    assert parity.elements > 0
    assert parity.max_steps == 0.0
    assert all(edge.different == 0 for edge in parity.edges)


def noise(result: onnxptq.Result) -> float:
    """Noise over signal of all outputs on held-out samples."""
    return float(sum(10 ** (-o.sqnr_db / 10) for o in result.report.outputs if o.sqnr_db is not None))
