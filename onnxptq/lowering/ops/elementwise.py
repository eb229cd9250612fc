"""Arithmetic, element by element, with numpy's broadcasting.

Integers: Div truncates toward zero; Mod takes the divisor's sign, or the dividend's with ``fmod=1``.
Round goes to even. Clip with min > max gives max.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from onnxptq.lowering.registry import Declined, Kernel, NodeSpec, register

Tensor = torch.Tensor


def _plain(op: str, since_version: int, function: Callable[..., Tensor]) -> None:
    """Register an operator without attributes, whose inputs are the function's arguments."""

    @register("", op, since_version)
    def build(spec: NodeSpec) -> Kernel:
        spec.ignore()
        return function


def _div(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


def _keep_type(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Torch turns integers into floats in these functions; ONNX keeps the type."""

    def run(x: Tensor) -> Tensor:
        y = function(x)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    return run


_plain("Add", 7, torch.add)
_plain("Sub", 7, torch.sub)
_plain("Mul", 7, torch.mul)
_plain("Div", 7, _div)
_plain("Neg", 6, torch.neg)
_plain("Abs", 6, torch.abs)
_plain("Sqrt", 6, torch.sqrt)
_plain("Exp", 6, torch.exp)
_plain("Log", 6, torch.log)
_plain("Reciprocal", 6, torch.reciprocal)
_plain("Floor", 6, torch.floor)
_plain("Ceil", 6, torch.ceil)
_plain("Round", 11, torch.round)
_plain("Sign", 9, torch.sign)
_plain("Erf", 9, _keep_type(torch.erf))
_plain("Sin", 7, torch.sin)
_plain("Cos", 7, torch.cos)
_plain("Tan", 7, torch.tan)
_plain("Asin", 7, torch.asin)
_plain("Acos", 7, torch.acos)
_plain("Atan", 7, torch.atan)
_plain("Sinh", 9, torch.sinh)
_plain("Cosh", 9, torch.cosh)
_plain("Asinh", 9, torch.asinh)
_plain("Acosh", 9, torch.acosh)
_plain("Atanh", 9, torch.atanh)
_plain("Det", 11, torch.linalg.det)


def _variadic(op: str, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Register an operator that folds one or more inputs."""

    @register("", op, 6)
    def build(spec: NodeSpec) -> Kernel:
        if spec.n_inputs == 2:
            return function
        return lambda *values: functools.reduce(function, values)


_variadic("Min", torch.minimum)
_variadic("Max", torch.maximum)
_variadic("Sum", torch.add)


@register("", "Mean", 6)
def mean(spec: NodeSpec) -> Kernel:
    """Mean of the inputs."""
    n = spec.n_inputs
    return lambda *values: functools.reduce(torch.add, values) / n


@register("", "Pow", 7)
def power(spec: NodeSpec) -> Kernel:
    """x^y in the type of x. A constant scalar exponent becomes a number, which has the exact gradient."""
    exponent = spec.peek(1)
    if exponent is not None and exponent.ndim == 0:
        value = float(exponent)
        spec.constant(1)
        if value.is_integer():
            return lambda x, _: torch.pow(x, int(value))
        return lambda x, _: torch.pow(x, value).to(x.dtype)

    def run(x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            return torch.pow(x, y).to(x.dtype)
        if y.is_floating_point():
            return torch.pow(x.double(), y.double()).to(x.dtype)
        return torch.pow(x, y).to(x.dtype)

    return run


@register("", "Mod", 10)
def mod(spec: NodeSpec) -> Kernel:
    """Mod, or C's fmod."""
    return torch.fmod if spec.integer("fmod", 0) == 1 else torch.remainder


@register("", "Clip", 6)
def clip_attributes(spec: NodeSpec) -> Kernel:
    """Clip whose limits are attributes."""
    low, high = spec.attribute("min"), spec.attribute("max")
    if low is None and high is None:
        return lambda x: x
    return lambda x: torch.clamp(x, low, high)


@register("", "Clip", 11)
def clip(spec: NodeSpec) -> Kernel:
    """Clip whose limits are inputs; constant limits become numbers."""
    computed = [i for i in (1, 2) if spec.has_input(i) and not spec.is_constant(i)]
    if computed:
        return _clip_tensors
    low, high = (_number(spec, i) for i in (1, 2))
    if low is None and high is None:
        return lambda x, *_: x
    return lambda x, *_: torch.clamp(x, low, high)


def _clip_tensors(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def _number(spec: NodeSpec, index: int) -> float | int | None:
    value = spec.constant(index)
    if value is None:
        return None
    if value.size != 1:
        raise Declined(f"Clip limit of shape {value.shape}")
    number: float | int = value.reshape(-1)[0].item()
    return number
