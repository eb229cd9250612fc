"""How labels pass operators that only move elements: the operator itself is applied to the labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph import layouts
from onnxptq.graph.classes import Literals
from onnxptq.graph.tracing import ChannelTracer, Declined


def _reshape(t: ChannelTracer, node: gs.Node) -> None:
    labels = layouts.reshape(t.read(node, 0), t.shape(node.inputs[0]), t.shape(node.outputs[0]))
    t.write(node.outputs[0], labels)


def _transpose(t: ChannelTracer, node: gs.Node) -> None:
    labels = t.read(node, 0)
    t.write(node.outputs[0], labels.transpose(node.attrs.get("perm", range(labels.ndim)[::-1])))


def _concat(t: ChannelTracer, node: gs.Node) -> None:
    rank = len(t.shape(node.outputs[0]))
    axis = int(node.attrs["axis"]) % rank
    sizes = [t.shape(tensor)[axis] for tensor in node.inputs]
    t.write(node.outputs[0], layouts.concat([t.read(node, i) for i in range(len(sizes))], sizes, axis))


def _split(t: ChannelTracer, node: gs.Node) -> None:
    labels = t.read(node, 0)
    axis = int(node.attrs.get("axis", 0)) % labels.ndim
    start = 0
    for tensor in node.outputs:
        size = t.shape(tensor)[axis]
        t.write(tensor, layouts.take(labels, axis, range(start, start + size)))
        start += size


def _slice(t: ChannelTracer, node: gs.Node) -> None:
    labels, shape = t.read(node, 0), t.shape(node.inputs[0])
    starts, ends = t.integers(node, 1), t.integers(node, 2)
    if starts is None or ends is None:
        raise Declined("its bounds are unknown")
    axes = t.integers(node, 3) or list(range(len(starts)))
    steps = t.integers(node, 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= len(shape)
        labels = layouts.take(labels, axis, _positions(start, end, step, shape[axis]))
    t.write(node.outputs[0], labels)


def _positions(start: int, end: int, step: int, size: int) -> Sequence[int]:
    """The positions that Slice takes: as Python's slice, except that a negative end may be below -size."""
    if step < 0 and end < -size:
        return range(size)[slice(start, None, step)]
    return range(size)[slice(start, end, step)]


def _gather(t: ChannelTracer, node: gs.Node) -> None:
    labels, shape = t.read(node, 0), t.shape(node.inputs[0])
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    rank = len(t.shape(node.outputs[0])) - len(shape) + 1
    size: tuple[int, ...]
    try:
        indices = [i % shape[axis] for i in t.integers(node, 1) or []]
    except Declined:
        labels, size = t.collapse(labels, [axis]), (1,) * rank
    else:
        labels = layouts.take(labels, axis, indices)
        index_shape = t.shape(node.outputs[0])[axis : axis + rank]
        size = index_shape if labels.shape[axis] > 1 else (1,) * rank
    moved = labels.reshape(labels.shape[:axis] + size + labels.shape[axis + 1 :])
    t.write(node.outputs[0], layouts.flatten_constant_axes(moved))


def _gather_elements(t: ChannelTracer, node: gs.Node) -> None:
    """Along the gather axis anything may be taken; along the others every element keeps its place."""
    labels, shape = t.read(node, 0), t.shape(node.outputs[0])
    labels = t.collapse(labels, [int(node.attrs.get("axis", 0)) % labels.ndim])
    for axis, size in enumerate(shape):
        labels = layouts.take(labels, axis, range(size))
    t.write(node.outputs[0], labels)


def _gather_nd(t: ChannelTracer, node: gs.Node) -> None:
    """Whole slices along the trailing axes are taken, from anywhere along the leading ones."""
    labels, shape = t.read(node, 0), node.inputs[1].shape
    if not shape or not isinstance(shape[-1], int):
        raise Declined("the length of its positions is unknown")
    taken = int(node.attrs.get("batch_dims", 0)) + shape[-1]
    kept = t.collapse(labels, range(taken)).reshape(labels.shape[taken:])
    t.write(node.outputs[0], layouts.align(kept, len(t.shape(node.outputs[0]))))


def _expand(t: ChannelTracer, node: gs.Node) -> None:
    t.write(node.outputs[0], layouts.align(t.read(node, 0), len(t.shape(node.outputs[0]))))


def _tile(t: ChannelTracer, node: gs.Node) -> None:
    repeats = t.integers(node, 1)
    if repeats is None:
        raise Declined("its repeats are unknown")
    t.write(node.outputs[0], layouts.tile(t.read(node, 0), repeats))


def _pad(t: ChannelTracer, node: gs.Node) -> None:
    labels, shape = t.read(node, 0), t.shape(node.inputs[0])
    pads = t.integers(node, 1)
    mode = node.attrs.get("mode", "constant")
    if pads is None or t.has_input(node, 3) or min(pads) < 0:
        raise Declined("its pads are negative or not plain")
    if t.has_input(node, 2) and float(t.constant(node, 2).reshape(-1)[0]) != 0:
        raise Declined("it pads with a number other than 0")
    for axis in range(len(shape)):
        before, after = pads[axis], pads[axis + len(shape)]
        # Along a flat axis zeros (or repeated values) take the label of their neighbours.
        if before + after and labels.shape[axis] > 1:
            labels = _padded(t, labels, axis, before, after, mode)
    t.write(node.outputs[0], labels)


def _padded(t: ChannelTracer, labels: Literals, axis: int, before: int, after: int, mode: str) -> Literals:
    if mode != "constant":
        return t.collapse(labels, [axis])
    edges = []
    for size in (before, after):
        zeros = t.classes.fresh((size,)).reshape([size if a == axis else 1 for a in range(labels.ndim)])
        edges.append(np.broadcast_to(zeros, (*labels.shape[:axis], size, *labels.shape[axis + 1 :])))
    return np.concatenate([edges[0], labels, edges[1]], axis=axis)


def _depth_space(t: ChannelTracer, node: gs.Node) -> None:
    labels = t.collapse(t.read(node, 0), [2, 3])
    block = int(node.attrs["blocksize"])
    channels = t.shape(node.inputs[0])[1]
    full = np.broadcast_to(labels, (labels.shape[0], channels, 1, 1)).reshape(labels.shape[0], channels)
    if node.op == "SpaceToDepth":
        t.write(node.outputs[0], np.tile(full, block * block)[:, :, None, None])
        return
    kept = channels // (block * block)
    if node.attrs.get("mode", "DCR") == "DCR":
        grouped: Literals = full.reshape(-1, block * block, kept)
    else:
        grouped = full.reshape(-1, kept, block * block).swapaxes(1, 2)
    # Neighbours in space come from different channels; giving each its own factor would label every pixel.
    joined = t.collapse(grouped, [1])
    t.write(node.outputs[0], joined.reshape(-1, kept, 1, 1))


MOVEMENTS: Mapping[str, Callable[[ChannelTracer, gs.Node], None]] = {
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _depth_space),
}
