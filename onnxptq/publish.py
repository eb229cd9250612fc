"""Writing a result so that it is either complete at its place, or not there at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from onnxptq.errors import OutputPathError


def require_distinct(source: Path, output: Path) -> None:
    """Raise OutputPathError where the output would overwrite the input."""
    if source.resolve() == output.resolve():
        raise OutputPathError(f"The output '{output}' is the input model.", "Choose another output.")


def require_writable(path: Path) -> None:
    """Raise OutputPathError unless a file could be created at ``path``; checked before any long work."""
    folder = path.parent
    if path.is_dir():
        raise OutputPathError(
            f"The output '{path}' is a folder.", "Name a file, for example model.int8.onnx."
        )
    if not folder.is_dir():
        raise OutputPathError(f"The folder '{folder}' does not exist.", "Create it or choose another output.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputPathError(
            f"The folder '{folder}' cannot be written: {error.strerror}.", "Choose another output."
        ) from error


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A path of the same name in a hidden folder beside ``path``; moved into place when the block succeeds.

    Everything in the hidden folder (external data too) moves, the file itself last; on any failure it is
    removed and ``path`` is untouched.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise OutputPathError(f"The folder '{path.parent}' cannot be written: {error.strerror}.") from error
    try:
        staged = folder / path.name
        yield staged
        for companion in sorted(folder.iterdir()):
            if companion != staged:
                companion.replace(path.parent / companion.name)
        staged.replace(path)
    except OSError as error:
        raise OutputPathError(
            f"Writing '{path}' failed: {error.strerror or error}.", "Free space and retry."
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically.

    Raises:
        OutputPathError: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputPathError(f"'{path}' cannot be written: {error.strerror or error}.") from error
