"""Folds the scalar of scaled dot-product attention into the projections that produce Q and K.

::

    softmax(s (Q K^T)) = softmax((s Q) K^T),     s Q = x (s W_Q) + s b_Q

A scalar ``Mul`` or ``Div`` is followed back from Q, from K, or from their product, through operators that
only move elements (Transpose, Reshape, Squeeze, Unsqueeze, and Split, Slice, Gather out of a fused QKV
projection), to the linear layer; the columns of weight and bias that feed it are scaled and the node is
removed. Exact in real arithmetic; bit-exact in floating point where s is a power of two (barring underflow),
else within rounding.

Declined: anything but a scalar, a path with another reader of the scaled elements, unknown shapes, and
anything but float32. Which columns feed the scalar is found by sending column numbers down the same path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxptq.graph.surgeon import (
    axes_of,
    bypass,
    float_constant,
    int_constants,
    is_graph_output,
    is_op,
    live_nodes,
    producer,
    scalar_constant,
    set_constant,
    sole_reader,
)

_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity")
_PICKS = ("Split", "Slice", "Gather")
_SYMBOL_SIZE = 2
_MAX_PATH = 16

Ids = npt.NDArray[np.int64]

NOTE = (
    "One factor of attention scores went into the weights in front.",
    "{} factors of attention scores went into the weights in front.",
)


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many scalar nodes were folded."""
    return sum(_fold(graph, node) for node in live_nodes(graph, "Mul", "Div"))


@dataclass(frozen=True, slots=True, eq=False)
class _Projection:
    """A linear layer: its MatMul or Gemm, and the Add of its bias where that is separate."""

    node: gs.Node
    add: gs.Node | None
    bias_index: int | None
    channels: int


def _fold(graph: gs.Graph, scaling: gs.Node) -> bool:
    found = _scalar(scaling)
    if found is None:
        return False
    source, factor = found
    product = producer(source)
    if product is not None and is_op(product, "MatMul") and _is_dynamic(product):
        # After the product: either operand will do, and the one without another reader is taken.
        if sole_reader(graph, source) is not scaling:
            return False
        paths = [(product, product.inputs[0]), (product, product.inputs[1])]
    elif _feeds_attention(graph, scaling):
        paths = [(scaling, source)]
    else:
        return False
    for reader, tensor in paths:
        path = _path_back(graph, reader, tensor)
        if path is not None and _scale_columns(graph, path[0], path[1], factor):
            return bypass(graph, scaling)
    return False


def _scalar(node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """The tensor that ``node`` scales and by how much."""
    for i in (1, 0) if node.op == "Mul" else (1,):
        value, source = scalar_constant(node.inputs[i]), node.inputs[1 - i]
        if value is None or not isinstance(source, gs.Variable) or source.dtype != np.float32:
            continue
        rank = None if source.shape is None else len(source.shape)
        if len(node.inputs[i].shape) > (rank or 0) or not np.isfinite(value) or value == 0.0:
            continue
        return source, value if node.op == "Mul" else 1.0 / value
    return None


def _is_dynamic(matmul: gs.Node) -> bool:
    return all(isinstance(tensor, gs.Variable) for tensor in matmul.inputs)


def _feeds_attention(graph: gs.Graph, scaling: gs.Node) -> bool:
    """Whether the scaled tensor only goes, moved at most, into a product of two activations."""
    node = scaling
    for _ in range(_MAX_PATH):
        following = sole_reader(graph, node.outputs[0])
        if following is None:
            return False
        if is_op(following, "MatMul"):
            return _is_dynamic(following)
        if not is_op(following, *_MOVES) or following.inputs[0] is not node.outputs[0]:
            return False
        node = following
    return False


def _path_back(
    graph: gs.Graph, reader: gs.Node, tensor: gs.Tensor
) -> tuple[_Projection, Sequence[tuple[gs.Node, gs.Tensor]]] | None:
    """The projection that ``tensor`` comes from, and the steps (node, tensor it writes) in running order."""
    steps: list[tuple[gs.Node, gs.Tensor]] = []
    for _ in range(_MAX_PATH):
        node = producer(tensor)
        if node is None or is_graph_output(graph, tensor):
            return None
        projection = _projection(graph, node)
        if projection is not None:
            return projection, steps[::-1]
        if not is_op(node, *_MOVES, *_PICKS):
            return None
        if not steps and sole_reader(graph, tensor) is not reader:
            return None
        steps.append((node, tensor))
        reader, tensor = node, node.inputs[0]
    return None


def _projection(graph: gs.Graph, node: gs.Node) -> _Projection | None:
    if is_op(node, "Gemm"):
        weight = float_constant(node.inputs[1])
        if weight is None:
            return None
        channels = weight.shape[0 if node.attrs.get("transB", 0) else 1]
        has_bias = len(node.inputs) > 2 and bool(node.inputs[2].name)
        return _Projection(node, node if has_bias else None, 2 if has_bias else None, channels)
    if is_op(node, "MatMul"):
        weight = float_constant(node.inputs[1])
        return None if weight is None or weight.ndim != 2 else _Projection(node, None, None, weight.shape[1])
    if not is_op(node, "Add"):
        return None
    for i in (0, 1):
        inner = producer(node.inputs[1 - i])
        if inner is None or not is_op(inner, "MatMul") or float_constant(node.inputs[i]) is None:
            continue
        if sole_reader(graph, node.inputs[1 - i]) is not node:
            continue
        found = _projection(graph, inner)
        if found is not None:
            return _Projection(found.node, node, i, found.channels)
    return None


def _scale_columns(
    graph: gs.Graph,
    projection: _Projection,
    steps: Sequence[tuple[gs.Node, gs.Tensor]],
    factor: float,
) -> bool:
    columns = _columns(graph, projection, steps)
    if columns is None:
        return False
    scale = np.ones(projection.channels)
    scale[columns] = factor
    node = projection.node
    weight = float_constant(node.inputs[1])
    bias = None
    if projection.add is not None and projection.bias_index is not None:
        bias = float_constant(projection.add.inputs[projection.bias_index])
        if bias is None or bias.shape[-1:] != (projection.channels,):
            return False
    assert weight is not None
    by_row = node.op == "Gemm" and node.attrs.get("transB", 0)
    scaled = weight * (scale[:, None] if by_row else scale)
    set_constant(graph, node, 1, scaled.astype(np.float32))
    if bias is not None and projection.add is not None and projection.bias_index is not None:
        set_constant(graph, projection.add, projection.bias_index, (bias * scale).astype(np.float32))
    return True


def _columns(
    graph: gs.Graph, projection: _Projection, steps: Sequence[tuple[gs.Node, gs.Tensor]]
) -> Ids | None:
    """Which columns of the projection end in the scaled tensor, if they end nowhere else."""
    last = projection.add or projection.node
    tensor = last.outputs[0]
    shape = _concrete(tensor.shape)
    if shape is None or not shape or shape[-1] != projection.channels:
        return None
    ids: Ids = np.broadcast_to(np.arange(projection.channels), shape)
    stages: list[tuple[gs.Tensor, gs.Node, Ids]] = []
    for node, written in steps:
        outputs = _move(node, ids)
        if outputs is None:
            return None
        position = next(i for i, candidate in enumerate(node.outputs) if candidate is written)
        stages.append((tensor, node, ids))
        for i, other in enumerate(node.outputs):
            if i != position and _is_read(graph, other) and _overlap(outputs[i], outputs[position]):
                return None
        tensor, ids = written, outputs[position]
    wanted = np.unique(ids)
    if not steps:
        # Without steps the scaling itself reads the projection, and must be its only reader.
        return wanted if len(tensor.outputs) == 1 else None
    for shared, on_path, held in stages:
        if not _others_disjoint(graph, shared, on_path, held, wanted):
            return None
    return wanted


def _others_disjoint(graph: gs.Graph, tensor: gs.Tensor, on_path: gs.Node, ids: Ids, wanted: Ids) -> bool:
    """Whether every reader of ``tensor`` beside ``on_path`` picks none of the ``wanted`` columns."""
    if is_graph_output(graph, tensor):
        return False
    for reader in tensor.outputs:
        if reader is on_path:
            continue
        outputs = _move(reader, ids) if is_op(reader, *_PICKS) else None
        if outputs is None or reader.inputs[0] is not tensor:
            return False
        if any(
            _is_read(graph, t) and _overlap(o, wanted) for t, o in zip(reader.outputs, outputs, strict=True)
        ):
            return False
    return True


def _is_read(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return bool(tensor.outputs) or is_graph_output(graph, tensor)


def _overlap(first: Ids, second: Ids) -> bool:
    return bool(np.intersect1d(first, second).size)


def _concrete(shape: Sequence[int | str | None] | None) -> list[int] | None:
    """The shape with every symbol taken as 2; None if a dimension is unknown."""
    if shape is None or any(dim is None or dim == "" for dim in shape):
        return None
    return [dim if isinstance(dim, int) else _SYMBOL_SIZE for dim in shape]


def _move(node: gs.Node, ids: Ids) -> list[Ids] | None:
    """What ``node`` makes of the column numbers; None if its parameters are no constants."""
    try:
        if is_op(node, "Identity"):
            return [ids]
        if is_op(node, "Transpose"):
            return [ids.transpose(node.attrs.get("perm", list(range(ids.ndim))[::-1]))]
        if is_op(node, "Reshape"):
            return _reshape(node, ids)
        if is_op(node, "Squeeze"):
            axes = axes_of(node)
            return [ids.squeeze(None if axes is None else tuple(axes))]
        if is_op(node, "Unsqueeze"):
            axes = axes_of(node)
            return None if axes is None else [np.expand_dims(ids, tuple(axes))]
        if is_op(node, "Split"):
            return _split(node, ids)
        if is_op(node, "Slice"):
            return _slice(node, ids)
        return _gather(node, ids)
    except (ValueError, IndexError):
        return None


def _reshape(node: gs.Node, ids: Ids) -> list[Ids] | None:
    target = _concrete(node.outputs[0].shape)
    if target is not None and np.prod(target) == ids.size:
        return [ids.reshape(target)]
    channels = ids.shape[-1]
    is_untouched = bool((ids == np.arange(channels)).all())
    if target is not None and is_untouched and np.prod(target) % channels == 0:
        # Leading dimensions that inference knows under two names: rows repeat, so their number is free.
        return [np.resize(np.arange(channels), target)]
    wanted = int_constants(node.inputs[1])
    if wanted is None or node.attrs.get("allowzero", 0):
        return None
    return [ids.reshape([ids.shape[i] if dim == 0 else dim for i, dim in enumerate(wanted)])]


def _split(node: gs.Node, ids: Ids) -> list[Ids] | None:
    axis = int(node.attrs.get("axis", 0))
    sizes = node.attrs.get("split")
    if sizes is None and len(node.inputs) > 1:
        sizes = int_constants(node.inputs[1])
        if sizes is None:
            return None
    if sizes is None:
        count = len(node.outputs)
        each = -(-ids.shape[axis] // count)
        sizes = [each] * (count - 1)
    return list(np.split(ids, np.cumsum(sizes)[: len(node.outputs) - 1], axis=axis))


def _slice(node: gs.Node, ids: Ids) -> list[Ids] | None:
    parameters = [int_constants(tensor) for tensor in node.inputs[1:] if tensor.name]
    if len(parameters) < 2 or any(p is None for p in parameters):
        return None
    starts, ends, *rest = (p for p in parameters if p is not None)
    axes = rest[0] if rest else list(range(len(starts)))
    steps = rest[1] if len(rest) > 1 else [1] * len(starts)
    if any(step < 1 for step in steps):
        return None
    index: list[slice] = [slice(None)] * ids.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[axis] = slice(start, end, step)
    return [ids[tuple(index)]]


def _gather(node: gs.Node, ids: Ids) -> list[Ids] | None:
    if not isinstance(node.inputs[1], gs.Constant):
        return None
    indices = np.asarray(node.inputs[1].values)
    return [np.take(ids, indices, axis=int(node.attrs.get("axis", 0)))]
