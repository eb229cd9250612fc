"""What the rules record on their way through a graph: which channels may be mixed, and which constants turn.

Every channel of a weighted layer's output gets a label; equal labels at two places mean the same coordinate.
Where channels x become x Q, every constant along them turns the same way, v to v Q: the columns of the weight
that writes them, the rows of the weight that reads them (x Q Q^T W = x W), and what is added to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxptq.graph import layouts
from onnxptq.graph.classes import Literals
from onnxptq.graph.index import READ_AGAIN, GraphIndex, is_shared_weight
from onnxptq.graph.tracing import ChannelTracer, Declined, Shapes
from onnxptq.types import Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turn:
    """Constant input ``index`` of ``node`` turns with its ``labels``, which broadcast to it.

    ``side`` tells weights that write channels from those that read them, and both from other constants.
    """

    node: gs.Node
    index: int
    labels: Literals
    side: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fibres:
    """Channels may be mixed only where ``keys`` are equal: an operator works on each of these sets alone."""

    labels: Literals
    keys: npt.NDArray[np.int64]


class RotationTracer(ChannelTracer):
    """What rules work with.

    Args:
        index, shapes, values: as :class:`~onnxptq.graph.tracing.ChannelTracer`.
        scales: why the scale and bias of a normalization cannot move into what reads it, by node; empty if they can.
    """

    def __init__(
        self, index: GraphIndex, shapes: Shapes, values: Mapping[str, Array], scales: Mapping[str, str]
    ) -> None:
        super().__init__(index, shapes, values, change="rotation")
        self.scales = scales
        self.turns: list[Turn] = []
        self.fibres: list[Fibres] = []
        self.normalized: dict[str, Literals] = {}
        self.contracted: list[Literals] = []

    def follow(self, rules: Mapping[str, Callable[[Any, gs.Node], None]]) -> None:
        """As the base class, but channels stay whose weight several nodes read: each would get a copy of it."""
        super().follow(rules)
        for turn in self.turns:
            if turn.index < len(turn.node.inputs) and is_shared_weight(
                self.index, turn.node.inputs[turn.index]
            ):
                self.classes.pin(turn.labels, READ_AGAIN)

    def forget(self, node: gs.Node) -> None:
        """Drop the constants of ``node``; sets that may not be mixed do no harm."""
        self.turns = [turn for turn in self.turns if turn.node is not node]
        self.normalized.pop(node.name, None)

    def took_constant(self, node: gs.Node, i: int, labels: Literals) -> None:
        """Let a constant that is only moved turn by itself."""
        self.turn(node, i, labels)

    def turn(self, node: gs.Node, i: int, labels: Literals, side: str = "") -> None:
        """Record that constant input ``i`` turns."""
        self.constant(node, i)
        self.turns.append(Turn(node=node, index=i, labels=labels, side=side))

    def turn_bias(self, node: gs.Node, labels: Literals) -> None:
        """Record that the bias at input 2 turns, if there is one or once there will be."""
        if self.has_input(node, 2):
            self.constant(node, 2)
        self.turns.append(Turn(node=node, index=2, labels=labels, side=""))

    def mix_along(self, labels: Literals, axis: int) -> None:
        """Allow mixing along ``axis`` only."""
        self._mix(labels, [a for a in range(labels.ndim) if a != axis % labels.ndim])

    def hold_apart(self, labels: Literals, sizes: tuple[int, ...]) -> None:
        """Forbid mixing along the axes on which the other operand of a product has more than one element.

        Raises:
            Declined: nothing is left to mix.
        """
        axes = [a for a in range(labels.ndim) if labels.shape[a] > 1]
        if axes and all(sizes[a] > 1 for a in axes):
            raise Declined("it scales every channel by its own factor")
        self._mix(labels, [a for a in axes if sizes[a] > 1])

    def _mix(self, labels: Literals, held: list[int]) -> None:
        keys = np.zeros((1,) * labels.ndim, dtype=np.int64)
        for axis in held:
            size = labels.shape[axis]
            position = np.arange(size).reshape([size if a == axis else 1 for a in range(labels.ndim)])
            keys = keys * size + position
        self.fibres.append(Fibres(labels=labels, keys=np.broadcast_to(keys, labels.shape)))

    def added_constant(self, node: gs.Node, i: int, labels: Literals) -> Literals:
        """Labels of ``labels + constant``. What is the same for all channels stays, as Q keeps 1."""
        value = self.constant(node, i)
        rank = max(labels.ndim, value.ndim)
        labels = layouts.align(labels, rank)
        shape = (1,) * (rank - value.ndim) + value.shape
        if all(shape[a] == 1 for a in range(rank) if labels.shape[a] > 1):
            return labels
        labels = self.collapse(labels, [a for a in range(rank) if shape[a] == 1])
        self.turn(node, i, labels.reshape(labels.shape[rank - value.ndim :]))
        return labels
