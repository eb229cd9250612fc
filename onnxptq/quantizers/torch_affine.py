"""The uniform affine quantizer of :mod:`onnxptq.quantizers.affine`, on torch tensors.

    x_hat = clamp(round(x / scale), qmin - zero_point, qmax - zero_point) * scale

which equals (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale, bit for bit: all
integers of up to 24 bits are exact floats, and a longer limit is rounded as the integer itself is. Half to even,
single precision, no negative zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from onnxptq.quantizers.affine import expand
from onnxptq.types import QParams


def fake_quantize(x: torch.Tensor, qparams: QParams) -> torch.Tensor:
    """Floats on the grid of ``qparams``, of the shape and on the device of float32 ``x``."""
    return fake_quantizer(qparams)(x)


def fake_quantizer(qparams: QParams) -> Callable[[torch.Tensor], torch.Tensor]:
    """:func:`fake_quantize` with fixed parameters, expanded once per shape of the tensor and device."""
    cache: dict[tuple[torch.Size, torch.device], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def apply(x: torch.Tensor) -> torch.Tensor:
        key = (x.shape, x.device)
        if key not in cache:
            cache.clear()
            cache[key] = _expanded(qparams, x)
        return cast(torch.Tensor, _Fixed.apply(x, *cache[key]))  # type: ignore[no-untyped-call]

    return apply


class _Fixed(torch.autograd.Function):
    """Gradients pass the rounding straight through and end beyond the grid, as those of learnt grids do
    (:mod:`onnxptq.quantizers.straight_through`)."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        scale: torch.Tensor,
        low: torch.Tensor,
        high: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, scale, low, high)
        # Adding zero turns -0.0, which no integer stands for, into 0.0.
        return torch.div(x, scale).round_().clamp_(low, high).add_(0.0).mul_(scale)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, scale, low, high = ctx.saved_tensors  # type: ignore[attr-defined]
        is_inside = (x >= (low - 0.5) * scale) & (x <= (high + 0.5) * scale)
        return gradient * is_inside, None, None, None


def _expanded(qparams: QParams, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scale and clamping limits that broadcast against ``x``."""
    shape = tuple(x.shape)
    scale = expand(qparams.scale, qparams.granularity, shape)
    zero_point = expand(qparams.zero_point, qparams.granularity, shape).astype(np.int64)
    low, high = qparams.qtype.qmin - zero_point, qparams.qtype.qmax - zero_point

    def tensor(values: object) -> torch.Tensor:
        # On the device even if it is a single number: dividing by a host scalar multiplies by its inverse there.
        return torch.tensor(np.asarray(values), dtype=torch.float32, device=x.device)

    return tensor(scale), tensor(low), tensor(high)
