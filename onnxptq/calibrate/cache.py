"""Calibration results on disk, under a key of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from onnxptq.calibrate.run import Calibration
from onnxptq.calibrate.statistics import TensorStatistics
from onnxptq.errors import OutputPathError
from onnxptq.types import Skip

_FORMAT = 2


def cache_key(*parts: Any) -> str:
    """A short hash of ``parts`` (model and data fingerprints, settings, versions)."""
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:24]


def load_calibration(folder: Path, key: str) -> Calibration | None:
    """The calibration stored under ``key``; None where there is none or the file is damaged."""
    try:
        with _path(folder, key).open("rb") as file, np.load(file, allow_pickle=False) as archive:
            header = json.loads(bytes(archive["header"]))
            return _unpack(header, archive["counts"])
    except Exception:  # numpy, zip, zlib, json and tokenize each raise their own on damage
        return None


def save_calibration(folder: Path, key: str, calibration: Calibration) -> None:
    """Store ``calibration`` under ``key``, atomically.

    Raises:
        OutputPathError: ``folder`` cannot be written.
    """
    header, counts = _pack(calibration)
    try:
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".part", delete=False) as file:
            try:
                np.savez(file, header=np.frombuffer(json.dumps(header).encode(), np.uint8), counts=counts)
                file.close()
                Path(file.name).replace(_path(folder, key))
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise OutputPathError(
            f"The work folder '{folder}' cannot be written: {error.strerror}.",
            "Choose another with --work-dir.",
        ) from error


def default_work_dir() -> Path:
    """Where caches live unless the user says otherwise: $ONNXPTQ_CACHE, or the user's cache folder."""
    explicit = os.environ.get("ONNXPTQ_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "onnxptq"


def _path(folder: Path, key: str) -> Path:
    return folder / f"calibration-{key}.npz"


def _pack(calibration: Calibration) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    names = list(calibration.statistics)
    rows = [calibration.statistics[name] for name in names]
    rows += [calibration.fitting.get(name, calibration.statistics[name]) for name in names]
    header = {
        "samples": calibration.samples,
        "skips": [[s.site, s.reason] for s in calibration.skips],
        "uncalibrated": dict(calibration.uncalibrated),
        # hex keeps every bit of a float
        "tensors": [
            [n, r.minimum.hex(), r.maximum.hex(), r.elements, r.exponent]
            for n, r in zip(names * 2, rows, strict=True)
        ],
    }
    empty = np.zeros(0, np.int64)
    counts = np.stack([r.counts if r.counts is not None else empty for r in rows]) if rows else empty
    return header, counts


def _unpack(header: dict[str, Any], counts: np.ndarray[Any, Any]) -> Calibration:
    rows = [
        TensorStatistics(
            minimum=float.fromhex(low),
            maximum=float.fromhex(high),
            elements=int(elements),
            exponent=int(exponent),
            counts=counts[i] if counts.ndim == 2 and counts.shape[1] else None,
        )
        for i, (_, low, high, elements, exponent) in enumerate(header["tensors"])
    ]
    names = [entry[0] for entry in header["tensors"]][: len(rows) // 2]
    return Calibration(
        statistics=dict(zip(names, rows, strict=False)),
        fitting=dict(zip(names, rows[len(names) :], strict=True)),
        samples=int(header["samples"]),
        skips=tuple(Skip(site=site, reason=reason) for site, reason in header["skips"]),
        uncalibrated=header["uncalibrated"],
    )
