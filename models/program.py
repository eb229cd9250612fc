"""The command line that the modules of this folder share: one path in, one line or several out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from onnxptq.errors import OnnxPtqError


def run_program(usage: str, work: Callable[[Path], str], arguments: list[str]) -> int:
    """Print what ``work`` says of the path that is the only argument; returns the exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(f"usage: python -m models.{usage}", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        print(work(Path(arguments[0])))
    except OnnxPtqError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0
