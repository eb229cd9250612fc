"""How far a file is from the FP32 model on a bed's evaluation samples, measured with onnxruntime alone.

    SQNR = 10 log10( sum r^2 / sum (r - q)^2 ) per output, over all samples, in dB

agreement is the share of samples whose first class is the same, top1 the share whose first class is the label.
``python -m benchmarks.quality --bed B --model Q.onnx --session exact --result OUT.json`` measures one file.

Sessions: ``default`` is what production runs, with integer kernels; ``exact`` runs every QuantizeLinear and
DequantizeLinear as written, with float kernels in between.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from benchmarks.beds import BEDS, Bed, Decoded, cache_folder, decoded, model_path, testbed
from benchmarks.detection import decode, map50, read_boxes

Array = npt.NDArray[Any]

MOST_DB = 200.0
"""Stands for equal outputs (and its negative for NaN or Inf): float32 resolves about 150 dB."""


def open_session(model: Path, *, exact: bool = False, threads: int = 0) -> ort.InferenceSession:
    """A CPU session of ``model``."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    # Threads that spin between runs would take the processor from whatever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if exact:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def outputs(session: ort.InferenceSession, samples: Decoded) -> Iterator[list[Array]]:
    """The outputs of every sample, one at a time."""
    name = session.get_inputs()[0].name
    for row in samples.values():
        yield session.run(None, {name: np.array(row[None])})


def reference(bed: Bed, samples: Decoded) -> tuple[list[str], list[Array]]:
    """Names and values [count, ...] of the FP32 model's outputs, kept in the cache."""
    path = cache_folder("reference") / f"{samples.array.stem}-ort{ort.__version__}.npz"
    if not path.exists():
        session = open_session(model_path(bed))
        found = [np.concatenate(part) for part in zip(*outputs(session, samples), strict=True)]
        partial = path.with_suffix(".part.npz")
        np.savez(partial, *found)
        partial.replace(path)
    else:
        session = open_session(model_path(bed))
    stored = np.load(path)
    names = [output.name for output in session.get_outputs()]
    return names, [stored[f"arr_{i}"] for i in range(len(names))]


def measure(bed: Bed, model: Path, session: str, limit: int | None = None) -> dict[str, Any]:
    """The distance of ``model`` from the FP32 model, and the task's own measure of both."""
    samples = decoded(bed, "evaluation", limit)
    names, expected = reference(bed, samples)
    results = outputs(open_session(model, exact=session == "exact"), samples)
    found = [np.concatenate(part) for part in zip(*results, strict=True)]
    sqnr = {name: _sqnr_db(r, q) for name, r, q in zip(names, expected, found, strict=True)}
    result: dict[str, Any] = {"samples": samples.count, "sqnr_db": sqnr, "nodes": _quantizers(model)}
    if bed.metric == "top1":
        first = [values[0].argmax(axis=1) for values in (expected, found)]
        labels = samples.labels()
        result["agreement"] = float((first[0] == first[1]).mean())
        result["top1"] = float((first[1] == labels).mean())
        result["float"] = {"top1": float((first[0] == labels).mean())}
    else:
        assert bed.boxes is not None
        truth = [read_boxes(testbed() / bed.boxes / f"{Path(name).stem}.txt") for name in samples.ids()]
        for target, values in ((result.setdefault("float", {}), expected), (result, found)):
            target["map50"] = map50([decode(row) for row in values[0]], truth)
    return result


def _quantizers(model: Path) -> dict[str, int]:
    """How many QuantizeLinear and DequantizeLinear nodes a file has, of any domain."""
    graph = onnx.load(str(model), load_external_data=False).graph
    counts = Counter(node.op_type for node in graph.node)
    return {name: counts[name] for name in ("QuantizeLinear", "DequantizeLinear")}


def _sqnr_db(expected: Array, found: Array) -> float:
    signal = float(np.square(expected, dtype=np.float64).sum())
    noise = float(np.square(expected.astype(np.float64) - found).sum())
    if not math.isfinite(noise):
        return -MOST_DB
    return min(MOST_DB, 10 * math.log10(signal / noise)) if noise > 0 else MOST_DB


def main() -> None:
    """Measure one file and write the numbers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bed", choices=BEDS, required=True)
    parser.add_argument("--model", type=Path, help="default: the bed's FP32 model")
    parser.add_argument("--session", choices=("default", "exact"), default="default")
    parser.add_argument("--samples", type=int)
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    bed = BEDS[given.bed]
    found = measure(bed, given.model or model_path(bed), given.session, given.samples)
    text = json.dumps(found, indent=1)
    print(text)
    if given.result is not None:
        given.result.write_text(text)


if __name__ == "__main__":
    main()
