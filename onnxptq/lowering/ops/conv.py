"""Conv and ConvTranspose.

Conv: y[n, m, o] = b[m] + sum_{c, k} x[n, c, o s + k d - p] w[m, c, k], by groups, in 1 to 3 spatial axes.
ConvTranspose is its adjoint in x; ``output_padding`` extends the end of the result, ``output_shape`` fixes
the padding: total = s (i - 1) + output_padding + d (k - 1) + 1 - output_shape, split as ONNX's
``ConvTranspose`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from onnxptq.lowering.ops.windows import Ints, padding_list, read_window
from onnxptq.lowering.registry import Declined, Kernel, NodeSpec, register

Tensor = torch.Tensor
_CONV: Mapping[int, Callable[..., Tensor]] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_CONV_TRANSPOSE: Mapping[int, Callable[..., Tensor]] = {
    3: F.conv_transpose1d,
    4: F.conv_transpose2d,
    5: F.conv_transpose3d,
}


def _check_rank(spec: NodeSpec) -> None:
    for rank in (spec.rank(0), spec.rank(1)):
        if rank is not None and rank not in _CONV:
            raise Declined(f"{rank - 2} spatial axes; 1, 2 and 3 are supported")


@register("", "Conv", 1, note="1 to 3 spatial axes")
def conv(spec: NodeSpec) -> Kernel:
    """Conv; symmetric explicit padding goes to torch as it is, anything else is padded first."""
    _check_rank(spec)
    window = read_window(spec)
    groups = spec.integer("group", 1)
    spec.ignore("kernel_shape")
    pads = window.pads
    dims = len(pads) // 2 if pads else 0
    is_symmetric = window.auto_pad == "NOTSET" and (not pads or pads[:dims] == pads[dims:])
    fixed_padding: Ints | int = pads[:dims] if pads else 0
    strides: Ints | int = window.strides or 1
    dilations: Ints | int = window.dilations or 1

    if is_symmetric:

        def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
            return _CONV[w.dim()](x, w, b, strides, fixed_padding, dilations, groups)

        return run

    def run_padded(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        begins, ends = window.pads_of(x.shape[2:], w.shape[2:])
        if begins == ends:
            return _CONV[w.dim()](x, w, b, strides, begins, dilations, groups)
        return _CONV[w.dim()](F.pad(x, padding_list(begins, ends)), w, b, strides, 0, dilations, groups)

    return run_padded


@register("", "ConvTranspose", 1, note="1 to 3 spatial axes")
def conv_transpose(spec: NodeSpec) -> Kernel:
    """ConvTranspose; what torch's symmetric padding cannot say is cropped or extended before the bias."""
    _check_rank(spec)
    window = read_window(spec)
    groups = spec.integer("group", 1)
    output_padding = spec.integers("output_padding")
    output_shape = spec.integers("output_shape")
    spec.ignore("kernel_shape")

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        function = _CONV_TRANSPOSE[w.dim()]
        dims = w.dim() - 2
        strides, dilations = window.stride_of(dims), window.dilation_of(dims)
        extra = output_padding or (0,) * dims
        full = tuple(
            s * (i - 1) + d * (k - 1) + 1
            for i, k, s, d in zip(x.shape[2:], w.shape[2:], strides, dilations, strict=True)
        )
        if output_shape is not None:
            begins, ends = _pads_for_shape(output_shape[-dims:], full, extra, window.auto_pad)
        elif window.auto_pad in ("SAME_UPPER", "SAME_LOWER"):
            shape = tuple(i * s for i, s in zip(x.shape[2:], strides, strict=True))
            begins, ends = _pads_for_shape(shape, full, extra, window.auto_pad)
        else:
            begins, ends = window.pads_of(x.shape[2:], w.shape[2:])
        is_native = all(
            b0 == e0 and b0 >= 0 and p < max(s, d)
            for b0, e0, p, s, d in zip(begins, ends, extra, strides, dilations, strict=True)
        )
        if is_native:
            return function(x, w, b, strides, begins, extra, groups, dilations)
        y = function(x, w, None, strides, 0, 0, groups, dilations)
        crops = [-v for v in padding_list(begins, tuple(e - p for e, p in zip(ends, extra, strict=True)))]
        y = F.pad(y, crops)
        return y if b is None else y + b.reshape(-1, *(1,) * dims)

    return run


def _pads_for_shape(
    shape: Sequence[int], full: Sequence[int], extra: Sequence[int], auto_pad: str
) -> tuple[Ints, Ints]:
    """Begin and end padding that give ``shape``; the odd element goes to the end for SAME_UPPER only.

    A shape beyond the full result is extended at the end, as onnxruntime does.
    """
    totals = [max(f + p - o, 0) for o, f, p in zip(shape, full, extra, strict=True)]
    short = [max(o - f - p, 0) for o, f, p in zip(shape, full, extra, strict=True)]
    begins = [t // 2 if auto_pad == "SAME_UPPER" else t - t // 2 for t in totals]
    ends = [t - b - s for t, b, s in zip(totals, begins, short, strict=True)]
    return tuple(begins), tuple(ends)
