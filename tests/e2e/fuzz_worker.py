"""Quantizes mutants one after the other in one interpreter, and says what became of each.

usage: python -m tests.e2e.fuzz_worker FOLDER FIRST LAST STEP

Prints the seed before each mutant and a line of JSON after it. The native steps, which otherwise start a
Python interpreter each, run in processes forked from one that has imported everything; all else is as in
production.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

_NATIVE = Path(__file__).resolve().parents[2] / "onnxptq/graph/native_worker.py"


def _serve(requests: Connection) -> None:
    """Fork a process for every job; answer with its id, then with its exit code."""
    specification = importlib.util.spec_from_file_location("native_worker", _NATIVE)
    assert specification is not None
    assert specification.loader is not None
    worker = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(worker)
    sys.modules["torch"] = None  # type: ignore[assignment]
    import onnxsim

    assert onnxsim is not None
    while True:
        try:
            job, out, err = requests.recv()
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            _work(worker, job, out, err)
        requests.send(child)
        requests.send(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def _work(worker: ModuleType, job: str, out: str, err: str) -> None:
    code = 1
    try:
        for descriptor, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY), descriptor)
        sys.stdout = os.fdopen(1, "w")
        code = worker.main(Path(job))
        sys.stdout.flush()
    finally:
        os._exit(code)


class _Forked:
    """The part of ``subprocess.Popen`` that running a native step needs."""

    requests: Connection

    def __init__(self, command: list[str], *, stdout: Any, stderr: Any, **_: Any) -> None:
        self.requests.send((command[-1], stdout.name, stderr.name))
        self._pid = self.requests.recv()
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            if not self.requests.poll(timeout):
                raise subprocess.TimeoutExpired("native", timeout or 0.0)
            self._code = self.requests.recv()
        return self._code

    def poll(self) -> int | None:
        return self.wait(0) if self._code is None and self.requests.poll(0) else self._code

    def kill(self) -> None:
        os.kill(self._pid, signal.SIGKILL)


def _options(seed: int, work: Path) -> list[str]:
    target = ("ort-cpu", "tensorrt", "simulate")[seed % 3]
    chosen = ["--calib", "random", "--samples", "5", "--work-dir", str(work), "-t", target, "--no-report"]
    if seed % 4:
        chosen += ["--method", "rtn", "--observer", "minmax"]
    return chosen if seed % 2 else [*chosen, "--no-simplify"]


def main(folder: Path, first: int, last: int, step: int) -> None:
    ours, theirs = Pipe()
    if os.fork() == 0:
        ours.close()
        _serve(theirs)
        os._exit(0)
    theirs.close()
    _Forked.requests = ours

    from onnxptq.cli.main import main as command

    from onnxptq.graph import native
    from tests.e2e.mutants import mutant

    native.subprocess = SimpleNamespace(  # type: ignore[attr-defined]
        Popen=_Forked, DEVNULL=subprocess.DEVNULL, TimeoutExpired=subprocess.TimeoutExpired
    )
    place, work = folder / "user", folder / "work"
    place.mkdir()
    work.mkdir()
    model = place / "net.onnx"
    for seed in range(first, last, step):
        model.write_bytes(mutant(seed))
        print(seed, flush=True)
        out, err = io.StringIO(), io.StringIO()
        code: Any = None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                command(["quantize", str(model), *_options(seed, work)])
            except SystemExit as stopped:
                code = stopped.code
        left = sorted(path.name for path in (*place.iterdir(), *work.iterdir()))
        left = [name for name in left if name != "net.onnx" and not name.startswith("calibration-")]
        print(json.dumps({"seed": seed, "code": code, "err": err.getvalue(), "left": left}), flush=True)
        (place / "net.int8.onnx").unlink(missing_ok=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
