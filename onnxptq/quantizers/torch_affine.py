"""The uniform affine quantizer of :mod:`onnxptq.quantizers.affine`, on torch tensors.

    x_hat = clamp(round(x / scale), qmin - zero_point, qmax - zero_point) * scale

which equals (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale, bit for bit: all
integers of up to 24 bits are exact floats, and a longer limit is rounded as the integer itself is. Half to even,
single precision, no negative zeros.
"""

from __future__ import annotations

from collections.abc import Callable

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
        scale, low, high = cache[key]
        clamped = torch.minimum(torch.maximum(torch.round(x / scale), low), high)
        # Adding zero turns -0.0, which no integer stands for, into 0.0.
        return (clamped + 0.0) * scale

    return apply


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
