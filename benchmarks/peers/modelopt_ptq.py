"""``modelopt.onnx.quantization.quantize``: INT8 with its ``max`` or ``entropy`` calibration, on the CPU."""

from __future__ import annotations

import numpy as np
from modelopt.onnx.quantization import quantize  # type: ignore[import-not-found]

from benchmarks.peers.reader import Job, parse_job

SETTINGS = ("max", "entropy")


def run(job: Job) -> None:
    """Quantize as its command line does, with the un-quantized rest left in FP32."""
    quantize(
        onnx_path=str(job.model),
        quantize_mode="int8",
        calibration_data={job.input_name: np.load(job.data)[: job.limit]},
        calibration_method=job.setting,
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        simplify=True,
        output_path=str(job.output),
    )


if __name__ == "__main__":
    run(parse_job(SETTINGS))
