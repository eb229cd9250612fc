"""RoiAlign, average mode.

Region (x1, y1, x2, y2) is scaled by ``spatial_scale`` (and shifted by -0.5 with half_pixel), cut into bins,
and each bin is the mean of g_h x g_w bilinear samples at y = y1 + (bin + (i + 0.5) / g_h) h_bin. g is
``sampling_ratio``, or ceil(bin size) where that is 0. Samples farther than one pixel outside are zero.
Gradients flow to the features; the regions are constants.
"""

from __future__ import annotations

import torch

from onnxptq.lowering.registry import Declined, Kernel, NodeSpec, register

Tensor = torch.Tensor


def _axis_samples(start: Tensor, bin_size: Tensor, bins: int, grid: int, size: int) -> tuple[Tensor, ...]:
    """Lower and upper pixel, the upper one's weight, and what is inside: each (regions, bins * grid)."""
    steps = (torch.arange(bins * grid, device=start.device, dtype=start.dtype) + 0.5) / grid
    at = start.unsqueeze(1) + steps * bin_size.unsqueeze(1)
    inside = (at >= -1) & (at <= size)
    at = at.clamp(0, size - 1)
    low = at.floor().long()
    return low, (low + 1).clamp(max=size - 1), at - low, inside.to(start.dtype)


def _sample(x: Tensor, batch: Tensor, rows: tuple[Tensor, ...], columns: tuple[Tensor, ...]) -> Tensor:
    """Bilinear samples as (regions, channels, rows, columns)."""
    y0, y1, wy, in_y = rows
    x0, x1, wx, in_x = columns
    pick = batch.reshape(-1, 1, 1)

    def at(y: Tensor, column: Tensor) -> Tensor:
        return x[pick, :, y.unsqueeze(2), column.unsqueeze(1)].permute(0, 3, 1, 2)

    wy, wx = wy.unsqueeze(2).unsqueeze(1), wx.unsqueeze(1).unsqueeze(1)
    top = at(y0, x0) * (1 - wx) + at(y0, x1) * wx
    bottom = at(y1, x0) * (1 - wx) + at(y1, x1) * wx
    return (top * (1 - wy) + bottom * wy) * (in_y.unsqueeze(2) * in_x.unsqueeze(1)).unsqueeze(1)


def _roi_align(spec: NodeSpec, half_pixel: bool) -> Kernel:
    if spec.text("mode", "avg") != "avg":
        raise Declined("RoiAlign in max mode")
    height, width = spec.integer("output_height", 1), spec.integer("output_width", 1)
    ratio, scale = spec.integer("sampling_ratio", 0), spec.number("spatial_scale", 1.0)
    offset = 0.5 if half_pixel else 0.0

    def group(
        x: Tensor, rois: Tensor, batch: Tensor, bins: tuple[Tensor, Tensor], grid: tuple[int, int]
    ) -> Tensor:
        rows = _axis_samples(rois[:, 1], bins[0], height, grid[0], x.shape[2])
        columns = _axis_samples(rois[:, 0], bins[1], width, grid[1], x.shape[3])
        samples = _sample(x, batch, rows, columns)
        parts = samples.reshape(*samples.shape[:2], height, grid[0], width, grid[1])
        return parts.mean(dim=(3, 5))

    def run(x: Tensor, rois: Tensor, batch: Tensor) -> Tensor:
        rois = rois.detach() * scale - offset
        h_roi, w_roi = rois[:, 3] - rois[:, 1], rois[:, 2] - rois[:, 0]
        if not half_pixel:
            h_roi, w_roi = h_roi.clamp(min=1.0), w_roi.clamp(min=1.0)
        h_bin, w_bin = h_roi / height, w_roi / width
        if ratio > 0:
            grids = torch.full((rois.shape[0], 2), ratio, dtype=torch.int64, device=rois.device)
        else:
            grids = torch.stack([h_bin, w_bin], 1).ceil().long()
        y = x.new_zeros((rois.shape[0], x.shape[1], height, width))
        for size in torch.unique(grids, dim=0).tolist():
            if min(size) < 1:
                continue
            members = torch.nonzero((grids == torch.tensor(size, device=grids.device)).all(dim=1)).reshape(-1)
            bins = (h_bin[members], w_bin[members])
            part = group(x, rois[members], batch[members].long(), bins, (size[0], size[1]))
            y = y.index_copy(0, members, part)
        return y

    return run


@register("", "RoiAlign", 10, note="average mode")
def roi_align_unshifted(spec: NodeSpec) -> Kernel:
    """RoiAlign of opset 10: no half-pixel shift."""
    return _roi_align(spec, half_pixel=False)


@register("", "RoiAlign", 16, note="average mode")
def roi_align(spec: NodeSpec) -> Kernel:
    """RoiAlign whose shift is an attribute."""
    mode = spec.text("coordinate_transformation_mode", "half_pixel")
    return _roi_align(spec, half_pixel=mode == "half_pixel")
