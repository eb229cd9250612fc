"""Comparisons, boolean and bitwise operators, Where, and tests for special values."""

from __future__ import annotations

import torch

from onnxptq.lowering.registry import Kernel, NodeSpec, register, register_plain

Tensor = torch.Tensor


register_plain("Equal", 7, torch.eq)
register_plain("Greater", 7, torch.gt)
register_plain("Less", 7, torch.lt)
register_plain("GreaterOrEqual", 12, torch.ge)
register_plain("LessOrEqual", 12, torch.le)
register_plain("And", 7, torch.logical_and)
register_plain("Or", 7, torch.logical_or)
register_plain("Xor", 7, torch.logical_xor)
register_plain("Not", 1, torch.logical_not)
register_plain("BitwiseAnd", 18, torch.bitwise_and)
register_plain("BitwiseOr", 18, torch.bitwise_or)
register_plain("BitwiseXor", 18, torch.bitwise_xor)
register_plain("BitwiseNot", 18, torch.bitwise_not)
register_plain("Where", 9, torch.where)
register_plain("IsNaN", 9, torch.isnan)


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
