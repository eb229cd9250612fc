"""Arrays that are not in memory: where their bytes lie, and how to read some rows of them.

Reads go through ordinary file calls: pages of a memory map would count as resident memory, and the
peak would then grow with the data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onnxptq.calibrate.feeds.decode import from_array, read_image
from onnxptq.calibrate.feeds.preprocess import ImagePreprocess
from onnxptq.calibrate.feeds.wording import first_line, quote
from onnxptq.errors import FeedError
from onnxptq.types import Array, InputSpec

_CHUNK = 1 << 20
_SHELF_BYTES = 1 << 27
UNKNOWN = -1
"""A dimension that only reading tells (pictures without a fixed size)."""


class StoredArray(Protocol):
    """An array of known type and shape (dimensions may be UNKNOWN) whose values are read on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions; UNKNOWN where only reading tells."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the elements."""
        ...

    def load(self) -> Array:
        """The whole array, a fresh copy."""
        ...

    def read(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop`` of axis 0, a fresh copy."""
        ...

    def contents(self) -> Iterator[bytes]:
        """What the values are made of, for hashing: array bytes in C order, or the bytes of a file."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class MemoryArray:
    """An array that the caller already holds."""

    values: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the array."""
        return self.values.dtype

    def load(self) -> Array:
        """See StoredArray."""
        return self.values.copy()

    def read(self, start: int, stop: int) -> Array:
        """See StoredArray."""
        return self.values[start:stop].copy()

    def contents(self) -> Iterator[bytes]:
        """See StoredArray."""
        if self.dtype.hasobject:
            yield repr(self.values.tolist()).encode()
        elif self.values.ndim == 0:
            yield self.values.tobytes()
        else:
            for row in self.values:
                yield np.ascontiguousarray(row).tobytes()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FileArray:
    """Raw array bytes at ``offset`` of a file (an .npy, an uncompressed .npz member, a spool)."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    is_fortran: bool = False
    owner: object = None
    """What must stay alive for the file to exist."""

    @property
    def nbytes(self) -> int:
        """Length of the stored bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> Array:
        """See StoredArray."""
        if self.is_fortran:
            return self._mapped().copy(order="C")
        return self._values(0, math.prod(self.shape)).reshape(self.shape)

    def read(self, start: int, stop: int) -> Array:
        """See StoredArray."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        if self.is_fortran:
            return self._mapped()[start:stop].copy(order="C")
        row = math.prod(self.shape[1:])
        return self._values(start * row, (stop - start) * row).reshape(stop - start, *self.shape[1:])

    def contents(self) -> Iterator[bytes]:
        """See StoredArray."""
        if self.is_fortran:
            yield from MemoryArray(self._mapped()).contents()
            return
        left = self.nbytes
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left and (block := file.read(min(_CHUNK, left))):
                left -= len(block)
                yield block

    def _mapped(self) -> Array:
        # Rows of a Fortran array are strided over the whole file; only a map reads them sensibly.
        return np.memmap(self.path, self.dtype, "r", self.offset, self.shape, order="F")

    def _values(self, first: int, count: int) -> Array:
        with self.path.open("rb") as file:
            file.seek(self.offset + first * self.dtype.itemsize)
            block = file.read(count * self.dtype.itemsize)
        if len(block) != count * self.dtype.itemsize:
            raise FeedError(f"{self.path.name}: the file became shorter while it was in use.", "Run again.")
        return np.frombuffer(bytearray(block), self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ParsedFile:
    """An array that is parsed from a whole small file each time (protobuf tensors)."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    parse: Callable[[Path], Array]

    def load(self) -> Array:
        """See StoredArray."""
        return self.parse(self.path)

    def read(self, start: int, stop: int) -> Array:
        """See StoredArray."""
        return self.load()[start:stop].copy()

    def contents(self) -> Iterator[bytes]:
        """See StoredArray."""
        return file_contents(self.path)


class Shelf:
    """Pixels of pictures that were decoded before, as many as ``room`` bytes hold.

    Decoding a photograph takes longer than most networks take to run it, and samples are read again and again.
    The first to come stay: samples are read in turn, so making room for one would take it from the next.
    """

    def __init__(self, room: int = _SHELF_BYTES) -> None:
        self._room = room
        self._kept: dict[Path, Array] = {}

    def get(self, path: Path, decode: Callable[[], Array]) -> Array:
        """What ``decode`` makes of the picture at ``path``, or made of it before."""
        known = self._kept.get(path)
        if known is not None:
            return known
        pixels = decode()
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._kept[path] = pixels
        return pixels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ImageFile:
    """One picture as an array with a batch axis of 1, decoded on demand. ``preprocess`` is resolved."""

    path: Path
    label: str
    preprocess: ImagePreprocess
    shelf: Shelf

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after preprocessing; height and width are UNKNOWN where no size is fixed."""
        return image_shape(1, self.preprocess)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type after preprocessing."""
        return np.dtype(self.preprocess.dtype)

    def load(self) -> Array:
        """See StoredArray."""
        pixels = self.shelf.get(
            self.path, lambda: self.preprocess.pixels(read_image(self.path, self.label), self.label)
        )
        return self.preprocess.values(pixels)[None]

    def read(self, start: int, stop: int) -> Array:
        """See StoredArray."""
        return self.load()[start:stop]

    def contents(self) -> Iterator[bytes]:
        """See StoredArray."""
        return file_contents(self.path)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PixelArray:
    """uint8 pixels of one picture or of a stack of them, preprocessed row by row."""

    pixels: StoredArray
    label: str
    preprocess: ImagePreprocess
    axes: str
    """Meaning of the axes of ``pixels``: NHWC, NCHW, NHW, HWC, CHW or HW."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape after preprocessing, with a batch axis."""
        return image_shape(self.pixels.shape[0] if self.axes.startswith("N") else 1, self.preprocess)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type after preprocessing."""
        return np.dtype(self.preprocess.dtype)

    def load(self) -> Array:
        """See StoredArray."""
        return self.read(0, self.shape[0])

    def read(self, start: int, stop: int) -> Array:
        """See StoredArray."""
        block = (
            self.pixels.read(start, stop)
            if self.axes.startswith("N")
            else self.pixels.load()[None][start:stop]
        )
        rows = [row.transpose(1, 2, 0) if self.axes.endswith("CHW") else row for row in block]
        return np.stack([self.preprocess.apply(from_array(row, self.label), self.label) for row in rows])

    def contents(self) -> Iterator[bytes]:
        """See StoredArray."""
        return self.pixels.contents()


def image_shape(count: int, preprocess: ImagePreprocess) -> tuple[int, ...]:
    """Shape of ``count`` pictures after a resolved ``preprocess``."""
    height, width = preprocess.size or (UNKNOWN, UNKNOWN)
    if preprocess.layout == "NHWC":
        return (count, height, width, preprocess.channels)
    return (count, preprocess.channels, height, width)


def with_preprocess(
    array: StoredArray, spec: InputSpec, preprocess: ImagePreprocess | None, label: str
) -> tuple[StoredArray, bool]:
    """``array`` as it feeds ``spec``, and whether it holds pixels that ``preprocess`` turns into inputs.

    Only uint8 arrays are pixels, and only where the model does not read uint8 in that very shape.

    Raises:
        FeedError: the axes of the pixels cannot be told.
    """
    if preprocess is None or array.dtype != np.uint8 or len(spec.shape) != 4:
        return array, False
    if spec.dtype == np.uint8 and _fits(array.shape, spec):
        return array, False
    axes = _pixel_axes(array.shape)
    if axes is None:
        raise FeedError(
            f"{label}: uint8 array of shape {quote(array.shape)} for input {spec.name!r} "
            "is no picture and no stack of pictures.",
            "Give pixels as (samples, height, width, channels), or float arrays in the model's own shape.",
        )
    return PixelArray(pixels=array, label=label, preprocess=preprocess.resolve(spec), axes=axes), True


def _fits(shape: tuple[int, ...], spec: InputSpec) -> bool:
    wanted = spec.shape[1:]
    found = shape[len(shape) - len(wanted) :]
    return len(shape) >= len(wanted) and all(
        not isinstance(want, int) or want == have for want, have in zip(wanted, found, strict=True)
    )


def _pixel_axes(shape: tuple[int, ...]) -> str | None:
    channels = (1, 3, 4)
    if len(shape) == 4:
        return "NHWC" if shape[3] in channels else "NCHW" if shape[1] in channels else None
    if len(shape) == 3:
        return "HWC" if shape[2] in channels else "CHW" if shape[0] in channels else "NHW"
    return "HW" if len(shape) == 2 else None


def file_contents(path: Path) -> Iterator[bytes]:
    """The bytes of a file, in blocks.

    Raises:
        FeedError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            while block := file.read(_CHUNK):
                yield block
    except OSError as error:
        raise FeedError(f"{path.name}: cannot be read: {first_line(error)}", "Check the file.") from error
