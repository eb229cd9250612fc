"""Along which axis the channels of a tensor lie, told by the operators around it.

Convolutions, pools and batch norms have channels along axis 1. Matrices write and read them along the last axis, or
along the one before where they stand on the left, and normalizations over features scale them along the last. Between
such an operator and a tensor, operators that keep the shape keep the axis too, Transpose moves it, and Reshape may
leave it in its place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_graphsurgeon as gs

from onnxptq.graph.index import GraphIndex, is_constant
from onnxptq.graph.normalizations import NORMALIZATIONS

_FIRST = frozenset(
    {
        *("AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "GlobalAveragePool", "GlobalMaxPool"),
        *("GroupNormalization", "InstanceNormalization", "MaxPool"),
    }
)
_MATRICES = frozenset({"Gemm", "MatMul"})
_KEEPING = frozenset({"Concat", "Pad", "Resize", "Slice", "Split", "Tile"})
_FARTHEST = 24
"""Operators between a tensor and the one that tells its channels, at most."""


def channel_axes(index: GraphIndex, tensors: Iterable[str]) -> Mapping[str, int]:
    """The axis of the channels of each of ``tensors`` whose surroundings tell it: what writes it before what reads
    it."""
    found = {name: _written(index, name, _FARTHEST, set()) for name in tensors}
    found = {
        name: _read(index, name, _FARTHEST, set()) if axis is None else axis for name, axis in found.items()
    }
    return {name: axis for name, axis in found.items() if axis is not None}


def _written(index: GraphIndex, tensor: str, left: int, seen: set[str]) -> int | None:
    node = index.producer(tensor)
    if node is None or left == 0 or tensor in seen:
        return None
    seen.add(tensor)
    output = next(t for t in node.outputs if t.name == tensor)
    if node.op in _MATRICES or node.op in NORMALIZATIONS or node.op in _FIRST:
        return _own(node, output, is_constant(node.inputs[0]))
    for source in node.inputs:
        if not is_constant(source) and source.name and _passes(node, source, output):
            axis = _written(index, source.name, left - 1, seen)
            if axis is not None:
                return _behind(node, source, output, axis)
    return None


def _read(index: GraphIndex, tensor: str, left: int, seen: set[str]) -> int | None:
    if left == 0 or tensor in seen:
        return None
    seen.add(tensor)
    for use in index.uses(tensor):
        node = use.node
        source, output = node.inputs[use.index], node.outputs[0]
        if use.index == 0 and (node.op in NORMALIZATIONS or node.op in _FIRST):
            return _own(node, source, False)
        if node.op in _MATRICES and use.index < 2 and is_constant(node.inputs[1 - use.index]):
            return _own(node, source, use.index == 1)
        axis = _read(index, output.name, left - 1, seen) if _passes(node, source, output) else None
        if axis is not None:
            before = _before(node, source, output, axis)
            if before is not None:
                return before
    return None


def _passes(node: gs.Node, source: gs.Tensor, output: gs.Tensor) -> bool:
    """Whether the axes of ``source`` are those of ``output``, or a Transpose or Reshape tells what they become."""
    if source.shape is None or output.shape is None:
        return False
    if node.op in ("Transpose", "Reshape"):
        return source is node.inputs[0]
    is_kept = list(source.shape) == list(output.shape) and node.op not in _MATRICES
    return is_kept or (node.op in _KEEPING and len(source.shape) == len(output.shape))


def _own(node: gs.Node, tensor: gs.Tensor, is_left: bool) -> int | None:
    """The axis along which ``node`` itself writes or reads channels of ``tensor``."""
    rank = _rank(tensor)
    if rank is None or rank < 2:
        return None
    if node.op in _FIRST:
        return 1
    return rank - 2 if is_left else rank - 1


def _behind(node: gs.Node, source: gs.Tensor, output: gs.Tensor, axis: int) -> int | None:
    """Where ``axis`` of ``source`` is in ``output``."""
    if node.op == "Transpose":
        perm = node.attrs.get("perm")
        return None if perm is None else list(perm).index(axis)
    return _aligned(node, source, output, axis)


def _before(node: gs.Node, source: gs.Tensor, output: gs.Tensor, axis: int) -> int | None:
    """Where ``axis`` of ``output`` is in ``source``."""
    if node.op == "Transpose":
        perm = node.attrs.get("perm")
        return None if perm is None else int(perm[axis])
    return _aligned(node, output, source, axis)


def _aligned(node: gs.Node, known: gs.Tensor, other: gs.Tensor, axis: int) -> int | None:
    """``axis`` of ``known`` in ``other``: the same, unless a Reshape changes more than what is on one side of it."""
    first, second = list(known.shape), list(other.shape)
    if node.op != "Reshape":
        return axis
    if second and axis == len(first) - 1 and first[-1] == second[-1]:
        return len(second) - 1
    return axis if first[1 : axis + 1] == second[1 : axis + 1] and axis < len(second) else None


def _rank(tensor: gs.Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)
