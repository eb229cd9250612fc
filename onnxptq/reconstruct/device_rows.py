"""The rows that a linear layer multiplies and their second moments, where torch runs the network on a device.

The same numbers as :func:`onnxptq.reconstruct.gram.layer_rows` and :meth:`onnxptq.reconstruct.gram.Gram.add`, from
tensors that stay where they are: only sums of K x K come back. On a processor the numpy form is faster, since its
product of a matrix with itself does half of the work.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.nn import functional

from onnxptq.graph.linear import Linear
from onnxptq.reconstruct.gram import Gram, Matrix, picked, window_of


def device_rows(layer: Linear, value: torch.Tensor, limit: int) -> torch.Tensor:
    """Rows of what a layer that ``has_rows`` reads, those that ``layer_rows`` picks: (groups, n, K)."""
    if layer.node.op == "Conv":
        return _patches(layer, value, limit)
    rows = value.reshape(-1, value.shape[-1])
    return rows[torch.from_numpy(picked(len(rows), limit)).to(value.device)][None]


def add_on_device(gram: Gram, rows: torch.Tensor, quantized: torch.Tensor) -> None:
    """Add rows of shape (groups, n, K) to the sums of ``gram``, which stay in memory."""
    transposed = quantized.mT
    gram.quantized += _sums(transposed @ quantized)
    if gram.mixed is not gram.quantized:
        gram.mixed += _sums(transposed @ rows)
    if gram.floats is not None:
        gram.floats += _sums(rows.mT @ rows)
    gram.float_total += _sums(rows.sum(dim=1, dtype=torch.float64))
    gram.quantized_total += _sums(quantized.sum(dim=1, dtype=torch.float64))
    gram.rows += rows.shape[1]


def _sums(values: torch.Tensor) -> Matrix:
    return np.asarray(values.cpu().numpy(), np.float64)


def _patches(layer: Linear, value: torch.Tensor, limit: int) -> torch.Tensor:
    """Patches of a convolution's input, (groups, n, channels per group * kernel)."""
    window, spatial = window_of(layer), value.ndim - 2
    # torch lists the pads of the last axis first.
    windows = functional.pad(value, [pad for pads in reversed(window.pads) for pad in pads])
    for axis, (reach, stride) in enumerate(zip(window.reach, window.strides, strict=True), start=2):
        windows = windows.unfold(axis, reach, stride)
    for axis, step in enumerate(window.dilations, start=2 + spatial):
        windows = windows[(slice(None),) * axis + (slice(None, None, step),)]
    windows = windows.movedim(1, 1 + spatial)
    places = tuple(windows.shape[: 1 + spatial])
    chosen = np.unravel_index(picked(math.prod(places), limit), places)
    patches = windows[tuple(torch.from_numpy(index).to(value.device) for index in chosen)]
    return patches.reshape(len(patches), layer.group, -1).movedim(1, 0).contiguous()
