"""MatMul, Gemm, Einsum.

Gemm: Y = alpha A' B' + beta C, where ' transposes on request and C broadcasts to (M, N).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own idiom

from onnxptq.lowering.registry import Kernel, NodeSpec, register

Tensor = torch.Tensor


@register("", "MatMul", 1)
def matmul(spec: NodeSpec) -> Kernel:
    """MatMul, numpy's semantics."""
    del spec
    return torch.matmul


@register("", "Gemm", 7)
def gemm(spec: NodeSpec) -> Kernel:
    """Gemm; the form of a linear layer goes to torch's linear."""
    alpha, beta = spec.number("alpha", 1.0), spec.number("beta", 1.0)
    trans_a, trans_b = bool(spec.integer("transA", 0)), bool(spec.integer("transB", 0))

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a = a.T if trans_a else a
        is_linear = c is None or (beta == 1.0 and c.dim() == 1 and c.shape[0] == b.shape[0])
        if alpha == 1.0 and trans_b and is_linear:
            return F.linear(a, b, c)
        y = a @ (b.T if trans_b else b)
        if not y.is_floating_point():
            y = y * int(alpha)
            return y if c is None else y + c * int(beta)
        if alpha != 1.0:
            y = y * alpha
        if c is None or beta == 0.0:
            return y
        return y + (c if beta == 1.0 else c * beta)

    return run


@register("", "Einsum", 12)
def einsum(spec: NodeSpec) -> Kernel:
    """Einsum over any number of operands."""
    equation = spec.text("equation", "").replace(" ", "")
    return lambda *operands: torch.einsum(equation, *operands)
