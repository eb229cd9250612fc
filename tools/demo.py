"""The whole job on a real model, as a user would do it: ``make demo``, or ``python -m tools.demo [FOLDER]``.

Writes a float EfficientNet-Lite0, real photographs and the preprocessing options into FOLDER (``demo``
by default), calls the command line on them, and ends with its summary and the path of its report.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import yaml

from models import efficientnet_lite0, photographs
from onnxptq.errors import OnnxPtqError

REPORT = "report.html"
"""The page that the command line writes into the folder given as ``--report``."""


def command(folder: Path) -> list[str]:
    """The one command that the demonstration is about, without the program's own path."""
    return [
        "onnxptq",
        "quantize",
        str(folder / "efficientnet_lite0.onnx"),
        *("--calib", str(folder / "calib")),
        *("--eval", str(folder / "heldout")),
        *("--preprocess", str(folder / "preprocess.yaml")),
        *("--target", "ort-cpu"),
        *("--output", str(folder / "efficientnet_lite0.int8.onnx")),
        *("--report", str(folder / "report")),
    ]


def prepare(folder: Path) -> None:
    """Write everything that ``command`` reads.

    Raises:
        EnvironmentMismatchError: a package of the demo extra is absent.
        OutputPathError: ``folder`` cannot be written.
    """
    model = efficientnet_lite0.build(folder / "efficientnet_lite0.onnx")
    print(f"model        {model} ({model.stat().st_size / 1e6:.1f} MB, checked against torch)")
    for name, pictures in zip(("calibration", "held out"), photographs.write(folder), strict=True):
        print(f"{name:<12} {pictures} ({len(list(pictures.iterdir()))} photographs)")
    options = folder / "preprocess.yaml"
    options.write_text(yaml.safe_dump(efficientnet_lite0.MANIFEST.preprocessing.options(), sort_keys=False))
    print(f"input        {options}")


def main(arguments: list[str]) -> int:
    """Run as a program; returns the exit code of the command line."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print("usage: python -m tools.demo [FOLDER]", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    folder = Path(arguments[0] if arguments else "demo")
    start = time.monotonic()
    try:
        prepare(folder)
    except OnnxPtqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    words = command(folder)
    print(f"\n$ {shlex.join(words)}", flush=True)
    # The program of this very environment, whatever PATH says.
    program = Path(sys.executable).with_name(words[0])
    if not program.exists():
        print(f"error: {program} does not exist.\nRun: make setup", file=sys.stderr)
        return 2
    code = subprocess.run([str(program), *words[1:]], check=False).returncode
    if code == 0:
        print(f"\n{time.monotonic() - start:.0f} s in all. Report: {folder / 'report' / REPORT}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
