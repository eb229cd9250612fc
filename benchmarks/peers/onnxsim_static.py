"""``onnxsim.quantize_static``: the inputs of Conv, Gemm and MatMul, per-channel weights, min-max ranges."""

from __future__ import annotations

import onnx
import onnxsim

from benchmarks.peers.reader import Job, parse_job

SETTINGS = ("default",)


def run(job: Job) -> None:
    """Quantize with the tool's defaults; it wants all samples at once."""
    onnx.save(onnxsim.quantize_static(str(job.model), list(job.feeds())), str(job.output))


if __name__ == "__main__":
    run(parse_job(SETTINGS))
