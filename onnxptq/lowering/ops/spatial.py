"""Pad, DepthToSpace, SpaceToDepth, GridSample, AffineGrid, CenterCropPad.

Pad modes: ``constant``, ``reflect`` (without the border), ``edge``, ``wrap``; negative pads cut.
GridSample: x = ((g + 1) n - 1) / 2, or (g + 1) (n - 1) / 2 with ``align_corners``, for g in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from onnxptq.lowering.ops.windows import padding_list
from onnxptq.lowering.registry import Declined, Kernel, NodeSpec, register

Tensor = torch.Tensor
Ints = tuple[int, ...]
_PAD_MODES: Mapping[str, str] = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}


def _pad_constant(x: Tensor, pads: Ints, value: float) -> Tensor:
    dims = len(pads) // 2
    flat = padding_list(pads[:dims], pads[dims:])
    if x.dtype == torch.bool:
        return F.pad(x.to(torch.uint8), flat, value=float(bool(value))).to(torch.bool)
    return F.pad(x, flat, value=value)


def _pad_by_index(x: Tensor, pads: Ints, mode: str) -> Tensor:
    dims = len(pads) // 2
    for axis, (begin, end) in enumerate(zip(pads[:dims], pads[dims:], strict=True)):
        if begin == 0 and end == 0:
            continue
        size = x.shape[axis]
        positions = np.arange(size)[max(-begin, 0) : size - max(-end, 0)]
        positions = np.pad(positions, (max(begin, 0), max(end, 0)), mode=mode)  # type: ignore[call-overload]
        x = x.index_select(axis, torch.from_numpy(positions).to(x.device))
    return x


def _all_axes(pads: Sequence[int], axes: Sequence[int] | None, rank: int) -> Ints:
    """Pads for every axis, from pads for ``axes`` only."""
    if axes is None:
        return tuple(pads)
    full = [0] * (2 * rank)
    for i, axis in enumerate(axes):
        at = axis + rank if axis < 0 else axis
        full[at], full[at + rank] = pads[i], pads[i + len(axes)]
    return tuple(full)


def _read_pad_mode(spec: NodeSpec) -> str:
    mode = spec.text("mode", "constant")
    if mode != "constant" and mode not in _PAD_MODES:
        raise Declined(f"Pad mode {mode}")
    return mode


def _pad(x: Tensor, pads: Ints, mode: str, value: float) -> Tensor:
    return _pad_constant(x, pads, value) if mode == "constant" else _pad_by_index(x, pads, _PAD_MODES[mode])


@register("", "Pad", 2)
def pad_attributes(spec: NodeSpec) -> Kernel:
    """Pad whose pads and value are attributes."""
    pads, value, mode = spec.integers("pads") or (), spec.number("value", 0.0), _read_pad_mode(spec)
    return lambda x: _pad(x, pads, mode, value)


@register("", "Pad", 11, host_inputs=(1, 2, 3))
def pad(spec: NodeSpec) -> Kernel:
    """Pad whose pads, value and (opset 18) axes are inputs."""
    mode = _read_pad_mode(spec)
    fixed_pads, fixed_axes = spec.constant_integers(1), spec.constant_integers(3)
    constant = spec.constant(2)
    fixed_value = None if constant is None or constant.size == 0 else constant.reshape(-1)[0].item()

    def run(
        x: Tensor, pads: Tensor | None, value: Tensor | None = None, axes: Tensor | None = None
    ) -> Tensor:
        amounts = tuple(pads.tolist()) if pads is not None else fixed_pads or ()
        where = tuple(axes.reshape(-1).tolist()) if axes is not None else fixed_axes
        fill = value.reshape(-1)[0].item() if value is not None and value.numel() else fixed_value or 0
        return _pad(x, _all_axes(amounts, where, x.dim()), mode, fill)

    return run


@register("", "DepthToSpace", 1)
def depth_to_space(spec: NodeSpec) -> Kernel:
    """Blocks of channels become blocks of pixels; the block index is outermost (DCR) or innermost (CRD)."""
    block, mode = spec.integer("blocksize", 1), spec.text("mode", "DCR")

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if mode == "CRD":
            return F.pixel_shuffle(x, block)
        y = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return y.reshape(n, c // block**2, h * block, w * block)

    return run


@register("", "SpaceToDepth", 1)
def space_to_depth(spec: NodeSpec) -> Kernel:
    """Blocks of pixels become blocks of channels, as the inverse of DepthToSpace."""
    block, mode = spec.integer("blocksize", 1), spec.text("mode", "DCR")

    def run(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        if mode == "CRD":
            return F.pixel_unshuffle(x, block)
        y = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return y.reshape(n, c * block**2, h // block, w // block)

    return run


_GRID_MODES: Mapping[str, str] = {
    "bilinear": "bilinear",
    "linear": "bilinear",
    "nearest": "nearest",
    "bicubic": "bicubic",
    "cubic": "bicubic",
}


@register("", "GridSample", 16, note="cubic only for 2 spatial axes")
def grid_sample(spec: NodeSpec) -> Kernel:
    """GridSample; one definition serves the mode names of opsets 16 and 20."""
    mode = spec.text("mode", "linear")
    padding = spec.text("padding_mode", "zeros")
    align = bool(spec.integer("align_corners", 0))
    if mode not in _GRID_MODES or padding not in ("zeros", "border", "reflection"):
        raise Declined(f"GridSample with mode {mode}, padding_mode {padding}")
    torch_mode = _GRID_MODES[mode]
    if torch_mode == "bicubic" and spec.rank(0) not in (None, 4):
        raise Declined("cubic GridSample of other than 2 spatial axes")
    return lambda x, grid: F.grid_sample(x, grid, torch_mode, padding, align)


@register("", "AffineGrid", 20, host_inputs=(1,))
def affine_grid(spec: NodeSpec) -> Kernel:
    """AffineGrid."""
    align = bool(spec.integer("align_corners", 0))
    fixed = spec.constant_integers(1)

    def run(theta: Tensor, size: Tensor | None) -> Tensor:
        sizes = list(fixed or ()) if size is None else size.tolist()
        return F.affine_grid(theta, sizes, align_corners=align)

    return run


@register("", "CenterCropPad", 18, host_inputs=(1,))
def center_crop_pad(spec: NodeSpec) -> Kernel:
    """Crop or zero-pad around the centre to ``shape``; the odd element goes to the end."""
    axes = spec.integers("axes")
    fixed = spec.constant_integers(1)

    def run(x: Tensor, shape: Tensor | None) -> Tensor:
        wanted = (fixed or ()) if shape is None else tuple(shape.tolist())
        rank = x.dim()
        pads = [0] * (2 * rank)
        for axis, size in zip(axes or range(rank), wanted, strict=True):
            at = axis % rank
            missing = size - x.shape[at]
            # A crop starts at floor(excess / 2), a padding begins with floor(missing / 2).
            begin = missing // 2 if missing >= 0 else -(-missing // 2)
            pads[at], pads[at + rank] = begin, missing - begin
        return _pad_constant(x, tuple(pads), 0.0)

    return run
