"""``nncf.quantize`` on ONNX: its default preset, or the one for transformers."""

from __future__ import annotations

import nncf  # type: ignore[import-not-found]
import onnx

from benchmarks.peers.reader import Job, load_model, parse_job

SETTINGS = ("default", "transformer")


def run(job: Job) -> None:
    """Quantize with all samples (its own default is 300)."""
    feeds = list(job.feeds())
    kind = nncf.ModelType.TRANSFORMER if job.setting == "transformer" else None
    model = nncf.quantize(load_model(job.model), nncf.Dataset(feeds), model_type=kind, subset_size=len(feeds))
    onnx.save(model, str(job.output))


if __name__ == "__main__":
    run(parse_job(SETTINGS))
