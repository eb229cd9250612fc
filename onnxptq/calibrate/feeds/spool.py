"""A file that holds the samples of a source which can be read only once."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from onnxptq.calibrate.feeds.stored import FileArray, MemoryArray, StoredArray
from onnxptq.calibrate.feeds.wording import first_line
from onnxptq.errors import FeedError
from onnxptq.types import Array


class Spool:
    """Appends arrays to one new file in ``folder``; the file goes when nothing refers to its arrays any more.

    No file is made before the first write.

    Raises:
        FeedError: the folder cannot be written or the disk is full.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: BinaryIO | None = None
        self._path = folder
        self._size = 0

    @property
    def path(self) -> Path:
        """The file, which exists from the first write on."""
        return self._path

    def append(self, values: Array) -> StoredArray:
        """Write one array."""
        if values.dtype.hasobject:
            return MemoryArray(values)
        values = np.ascontiguousarray(values)
        offset = self.append_bytes(iter((values.tobytes(),)))
        return FileArray(path=self._path, offset=offset, shape=values.shape, dtype=values.dtype, owner=self)

    def append_bytes(self, blocks: Iterator[bytes]) -> int:
        """Write raw bytes and return their offset."""
        start = self._size
        file = self._opened()
        for block in blocks:
            view = memoryview(block)
            while view:
                try:
                    written = file.write(view)
                except OSError as error:
                    raise self._failure(error) from error
                self._size += written
                view = view[written:]
        return start

    def _opened(self) -> BinaryIO:
        if self._file is None:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                handle, name = tempfile.mkstemp(prefix="feeds-", suffix=".spool", dir=self._folder)
            except OSError as error:
                raise self._failure(error) from error
            # Unbuffered: a failed write must fail at the write, not again in close().
            self._file, self._path = os.fdopen(handle, "wb", buffering=0), Path(name)
            weakref.finalize(self, _discard, self._path, self._file)
        return self._file

    def _failure(self, error: OSError) -> FeedError:
        return FeedError(
            f"{self._folder}: samples cannot be spooled there: {first_line(error)}",
            "Free some space, choose another work folder, or give fewer samples.",
        )


def _discard(path: Path, file: BinaryIO) -> None:
    file.close()
    path.unlink(missing_ok=True)
