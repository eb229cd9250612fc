"""Pooling: max, average and p-norm windows, and their global forms.

Average: sum of the window / count, where the count holds real elements, and padding too with
``count_include_pad`` (never the positions that ``ceil_mode`` adds beyond the padding).
LpPool: (sum |x|^p)^(1/p).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from onnxptq.lowering.ops.windows import Ints, Window, output_length, padding_list, read_window
from onnxptq.lowering.registry import Declined, Kernel, NodeSpec, register

Tensor = torch.Tensor
_MAX: Mapping[int, Callable[..., Tensor]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN: Mapping[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def _read_kernel(spec: NodeSpec) -> Ints:
    kernel = spec.integers("kernel_shape")
    if kernel is None or len(kernel) not in _MAX:
        raise Declined(f"kernel_shape {kernel}; 1 to 3 spatial axes are supported")
    return kernel


def _geometry(window: Window, size: Sequence[int], kernel: Ints, *, ceil: bool) -> tuple[Ints, Ints, Ints]:
    """Begin padding, end padding, and what more the end needs so that a floor-mode pool gives every window.

    The third value is negative where the last elements belong to no window.
    """
    begins, ends = window.pads_of(size, kernel)
    dims = len(kernel)
    extras = []
    for i, b, e, k, s, d in zip(
        size, begins, ends, kernel, window.stride_of(dims), window.dilation_of(dims), strict=True
    ):
        # SAME_* fix the output length themselves, so rounding has no say.
        count = output_length(i, (b, e), k, s, d, ceil=ceil and window.auto_pad == "NOTSET")
        extras.append((count - 1) * s + d * (k - 1) + 1 - (i + b + e))
    return begins, ends, tuple(extras)


@register("", "MaxPool", 1, note="the Indices output is declined")
def max_pool(spec: NodeSpec) -> Kernel:
    """MaxPool; padding is the lowest value of the type."""
    if spec.n_outputs > 1:
        raise Declined("the Indices output of MaxPool")
    kernel = _read_kernel(spec)
    window = read_window(spec)
    ceil = bool(spec.integer("ceil_mode", 0))
    spec.ignore("storage_order")
    dims = len(kernel)
    pool, strides, dilations = _MAX[dims], window.stride_of(dims), window.dilation_of(dims)

    def run(x: Tensor) -> Tensor:
        begins, ends, extras = _geometry(window, x.shape[2:], kernel, ceil=ceil)
        is_native = begins == ends and all(
            e <= 0 and 2 * b <= k for e, b, k in zip(extras, begins, kernel, strict=True)
        )
        if is_native and x.is_floating_point():
            return pool(x, kernel, strides, begins, dilations)
        ends = tuple(e + max(more, 0) for e, more in zip(ends, extras, strict=True))
        if x.is_floating_point():
            return pool(F.pad(x, padding_list(begins, ends), value=-math.inf), kernel, strides, 0, dilations)
        # 8-bit integers are exact in float32, where torch has the kernel.
        low = float(torch.iinfo(x.dtype).min)
        y = pool(F.pad(x.float(), padding_list(begins, ends), value=low), kernel, strides, 0, dilations)
        return y.to(x.dtype)

    return run


@register("", "AveragePool", 1)
def average_pool(spec: NodeSpec) -> Kernel:
    """AveragePool; windows that touch padding divide by their own count."""
    kernel = _read_kernel(spec)
    window = read_window(spec)
    ceil = bool(spec.integer("ceil_mode", 0))
    include_pad = bool(spec.integer("count_include_pad", 0))
    dims = len(kernel)
    strides = window.stride_of(dims)
    counts: dict[tuple[object, ...], Tensor] = {}

    def run(x: Tensor) -> Tensor:
        begins, ends, extras = _geometry(window, x.shape[2:], kernel, ceil=ceil)
        grown = any(e > 0 for e in extras)
        padded = any(begins) or any(ends)
        is_plain = begins == ends and not grown and not window.dilations and (include_pad or not padded)
        if is_plain and all(2 * b <= k for b, k in zip(begins, kernel, strict=True)):
            return _MEAN[dims](x, kernel, strides, begins)
        key = (tuple(x.shape[2:]), x.dtype, x.device)
        if key not in counts:
            # A count made in inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False):
                ones = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
                ones = F.pad(ones, padding_list(begins, ends), value=1.0 if include_pad else 0.0)
                counts[key] = _window_sum(F.pad(ones, _growth(extras)), kernel, window)
        ends = tuple(e + max(more, 0) for e, more in zip(ends, extras, strict=True))
        total = _window_sum(F.pad(x, padding_list(begins, ends)), kernel, window)
        return total / counts[key]

    return run


@register("", "LpPool", 2)
def lp_pool(spec: NodeSpec) -> Kernel:
    """LpPool: the p-norm of each window."""
    kernel = _read_kernel(spec)
    window = read_window(spec)
    ceil = bool(spec.integer("ceil_mode", 0))
    p = spec.integer("p", 2)

    def run(x: Tensor) -> Tensor:
        begins, ends, extras = _geometry(window, x.shape[2:], kernel, ceil=ceil)
        ends = tuple(e + max(more, 0) for e, more in zip(ends, extras, strict=True))
        powers = F.pad(x, padding_list(begins, ends)).abs().pow(p)
        return _window_sum(powers, kernel, window).pow(1.0 / p)

    return run


@register("", "GlobalAveragePool", 1)
def global_average_pool(spec: NodeSpec) -> Kernel:
    """Mean over all spatial axes, kept as 1."""
    del spec
    return lambda x: x.mean(dim=tuple(range(2, x.dim())), keepdim=True)


@register("", "GlobalMaxPool", 1)
def global_max_pool(spec: NodeSpec) -> Kernel:
    """Maximum over all spatial axes, kept as 1. One maximal element receives the gradient, as in MaxPool."""
    del spec

    def run(x: Tensor) -> Tensor:
        flat = x.flatten(2).max(dim=2).values
        return flat.reshape(*flat.shape, *(1,) * (x.dim() - 2))

    return run


@register("", "GlobalLpPool", 2)
def global_lp_pool(spec: NodeSpec) -> Kernel:
    """p-norm over all spatial axes, kept as 1."""
    p = spec.integer("p", 2)
    return lambda x: torch.linalg.vector_norm(x, ord=p, dim=tuple(range(2, x.dim())), keepdim=True)


def _growth(extras: Sequence[int]) -> list[int]:
    return padding_list((0,) * len(extras), tuple(max(e, 0) for e in extras))


def _window_sum(x: Tensor, kernel: Ints, window: Window) -> Tensor:
    """Sum over every window of an already padded tensor, as a convolution with ones on each channel alone."""
    dims = len(kernel)
    dilations = window.dilation_of(dims)
    if all(d == 1 for d in dilations):
        return _MEAN[dims](x, kernel, window.stride_of(dims)) * math.prod(kernel)
    flat = x.reshape(-1, 1, *x.shape[2:])
    ones = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
    y = _CONV[dims](flat, ones, None, window.stride_of(dims), 0, dilations)
    return y.reshape(*x.shape[:2], *y.shape[2:])
