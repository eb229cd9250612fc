"""Resize and Upsample, one axis at a time.

For output position i of an axis of length n -> m with scale s, the source coordinate u is, by mode:

- half_pixel: (i + 0.5) / s - 0.5; pytorch_half_pixel: the same, 0 where m = 1
- half_pixel_symmetric: n/2 (1 - m / (s n)) + (i + 0.5) / s - 0.5
- asymmetric: i / s; align_corners: i (n - 1) / (m - 1); tf_half_pixel_for_nn: (i + 0.5) / s
- tf_crop_and_resize: r0 (n - 1) + i (r1 - r0) (n - 1) / (m - 1)

nearest picks one element; linear and cubic weigh 2 and 4 neighbours of u, with the border repeated (or its
weight dropped with ``exclude_outside``). With ``antialias`` the filter is stretched by 1/s when shrinking.
Every axis is then a (m, n) matrix of weights, unless torch has the same operation ready.
Coordinates are computed in float32, as onnxruntime does, because nearest modes decide ties there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from onnxptq.lowering.registry import Declined, Kernel, NodeSpec, register

Tensor = torch.Tensor
FloatArray = npt.NDArray[np.float32]
_f32 = np.float32
_COORDINATES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_half_pixel_for_nn",
    "tf_crop_and_resize",
)
_NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil", "simple")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeMode:
    """The attributes of a Resize node. ``nearest`` "simple" is the rule before opset 11."""

    mode: str
    coordinates: str
    nearest: str = "round_prefer_floor"
    cubic_a: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    extrapolation: float = 0.0


@dataclass(frozen=True, slots=True)
class Axis:
    """How one axis changes: lengths, scale and (for tf_crop_and_resize) the normalized range."""

    axis: int
    size: int
    target: int
    scale: float
    roi: tuple[float, float]


def source_coordinates(axis: Axis, coordinates: str) -> FloatArray:
    """The coordinate u of every output position."""
    i = np.arange(axis.target, dtype=_f32)
    n, m, s = _f32(axis.size), _f32(axis.target), _f32(axis.scale)
    half = _f32(0.5)
    if coordinates == "asymmetric":
        return i / s
    if coordinates == "align_corners":
        return i * (n - 1) / (m - 1) if axis.target > 1 else i * 0
    if coordinates == "tf_half_pixel_for_nn":
        return (i + half) / s
    if coordinates == "tf_crop_and_resize":
        first, last = (_f32(r) for r in axis.roi)
        if axis.target == 1:
            return np.array([half * (first + last) * (n - 1)], dtype=_f32)
        return first * (n - 1) + i * (last - first) * (n - 1) / (m - 1)
    if coordinates == "half_pixel_symmetric":
        return n / 2 * (1 - m / (s * n)) + (i + half) / s - half
    if coordinates == "pytorch_half_pixel" and axis.target == 1:
        return i * 0
    return (i + half) / s - half


def nearest_indices(axis: Axis, how: ResizeMode) -> npt.NDArray[np.int64]:
    """The element that each output position copies."""
    u = source_coordinates(axis, how.coordinates)
    rule = how.nearest
    if rule == "simple":
        rule = "ceil" if axis.scale < 1 else "floor"
    if rule == "floor":
        picked = np.floor(u)
    elif rule == "ceil":
        picked = np.ceil(u)
    elif rule == "round_prefer_ceil":
        picked = np.floor(u + _f32(0.5))
    else:
        picked = np.ceil(u - _f32(0.5))
    return np.clip(picked, 0, axis.size - 1).astype(np.int64)


def _linear(t: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    weights: npt.NDArray[np.float64] = np.maximum(1 - np.abs(t), 0)
    return weights


def _cubic(t: npt.NDArray[np.float64], a: float) -> npt.NDArray[np.float64]:
    t = np.abs(t)
    inner = ((a + 2) * t - (a + 3)) * t * t + 1
    outer = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    result: npt.NDArray[np.float64] = np.where(t <= 1, inner, np.where(t < 2, outer, 0.0))
    return result


def weight_matrix(axis: Axis, how: ResizeMode) -> FloatArray:
    """The (target, size) matrix of linear or cubic interpolation along ``axis``."""
    u = source_coordinates(axis, how.coordinates).astype(np.float64)
    stretch = min(float(axis.scale), 1.0) if how.antialias else 1.0
    reach = int(np.ceil((2 if how.mode == "cubic" else 1) / stretch)) + 1
    positions = np.floor(u)[:, None] + np.arange(-reach, reach + 1)[None, :]
    distance = (positions - u[:, None]) * stretch
    weights = _cubic(distance, how.cubic_a) if how.mode == "cubic" else _linear(distance)
    if how.exclude_outside:
        weights = np.where((positions < 0) | (positions > axis.size - 1), 0.0, weights)
    if how.exclude_outside or how.antialias:
        weights = weights / weights.sum(axis=1, keepdims=True)
    matrix = np.zeros((axis.target, axis.size))
    columns = np.clip(positions, 0, axis.size - 1).astype(np.int64)
    np.add.at(matrix, (np.arange(axis.target)[:, None], columns), weights)
    return matrix.astype(_f32)


class Resizer:
    """Applies a ResizeMode; remembers the indices and matrices of the sizes it has seen."""

    def __init__(self, how: ResizeMode) -> None:
        self.how = how
        self._memory: dict[tuple[object, ...], Tensor] = {}

    def __call__(self, x: Tensor, axes: Sequence[Axis]) -> Tensor:
        """Resize ``x`` along ``axes``; axes that keep every element are left alone."""
        crops = self.how.coordinates == "tf_crop_and_resize"
        changed = [a for a in axes if crops or a.target != a.size or a.scale != 1.0]
        y = self._native(x, changed)
        if y is None:
            y = x
            for axis in changed:
                y = self._nearest(y, axis) if self.how.mode == "nearest" else self._weigh(y, axis)
        return self._extrapolate(y, changed) if crops else y

    def _native(self, x: Tensor, axes: Sequence[Axis]) -> Tensor | None:
        """Torch's own interpolation of the last two axes where it is the same function."""
        if x.dim() != 4 or [a.axis for a in axes] != [2, 3] or not x.is_floating_point():
            return None
        sizes = tuple(a.target for a in axes)
        if self.how.mode == "nearest":
            return F.interpolate(x, sizes, mode="nearest") if all(map(self._repeats, axes)) else None
        if self.how.antialias or (self.how.mode == "cubic" and self._is_special_cubic()):
            return None
        name = "bilinear" if self.how.mode == "linear" else "bicubic"
        if self.how.coordinates == "align_corners":
            return F.interpolate(x, sizes, mode=name, align_corners=True)
        halves = self.how.coordinates == "half_pixel" or (
            self.how.coordinates == "pytorch_half_pixel" and min(sizes) > 1
        )
        if halves and all(a.scale == _f32(a.target) / _f32(a.size) for a in axes):
            return F.interpolate(x, sizes, mode=name, align_corners=False)
        return None

    def _is_special_cubic(self) -> bool:
        return self.how.exclude_outside or self.how.cubic_a != -0.75

    def _repeats(self, axis: Axis) -> bool:
        """Whether nearest repeats every element the same number of times."""
        if axis.target % axis.size:
            return False
        plain = np.arange(axis.target) // (axis.target // axis.size)
        return bool((nearest_indices(axis, self.how) == plain).all())

    def _recall(self, x: Tensor, axis: Axis) -> Tensor:
        dtype = x.dtype if x.is_floating_point() else torch.float32
        key = (axis, dtype, x.device)
        if key not in self._memory:
            # A tensor made in inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False):
                if self.how.mode == "nearest":
                    made = torch.from_numpy(nearest_indices(axis, self.how)).to(x.device)
                else:
                    made = torch.from_numpy(weight_matrix(axis, self.how)).to(x.device, dtype)
            self._memory[key] = made
        return self._memory[key]

    def _nearest(self, x: Tensor, axis: Axis) -> Tensor:
        return x.index_select(axis.axis, self._recall(x, axis))

    def _weigh(self, x: Tensor, axis: Axis) -> Tensor:
        matrix = self._recall(x, axis)
        y = torch.matmul(x.to(matrix.dtype).movedim(axis.axis, -1), matrix.T).movedim(-1, axis.axis)
        return y if x.is_floating_point() else y.to(x.dtype)

    def _extrapolate(self, x: Tensor, axes: Sequence[Axis]) -> Tensor:
        for axis in axes:
            u = source_coordinates(axis, self.how.coordinates)
            outside = torch.from_numpy((u < 0) | (u > axis.size - 1)).to(x.device)
            shape = [-1 if a == axis.axis else 1 for a in range(x.dim())]
            fill = torch.full((), self.how.extrapolation, dtype=x.dtype, device=x.device)
            x = torch.where(outside.reshape(shape), fill, x)
        return x


def axes_from_scales(
    x: Tensor, scales: Sequence[float], axes: Sequence[int], roi: Sequence[float], *, crops: bool
) -> list[Axis]:
    """Axis changes from scales: target = floor(size * scale), of the cropped size where ``crops``."""
    found = []
    for i, (axis, scale) in enumerate(zip(axes, scales, strict=True)):
        window = (float(roi[i]), float(roi[i + len(axes)])) if crops and roi else (0.0, 1.0)
        length = _f32(x.shape[axis]) * _f32(scale)
        target = int(length * (_f32(window[1]) - _f32(window[0])) if crops else length)
        found.append(Axis(axis, x.shape[axis], target, float(_f32(scale)), window))
    return found


def axes_from_sizes(
    x: Tensor, sizes: Sequence[int], axes: Sequence[int], roi: Sequence[float], policy: str
) -> list[Axis]:
    """Axis changes from sizes, or from the one scale that ``policy`` derives from them."""
    scales = [_f32(m) / _f32(x.shape[axis]) for m, axis in zip(sizes, axes, strict=True)]
    if policy != "stretch":
        scale = min(scales) if policy == "not_larger" else max(scales)
        scales = [scale] * len(scales)
        sizes = [int(np.floor(scale * _f32(x.shape[axis]) + _f32(0.5))) for axis in axes]
    found = []
    for i, (axis, size, s) in enumerate(zip(axes, sizes, scales, strict=True)):
        window = (float(roi[i]), float(roi[i + len(axes)])) if roi else (0.0, 1.0)
        found.append(Axis(axis, x.shape[axis], size, float(s), window))
    return found


def _read_mode(spec: NodeSpec) -> ResizeMode:
    mode = spec.text("mode", "nearest")
    how = ResizeMode(
        mode=mode,
        coordinates=spec.text("coordinate_transformation_mode", "half_pixel"),
        nearest=spec.text("nearest_mode", "round_prefer_floor"),
        cubic_a=round(spec.number("cubic_coeff_a", -0.75), 7),
        exclude_outside=bool(spec.integer("exclude_outside", 0)),
        antialias=bool(spec.integer("antialias", 0)),
        extrapolation=spec.number("extrapolation_value", 0.0),
    )
    if mode not in ("nearest", "linear", "cubic") or how.coordinates not in _COORDINATES:
        raise Declined(f"Resize with mode {mode}, coordinates {how.coordinates}")
    if how.nearest not in _NEAREST:
        raise Declined(f"Resize with nearest_mode {how.nearest}")
    return how


@register("", "Resize", 11, host_inputs=(1, 2, 3))
def resize(spec: NodeSpec) -> Kernel:
    """Resize by scales or sizes, of all axes or (opset 18) of ``axes``."""
    resizer = Resizer(_read_mode(spec))
    policy = spec.text("keep_aspect_ratio_policy", "stretch")
    fixed_axes = spec.integers("axes")
    crops = resizer.how.coordinates == "tf_crop_and_resize"
    fixed = {i: spec.constant(i) for i in (1, 2, 3)}

    def read(index: int, value: Tensor | None) -> list[float]:
        constant = fixed[index]
        if constant is not None:
            listed: list[float] = constant.reshape(-1).tolist()
            return listed
        return [] if value is None else value.reshape(-1).tolist()

    def run(
        x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
    ) -> Tensor:
        axes = [a % x.dim() for a in fixed_axes] if fixed_axes else list(range(x.dim()))
        window = read(1, roi) if crops else []
        targets = read(3, sizes)
        if targets:
            changes = axes_from_sizes(x, [int(m) for m in targets], axes, window, policy)
        else:
            changes = axes_from_scales(x, read(2, scales), axes, window, crops=crops)
        return resizer(x, changes)

    return run


def _legacy(spec: NodeSpec) -> Resizer:
    mode = spec.text("mode", "nearest")
    if mode not in ("nearest", "linear", "bilinear"):
        raise Declined(f"{spec.op} with mode {mode}")
    mode = "nearest" if mode == "nearest" else "linear"
    return Resizer(ResizeMode(mode=mode, coordinates="asymmetric", nearest="simple"))


@register("", "Upsample", 7)
def upsample_attribute(spec: NodeSpec) -> Kernel:
    """Upsample whose scales are an attribute."""
    resizer, scales = _legacy(spec), [float(s) for s in spec.attribute("scales", [])]
    return lambda x: resizer(x, axes_from_scales(x, scales, range(x.dim()), (), crops=False))


def _legacy_scales_input(spec: NodeSpec) -> Kernel:
    resizer, fixed = _legacy(spec), spec.constant(1)
    constant = None if fixed is None else [float(s) for s in fixed.reshape(-1)]

    def run(x: Tensor, scales: Tensor | None) -> Tensor:
        values = (constant or []) if scales is None else scales.tolist()
        return resizer(x, axes_from_scales(x, values, range(x.dim()), (), crops=False))

    return run


register("", "Upsample", 9, host_inputs=(1,))(_legacy_scales_input)
register("", "Resize", 10, host_inputs=(1,))(_legacy_scales_input)
