"""Wording that all feed errors share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onnxptq.listing import listed

FORMATS = (
    "a folder of pictures (jpg, png, bmp, webp, tiff, gif), a folder of .npy or .npz files, one .npz keyed "
    "by input name, one .npy, or test_data_set_*/input_*.pb"
)


def quote(shape: Sequence[int | str | None]) -> str:
    """A shape as people write it: ``[b, 3, 224, 224]``, with ? for unknown."""
    return "[" + ", ".join("?" if dim is None or dim == -1 else str(dim) for dim in shape) + "]"


def listing(names: Iterable[str], most: int = 6) -> str:
    """The first few names, comma separated, and how many more there are."""
    return listed([repr(name) for name in names], most)


def first_line(error: BaseException) -> str:
    """The text of an exception on one line, never empty."""
    return " ".join(str(error).split())[:300] or type(error).__name__
