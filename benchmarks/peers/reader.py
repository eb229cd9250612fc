"""What every peer's script shares: its arguments, the calibration samples, and a model that it can quantize."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import version_converter

Feed = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One quantization: samples are rows of ``data``, an ``.npy`` file, fed to ``input_name`` one at a time."""

    model: Path
    data: Path
    input_name: str
    output: Path
    setting: str
    limit: int | None

    def feeds(self) -> Iterator[Feed]:
        """Every sample as a feed of batch 1."""
        rows = np.load(self.data, mmap_mode="r")
        for row in rows[: self.limit]:
            yield {self.input_name: np.array(row[None])}


class Reader:
    """The samples of a job as onnxruntime's CalibrationDataReader is read."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._feeds = job.feeds()

    def get_next(self) -> Feed | None:
        """The next feed, None at the end."""
        return next(self._feeds, None)

    def rewind(self) -> None:
        """Start again."""
        self._feeds = self._job.feeds()


OLDEST_OPSET = 13
"""The first opset whose DequantizeLinear knows an axis, which scales per channel need."""


def load_model(path: Path) -> onnx.ModelProto:
    """The model with its shapes inferred, raised to OLDEST_OPSET where it is older.

    Tools otherwise write invalid files or quantize nothing, which any user would notice and mend.
    """
    model = onnx.load(str(path))
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < OLDEST_OPSET:
        model = version_converter.convert_version(model, OLDEST_OPSET)
    return onnx.shape_inference.infer_shapes(model)


def parse_job(settings: Sequence[str]) -> Job:
    """The job that the command line asks for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--input-name", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--setting", choices=settings, required=True)
    parser.add_argument("--limit", type=int)
    return Job(**vars(parser.parse_args()))
