"""Gather and scatter in their three forms, and Compress.

Negative indices count from the end everywhere. Scatter with ``reduction`` includes the old value; without
it, equal indices are undefined by ONNX. Gradients flow to the data and to the updates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from onnxptq.lowering.registry import Declined, Kernel, NodeSpec, register

Tensor = torch.Tensor
_REDUCTIONS: Mapping[str, str] = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _wrap(indices: Tensor, size: int) -> Tensor:
    return torch.where(indices < 0, indices + size, indices)


@register("", "Gather", 1)
def gather(spec: NodeSpec) -> Kernel:
    """Whole slices along ``axis``; a constant scalar index is a view."""
    axis = spec.integer("axis", 0)
    known = spec.peek(1)
    if known is not None and known.ndim == 0:
        position = int(spec.constant_integers(1)[0])  # type: ignore[index]
        return lambda x, *_: x.select(axis, position)
    may_be_negative = known is None or bool((known < 0).any())

    def run(x: Tensor, indices: Tensor) -> Tensor:
        at = axis + x.dim() if axis < 0 else axis
        flat = indices.reshape(-1)
        if may_be_negative:
            flat = _wrap(flat, x.shape[at])
        picked = x.index_select(at, flat)
        if indices.dim() == 1:
            return picked
        return picked.reshape((*x.shape[:at], *indices.shape, *x.shape[at + 1 :]))

    return run


@register("", "GatherElements", 11)
def gather_elements(spec: NodeSpec) -> Kernel:
    """One element per index along ``axis``."""
    axis = spec.integer("axis", 0)
    return lambda x, indices: torch.gather(x, axis, _wrap(indices.long(), x.shape[axis]))


def _linear(indices: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The flat position of index tuples (..., k) in an array of k ``sizes``."""
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=indices.device)
    for i, n in enumerate(sizes):
        flat = flat * n + _wrap(indices[..., i].long(), n)
    return flat


@register("", "GatherND", 11)
def gather_nd(spec: NodeSpec) -> Kernel:
    """Slices at index tuples; the first ``batch_dims`` axes are shared by data and indices."""
    batch_dims = spec.integer("batch_dims", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        depth = indices.shape[-1]
        batch, tail = x.shape[:batch_dims], x.shape[batch_dims + depth :]
        sizes = tuple(x.shape[batch_dims : batch_dims + depth])
        n = math.prod(batch)
        flat = x.reshape((n, math.prod(sizes), *tail))
        at = _linear(indices, sizes).reshape(n, -1)
        rows = torch.arange(n, device=x.device).reshape(n, 1)
        return flat[rows, at].reshape((*indices.shape[:-1], *tail))

    return run


def _read_reduction(spec: NodeSpec) -> str | None:
    name = spec.text("reduction", "none")
    if name == "none":
        return None
    if name not in _REDUCTIONS:
        raise Declined(f"reduction {name}")
    return _REDUCTIONS[name]


def _scatter_elements(spec: NodeSpec) -> Kernel:
    axis, reduction = spec.integer("axis", 0), _read_reduction(spec)

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        at = _wrap(indices.long(), x.shape[axis])
        if reduction is None:
            return torch.scatter(x, axis, at, updates)
        return torch.scatter_reduce(x, axis, at, updates, reduction, include_self=True)

    return run


register("", "Scatter", 9)(_scatter_elements)
register("", "ScatterElements", 11)(_scatter_elements)


@register("", "ScatterND", 11)
def scatter_nd(spec: NodeSpec) -> Kernel:
    """Slices written at index tuples."""
    reduction = _read_reduction(spec)

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        depth = indices.shape[-1]
        tail = x.shape[depth:]
        flat = x.reshape(-1, math.prod(tail))
        at = _linear(indices, tuple(x.shape[:depth])).reshape(-1)
        rows = updates.reshape(-1, math.prod(tail))
        if reduction is None:
            return flat.index_put((at,), rows).reshape(x.shape)
        columns = at.unsqueeze(1).expand_as(rows)
        return torch.scatter_reduce(flat, 0, columns, rows, reduction, include_self=True).reshape(x.shape)

    return run


@register("", "Compress", 9)
def compress(spec: NodeSpec) -> Kernel:
    """Slices along ``axis`` (of the flattened input without one) where the condition holds."""
    axis = spec.attribute("axis")

    def run(x: Tensor, condition: Tensor) -> Tensor:
        kept = torch.nonzero(condition).reshape(-1)
        return x.reshape(-1).index_select(0, kept) if axis is None else x.index_select(int(axis), kept)

    return run
