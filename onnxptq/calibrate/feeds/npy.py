"""NumPy files without loading them: each array becomes a place in a file.

Uncompressed .npz members are read where they lie; compressed ones are unpacked into a spool first.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from onnxptq.calibrate.feeds.spool import Spool
from onnxptq.calibrate.feeds.stored import FileArray
from onnxptq.calibrate.feeds.wording import first_line
from onnxptq.errors import FeedError

_LOCAL_HEADER = struct.Struct("<26xHH")
_BLOCK = 1 << 20


def open_npy(path: Path, label: str) -> FileArray:
    """The array of an .npy file.

    Raises:
        FeedError: no .npy file, pickled objects, or truncated.
    """
    try:
        with path.open("rb") as file:
            shape, is_fortran, dtype = _read_header(file, label)
            array = FileArray(path=path, offset=file.tell(), shape=shape, dtype=dtype, is_fortran=is_fortran)
        if path.stat().st_size < array.offset + array.nbytes:
            raise _damaged(label, "the file is truncated")
    except OSError as error:
        raise _damaged(label, first_line(error)) from error
    return array


def open_npz(path: Path, label: str, spool: Spool) -> Mapping[str, FileArray]:
    """The arrays of an .npz file by key.

    Raises:
        FeedError: no zip archive, damaged, encrypted, or holding pickled objects or files other than arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [entry for entry in archive.infolist() if not entry.is_dir()]
            return {
                entry.filename.removesuffix(".npy"): _open_member(archive, entry, path, label, spool)
                for entry in members
            }
    except FeedError:
        raise
    except (OSError, RuntimeError, NotImplementedError, EOFError, ValueError, struct.error) as error:
        raise _damaged(label, first_line(error)) from error
    except (zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(label, first_line(error)) from error


def _open_member(
    archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, label: str, spool: Spool
) -> FileArray:
    where = f"{label}[{entry.filename}]"
    with archive.open(entry) as member:
        shape, is_fortran, dtype = _read_header(member, where)
        header = member.tell()
        size = math.prod(shape) * dtype.itemsize
        if entry.file_size < header + size:
            raise _damaged(where, "the array is truncated")
        if entry.compress_type == zipfile.ZIP_STORED:
            offset = _member_start(path, entry) + header
            if path.stat().st_size < offset + size:
                raise _damaged(where, "the file is truncated")
            return FileArray(path=path, offset=offset, shape=shape, dtype=dtype, is_fortran=is_fortran)
        offset = spool.append_bytes(_blocks(member))
    return FileArray(
        path=spool.path, offset=offset, shape=shape, dtype=dtype, is_fortran=is_fortran, owner=spool
    )


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    while block := file.read(_BLOCK):
        yield block


def _member_start(path: Path, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an uncompressed member begin: the name and extra lengths of its local header may
    differ from those of the central directory.
    """
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return entry.header_offset + _LOCAL_HEADER.size + int(name) + int(extra)


def _read_header(file: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(file)
        if version == (1, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_1_0(file)
        elif version == (2, 0):
            shape, is_fortran, dtype = np.lib.format.read_array_header_2_0(file)
        else:
            raise ValueError(f"unsupported format version {version}")
    except (ValueError, EOFError, TypeError, SyntaxError, struct.error) as error:
        raise _damaged(where, first_line(error)) from error
    if dtype.hasobject:
        raise FeedError(
            f"{where}: holds pickled Python objects, which are not loaded because they can run code.",
            "Save plain numeric arrays, for example np.save(path, array.astype(np.float32)).",
        )
    return tuple(shape), bool(is_fortran), dtype


def _damaged(where: str, reason: str) -> FeedError:
    return FeedError(
        f"{where}: cannot be read as a NumPy file: {reason}", "Write the file again with numpy.save or savez."
    )
