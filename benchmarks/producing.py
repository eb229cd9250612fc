"""Quantized files by bed and setting, each made in a process of its own and kept in the cache with its costs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.beds import ROOT, Bed, cache_folder, decoded, model_path
from benchmarks.process import run_measured
from benchmarks.results import source_id
from benchmarks.settings import OURS, PEERS, Setting, interpreter, tool_version


@dataclass(frozen=True, slots=True, kw_only=True)
class Produced:
    """A quantized file with the costs of making it; ``error`` says why there is none.

    ``source`` is the hash of the code that made it, or the version of the tool.
    """

    path: Path
    source: str
    facts: dict[str, Any]
    error: str | None = None


def prepare(bed: Bed, limit: int | None = None) -> None:
    """Decode a bed's samples and expand its model in a process of its own, so that this one stays small."""
    code = (
        "import sys; from benchmarks.beds import BEDS, decoded; limit = int(sys.argv[2]) or None; "
        "[decoded(BEDS[sys.argv[1]], split, limit) for split in ('calibration', 'learning', 'evaluation')]"
    )
    subprocess.run([sys.executable, "-c", code, bed.name, str(limit or 0)], check=True, cwd=ROOT)


def produce(
    bed: Bed, setting: Setting, limit: int | None, *, timeout: float = 3600.0, fresh: bool = False
) -> Produced:
    """The file of ``setting`` on ``bed``, from the cache where it was made from the same code and samples.

    Args:
        limit: at most this many calibration samples.
        fresh: make it again.
    """
    samples = decoded(bed, setting.split, limit)
    version = source_id() if setting.tool == OURS else _version(setting.tool)
    stem = f"{bed.name}-{setting.tool}-{setting.name}-{samples.count}-{version}"
    folder = cache_folder("files")
    path, facts = folder / f"{stem}.onnx", folder / f"{stem}.json"
    if facts.exists() and path.exists() and not fresh:
        return Produced(path=path, source=version, facts=json.loads(facts.read_text()))
    for old in folder.glob(f"{bed.name}-{setting.tool}-{setting.name}-{samples.count}-*"):
        old.unlink()  # made by other code: the cache keeps one file of a kind
    report = folder / f"{stem}.report.json"
    measured = run_measured(_command(bed, setting, samples.array, path, report), timeout=timeout)
    if measured.failure is not None or not path.exists():
        return Produced(
            path=path, source=version, facts=measured.costs(), error=measured.failure or "wrote no file"
        )
    made = {
        **measured.costs(),
        **({} if setting.tool == OURS else {"tool_version": version}),
        "calibration_samples": samples.count,
        "size_mb": round(sum(p.stat().st_size for p in folder.glob(f"{path.name}*")) / 1e6, 3),
        "float_size_mb": round(model_path(bed).stat().st_size / 1e6, 3),
        **(json.loads(report.read_text()) if report.exists() else {}),
    }
    report.unlink(missing_ok=True)
    facts.write_text(json.dumps(made))
    return Produced(path=path, source=version, facts=made)


def peer_command(tool: str, peer_setting: str, bed: Bed, data: Path, output: Path) -> list[str]:
    """The command of one peer; ``data`` is an ``.npy`` of samples.

    Raises:
        LookupError: the tool is not installed.
    """
    python = interpreter(tool)
    if python is None:
        raise LookupError(f"{tool} is not installed")
    return [
        *(str(python), "-m", f"benchmarks.peers.{PEERS[tool].script}"),
        *("--model", str(model_path(bed))),
        *("--data", str(data)),
        *("--input-name", bed.input_name),
        *("--output", str(output)),
        *("--setting", peer_setting),
    ]


def _command(bed: Bed, setting: Setting, data: Path, output: Path, report: Path) -> list[str]:
    if setting.tool != OURS:
        return peer_command(setting.tool, setting.peer_setting, bed, data, output)
    return [
        *(sys.executable, "-m", "benchmarks.quantize_bed", "--bed", bed.name),
        *("--data", str(data), "--recipe", json.dumps(dict(setting.recipe))),
        *("--output", str(output), "--result", str(report)),
    ]


def _version(tool: str) -> str:
    python = interpreter(tool)
    return "absent" if python is None else tool_version(tool, python)
