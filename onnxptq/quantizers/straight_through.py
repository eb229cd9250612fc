"""Grids whose rounding is passed straight through by gradients, in few passes over memory.

    x_hat = s clamp(round(x / s), low, high)

With the rounding held, inside the grid dx_hat/dx = 1 and dx_hat/ds = (x_hat - x) / s; beyond an end dx_hat/dx = 0 and
dx_hat/ds is the integer of that end. For a gradient g and its part p that passes on, 0 beyond the ends,

    sum g dx_hat/ds = (<g, x_hat> - <p, x>) / s

which needs no tensor of slopes. Activations are large, and a processor waits for memory: a grid written out in single
operators takes three times as long as what is here, in both directions.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

Context = torch.autograd.function.FunctionCtx


def on_grid(x: torch.Tensor, scale: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """x_hat for a scale of one element, as the file computes it: by division, half to even."""
    return torch.div(x, scale).round_().clamp_(low, high).mul_(scale)


def passed(gradient: torch.Tensor, x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """``gradient`` where ``low`` <= x <= ``high``, else 0."""
    # The operator is strict at both ends.
    below, above = np.nextafter(np.array([low, high], np.float32), np.array([-np.inf, np.inf], np.float32))
    return cast(torch.Tensor, torch.ops.aten.hardtanh_backward(gradient, x, float(below), float(above)))


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum of products of all elements."""
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    return (a * b).sum()


def round_through(x: torch.Tensor) -> torch.Tensor:
    """Round half to even, with the gradient of the identity."""
    return cast(torch.Tensor, _Round.apply(x))  # type: ignore[no-untyped-call]


def scaled_grid(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """``x`` on the grid, differentiable in x and in the ``scale`` of shape (1,)."""
    return cast(torch.Tensor, _Grid.apply(x, scale, low, high))  # type: ignore[no-untyped-call]


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(_: Context, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x)

    @staticmethod
    def backward(_: Context, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _Grid(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(ctx: Context, x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
        found = on_grid(x, scale, low, high)
        ctx.save_for_backward(x, found, scale)
        ctx.ends = low, high  # type: ignore[attr-defined]
        return found

    @staticmethod
    def backward(ctx: Context, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, found, scale = ctx.saved_tensors  # type: ignore[attr-defined]
        low, high = ctx.ends  # type: ignore[attr-defined]
        step = float(scale)
        # What rounds to an end is still inside.
        through = passed(gradient, x, (low - 0.5) * step, (high + 0.5) * step)
        to_scale = (inner(gradient, found) - inner(through, x)).reshape(1) / scale
        return through, to_scale, None, None
