"""Comparisons, boolean and bitwise operators, Where, and tests for special values."""

from __future__ import annotations

from collections.abc import Callable

import torch

from onnxptq.lowering.registry import Kernel, NodeSpec, register

Tensor = torch.Tensor


def _plain(op: str, since_version: int, function: Callable[..., Tensor]) -> None:
    @register("", op, since_version)
    def build(spec: NodeSpec) -> Kernel:
        spec.ignore()
        return function


_plain("Equal", 7, torch.eq)
_plain("Greater", 7, torch.gt)
_plain("Less", 7, torch.lt)
_plain("GreaterOrEqual", 12, torch.ge)
_plain("LessOrEqual", 12, torch.le)
_plain("And", 7, torch.logical_and)
_plain("Or", 7, torch.logical_or)
_plain("Xor", 7, torch.logical_xor)
_plain("Not", 1, torch.logical_not)
_plain("BitwiseAnd", 18, torch.bitwise_and)
_plain("BitwiseOr", 18, torch.bitwise_or)
_plain("BitwiseXor", 18, torch.bitwise_xor)
_plain("BitwiseNot", 18, torch.bitwise_not)
_plain("Where", 9, torch.where)
_plain("IsNaN", 9, torch.isnan)


@register("", "IsInf", 10)
def is_inf(spec: NodeSpec) -> Kernel:
    """Infinite of the wanted signs."""
    positive, negative = spec.integer("detect_positive", 1), spec.integer("detect_negative", 1)
    if positive and negative:
        return torch.isinf
    if positive:
        return torch.isposinf
    if negative:
        return torch.isneginf
    return lambda x: torch.zeros_like(x, dtype=torch.bool)
