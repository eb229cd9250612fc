"""Writing a result so that it is either complete at its place, or not there at all."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from onnxptq.errors import OnnxPtqError, OutputPathError
from onnxptq.room import SPACE_ERRORS

if sys.platform != "win32":
    import fcntl

_SETTLED_SECONDS = 5.0


def require_distinct(source: Path, output: Path) -> None:
    """Raise OutputPathError where the output would overwrite the input."""
    if source.resolve() == output.resolve():
        raise OutputPathError(f"The output '{output}' is the input model.", "Choose another output.")


def require_apart(output: Path, folders: Mapping[str, Path | None]) -> None:
    """Raise OutputPathError where a folder, here by its option, would take the place of the output, of its external
    data, or of a folder that it lies in."""
    files = {part.resolve() for part in (output, output.with_name(f"{output.name}.data"))}
    for option, folder in folders.items():
        if folder is not None and files & {folder.resolve(), *folder.resolve().parents}:
            raise OutputPathError(
                f"The folder '{folder}' of {option} would take the place of the output '{output}'.",
                "Choose another folder, or another output.",
            )


def real_place(path: Path) -> Path:
    """Where a file of that name is written: at the end of its symbolic links, which stay.

    Raises:
        OutputPathError: there is something else than a regular file, such as a folder, a device or a pipe.
    """
    place = Path(os.path.realpath(path))
    if os.path.lexists(place) and not place.is_file():
        what = "is a folder" if place.is_dir() else "is not a regular file"
        raise OutputPathError(
            f"The output '{path}' {what}.", "Name a file, for example model.int8.onnx, or another folder."
        )
    return place


def require_writable(path: Path) -> None:
    """Raise OutputPathError unless a file could be written at ``path``; checked before any long work."""
    place = real_place(path)
    # Large weights would go there. They are looked for beside the model, so that no link may lead elsewhere.
    data = place.with_name(f"{place.name}.data")
    if os.path.lexists(data) and (data.is_symlink() or not data.is_file()):
        raise OutputPathError(
            f"'{data}', where large weights of the output would go, is not a regular file.",
            "Choose another output, or remove it.",
        )
    # What the user wrote reads better than where it leads, as long as these are the same.
    folder = place.parent if path.is_symlink() else path.parent
    if not folder.is_dir():
        raise OutputPathError(f"The folder '{folder}' does not exist.", "Create it or choose another output.")
    _require_room(folder)


def require_writable_folder(folder: Path, names: Iterable[str] = ()) -> None:
    """Raise OutputPathError unless files, ``names`` among them, could be written in ``folder``, which need not exist
    yet."""
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OutputPathError(f"'{place}' is not a folder.", "Choose another folder.")
    _require_room(place)
    for name in names:
        real_place(folder / name)


def _require_room(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputPathError(
            f"The folder '{folder}' cannot be written: {error.strerror or error}.", "Choose another output."
        ) from error


@contextmanager
def claimed_folder(place: Path, prefix: str) -> Iterator[Path]:
    """A new folder in ``place``, removed at the end; so are those that killed runs left there.

    A live run holds a lock on its folder, so a folder of this prefix without one is a leftover.

    Raises:
        OutputPathError: ``place`` cannot be written.
    """
    _remove_leftovers(place, prefix)
    try:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        descriptor = _lock(folder)
    except OSError as error:
        raise OutputPathError(
            f"The folder '{place}' cannot be written: {error.strerror or error}.",
            "Choose another, or make it writable.",
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)


def _remove_leftovers(place: Path, prefix: str) -> None:
    if not place.is_dir():
        return
    for folder in place.iterdir():
        if not folder.name.startswith(prefix) or folder.is_symlink() or not folder.is_dir():
            continue
        with suppress(OSError):
            descriptor = _lock(folder)
            if descriptor is None:  # without locks a leftover cannot be told from a live run's folder
                continue
            try:
                # One that is being made has no lock yet.
                if time.time() - folder.stat().st_mtime > _SETTLED_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds the lock on ``folder`` until it is closed, None where there are no locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    if sys.platform == "win32":
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        # Some network file systems have no locks.
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A path of the same name in a hidden folder beside ``path``; moved into place when the block succeeds.

    Everything in the hidden folder (external data too) moves, the file itself last; on any failure it is
    removed and ``path`` is untouched. Where ``path`` is a symbolic link, all of this happens where it leads.

    Raises:
        OutputPathError: the folder of ``path`` cannot be written, or no regular file is there.
    """
    place = real_place(path)
    with claimed_folder(place.parent, f".{place.name}.onnxptq-") as folder:
        staged = folder / place.name
        with _named_as(path, staged):
            yield staged
        try:
            for companion in sorted(folder.iterdir()):
                if companion != staged:
                    companion.replace(place.parent / companion.name)
            staged.replace(place)
        except OSError as error:
            raise OutputPathError(
                f"'{path}' cannot be written: {error.strerror or error}.", "Choose another output."
            ) from error


@contextmanager
def _named_as(path: Path, staged: Path) -> Iterator[None]:
    """Errors about ``staged``, and about files beside it, tell of ``path``, the only one that the user knows."""
    folder = str(staged.parent)
    beside = re.compile(rf"{re.escape(folder)}(/[^/\s']+)?")
    try:
        yield
    except OnnxPtqError as error:
        message = beside.sub(lambda _: str(path), error.message.replace(str(staged), str(path)))
        if message == error.message:
            raise
        raise type(error)(message, error.remedy) from error
    except OSError as error:
        if error.errno in SPACE_ERRORS and str(error.filename).startswith(folder):
            error.filename = str(path)
        raise


def write_texts(folder: Path, texts: Mapping[str, str]) -> None:
    """Write small text files into ``folder``, which is made if needed: all of them, or none.

    Raises:
        OutputPathError: the folder cannot be written, or no regular file is at one of their places.
    """
    is_new = not folder.exists()
    temporary: dict[Path, Path] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for name, text in texts.items():
                place = real_place(folder / name)
                descriptor, path = tempfile.mkstemp(dir=place.parent, prefix=f".{name}.")
                temporary[place] = Path(path)
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                temporary[place].chmod(0o644)
            for place, written in temporary.items():
                written.replace(place)
        except BaseException:
            for written in temporary.values():
                written.unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):
                    folder.rmdir()
            raise
    except OSError as error:
        raise OutputPathError(
            f"'{folder}' cannot be written: {error.strerror or error}.",
            "Choose another folder, or free space.",
        ) from error
