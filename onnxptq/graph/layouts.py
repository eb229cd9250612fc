"""Moving labels the way operators move elements.

The labels of a tensor are an integer array of the tensor's rank. An axis along which all labels are equal
has size 1 ("flat"), every other axis the tensor's full size; so labels broadcast to the tensor, and tensors
of any spatial size have small labels. All functions take and return arrays in that form.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxptq.graph.classes import Literals


def flatten_constant_axes(labels: Literals) -> Literals:
    """Give size 1 to every axis along which the labels do not change."""
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1:
            first = labels.take([0], axis=axis)
            if bool((labels == first).all()):
                labels = first
    return labels


def align(labels: Literals, rank: int) -> Literals:
    """Prepend axes of size 1 up to ``rank``."""
    return labels.reshape((1,) * (rank - labels.ndim) + labels.shape)


def reshape(labels: Literals, before: Sequence[int], after: Sequence[int]) -> Literals:
    """Labels of a tensor of shape ``before`` reshaped to ``after``.

    Both shapes are cut into the shortest runs of axes with equal products; a run that is flat before is
    flat after, so only runs that carry labels are materialised.
    """
    inner: list[int] = []
    outer: list[int] = []
    for run_in, run_out in _runs(before, after):
        if all(labels.shape[axis] == 1 for axis in run_in):
            inner += [1] * len(run_in)
            outer += [1] * len(run_out)
        else:
            inner += [before[axis] for axis in run_in]
            outer += [after[axis] for axis in run_out]
    full = np.broadcast_to(labels, [max(a, b) for a, b in zip(labels.shape, inner, strict=True)])
    return flatten_constant_axes(full.reshape(outer))


def _runs(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        run_in, run_out = [], []
        left = right = 1
        if i < len(before):
            run_in.append(i)
            left, i = before[i], i + 1
        if j < len(after):
            run_out.append(j)
            right, j = after[j], j + 1
        while left != right:
            if left < right and i < len(before):
                run_in.append(i)
                left, i = left * before[i], i + 1
            elif j < len(after):
                run_out.append(j)
                right, j = right * after[j], j + 1
            else:
                raise ValueError(f"shapes {tuple(before)} and {tuple(after)} differ in size")
        runs.append((run_in, run_out))
    return runs


def take(labels: Literals, axis: int, indices: Sequence[int] | Literals) -> Literals:
    """Labels of the elements ``indices`` along ``axis``; the axis stays."""
    if labels.shape[axis] == 1:
        return labels
    return flatten_constant_axes(labels.take(np.asarray(indices, dtype=np.int64).reshape(-1), axis=axis))


def concat(parts: Sequence[Literals], sizes: Sequence[int], axis: int) -> Literals:
    """Labels of a concatenation of tensors that have ``sizes`` along ``axis``."""
    rest = np.broadcast_shapes(*((*part.shape[:axis], 1, *part.shape[axis + 1 :]) for part in parts))
    shapes = [(*rest[:axis], size, *rest[axis + 1 :]) for size in sizes]
    full = [np.broadcast_to(part, shape) for part, shape in zip(parts, shapes, strict=True)]
    return flatten_constant_axes(np.concatenate(full, axis=axis))


def tile(labels: Literals, repeats: Sequence[int]) -> Literals:
    """Labels of a tensor repeated along its axes; flat axes stay flat."""
    return np.tile(labels, [1 if size == 1 else n for size, n in zip(labels.shape, repeats, strict=True)])
