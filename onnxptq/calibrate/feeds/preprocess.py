"""How a picture becomes a model input.

In this order: EXIF orientation, 8-bit RGB or grey, resize, centre crop, then per channel ``c``::

    y = (v * scale - mean[c]) / std[c]        v in 0..255

computed in float64 for each of the 256 byte values and rounded once to float32, so that the result
does not depend on the order of vector operations. ``dtype: uint8`` passes the bytes through.

Resizing is Pillow's (antialiased), with the rounding that torchvision uses: the long side becomes
``int(short_size * long / short)`` and a crop starts at ``round((length - crop) / 2)``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import yaml
from PIL import Image
from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from onnxptq.calibrate.feeds.wording import quote
from onnxptq.errors import FeedError
from onnxptq.settings import Settings, load_yaml
from onnxptq.types import Array, InputSpec

_BYTE_SCALE = 1 / 255
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_FILTERS: Mapping[str, Image.Resampling] = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_STATED = ("size", "resize", "color", "layout", "scale", "mean", "std")
"""What people state about their pictures; the rest are refinements with defaults."""
_OVERRIDE = f"override with {', '.join(f'--{name}' for name in _STATED)} or --preprocess FILE.yaml"


def _as_pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, int | float) and not isinstance(value, bool) else value


class ImagePreprocess(Settings):
    """Everything between a picture and the array that the model reads.

    Attributes:
        size: height and width of the model's input; None: those of the input's shape, where it fixes them.
        resize: ``short_side`` keeps the aspect ratio, ``exact`` does not, ``none`` leaves the picture alone.
        resize_size: pixels of the short side (``short_side``) or of both sides (``exact``). None: the
            smallest size that covers ``size``, or exactly ``size``.
        interpolation: Pillow's filter.
        center_crop: cut ``size`` out of the middle after resizing.
        color: order of the channels.
        layout: place of the channels; ``auto`` reads it from the input's shape.
        scale, mean, std: see the module's equation; one value per channel, or one for all.
        dtype: ``float32``, or ``uint8`` for raw bytes.

    Raises:
        FeedError: an unknown option or an illegal value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ignored_types=(cached_property,))

    size: (
        Annotated[tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)]], BeforeValidator(_as_pair)]
        | None
    ) = None
    resize: Literal["short_side", "exact", "none"] = "short_side"
    resize_size: Annotated[int, Field(gt=0)] | None = None
    interpolation: Literal["bicubic", "bilinear", "nearest", "lanczos"] = "bicubic"
    center_crop: bool = True
    color: Literal["RGB", "BGR", "GRAY"] = "RGB"
    layout: Literal["NCHW", "NHWC", "auto"] = "auto"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = _BYTE_SCALE
    mean: Annotated[tuple[Annotated[float, Field(allow_inf_nan=False)], ...], BeforeValidator(_as_tuple)] = (
        0.0,
    )
    std: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], BeforeValidator(_as_tuple)
    ] = (1.0,)
    dtype: Literal["float32", "uint8"] = "float32"

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(
                    f"{name} has {len(values)} values for {self.channels} channel(s) of {self.color}"
                )
        if self.dtype == "uint8" and (self.scale, set(self.mean), set(self.std)) != (
            _BYTE_SCALE,
            {0.0},
            {1.0},
        ):
            raise ValueError("dtype uint8 passes raw bytes through, so scale, mean and std must be left out")
        if self.resize == "none" and self.resize_size is not None:
            raise ValueError("resize_size has no effect with resize: none")
        return self

    @property
    def channels(self) -> int:
        """Number of colour channels of the result."""
        return 1 if self.color == "GRAY" else 3

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], *, base: ImagePreprocess | None = None, where: str = "preprocessing"
    ) -> ImagePreprocess:
        """``base`` (or the defaults) with ``options`` laid over it, validated.

        A base without a size leaves pictures as they are; where a size is given, ``resize`` and ``center_crop``
        have their defaults again. So have ``mean`` and ``std`` where ``color`` has another number of channels.

        Raises:
            FeedError: an unknown option or an illegal value; names ``where`` and the option.
        """
        start = base.model_dump() if base is not None else {}
        if start.get("size") is None and (options.get("size") or options.get("resize_size")):
            start = {name: value for name, value in start.items() if name not in ("resize", "center_crop")}
        if base is not None and (options.get("color", base.color) == "GRAY") != (base.color == "GRAY"):
            # What was guessed for other channels says nothing of these.
            start = {name: value for name, value in start.items() if name not in ("mean", "std")}
        try:
            return cls.model_validate({**start, **options})
        except ValidationError as error:
            raise cls.refused(error, where) from None

    @classmethod
    def refused(cls, error: ValidationError, where: str = "preprocessing") -> FeedError:
        """What is raised instead of ``error``; ``where`` the options come from."""
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            near = difflib.get_close_matches(name, cls.model_fields, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Options: {', '.join(cls.model_fields)}."
            return FeedError(f"{where}: unknown option {name!r}.", hint)
        text = first["msg"].removeprefix("Value error, ")
        return FeedError(
            f"{where}: {f'{name}: ' if name else ''}{text}.", "Correct the preprocessing options."
        )

    @classmethod
    def from_yaml(cls, path: Path) -> ImagePreprocess:
        """Read the options from a YAML mapping whose keys are this class's attributes.

        Raises:
            FeedError: the file is unreadable, no mapping, or has an unknown or illegal option.
        """
        try:
            content = load_yaml(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise FeedError(
                f"{path}: cannot be read as YAML: {' '.join(str(error).split())}",
                "Give a small YAML file such as: size: [224, 224]",
            ) from error
        if not isinstance(content, dict):
            raise FeedError(
                f"{path}: holds no mapping of options.", f"Options: {', '.join(cls.model_fields)}."
            )
        return cls.from_options(content, where=str(path))

    @classmethod
    def guess(cls, spec: InputSpec) -> ImagePreprocess:
        """What the input's shape and type suggest: the ImageNet convention for three float channels.

        Channels are the axis of size 1 or 3 (axis 1 where both or neither qualify and sizes are open).

        Raises:
            FeedError: the input is not of rank 4, or neither axis 1 nor axis 3 can be channels.
        """
        layout = image_layout(spec)
        if layout is None:
            raise FeedError(
                f"Input {spec.name!r} with shape {quote(spec.shape)} does not look like a picture.",
                "Give the samples as .npy or .npz files, or state the preprocessing in a YAML file.",
            )
        axis, rows = (1, 2) if layout == "NCHW" else (3, 1)
        height, width = spec.shape[rows], spec.shape[rows + 1]
        size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
        is_gray, is_raw = spec.shape[axis] == 1, spec.dtype == np.uint8
        is_imagenet = not is_gray and not is_raw
        return cls(
            size=size,
            resize="short_side" if size else "none",
            center_crop=size is not None,
            color="GRAY" if is_gray else "RGB",
            layout=layout,
            mean=_IMAGENET_MEAN if is_imagenet else (0.0,),
            std=_IMAGENET_STD if is_imagenet else (1.0,),
            dtype="uint8" if is_raw else "float32",
        )

    def resolve(self, spec: InputSpec) -> ImagePreprocess:
        """The same with ``size`` and ``layout`` filled in from ``spec`` where they are left open.

        Raises:
            FeedError: the layout is ``auto`` and the shape does not tell it, or the channels differ.
        """
        layout = self.layout if self.layout != "auto" else image_layout(spec)
        if layout is None or len(spec.shape) != 4:
            raise FeedError(
                f"Input {spec.name!r} with shape {quote(spec.shape)} does not look like a picture.",
                "State layout: NCHW or NHWC, or give the samples as .npy or .npz files.",
            )
        wanted = spec.shape[1 if layout == "NCHW" else 3]
        if isinstance(wanted, int) and wanted != self.channels:
            raise FeedError(
                f"Input {spec.name!r} with shape {quote(spec.shape)} reads {wanted} channel(s) as {layout}, "
                f"color {self.color} gives {self.channels}.",
                "Use color: RGB or BGR for three channels, GRAY for one, or state the layout.",
            )
        size = self.size
        rows = 2 if layout == "NCHW" else 1
        height, width = spec.shape[rows], spec.shape[rows + 1]
        if size is None and isinstance(height, int) and isinstance(width, int):
            size = (height, width)
        return self.model_copy(update={"layout": layout, "size": size})

    def describe(self, *, stated: Collection[str] | None = None) -> str:
        """One line for people: every step in order; where the options that were ``stated`` are given, also what was
        guessed beside them, and how to override it."""
        target = f"{self.size[0]}x{self.size[1]}" if self.size else "the picture's own size"
        if self.resize == "none":
            steps = ["no resize"]
        elif self.resize == "exact":
            to = f"{self.resize_size}x{self.resize_size}" if self.resize_size else target
            steps = [f"resize to {to} ({self.interpolation})"]
        else:
            to = f"short side to {self.resize_size}" if self.resize_size else f"resize to cover {target}"
            steps = [f"{to} ({self.interpolation})"]
        is_exact = self.resize == "exact" and self.resize_size is None
        if self.center_crop and self.size and not is_exact:
            steps.append(f"centre crop {target}")
        steps.append(f"{self.color} {self.layout}")
        steps.append(self._describe_values())
        line = ", ".join(steps)
        if stated is None:
            return line
        if not stated:
            return f"guessed: {line}; {_OVERRIDE}"
        # The size is the model's own, and raw bytes have no scale.
        certain = {"size", *stated, *(("scale", "mean", "std") if self.dtype == "uint8" else ())}
        guessed = [name for name in _STATED if name not in certain]
        return f"{line}; guessed of this: {', '.join(guessed)}; {_OVERRIDE}" if guessed else line

    def _describe_values(self) -> str:
        if self.dtype == "uint8":
            return "raw bytes"
        scaled = "v / 255" if math.isclose(self.scale, _BYTE_SCALE) else f"v * {self.scale:g}"
        if set(self.mean) == {0.0} and set(self.std) == {1.0}:
            return scaled
        means, stds = (" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std))
        return f"({scaled} - mean) / std with mean {means} and std {stds}"

    def apply(self, image: Image.Image, where: str) -> Array:
        """``values`` of the ``pixels`` of one picture."""
        return self.values(self.pixels(image, where))

    def pixels(self, image: Image.Image, where: str) -> Array:
        """The bytes (channels, height, width), or (height, width, channels) for NHWC, of one 8-bit picture.

        Args:
            image: mode RGB or L.
            where: the picture's name, for errors.

        Raises:
            FeedError: the picture is smaller than the crop, or not of ``size`` with no step that makes it so.
        """
        image = image.convert("L" if self.color == "GRAY" else "RGB")
        image = self._crop(self._resized(image), where)
        pixels = np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, self.channels)
        if self.color == "BGR":
            pixels = pixels[:, :, ::-1]
        if self.layout != "NHWC":
            pixels = pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(pixels)

    def values(self, pixels: Array) -> Array:
        """What the model reads instead of ``pixels``, by the module's equation; a fresh array."""
        if self.dtype == "uint8":
            return pixels.copy()
        axis = 2 if self.layout == "NHWC" else 0
        planes = [self._table[c][np.take(pixels, c, axis=axis)] for c in range(self.channels)]
        return np.stack(planes, axis=axis)

    @cached_property
    def _table(self) -> Array:
        """The module's equation for every byte value: float32 of shape (channels, 256)."""
        mean = np.broadcast_to(np.asarray(self.mean, np.float64), self.channels)[:, None]
        std = np.broadcast_to(np.asarray(self.std, np.float64), self.channels)[:, None]
        values = np.arange(256, dtype=np.float64)[None, :]
        return ((values * self.scale - mean) / std).astype(np.float32)

    def _resized(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if self.resize == "none":
            return image
        if self.resize == "exact":
            pair = (self.resize_size, self.resize_size) if self.resize_size else self.size
            if pair is None:
                return image
            new_height, new_width = pair
        elif self.resize_size is not None:
            new_height, new_width = _scale_to(height, width, self.resize_size, by_height=height <= width)
        elif self.size is not None:
            # Cover the target: scale by the side that needs the larger factor.
            by_height = self.size[0] * width >= self.size[1] * height
            new_height, new_width = _scale_to(
                height, width, self.size[0 if by_height else 1], by_height=by_height
            )
            new_height, new_width = max(new_height, self.size[0]), max(new_width, self.size[1])
        else:
            return image
        if (new_height, new_width) == (height, width):
            return image
        return image.resize((new_width, new_height), _FILTERS[self.interpolation])

    def _crop(self, image: Image.Image, where: str) -> Image.Image:
        if self.size is None:
            return image
        height, width = self.size
        if (image.height, image.width) == (height, width):
            return image
        if not self.center_crop:
            raise FeedError(
                f"{where}: the picture is {image.height}x{image.width} after resizing, "
                f"the model reads {height}x{width}.",
                "Leave out center_crop: false, or use resize: exact (--resize exact).",
            )
        if image.height < height or image.width < width:
            raise FeedError(
                f"{where}: the picture is {image.height}x{image.width}, "
                f"smaller than the crop {height}x{width}.",
                "Use a larger resize_size, or leave it out."
                if self.resize_size
                else "Use resize: short_side or exact (--resize), or larger pictures.",
            )
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        return image.crop((left, top, left + width, top + height))


def _scale_to(height: int, width: int, pixels: int, *, by_height: bool) -> tuple[int, int]:
    if by_height:
        return pixels, max(1, int(pixels * width / height))
    return max(1, int(pixels * height / width)), pixels


def image_layout(spec: InputSpec) -> Literal["NCHW", "NHWC"] | None:
    """Where the shape of ``spec`` has its colour channels, or None where it is no picture."""
    if len(spec.shape) != 4:
        return None
    first, last = spec.shape[1], spec.shape[3]
    if first in (1, 3):
        return "NCHW"
    if last in (1, 3):
        return "NHWC"
    return None if isinstance(first, int) else "NCHW"
