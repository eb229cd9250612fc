"""The dynamic focusing quantizer of AIQViT (arXiv 2502.04628), on torch tensors: both ends of the grid are learnt.

    s = (b2 - b1) / Q,    u = (x - b1) / s,    x_hat = b1 + s clamp(round(u), 0, Q)        Q = qmax - qmin

so what lies outside [b1, b2] becomes the nearer end. With the rounding passed straight through, the gradients are

    below b1                  d/db1 = 1                  d/db2 = 0                  d/dx = 0
    inside, q = round(u)      d/db1 = -(q - u) / Q       d/db2 = (q - u) / Q        d/dx = 1
    above b2                  d/db1 = 0                  d/db2 = 1                  d/dx = 0

A file holds such a grid only where it passes through 0 in whole steps, so b1 is used as its nearest n s, which is
taken for b1 in the gradients too:

    x_hat = s clamp(round(x / s), n, n + Q)

This is the affine quantizer with zero point qmin - n, value for value.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from onnxptq.quantizers.affine import SMALLEST_SCALE, shifted_type
from onnxptq.quantizers.straight_through import inner, on_grid, passed
from onnxptq.types import PerTensor, QParams, QType

_LEAST_WIDTH = 2.0**-10
"""The range never gets narrower than this share of its first width: from a point no gradient leads back."""


class FocusedActivation(torch.nn.Module):
    """A per-tensor quantizer of values that are not negative, with learnt ends.

    Args:
        qparams: where to begin, on a grid of ``qtype``'s width that starts at 0 or above.

    Raises:
        ValueError: the grid has no form that may start above 0 (see :func:`can_focus`).
    """

    def __init__(self, qparams: QParams) -> None:
        super().__init__()
        qtype = _focused_type(qparams.qtype)
        if qtype is None or not isinstance(qparams.granularity, PerTensor):
            raise ValueError(f"a grid of {qparams.qtype} cannot start above 0")
        self._qtype = qtype
        self._levels = qtype.qmax - qtype.qmin
        self._most_steps = qtype.qmin - qtype.storage_limits[0]
        scale, steps = float(qparams.scale), qparams.qtype.qmin - int(qparams.zero_point)
        self._start = steps * scale
        self._width = self._levels * scale
        # In units of the first width, so that one learning rate serves all.
        self.low = torch.nn.Parameter(torch.zeros(1))
        self.high = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` on the grid, differentiable in x and in both ends."""
        with torch.no_grad():
            # A step that passes a bound ends on it: from beyond it no gradient would lead back.
            self.low.clamp_min_(-self._start / self._width)
            torch.maximum(self.high, self.low - 1.0 + _LEAST_WIDTH, out=self.high)
        b1, b2 = self.ends()
        return cast(torch.Tensor, _Focus.apply(x, b1, b2, self._levels, self._most_steps))  # type: ignore[no-untyped-call]

    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """b1 and b2, before b1 is moved to a whole number of steps."""
        return self._start + self._width * self.low, self._start + self._width * (1.0 + self.high)

    @torch.no_grad()
    def hardened(self) -> QParams:
        """Parameters as the file will hold them."""
        scale, steps = _grid(*self.ends(), self._levels, self._most_steps)
        return QParams(
            scale=scale.cpu().numpy().astype(np.float32).reshape(()),
            zero_point=np.asarray(self._qtype.qmin - int(steps), np.int32),
            qtype=self._qtype,
            granularity=PerTensor(),
        )


def can_focus(qparams: QParams) -> bool:
    """Whether the grid of ``qparams``, which holds nothing below 0, can be made to start anywhere above."""
    is_above = qparams.zero_point.size == 1 and int(qparams.zero_point) <= qparams.qtype.qmin
    return (
        is_above and isinstance(qparams.granularity, PerTensor) and _focused_type(qparams.qtype) is not None
    )


def _focused_type(qtype: QType) -> QType | None:
    """The signed grid from integer 0 on: made of an unsigned one, or there already."""
    return qtype if qtype.is_signed and qtype.qmin == 0 else shifted_type(qtype)


def _grid(
    b1: torch.Tensor, b2: torch.Tensor, levels: int, most_steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """s and n. A range so narrow that n would leave its storage is widened below."""
    scale = torch.maximum((b2 - b1) / levels, b2 / (levels + most_steps)).clamp_min(SMALLEST_SCALE)
    return scale, torch.round(b1 / scale).clamp(0, most_steps)


class _Focus(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: torch.Tensor,
        b1: torch.Tensor,
        b2: torch.Tensor,
        levels: int,
        most_steps: int,
    ) -> torch.Tensor:
        scale, steps = _grid(b1, b2, levels, most_steps)
        first = float(steps)
        found = on_grid(x, scale, first, first + levels)
        ctx.save_for_backward(x, found, scale)
        ctx.ends = first, first + levels  # type: ignore[attr-defined]
        return found

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        x, found, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        first, last = ctx.ends  # type: ignore[attr-defined]
        step, levels = float(scale), last - first
        through = passed(gradient, x, first * step, last * step)
        shared = (inner(through, found) - inner(through, x)) / (step * levels)
        # Beyond the grid x_hat / s is one of two integers, which tells below from above without another comparison:
        # sum g = below + above, sum g x_hat / s = first below + last above.
        beyond = gradient - through
        both = beyond.sum()
        above = (inner(beyond, found) / step - first * both) / levels
        return through, (both - above - shared).reshape(1), (above + shared).reshape(1), None, None
