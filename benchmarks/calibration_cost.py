"""What calibration costs, relative to plain inference that returns all inner tensors.

``python -m benchmarks.calibration_cost --bed B --samples 32 --rounds 3 --result OUT.json``

The yardsticks are onnxruntime sessions with default options on the canonical model, the same samples:
``plain`` returns every inner float tensor, ``plain-same`` only those that onnxptq observes. Each way is timed
from the model on disk to its last result: opening the session counts, and for onnxptq also the choice of every
range. The ways are run in turns and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.beds import BEDS, decoded, model_path
from onnxptq.calibrate.observers import Observer, ObserverName, choose_qparams
from onnxptq.calibrate.run import calibrate
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.index import GraphIndex
from onnxptq.samples import ListFeeds
from onnxptq.targets import candidate_tensors
from onnxptq.types import CanonicalModel, QType, Sample

OBSERVERS: tuple[ObserverName, ...] = ("minmax", "percentile", "mse", "entropy")


def measure(bed: str, samples: int, rounds: int) -> dict[str, Any]:
    """Seconds of every way, and its ratio to ``plain``: wall and CPU time, median over the rounds."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = canonicalize(model_path(BEDS[bed]), scratch)
        feeds = _feeds(bed, model.inputs[0].name, samples)
        observed = candidate_tensors(GraphIndex(model.graph))
        every = _inner_float_tensors(model)
        ways: dict[str, Callable[[], None]] = {
            "plain": lambda: _plain(model, every, feeds, scratch),
            "plain-same": lambda: _plain(model, [n for n in observed if n in every], feeds, scratch),
        }
        for name in OBSERVERS:
            ways[name] = functools.partial(_ours, model, observed, feeds, name)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        order = list(ways)
        for number in range(rounds):
            for way in order if number % 2 == 0 else order[::-1]:
                wall, cpu = time.perf_counter(), time.process_time()
                ways[way]()
                seconds[way].append((time.perf_counter() - wall, time.process_time() - cpu))
                print(f"{way}: {seconds[way][-1][0]:.2f} s", flush=True)
    return {
        "samples": samples,
        "rounds": rounds,
        "tensors": {"plain": len(every), "plain-same": len([n for n in observed if n in every])},
        "wall_s": {name: round(statistics.median(w for w, _ in t), 3) for name, t in seconds.items()},
        "cpu_s": {name: round(statistics.median(c for _, c in t), 3) for name, t in seconds.items()},
        "wall_ratio": {y: _ratios(seconds, y, 0) for y in ("plain", "plain-same")},
        "cpu_ratio": {y: _ratios(seconds, y, 1) for y in ("plain", "plain-same")},
    }


def _ratios(seconds: dict[str, list[tuple[float, float]]], yardstick: str, which: int) -> dict[str, float]:
    return {
        name: round(
            statistics.median(
                a[which] / b[which] for a, b in zip(seconds[name], seconds[yardstick], strict=True)
            ),
            3,
        )
        for name in OBSERVERS
    }


def _feeds(bed: str, input_name: str, count: int) -> ListFeeds:
    rows = decoded(BEDS[bed], "calibration").values()[:count]
    samples: list[Sample] = [{input_name: np.array(row[None])} for row in rows]
    return ListFeeds(samples)


def _inner_float_tensors(model: CanonicalModel) -> list[str]:
    """Every float32 tensor that a node writes and that is no output of the graph."""
    return [
        tensor.name
        for node in model.graph.nodes
        for tensor in node.outputs
        if tensor.name and tensor.dtype == np.float32 and tensor.name not in model.outputs
    ]


def _plain(model: CanonicalModel, names: Sequence[str], feeds: ListFeeds, scratch: Path) -> None:
    proto = onnx.load(str(model.path))
    for name in names:
        entry = proto.graph.output.add()
        entry.name = name
        entry.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    path = scratch / "plain.onnx"
    onnx.save(proto, str(path))
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for sample in feeds:
        session.run(None, dict(sample))


def _ours(model: CanonicalModel, names: Sequence[str], feeds: ListFeeds, observer: ObserverName) -> None:
    found = calibrate(model, feeds, names, histogram=observer != "minmax")
    for statistics_ in found.statistics.values():
        choose_qparams(statistics_, QType.unsigned(8), symmetric=False, observer=Observer(name=observer))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bed", choices=BEDS, required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--result", type=Path, required=True)
    given = parser.parse_args()
    given.result.write_text(json.dumps(measure(given.bed, given.samples, given.rounds)))


if __name__ == "__main__":
    main()
