"""Shapes, and tensors made from shapes and numbers."""

from __future__ import annotations

import math

import torch

from onnxptq.lowering.dtypes import tensor_of, torch_dtype
from onnxptq.lowering.registry import Declined, Kernel, NodeSpec, register

Tensor = torch.Tensor


@register("", "Shape", 1, host_output=True)
def shape(spec: NodeSpec) -> Kernel:
    """The input's dimensions from ``start`` to ``end``."""
    start, end = spec.integer("start", 0), spec.attribute("end")
    if start == 0 and end is None:
        return lambda x: torch.tensor(x.shape, dtype=torch.int64)

    def run(x: Tensor) -> Tensor:
        rank = x.dim()
        first = min(max(start + rank if start < 0 else start, 0), rank)
        last = rank if end is None else min(max(end + rank if end < 0 else end, 0), rank)
        return torch.tensor(x.shape[first:last], dtype=torch.int64)

    return run


@register("", "Size", 1, host_output=True)
def size(spec: NodeSpec) -> Kernel:
    """The number of elements."""
    del spec
    return lambda x: torch.tensor(x.numel(), dtype=torch.int64)


@register("", "ConstantOfShape", 9, host_inputs=(0,))
def constant_of_shape(spec: NodeSpec) -> Kernel:
    """A tensor filled with ``value`` (float 0 by default)."""
    value = spec.attribute("value")
    fill = torch.zeros(()) if value is None else tensor_of(value.values).reshape(())
    fixed = spec.constant_integers(0)
    number, dtype = fill.item(), fill.dtype

    def run(dims: Tensor | None) -> Tensor:
        sizes = fixed if dims is None else dims.tolist()
        return torch.full(tuple(sizes or ()), number, dtype=dtype)

    return run


@register("", "Range", 11, host_inputs=(0, 1, 2))
def arange(spec: NodeSpec) -> Kernel:
    """start, start + delta, ... below limit: max(ceil((limit - start) / delta), 0) elements."""
    spec.ignore("stash_type")

    def run(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        first, last, step = start.item(), limit.item(), delta.item()
        count = max(math.ceil((last - first) / step), 0)
        is_half = start.dtype in (torch.float16, torch.bfloat16)
        values = torch.arange(count, dtype=torch.float32 if is_half else start.dtype) * step + first
        return values.to(start.dtype)

    return run


@register("", "EyeLike", 9)
def eye_like(spec: NodeSpec) -> Kernel:
    """Ones on diagonal ``k`` of a matrix with the input's shape."""
    k, code = spec.integer("k", 0), spec.attribute("dtype")
    dtype = None if code is None else torch_dtype(int(code))

    def run(x: Tensor) -> Tensor:
        rows, columns = x.shape
        row = torch.arange(rows, device=x.device).reshape(-1, 1)
        column = torch.arange(columns, device=x.device)
        return (column - row == k).to(dtype or x.dtype)

    return run


@register("", "Trilu", 14, host_inputs=(1,))
def trilu(spec: NodeSpec) -> Kernel:
    """The upper or lower triangle, from diagonal ``k``."""
    cut = torch.triu if spec.integer("upper", 1) else torch.tril
    if not spec.has_input(1):
        return lambda x, *_: cut(x)
    fixed = spec.constant_integers(1)
    if fixed is not None:
        return lambda x, *_: cut(x, fixed[0])
    return lambda x, k: cut(x, int(k))


@register("", "OneHot", 9, host_inputs=(1,))
def one_hot(spec: NodeSpec) -> Kernel:
    """values[1] where the new axis equals the index, else values[0]; negative indices count from the end."""
    axis = spec.integer("axis", -1)
    fixed = spec.constant(1)

    def run(indices: Tensor, depth_tensor: Tensor | None, values: Tensor) -> Tensor:
        depth = int(fixed.reshape(-1)[0]) if fixed is not None else int(depth_tensor)  # type: ignore[arg-type]
        where = torch.where(indices < 0, indices + depth, indices).unsqueeze(axis)
        rank = where.dim()
        steps = torch.arange(depth, device=indices.device, dtype=indices.dtype)
        steps = steps.reshape([-1 if a == axis % rank else 1 for a in range(rank)])
        return torch.where(where == steps, values[1], values[0])

    return run


@register("", "NonZero", 9)
def non_zero(spec: NodeSpec) -> Kernel:
    """Indices of the non-zero elements, (rank, count), in row-major order."""
    del spec
    return lambda x: torch.nonzero(x).T if x.dim() else torch.nonzero(x.reshape(1)).T[:0]


@register("", "Constant", 1)
def constant(spec: NodeSpec) -> Kernel:
    """Only reached by constants that have no tensor form; the others are read like initializers."""
    del spec
    raise Declined("a constant that is neither a dense tensor nor numbers")
