"""Runs native code over untrusted models in a subprocess, so that a crash or a hang becomes an error.

The ONNX checker, shape inference, the version converter, the inliner and onnxsim are C++; a damaged file can
make them abort, loop, or ask for terabytes. The subprocess costs about 0.15 s (0.35 s with onnxsim).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxptq.room import SPACE_ERRORS, no_room, temporary_folder

_WORKER = Path(__file__).with_name("native_worker.py")
_BASE_MEMORY_MB = 6 * 1024
_MEMORY_PER_MODEL_BYTE = 12
_BASE_SECONDS = 120.0
_SECONDS_PER_GB = 600.0


class NativeError(Exception):
    """A native step failed.

    Attributes:
        step: which one: check, read, inline, expand, convert, simplify, infer or write.
        reason: what it said, or how it ended.
        is_crash: whether the process died or hung instead of reporting an error.
    """

    def __init__(self, step: str, reason: str, is_crash: bool) -> None:
        super().__init__(f"{step}: {reason}")
        self.step = step
        self.reason = reason
        self.is_crash = is_crash


def run_native(
    steps: Sequence[str] | str,
    source: Path,
    *,
    input_path: Path | None = None,
    output: Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Run ``steps`` over ``input_path`` (the checker over ``source``) and write ``output``.

    Raises:
        NativeError: a step failed, crashed, ran out of time or out of memory; no ``output`` is left.
        OutputPathError: there is no room for intermediate files.
        OSError: there is none for ``output``.
    """
    names = [steps] if isinstance(steps, str) else list(steps)
    size = (input_path or source).stat().st_size
    with temporary_folder() as folder:
        result = folder / "result.json"
        job = {
            "steps": names,
            "source": str(source),
            "input": str(input_path) if input_path else None,
            "output": str(output) if output else None,
            "result": str(result),
            "memory_mb": _BASE_MEMORY_MB + _MEMORY_PER_MODEL_BYTE * (size >> 20),
            **(options or {}),
        }
        job_path = folder / "job.json"
        job_path.write_text(json.dumps(job), encoding="utf-8")
        try:
            _run(job_path, result, _BASE_SECONDS + _SECONDS_PER_GB * size / 2**30)
        except BaseException:
            if output is not None:
                output.unlink(missing_ok=True)
            raise


def _run(job_path: Path, result: Path, timeout: float) -> None:
    progress = job_path.with_name("progress")
    log = job_path.with_name("log")
    with progress.open("wb") as out, log.open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(job_path)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env={**os.environ, "PYTHONFAULTHANDLER": "0"},
        )
        try:
            code = process.wait(timeout=timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if code == 0:
        return
    if code == -signal.SIGINT:  # Ctrl-C reaches every process of the terminal
        raise KeyboardInterrupt
    lines = [line for line in progress.read_text(errors="replace").splitlines() if line]
    step = next((line for line in reversed(lines) if line in _STEP_NAMES), "start")
    if code is None:
        raise NativeError(step, f"it did not finish within {timeout:.0f} s", True)
    if result.exists():
        raise _failure(result.read_text(encoding="utf-8"))
    tail = " ".join(log.read_text(errors="replace").split())[-300:]
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    raise NativeError(step, f"the native library crashed ({how}) {tail}".rstrip(), True)


def _failure(answer: str) -> Exception:
    """What the worker has said; cut off where the disk was full."""
    try:
        told = json.loads(answer)
    except ValueError:
        return no_room("the disk is full")
    if told["errno"] not in SPACE_ERRORS:
        return NativeError(told["step"], told["reason"], False)
    reason = os.strerror(told["errno"])
    return OSError(told["errno"], reason) if told["step"] == "write" else no_room(reason)


_STEP_NAMES = frozenset({"check", "read", "inline", "expand", "convert", "simplify", "infer", "write"})
