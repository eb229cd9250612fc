"""Interrupted and killed runs: nothing is left, and the same command gives the same bytes afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from onnxptq.errors import INTERRUPTED
from tests.e2e.command import Bench, pictures, process, snapshot

SLOW = """
import importlib, signal, sys, time
from onnxptq.__main__ import main
# A shell's background job starts with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
(place, name), ready = sys.argv[1].rsplit(".", 1), sys.argv[2]
module = importlib.import_module(place)
real = getattr(module, name)
def slow(*arguments, **options):
    open(ready, "w").close()
    time.sleep(60)
    return real(*arguments, **options)
setattr(module, name, slow)
sys.argv[1:3] = []
main()
"""

AFTER_PACKS = """
import sys, time
from onnxptq.reconstruct.checkpoint import Checkpoints
from onnxptq.cli.main import main
count, ready = int(sys.argv[1]), sys.argv[2]
real, done = Checkpoints.save, []
def slow(*arguments):
    real(*arguments)
    done.append(1)
    if len(done) == count:
        open(ready, "w").close()
        time.sleep(120)
Checkpoints.save = slow
main(sys.argv[3:])
"""

WHILE_IMPORTING = """
import runpy, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            FAILURE
sys.meta_path.insert(0, Finder())
START
"""

FAILURES = {
    "interrupt": "raise KeyboardInterrupt",
    "extension": "raise ImportError('initialization failed') from KeyboardInterrupt()",
}

SIGNAL = "import signal; signal.raise_signal(signal.SIGTERM); print('on')"
"""What would end the program at once, were it not for the import."""


def _script() -> str:
    """What the command ``onnxptq`` runs, by its entry in the package's metadata."""
    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    module, function = settings["project"]["scripts"]["onnxptq"].split(":")
    return f"from {module} import {function}; sys.exit({function}())"


STARTS = {"module": "runpy.run_module('onnxptq', run_name='__main__')", "script": _script()}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("start", STARTS)
def test_interrupted_while_importing(start: str, failure: str) -> None:
    program = WHILE_IMPORTING.replace("FAILURE", FAILURES[failure]).replace("START", STARTS[start])
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr.splitlines() == [INTERRUPTED]


LOADING = """
import signal, sys, time
from onnxptq import interrupts
# A shell's background job starts with the signal ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
interrupts.begin()
sys.path.insert(0, sys.argv[1])
try:
    import interrupted_library
    time.sleep(10)
except KeyboardInterrupt:
    print("interrupted")
interrupts.end()
signal.raise_signal(signal.SIGINT)
signal.raise_signal(signal.SIGTERM)
print("the end")
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_import_is_not_interrupted(tmp_path: Path, name: str) -> None:
    (tmp_path / "interrupted_library.py").write_text(
        f"import signal, time\nsignal.raise_signal(signal.{name})\ntime.sleep(0.1)\nprint('loaded')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split("\n") == ["loaded", "interrupted", "the end", ""]


def test_interrupted_while_the_command_line_is_loaded(bench: Bench) -> None:
    program = WHILE_IMPORTING.replace("FAILURE", SIGNAL).replace("START", STARTS["script"])
    before = snapshot(bench.folder)
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, bench.arguments())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split(), done.stderr.strip()) == (130, ["on"], INTERRUPTED)
    assert snapshot(bench.folder) == before


def _stop(bench: Bench, step: str, number: int) -> tuple[int, str]:
    """Send a signal to a run that is inside ``step``; its exit code and what it said."""
    return _stop_inside(SLOW, step, number, bench.work.parent / "ready", bench.arguments())


def _stop_inside(
    program: str, step: str, number: int, ready: Path, arguments: Iterable[object]
) -> tuple[int, str]:
    running = subprocess.Popen(
        [sys.executable, "-c", program, step, str(ready), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not ready.exists():
            assert running.poll() is None, running.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(number)
        out, err = running.communicate(timeout=30)
    finally:
        running.kill()
        running.wait()
    ready.unlink()
    assert out == ""
    return running.returncode, err


def _scratch(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if not p.name.startswith("calibration-")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_calibrating(bench: Bench, number: int) -> None:
    before = snapshot(bench.folder)
    code, err = _stop(bench, "onnxptq.forming.calibrate", number)
    assert code == 130
    assert "Traceback" not in err
    assert err.strip().startswith("Interrupted.")
    assert snapshot(bench.folder) == before
    assert _scratch(bench.work) == []


def test_interrupted_while_checking_and_resumed_from_the_cache(bench: Bench) -> None:
    before = snapshot(bench.folder)
    code, _ = _stop(bench, "onnxptq.steps.check_parity", signal.SIGINT)
    assert code == 130
    assert snapshot(bench.folder) == before
    assert _scratch(bench.work) == []
    done = process(*bench.arguments("--verbose"))
    assert done.code == 0
    assert "Calibration is reused" in done.err


def test_killed_then_run_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _ = _stop(bench, "onnxptq.steps.check_parity", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not bench.output.exists()
    assert len(_scratch(bench.work)) == 1
    monkeypatch.setattr("onnxptq.publish._SETTLED_SECONDS", -1.0)
    assert bench.quantize("--no-report").code == 0
    resumed = bench.output.read_bytes()
    assert _scratch(bench.work) == []
    assert sorted(snapshot(bench.folder)) == ["data.npz", "net.int8.onnx", "net.onnx"]
    fresh = bench.work.parent / "fresh"
    assert bench.quantize("--no-report", "--work-dir", fresh).code == 0
    assert bench.output.read_bytes() == resumed


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_between_packs_and_started_again(bench: Bench) -> None:
    np.savez(bench.data, x=pictures(16))
    options = ("--target", "simulate", "-w", "3", "-a", "4", "--method", "pack-ptq", "--effort", "balanced",
               "--no-simplify", "--no-equalize", "--observer", "minmax")  # fmt: skip
    whole, resumed, ready = (bench.folder / name for name in ("whole.onnx", "resumed.onnx", "ready"))

    def arguments(output: Path, *given: object) -> tuple[object, ...]:
        return bench.arguments("-o", output, *options, *given, fast=False)

    done = process(*arguments(whole, "--work-dir", bench.work.parent / "other"))
    assert done.code == 0, done.err
    code, _ = _stop_inside(AFTER_PACKS, "2", signal.SIGKILL, ready, arguments(resumed))
    assert code == -signal.SIGKILL
    finished = sorted((bench.work / "packs").rglob("*.state"))
    assert [path.name for path in finished] == ["pack_0000.state", "pack_0001.state"]
    assert not resumed.exists()
    done = process(*arguments(resumed))
    assert done.code == 0, done.err
    assert resumed.read_bytes() == whole.read_bytes()
    assert not finished[0].exists()
