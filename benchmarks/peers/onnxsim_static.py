"""``onnxsim.quantize_static``: the inputs of Conv, Gemm and MatMul, per-channel weights, min-max ranges.

The model is simplified first, with the same tool: a Conv of unknown rank it leaves in float without a word.
"""

from __future__ import annotations

import onnx
import onnxsim

from benchmarks.peers.reader import Job, load_model, parse_job

SETTINGS = ("default",)


def run(job: Job) -> None:
    """Quantize with the tool's defaults; it wants all samples at once."""
    simplified, _ = onnxsim.simplify(load_model(job.model))
    onnx.save(onnxsim.quantize_static(simplified, list(job.feeds())), str(job.output))


if __name__ == "__main__":
    run(parse_job(SETTINGS))
