"""Shifting what can be shifted to the middle of its range, and checking that the network still computes the same.

The grid of a tensor covers the union of what its channels cover. Behind normalizations, and between layers without a
nonlinear operator, every channel has a mean of its own; with the middle of each range at 0, only widths count. Behind
normalizations these are the zero points of RepQ-ViT (arXiv 2212.08254), whose scales per channel
:mod:`onnxptq.equalize` takes care of. The middle is that between the quantiles ``TAIL`` and 1 - ``TAIL``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxptq.graph.forms import write_form
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import Linear
from onnxptq.graph.save import exposed_copy
from onnxptq.graph.surgeon import new_constant, set_constant
from onnxptq.runtime import Provider, Session, compare_forms, concrete_shapes, first_sample, open_transient
from onnxptq.runtime.transient import group_within
from onnxptq.shift.tracing import RULES, ShiftTracer, Writer
from onnxptq.types import CanonicalModel, Feeds

TAIL = 1e-3
"""Share of a channel's values that may lie beyond either end of its range."""

_ROWS = 8192
"""Most rows of a tensor that are looked at."""

_GROUP_BYTES = 1 << 30

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shift:
    """What was shifted.

    Attributes:
        tensors: outputs of normalizations and layers with shifted channels, in the user's names.
        channels: how many of their channels.
        difference: of the float outputs, relative to their largest magnitude.
        reason: why nothing was shifted although it could be.
    """

    tensors: tuple[str, ...] = ()
    channels: int = 0
    difference: float = 0.0
    reason: str = ""

    @property
    def summary(self) -> str:
        """One line."""
        if not self.tensors:
            return f"No channels between layers can be shifted{self.reason and ': '}{self.reason}."
        count = len(self.tensors)
        return (
            f"Shifted: {self.channels} channels of {count} tensor{'s' * (count > 1)}; "
            f"the float outputs differ by {self.difference:.1e}."
        )


def shift(
    model: CanonicalModel,
    feeds: Feeds,
    *,
    work_dir: Path,
    provider: Provider = "cpu",
    group_bytes: int | None = None,
) -> tuple[CanonicalModel, Shift]:
    """Shift channels to the middle of their ranges, where a bias places them and only layers with a bias read them.

    The result computes the same function with the same nodes; only constants differ. It is written to
    ``work_dir/shifted.onnx``.

    Args:
        feeds: samples that show the ranges; the first one tells shapes, and the float outputs are compared on it.
        group_bytes: values held at once.

    Returns:
        The new model (the old one if nothing can be shifted) and what was done.

    Raises:
        FeedError: there is no sample.
        OutputPathError: ``work_dir`` cannot be written.
    """
    sample = first_sample(feeds)
    shapes, values = concrete_shapes(model, sample, provider)
    index = GraphIndex(model.graph)
    tracer = ShiftTracer(index, shapes, values)
    tracer.follow(RULES)
    free = [writer for writer in tracer.writers if not tracer.classes.all_pinned(writer.labels)]
    if not free:
        return model, Shift()
    sizes = {w.tensor: 4 * int(np.prod(shapes[w.tensor], dtype=np.int64)) for w in free}
    axes = {w.tensor: w.axis for w in free}
    offsets = _offsets(
        tracer, free, _middles(model, feeds, sizes, axes, provider, group_bytes or _GROUP_BYTES)
    )
    result = _applied(model, tracer, offsets, work_dir / "shifted.onnx")
    gap, reason = compare_forms(model.path, result.path, sample, provider=provider)
    if reason:
        return model, Shift(reason=reason)
    return result, Shift(
        tensors=tuple(model.user_name(w.tensor) for w in free),
        channels=sum(int(np.count_nonzero(_of(tracer, w.labels, offsets))) for w in free),
        difference=gap,
    )


def _middles(
    model: CanonicalModel,
    feeds: Feeds,
    sizes: Mapping[str, int],
    axes: Mapping[str, int],
    provider: Provider,
    limit: int,
) -> dict[str, Floats]:
    """The middle of the range of every channel of every tensor, along its axis."""
    names, found = list(sizes), {}
    most = -(-_ROWS // len(feeds))
    for members in group_within([[name] for name in names], sizes, limit):
        group = [names[i] for i in members]
        session = _opened(model, group, provider)
        rows: dict[str, list[npt.NDArray[np.float32]]] = {name: [] for name in group}
        for sample in feeds:
            for name, value in session.run(sample, group).items():
                moved = np.moveaxis(value, axes[name], -1)
                flat = moved.reshape(-1, moved.shape[-1])
                rows[name].append(flat[:: -(-len(flat) // most)].copy())
        for name, parts in rows.items():
            ends = np.quantile(np.concatenate(parts).astype(np.float64), [TAIL, 1 - TAIL], axis=0)
            found[name] = ends.mean(axis=0)
    return found


def _opened(model: CanonicalModel, names: Sequence[str], provider: Provider) -> Session:
    return open_transient(
        model.path.with_name(f"exposed_{model.path.name}"),
        lambda path: exposed_copy(model.path, names, path),
        provider=provider,
    )


def _offsets(
    tracer: ShiftTracer, writers: Sequence[Writer], middles: Mapping[str, Floats]
) -> dict[int, float]:
    """c by class of channels: the mean of the middles of its members, and none for those that are held."""
    members: dict[int, list[float]] = {}
    for writer in writers:
        roots = tracer.classes.roots(writer.labels).reshape(-1)
        for root, value in zip(roots.tolist(), middles[writer.tensor].tolist(), strict=True):
            if not tracer.classes.is_pinned(root) and np.isfinite(value):
                members.setdefault(root, []).append(value)
    return {root: float(np.mean(values)) for root, values in members.items()}


def _of(tracer: ShiftTracer, labels: npt.NDArray[np.int64], offsets: Mapping[int, float]) -> Floats:
    """c of every channel, flat."""
    roots = tracer.classes.roots(labels).reshape(-1).tolist()
    return np.asarray([offsets.get(root, 0.0) for root in roots])


def _applied(
    model: CanonicalModel, tracer: ShiftTracer, offsets: Mapping[int, float], path: Path
) -> CanonicalModel:
    graph = model.graph.copy()
    nodes = {node.name: node for node in graph.nodes}
    for writer in tracer.writers:
        taken = _of(tracer, writer.labels, offsets)
        if taken.any():
            _add(graph, nodes[writer.node.name], writer.index, -taken)
    for reader in tracer.readers:
        moved = _moved(reader.layer, _of(tracer, reader.labels, offsets))
        if moved.any():
            layer = reader.layer
            node, i = (layer.node, 2) if layer.bias_node is None else (layer.bias_node, layer.bias_index or 0)
            _add(graph, nodes[node.name], i, moved)
    return write_form(model, graph, path, f"shifted {sorted(offsets.items())}")


def _moved(layer: Linear, taken: Floats) -> Floats:
    """W c per output channel."""
    weight = np.asarray(layer.weight.values, np.float64)
    if layer.node.op != "Conv":
        return np.asarray(weight.T @ taken if layer.axis % 2 else weight @ taken)
    parts = weight.reshape(layer.group, weight.shape[0] // layer.group, weight.shape[1], -1).sum(axis=3)
    moved: Floats = np.einsum("goi,gi->go", parts, taken.reshape(layer.group, -1)).reshape(-1)
    return moved


def _add(graph: gs.Graph, node: gs.Node, i: int, value: Floats) -> None:
    """Add to constant input ``i``, which is made where it is absent."""
    if i < len(node.inputs) and node.inputs[i].name:
        old = np.asarray(node.inputs[i].values, np.float64)
        set_constant(graph, node, i, (old + value).astype(np.float32))
        return
    constant = new_constant(graph, f"{node.name}/bias", value.astype(np.float32))
    if i < len(node.inputs):
        node.inputs[i] = constant
    else:
        node.inputs.append(constant)
