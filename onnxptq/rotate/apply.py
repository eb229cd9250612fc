"""Writing rotations into a copy of the graph: only values of constants change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxptq.graph.classes import Classes
from onnxptq.graph.forms import write_form
from onnxptq.graph.surgeon import set_constant
from onnxptq.rotate.folding import Floats, Folding, Pending, fold
from onnxptq.rotate.orthogonal import spreading_rotation
from onnxptq.rotate.spaces import Space
from onnxptq.rotate.tracing import RotationTracer, Turn
from onnxptq.types import CanonicalModel


def apply_rotations(
    model: CanonicalModel,
    tracer: RotationTracer,
    foldings: Mapping[str, Folding],
    spaces: Sequence[Space],
    path: Path,
    *,
    seed: int,
) -> CanonicalModel:
    """The model with every space rotated, written to ``path``; ``seed`` chooses the rotations."""
    pending = Pending()
    rotated = {root for space in spaces for root in space.roots.tolist()}
    for name, labels in tracer.normalized.items():
        if name in foldings and rotated & set(tracer.classes.roots(labels).reshape(-1).tolist()):
            fold(foldings[name], pending)
    rotations = [
        spreading_rotation(s.roots.size, np.random.default_rng([seed, i])) for i, s in enumerate(spaces)
    ]
    for turn in tracer.turns:
        _turn(turn, tracer.classes, spaces, rotations, pending)
    graph = model.graph.copy()
    nodes = {node.name: node for node in graph.nodes}
    for (name, i), value in pending.values.items():
        set_constant(graph, nodes[name], i, value.astype(np.float32))
    return write_form(model, graph, path, f"rotated {seed} {sorted(rotated)}")


def _turn(
    turn: Turn, classes: Classes, spaces: Sequence[Space], rotations: Sequence[Floats], pending: Pending
) -> None:
    """v becomes v Q along the axes of the labels, for each copy of each space that is there."""
    roots = classes.roots(turn.labels)
    axes = [axis for axis in range(roots.ndim) if roots.shape[axis] > 1]
    along = roots.reshape(-1)
    present = set(along.tolist())
    for space, rotation in zip(spaces, rotations, strict=True):
        if int(space.roots[0]) not in present:
            continue
        value = pending.find(turn.node, turn.index)
        if value is None:
            return
        moved = np.moveaxis(value, axes, range(-len(axes), 0))
        flat = moved.reshape(*moved.shape[: moved.ndim - len(axes)], along.size).copy()
        # The k-th place of every coordinate belongs to the k-th copy.
        places = np.stack([np.flatnonzero(along == root) for root in space.roots.tolist()], axis=1)
        for copy in places:
            flat[..., copy] = flat[..., copy] @ rotation
        turned = np.moveaxis(flat.reshape(moved.shape), range(-len(axes), 0), axes)
        pending.set(turn.node, turn.index, np.ascontiguousarray(turned))
