"""Operators that move elements without changing them: shapes, axes, joining, cutting, casting.

A constant shape, axis or bound is read once, at lowering; otherwise it is an integer tensor on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from onnxptq.lowering.dtypes import torch_dtype
from onnxptq.lowering.registry import Declined, Kernel, NodeSpec, register

Tensor = torch.Tensor
Ints = tuple[int, ...]


def with_integers(spec: NodeSpec, index: int, function: Callable[[Tensor, Ints], Tensor]) -> Kernel:
    """A kernel ``function(x, integers)`` whose integers are input ``index``, constant or not."""
    fixed = spec.constant_integers(index)
    if fixed is not None:
        return lambda x, *_: function(x, fixed)
    return lambda *args: function(args[0], tuple(args[index].reshape(-1).tolist()))


def _reshape(x: Tensor, shape: Sequence[int], allow_zero: bool) -> Tensor:
    if not allow_zero and 0 in shape:
        shape = [x.shape[i] if n == 0 else n for i, n in enumerate(shape)]
    if -1 in shape and x.numel() == 0:
        rest = math.prod(n for n in shape if n != -1)
        shape = [(0 if rest == 0 else x.numel() // rest) if n == -1 else n for n in shape]
    return x.reshape(tuple(shape))


@register("", "Reshape", 5, host_inputs=(1,))
def reshape(spec: NodeSpec) -> Kernel:
    """Reshape: 0 copies the input's dimension (unless ``allowzero``), one -1 is inferred."""
    allow_zero = bool(spec.integer("allowzero", 0))
    return with_integers(spec, 1, lambda x, shape: _reshape(x, shape, allow_zero))


@register("", "Transpose", 1)
def transpose(spec: NodeSpec) -> Kernel:
    """Transpose; reversed axes by default."""
    perm = spec.integers("perm")
    if perm is None:
        return lambda x: x.permute(tuple(range(x.dim() - 1, -1, -1)))
    return lambda x: x.permute(perm)


@register("", "Flatten", 1)
def flatten(spec: NodeSpec) -> Kernel:
    """Two axes: everything before ``axis``, and the rest."""
    axis = spec.integer("axis", 1)

    return lambda x: x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(x: Tensor, axes: Ints) -> Tensor:
    wrong = [a for a in axes if x.shape[a] != 1]
    if wrong:
        raise ValueError(f"Squeeze of axis {wrong[0]}, whose size is {x.shape[wrong[0]]}")
    return x.squeeze(axes)


def _unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    rank = x.dim() + len(axes)
    for axis in sorted(a + rank if a < 0 else a for a in axes):
        x = x.unsqueeze(axis)
    return x


@register("", "Squeeze", 1)
def squeeze_attribute(spec: NodeSpec) -> Kernel:
    """Squeeze whose axes are an attribute; all axes of size 1 by default."""
    axes = spec.integers("axes")
    return (lambda x: x.squeeze()) if axes is None else (lambda x: _squeeze(x, axes))


@register("", "Squeeze", 13, host_inputs=(1,))
def squeeze(spec: NodeSpec) -> Kernel:
    """Squeeze whose axes are an input."""
    if not spec.has_input(1):
        return lambda x, *_: x.squeeze()
    return with_integers(spec, 1, _squeeze)


@register("", "Unsqueeze", 1)
def unsqueeze_attribute(spec: NodeSpec) -> Kernel:
    """Unsqueeze whose axes are an attribute."""
    axes = spec.integers("axes") or ()
    return lambda x: _unsqueeze(x, axes)


@register("", "Unsqueeze", 13, host_inputs=(1,))
def unsqueeze(spec: NodeSpec) -> Kernel:
    """Unsqueeze whose axes are an input."""
    return with_integers(spec, 1, _unsqueeze)


@register("", "Concat", 4)
def concat(spec: NodeSpec) -> Kernel:
    """Concat along ``axis``."""
    axis = spec.integer("axis", 1)
    return lambda *values: torch.cat(values, axis)


def _split_equal(x: Tensor, axis: int, parts: int) -> tuple[Tensor, ...]:
    """Chunks of ceil(n / parts); the last one is what remains."""
    total = x.shape[axis]
    size = -(-total // parts)
    return tuple(
        x.narrow(axis, min(i * size, total), max(min(size, total - i * size), 0)) for i in range(parts)
    )


def _split_kernel(axis: int, sizes: Ints | None, parts: int) -> Kernel:
    if sizes is None:
        return lambda x, *_: _split_equal(x, axis, parts)
    fixed = list(sizes)
    return lambda x, *_: torch.split(x, fixed, axis)


@register("", "Split", 2)
def split_attribute(spec: NodeSpec) -> Kernel:
    """Split whose sizes are an attribute; equal parts by default."""
    return _split_kernel(spec.integer("axis", 0), spec.integers("split"), len(spec.node.outputs))


@register("", "Split", 13, host_inputs=(1,))
def split(spec: NodeSpec) -> Kernel:
    """Split whose sizes are an input; ``num_outputs`` (opset 18) allows a smaller last part."""
    axis = spec.integer("axis", 0)
    parts = spec.integer("num_outputs", len(spec.node.outputs))
    if not spec.has_input(1) or spec.is_constant(1):
        return _split_kernel(axis, spec.constant_integers(1), parts)
    return lambda x, sizes: torch.split(x, sizes.tolist(), axis)


def _slice(x: Tensor, starts: Ints, ends: Ints, axes: Ints, steps: Ints) -> Tensor:
    """Python's slicing, with negative steps too (torch has none)."""
    index = [slice(None)] * x.dim()
    backwards: list[tuple[int, range]] = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis = axis + x.dim() if axis < 0 else axis
        size = x.shape[axis]
        if step > 0:
            # Torch warns about bounds near the limits of 64 bits, which exporters write for "to the end".
            index[axis] = slice(max(start, -size), max(min(end, size), -size), min(step, max(size, 1)))
            continue
        first = max(min(start + size if start < 0 else start, size - 1), -1)
        last = max(min(end + size if end < 0 else end, size - 1), -1)
        backwards.append((axis, range(first, last, step)))
    x = x[tuple(index)]
    for axis, positions in backwards:
        x = x.index_select(axis, torch.tensor(list(positions), dtype=torch.int64, device=x.device))
    return x


@register("", "Slice", 1)
def slice_attributes(spec: NodeSpec) -> Kernel:
    """Slice whose bounds are attributes."""
    starts, ends = spec.integers("starts") or (), spec.integers("ends") or ()
    axes = spec.integers("axes") or tuple(range(len(starts)))
    steps = (1,) * len(starts)
    return lambda x: _slice(x, starts, ends, axes, steps)


@register("", "Slice", 10, host_inputs=(1, 2, 3, 4))
def slice_inputs(spec: NodeSpec) -> Kernel:
    """Slice whose bounds, axes and steps are inputs."""
    present = [i for i in (1, 2, 3, 4) if spec.has_input(i)]
    fixed = {i: spec.constant_integers(i) for i in present}

    def read(args: Sequence[Tensor | None], index: int, default: Ints) -> Ints:
        constant = fixed.get(index)
        if constant is not None:
            return constant
        value = args[index] if index < len(args) else None
        return default if value is None else tuple(value.reshape(-1).tolist())

    def run(x: Tensor, *bounds: Tensor | None) -> Tensor:
        args = (x, *bounds)
        starts, ends = read(args, 1, ()), read(args, 2, ())
        axes = read(args, 3, tuple(range(len(starts))))
        return _slice(x, starts, ends, axes, read(args, 4, (1,) * len(starts)))

    return run


def _broadcast(a: Ints, b: Ints) -> Ints:
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


def _expand(x: Tensor, shape: Ints) -> Tensor:
    return x.expand(_broadcast(tuple(x.shape), shape))


@register("", "Expand", 8, host_inputs=(1,))
def expand(spec: NodeSpec) -> Kernel:
    """Expand: two-way broadcasting with ``shape``."""
    return with_integers(spec, 1, _expand)


@register("", "Tile", 6, host_inputs=(1,))
def tile(spec: NodeSpec) -> Kernel:
    """Tile: repeats per axis."""
    return with_integers(spec, 1, lambda x, repeats: x.repeat(repeats))


@register("", "Identity", 1)
def identity(spec: NodeSpec) -> Kernel:
    """The input itself."""
    del spec
    return lambda x: x


@register("", "Dropout", 7, note="inference form")
def dropout(spec: NodeSpec) -> Kernel:
    """The input itself, and a mask of ones where it is wanted."""
    spec.ignore("ratio", "seed")
    if spec.has_input(2):
        training = spec.constant(2)
        if training is None or bool(training.reshape(-1)[0]):
            raise Declined("Dropout in training mode")
    if spec.n_outputs > 1:
        return lambda x, *_: (x, torch.ones_like(x, dtype=torch.bool))
    return lambda x, *_: x


@register("", "Cast", 6, note="strings, 8-bit floats and 4-bit integers are declined")
def cast(spec: NodeSpec) -> Kernel:
    """Cast; floats truncate toward zero when they become integers."""
    dtype = torch_dtype(spec.integer("to", 1))
    spec.ignore("saturate", "round_mode")
    return lambda x: x.to(dtype)


@register("", "CastLike", 15)
def cast_like(spec: NodeSpec) -> Kernel:
    """Cast to the type of the second input."""
    spec.ignore("saturate", "round_mode")
    return lambda x, like: x.to(like.dtype)
