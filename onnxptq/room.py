"""Room for files: what a full or read-only disk becomes, and a folder for files that are soon gone."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxptq.errors import OutputPathError

SPACE_ERRORS = frozenset({errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)})
"""Numbers of the errors that tell of a full or read-only disk."""


@contextmanager
def space_errors(work_dir: Path) -> Iterator[None]:
    """Turn a full or read-only disk, wherever it is met, into an OutputPathError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno not in SPACE_ERRORS:
            raise
        where = error.filename or work_dir
        raise OutputPathError(
            f"'{where}' cannot be written: {error.strerror}.",
            "Free space, or choose another --output, --report, --work-dir or TMPDIR.",
        ) from error


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for intermediate files, in the place that TMPDIR names, removed at the end.

    Raises:
        OutputPathError: it cannot be made, or what goes there cannot be written.
    """
    try:
        holder = tempfile.TemporaryDirectory(prefix="onnxptq-")
    except OSError as error:
        raise no_room(error.strerror or str(error)) from error
    with holder as name:
        try:
            yield Path(name)
        except OSError as error:
            if error.errno not in SPACE_ERRORS:
                raise
            raise no_room(error.strerror or str(error)) from error
        except OutputPathError as error:
            if name not in error.message:
                raise
            # The folder is of no interest, the disk is.
            raise OutputPathError(error.message.replace(name, _place()), _REMEDY) from error


def no_room(reason: str) -> OutputPathError:
    """The error for intermediate files that cannot be written."""
    return OutputPathError(f"Intermediate files cannot be written to '{_place()}': {reason}.", _REMEDY)


def _place() -> str:
    return tempfile.tempdir or os.environ.get("TMPDIR") or "/tmp"


_REMEDY = "Free space there, or set TMPDIR to a folder that has room."
