"""Activation functions, element by element, and the softmax family along an axis.

Before opset 13 Softmax, LogSoftmax and Hardmax flatten their input to two axes at ``axis`` (default 1) and
work on the second; from 13 on they work along ``axis`` (default -1) alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from onnxptq.lowering.registry import Declined, Kernel, NodeSpec, register

Tensor = torch.Tensor


def _plain(op: str, since_version: int, function: Callable[[Tensor], Tensor]) -> None:
    """Register an activation without attributes."""

    @register("", op, since_version)
    def build(spec: NodeSpec) -> Kernel:
        spec.ignore()
        return function


_plain("Relu", 6, torch.relu)
_plain("Sigmoid", 6, torch.sigmoid)
_plain("Tanh", 6, torch.tanh)
_plain("Softplus", 1, lambda x: torch.logaddexp(x, torch.zeros_like(x)))
_plain("Softsign", 1, F.softsign)
_plain("HardSwish", 14, F.hardswish)
_plain("Mish", 18, F.mish)


@register("", "LeakyRelu", 6)
def leaky_relu(spec: NodeSpec) -> Kernel:
    """x where x >= 0, alpha x elsewhere."""
    alpha = spec.number("alpha", 0.01)
    return lambda x: F.leaky_relu(x, alpha)


@register("", "PRelu", 7)
def prelu(spec: NodeSpec) -> Kernel:
    """x where x >= 0, slope x elsewhere; slope broadcasts to x."""
    del spec
    return lambda x, slope: torch.where(x < 0, slope * x, x)


@register("", "Elu", 6)
def elu(spec: NodeSpec) -> Kernel:
    """x where x >= 0, alpha (exp x - 1) elsewhere."""
    alpha = spec.number("alpha", 1.0)
    return lambda x: F.elu(x, alpha)


@register("", "Celu", 12)
def celu(spec: NodeSpec) -> Kernel:
    """max(0, x) + min(0, alpha (exp(x / alpha) - 1))."""
    alpha = spec.number("alpha", 1.0)
    return lambda x: F.celu(x, alpha)


@register("", "Selu", 6)
def selu(spec: NodeSpec) -> Kernel:
    """gamma x where x > 0, gamma alpha (exp x - 1) elsewhere."""
    alpha = spec.number("alpha", 1.67326319217681884765625)
    gamma = spec.number("gamma", 1.05070102214813232421875)
    return lambda x: F.elu(x, alpha) * gamma


@register("", "ThresholdedRelu", 10)
def thresholded_relu(spec: NodeSpec) -> Kernel:
    """x where x > alpha, 0 elsewhere."""
    alpha = spec.number("alpha", 1.0)
    return lambda x: torch.where(x > alpha, x, torch.zeros_like(x))


@register("", "Shrink", 9)
def shrink(spec: NodeSpec) -> Kernel:
    """x + bias below -lambd, x - bias above lambd, 0 between."""
    bias, lambd = spec.number("bias", 0.0), spec.number("lambd", 0.5)

    def run(x: Tensor) -> Tensor:
        y = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))
        return y.to(x.dtype)

    return run


@register("", "HardSigmoid", 6)
def hard_sigmoid(spec: NodeSpec) -> Kernel:
    """max(0, min(1, alpha x + beta))."""
    alpha, beta = spec.number("alpha", 0.2), spec.number("beta", 0.5)
    return lambda x: (x * alpha + beta).clamp(0.0, 1.0)


@register("", "Gelu", 20)
def gelu(spec: NodeSpec) -> Kernel:
    """x Phi(x), exact or with the tanh approximation."""
    approximate = spec.text("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise Declined(f"Gelu with approximate={approximate}")
    return lambda x: F.gelu(x, approximate=approximate)


@register("", "Swish", 24)
def swish(spec: NodeSpec) -> Kernel:
    """x sigmoid(alpha x)."""
    alpha = spec.number("alpha", 1.0)
    if alpha == 1.0:
        return F.silu
    return lambda x: x * torch.sigmoid(alpha * x)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    best = x.argmax(dim=axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, best, 1.0)


def _along_axis(op: str, function: Callable[[Tensor, int], Tensor]) -> None:
    """Register both semantics of a softmax-like operator."""

    @register("", op, 1)
    def build_flattened(spec: NodeSpec) -> Kernel:
        axis = spec.integer("axis", 1)

        def run(x: Tensor) -> Tensor:
            split = axis % x.dim() if axis < 0 else axis
            rows = 1
            for size in x.shape[:split]:
                rows *= size
            return function(x.reshape(rows, -1), 1).reshape(x.shape)

        return run

    @register("", op, 13)
    def build(spec: NodeSpec) -> Kernel:
        axis = spec.integer("axis", -1)
        return lambda x: function(x, axis)


_along_axis("Softmax", torch.softmax)
_along_axis("LogSoftmax", torch.log_softmax)
_along_axis("Hardmax", _hardmax)
