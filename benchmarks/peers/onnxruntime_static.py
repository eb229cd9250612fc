"""``onnxruntime.quantization.quantize_static``, after its own ``quant_pre_process``.

Settings: ``default`` is the API's default; ``minmax`` is per-channel weights and unsigned activations, what its
documentation advises for x86; ``minmax-linear`` is the same for Conv, MatMul and Gemm only; ``percentile`` is
``minmax`` with its percentile calibrator.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import onnx
from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.peers.reader import Job, Reader, load_model, parse_job

_ADVISED: dict[str, Any] = {
    "per_channel": True,
    "activation_type": QuantType.QUInt8,
    "weight_type": QuantType.QInt8,
    "quant_format": QuantFormat.QDQ,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "minmax": _ADVISED,
    "minmax-linear": {**_ADVISED, "op_types_to_quantize": ["Conv", "MatMul", "Gemm"]},
    "percentile": {**_ADVISED, "calibrate_method": CalibrationMethod.Percentile},
}


def run(job: Job) -> None:
    """Quantize as a user of the API does."""
    with tempfile.TemporaryDirectory() as scratch:
        loaded, prepared = Path(scratch) / "loaded.onnx", Path(scratch) / "prepared.onnx"
        onnx.save(load_model(job.model), str(loaded))
        try:
            quant_pre_process(str(loaded), str(prepared))
        except Exception as error:
            print(f"symbolic shape inference failed and is left out: {error}")
            quant_pre_process(str(loaded), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(job.output), Reader(job), **SETTINGS[job.setting])


if __name__ == "__main__":
    run(parse_job(tuple(SETTINGS)))
