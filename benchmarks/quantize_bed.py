"""One run of ``onnxptq.quantize`` on a bed, as a process of its own so that its memory can be measured.

``python -m benchmarks.quantize_bed --bed B --data SAMPLES --recipe '{"target": "simulate"}' --output Q.onnx``
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import onnxptq
from benchmarks.beds import BEDS, model_path


def main() -> None:
    """Quantize and write what the run reported about itself."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--bed", choices=BEDS, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--recipe", type=json.loads, default={})
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--result", type=Path)
    given = parser.parse_args()
    bed = BEDS[given.bed]
    recipe = onnxptq.Recipe.create({"holdout": 0.0, "preprocess": dict(bed.preprocess), **given.recipe})
    # A work folder of its own: no calibration may come from an earlier run.
    with tempfile.TemporaryDirectory() as work:
        result = onnxptq.quantize(
            model_path(bed), given.output, calibration=given.data, recipe=recipe, work_dir=work
        )
    report = result.report.to_json()
    if given.result is not None:
        found = {
            "stages": {stage["name"]: round(stage["seconds"], 2) for stage in report["stages"]},
            "notes": report["notes"],
            "skips": len(report["skips"]),
            "quantizers": len(report["quantized"]),
            "calibration_samples": report["calibration"]["count"],
        }
        given.result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
