"""``onnxptq``: the command group, and how errors become exit codes."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.text import Text

from onnxptq.errors import (
    EXIT_INTERRUPTED,
    INTERRUPTED,
    MemoryBudgetError,
    OnnxPtqError,
    UsageError,
    is_interruption,
)
from onnxptq.ranks import Ranks
from onnxptq.room import SPACE_ERRORS
from onnxptq.version import __version__

from .inspect import inspect
from .quantize import quantize
from .sensitivity import sensitivity
from .validate import validate

EXIT_CODES = """\b
Exit codes:
  0    success
  1    internal error (a bug; --debug shows where)
  2    the request is wrong: option, recipe, path, or data; or standard output is full
  3    the model is unsupported, damaged, or already quantized
  4    a quality gate (--min-...) is not met
  5    the target refuses the request
  6    the work does not fit --max-memory
  7    the written file failed its own checks and was removed
  130  interrupted; the same command resumes from its caches
"""


SCALE_OUT = """\b
Several processes, each with a share of the samples (see docs/reconstruction.md):
  torchrun --nproc-per-node N -m onnxptq quantize ...
"""


@click.group(
    epilog=f"{EXIT_CODES}\n{SCALE_OUT}",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="onnxptq")
def cli() -> None:
    """Quantize float ONNX models to QDQ files that are proven to compute what was simulated."""


cli.add_command(quantize)
cli.add_command(validate)
cli.add_command(inspect)
cli.add_command(sensitivity)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with a documented code."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(arguments, debug))


def _run(arguments: list[str] | None, debug: bool) -> int:
    try:
        ranks = Ranks.join()
        if ranks.rank > 0:
            _leave(ranks.serve())
    except (Exception, KeyboardInterrupt) as error:
        if is_interruption(error):
            return EXIT_INTERRUPTED
        if isinstance(error, OnnxPtqError):
            return _failed(error.message, error.remedy, error.exit_code, debug)
        raise
    code = _command(arguments, debug, ranks)
    ranks.dismiss(code)
    return code


def _leave(code: int) -> NoReturn:
    """End at once: threads of torch's that are still about can abort an interpreter that winds down, and the exit
    code would be lost. Rank 0 alone holds anything that needs tidying up."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _command(arguments: list[str] | None, debug: bool, ranks: Ranks) -> int:
    try:
        result: Any = cli.main(args=arguments, prog_name="onnxptq", standalone_mode=False, obj=ranks)
    except (Exception, KeyboardInterrupt) as error:
        return _ended(error, debug)
    return result if isinstance(result, int) else 0


def _ended(error: Exception | KeyboardInterrupt, debug: bool) -> int:
    """Say what went wrong, and give the exit code for it; called while the exception is handled."""
    # click makes an Abort of a KeyboardInterrupt.
    if isinstance(error, click.exceptions.Abort) or is_interruption(error):
        return _interrupted()
    match error:
        case click.exceptions.Exit():
            return error.exit_code
        case click.ClickException():
            error.show()
            return error.exit_code
        case OnnxPtqError():
            return _failed(error.message, error.remedy, error.exit_code, debug)
        case MemoryError():
            advice = "Lower --max-memory or --samples."
            return _failed("The machine ran out of memory.", advice, MemoryBudgetError.exit_code, debug)
        case OSError() if isinstance(error, BrokenPipeError) or error.errno in SPACE_ERRORS:
            return _unheard(error, debug)
    message = f"Internal error: {type(error).__name__}: {error}"
    return _failed(message, "Rerun with --debug and report the traceback.", 1, debug)


def _unheard(error: OSError, debug: bool) -> int:
    """Standard output cannot be written: say so, unless its reader has left. Where files cannot be, other errors are
    raised."""
    # Without this the interpreter complains again while it flushes at its end.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return UsageError.exit_code
    done = " ".join(getattr(error, "__notes__", ()))
    message = f"Standard output cannot be written: {error.strerror or error}. {done}".rstrip()
    return _failed(message, "Free space, or send the output elsewhere.", UsageError.exit_code, debug)


def _interrupted() -> int:
    Console(stderr=True, soft_wrap=True).print(INTERRUPTED)
    return EXIT_INTERRUPTED


def _failed(message: str, remedy: str, code: int, debug: bool) -> int:
    """Say what went wrong; called while the exception is handled."""
    if debug:
        traceback.print_exc()
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(Text("error: ", style="bold red").append(message, style="default"))
    if remedy:
        console.print(Text("  fix: ", style="bold green").append(remedy, style="default"))
    return code
