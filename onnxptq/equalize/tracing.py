"""Following factors through a graph: which channels share one, and which weights absorb them.

Every float tensor ``T`` is to become ``T / s``. A rule per operator (``rules``) says how the labels of its
outputs follow from those of its inputs, and records an :class:`Edit` for each constant that takes up the
difference. What no rule covers keeps its inputs and outputs as they are: their factors are pinned to 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph import layouts
from onnxptq.graph.classes import Classes, Literals
from onnxptq.graph.index import READ_AGAIN, GraphIndex, is_shared_weight
from onnxptq.graph.tracing import ChannelTracer, Shapes
from onnxptq.types import Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edit:
    """Input ``index`` of ``node`` becomes ``constant * s[times] / s[over]``; labels broadcast to the constant."""

    node: gs.Node
    index: int
    times: Literals | None = None
    over: Literals | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Product:
    """A weighted operator between two tensors, as its noise needs it.

    ``rows`` is the weight's axis of output channels, None for an elementwise Mul or Div; ``times`` labels its
    elements as they are read (input channels), ``over`` its output channels; both broadcast to it.
    """

    node: gs.Node
    index: int
    source: str
    target: str
    rows: int | None
    times: Literals
    over: Literals


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contraction:
    """A MatMul of two activations along a shared axis whose factors cancel: ``left`` has s, ``right`` 1 / s."""

    left: str
    right: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """A Clip to [``low``, ``high``], low <= 0 <= high, whose output ``tensor`` passes factors while it stays inside.

    A bound that is 0 or infinite scales with any factor.
    """

    tensor: str
    low: float
    high: float


Rule = Callable[["Tracer", gs.Node], None]


@dataclass(slots=True, eq=False)
class Trace:
    """The outcome: labels of every float tensor, the edits, and the records that the noise model reads.

    ``shared`` names constants that have several readers and one value for all of them.
    """

    classes: Classes
    labels: dict[str, Literals] = field(default_factory=dict)
    edits: list[Edit] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    bounds: list[Bounds] = field(default_factory=list)
    shared: set[str] = field(default_factory=set)
    declined: dict[str, str] = field(default_factory=dict)


class Tracer(ChannelTracer):
    """What rules work with; see :class:`~onnxptq.graph.tracing.ChannelTracer`."""

    def __init__(self, index: GraphIndex, shapes: Shapes, values: Mapping[str, Array]) -> None:
        super().__init__(index, shapes, values, change="rescaling")
        self.trace = Trace(classes=self.classes, labels=self.labels, declined=self.declined)

    def run(self, rules: Mapping[str, Rule]) -> Trace:
        """Label every tensor in graph order."""
        self.follow(rules)
        self._keep_shared()
        return self.trace

    def _keep_shared(self) -> None:
        """Let large constants that several nodes read change for all of them alike, else each would get a copy."""
        edits: dict[str, list[Edit]] = {}
        for edit in self.trace.edits:
            edits.setdefault(edit.node.inputs[edit.index].name, []).append(edit)
        for name, found in edits.items():
            if not is_shared_weight(self.index, found[0].node.inputs[found[0].index]):
                continue
            self.trace.shared.add(name)
            is_followed = len(found) == len(self.index.uses(name))
            for kind in ("times", "over"):
                labels = [getattr(edit, kind) for edit in found]
                given = [each for each in labels if each is not None]
                for each in given:
                    if is_followed and len(given) == len(labels):
                        self.classes.join(given[0], each)
                    else:
                        self.classes.pin(each, READ_AGAIN)

    def forget(self, node: gs.Node) -> None:
        """Drop the edits and products that a rule recorded for ``node`` before it gave up."""
        self.trace.edits = [edit for edit in self.trace.edits if edit.node is not node]
        self.trace.products = [product for product in self.trace.products if product.node is not node]

    def took_constant(self, node: gs.Node, i: int, labels: Literals) -> None:
        """Let a constant that is only moved absorb its own factors."""
        self.trace.edits.append(Edit(node=node, index=i, over=labels))

    def absorb(
        self, node: gs.Node, i: int, *, times: Literals | None = None, over: Literals | None = None
    ) -> None:
        """Record that constant input ``i`` is multiplied by s[times] and divided by s[over]."""
        self.constant(node, i)
        self.trace.edits.append(Edit(node=node, index=i, times=times, over=over))

    def product(self, node: gs.Node, i: int, rows: int | None, times: Literals, over: Literals) -> None:
        """Record a weight together with its edit."""
        if node.op == "Div":
            self.absorb(node, i, times=over, over=times)
        else:
            self.absorb(node, i, times=times, over=over)
        source = node.inputs[1 - i].name
        self.trace.products.append(
            Product(
                node=node,
                index=i,
                source=source,
                target=node.outputs[0].name,
                rows=rows,
                times=times,
                over=over,
            )
        )

    def additive(self, node: gs.Node, i: int, labels: Literals) -> Literals:
        """Labels of ``labels + constant`` where the constant at ``i`` is rescaled like what it is added to.

        Along axes that the constant repeats, the labels are joined. A single number other than 0 and
        infinity would have to become a vector; the labels are pinned instead.
        """
        value = self.constant(node, i)
        if value.size == 1:
            if not np.all((value == 0) | np.isinf(value)):
                self.classes.pin(labels, f"{node.op} adds or compares a single number")
            return layouts.align(labels, max(labels.ndim, value.ndim))
        rank = max(labels.ndim, value.ndim)
        labels = layouts.align(labels, rank)
        shape = (1,) * (rank - value.ndim) + value.shape
        labels = self.collapse(labels, [a for a in range(rank) if shape[a] == 1])
        self.absorb(node, i, over=labels.reshape(labels.shape[rank - value.ndim :]))
        return labels
