"""Time and memory of whole runs, each in a process of its own: ours, onnxruntime's, and how memory grows."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.beds import Bed, cache_folder, decoded, model_path, source_path
from benchmarks.process import Measured, run_measured
from benchmarks.producing import peer_command

MAIN = "from onnxptq.cli.main import main; main()"
HELD_OUT = 16


class RunFailedError(Exception):
    """A measured process failed."""


def whole_runs(bed: Bed, repeats: int, timeout: float) -> dict[str, Any]:
    """``onnxptq quantize`` on a folder as a user calls it, and onnxruntime's ``quantize_static``, in turns.

    ``ours`` holds 16 samples out, measures quality on them and writes the report; ``ours-no-quality`` uses the
    same calibration samples, holds none out and writes none; ``ours-minmax`` is that without anything that
    onnxruntime's min-max does not do either (the file is checked all the same). onnxruntime reads decoded samples,
    which spares it decoding pictures.
    """
    count = bed.calibration_samples
    samples = decoded(bed, "calibration")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = [sys.executable, "-c", MAIN, "quantize", str(model_path(bed)), "-q"]
        base += ["--calib", str(source_path(bed, "calibration")), "-o", str(folder / "ours.onnx")]
        total = count + HELD_OUT
        alone = [*base, "--samples", str(count), "--holdout", "0", "--no-report"]
        ways: dict[str, list[str]] = {
            "ours": [*base, "--samples", str(total), "--holdout", str(HELD_OUT / total)],
            "ours-no-quality": alone,
            "ours-minmax": [*alone, "--method", "rtn", "--observer", "minmax"],
            "onnxruntime": peer_command("onnxruntime", "minmax", bed, samples.array, folder / "ort.onnx"),
        }
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
        order = list(ways)
        for number in range(repeats):
            for way in order if number % 2 == 0 else order[::-1]:
                # A work folder of its own: no calibration may come from an earlier run.
                work = [] if way == "onnxruntime" else ["--work-dir", str(folder / f"work-{way}-{number}")]
                runs[way].append(_checked(run_measured([*ways[way], *work], timeout=timeout), way).costs())
                print(f"    {way}: {runs[way][-1]}", flush=True)
    medians = {
        way: {cost: round(statistics.median(run[cost] for run in found), 2) for cost in found[0]}
        for way, found in runs.items()
    }
    return {"samples": count, "held_out": HELD_OUT, "runs": runs, "medians": medians}


def memory_by_count(bed: Bed, counts: Sequence[int], timeout: float, *, is_quick: bool) -> dict[str, Any]:
    """Peak memory of a whole run at several numbers of samples: ours and onnxruntime's percentile method.

    Ours is also run at the bed's own number, unless ``is_quick``.
    """
    found: dict[str, dict[str, float]] = {"onnxruntime-percentile": {}, "ours": {}}
    samples = decoded(bed, "calibration")
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "out.onnx"
        for count in counts:
            command = peer_command("onnxruntime", "percentile", bed, samples.array, output)
            done = _checked(run_measured([*command, "--limit", str(count)], timeout=timeout), "percentile")
            found["onnxruntime-percentile"][str(count)] = done.costs()["peak_rss_mb"]
        for count in counts if is_quick else (*counts, samples.count):
            ours = quantize_bed(bed, samples.array, {"samples": count}, output, timeout)
            found["ours"][str(count)] = ours.costs()["peak_rss_mb"]
            print(f"    {count} samples: {ours.costs()}", flush=True)
    low, high = min(counts), max(counts)
    slopes = {
        tool: round((peaks[str(high)] - peaks[str(low)]) / (high - low), 2) for tool, peaks in found.items()
    }
    theirs = found["onnxruntime-percentile"][str(high)]
    return {
        "peak_rss_mb": found,
        "mb_per_sample": slopes,
        "samples": samples.count,
        "percentile_extrapolated_mb": round(
            theirs + slopes["onnxruntime-percentile"] * (samples.count - high), 1
        ),
    }


def growth(bed: Bed, observer: str, counts: tuple[int, int], timeout: float) -> dict[str, Any]:
    """Peak memory of a whole run at a small and a large number of samples.

    ``auto`` is the default method. A named observer is run with ``rtn``, where nothing that comes after
    calibration could hide calibration's own peak.
    """
    data = _large_source(bed)
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for count in counts:
            chosen = {} if observer == "auto" else {"method": "rtn", "observer": observer}
            recipe = {"samples": count, **chosen}
            done = quantize_bed(bed, data, recipe, Path(name) / "out.onnx", timeout)
            peaks[str(count)] = done.costs()["peak_rss_mb"]
            print(f"    {observer}, {count} samples: {done.costs()}", flush=True)
    low, high = (peaks[str(count)] for count in counts)
    return {"observer": observer, "peak_rss_mb": peaks, "ratio": round(high / low, 4)}


def quantize_bed(bed: Bed, data: Path, recipe: dict[str, Any], output: Path, timeout: float) -> Measured:
    """One run of ours on ``data``.

    Raises:
        RunFailedError: it failed.
    """
    command = [sys.executable, "-m", "benchmarks.quantize_bed", "--bed", bed.name]
    command += ["--data", str(data), "--recipe", json.dumps(recipe), "--output", str(output)]
    return _checked(run_measured(command, timeout=timeout), "onnxptq")


def _large_source(bed: Bed) -> Path:
    """Calibration data of at least 256 samples: where a folder has fewer, with the evaluation pictures added."""
    source = source_path(bed, "calibration")
    if not source.is_dir():
        return source
    folder = cache_folder("data", f"{bed.name}-all")
    for split in (source, source_path(bed, "evaluation")):
        for picture in sorted(split.rglob("*.jp*g")):
            link = folder / picture.name
            if not link.is_symlink():
                link.symlink_to(picture)
    return folder


def _checked(measured: Measured, what: str) -> Measured:
    if measured.failure is not None:
        raise RunFailedError(f"{what}: {measured.failure}")
    return measured
