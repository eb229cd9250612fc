"""Pictures of any kind as 8-bit RGB or grey ones, upright.

Alpha is dropped, as the usual training loaders do; palettes are resolved; 16-bit grey is divided by
257, so that white stays white (Pillow's own conversion saturates at 255 of 65535). Of animations and
multi-page files the first frame is read.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from onnxptq.calibrate.feeds.wording import first_line
from onnxptq.errors import FeedError
from onnxptq.types import Array

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif"})


def read_image(path: Path, where: str) -> Image.Image:
    """Decode the picture at ``path`` into mode RGB or L, with its EXIF orientation applied.

    Raises:
        FeedError: missing, unreadable, truncated, too large, or of floating-point pixels; names ``where``.
    """
    try:
        with warnings.catch_warnings():
            # What Pillow merely warns of is damaged metadata; damaged pixels raise.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                upright = ImageOps.exif_transpose(opened)
                return to_8bit(upright, where)
    except FeedError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise FeedError(
            f"{where}: the picture is too large to decode safely: {first_line(error)}",
            "Shrink it, or remove it from the folder.",
        ) from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise FeedError(
            f"{where}: cannot be read as a picture: {first_line(error)}",
            "Replace the file or remove it from the folder.",
        ) from error


def to_8bit(image: Image.Image, where: str) -> Image.Image:
    """``image`` in mode RGB, or L where it has no colour."""
    if image.mode in ("RGB", "L"):
        return image
    if image.mode.startswith("I"):
        return _from_16bit(np.asarray(image), where)
    if image.mode == "F":
        raise FeedError(
            f"{where}: holds floating-point pixels, whose range is unknown.",
            "Convert the pictures to 8 bits, or give the samples as .npy files.",
        )
    if image.mode in ("1", "LA", "La"):
        return image.convert("L")
    if image.mode in ("P", "PA") and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def from_array(pixels: Array, where: str) -> Image.Image:
    """A picture from uint8 pixels (height, width), or (height, width, 1, 3 or 4 channels)."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return to_8bit(Image.fromarray(np.ascontiguousarray(pixels)), where)


def _from_16bit(values: Array, where: str) -> Image.Image:
    wide = values.astype(np.int64)
    if wide.size and (wide.min() < 0 or wide.max() > 65535):
        raise FeedError(
            f"{where}: holds 32-bit pixels beyond 16 bits, whose range is unknown.",
            "Convert the pictures to 8 bits, or give the samples as .npy files.",
        )
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
