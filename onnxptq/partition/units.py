"""Where the data flow is cut, and how the pieces between cuts are grouped into blocks.

A sweep over the scheduled nodes counts the tensors that are alive after each of them. Level 1 cuts where
one tensor is alive; the pieces (*units*) are then

    layer   a single product                                    Conv, Gemm, MatMul, ...
    fork    several nodes with a product, from one tensor over several paths to one tensor
    gate    a fork that multiplies its own input                squeeze-and-excitation, x * sigmoid(x)
    float   operators that no gradient passes                   LSTM, NonMaxSuppression, control flow
    rest    anything without a product                          norms, pools, data movement, activations

A fork is a block, a layer starts one; a float unit is a block of its own, so that what lies in front of it is
compared before it. A fork with more layers than the size cap (a dense block, a decoder with long skips, parallel
resolutions), or with layers beside an operator that no gradient passes, is swept again with one more tensor allowed.
Tensors that are only read by the same concatenations from here on count as one: together they are the concatenated
tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from onnxptq.partition.dataflow import Dataflow
from onnxptq.partition.operators import (
    is_depthwise,
    is_elementwise,
    is_linear,
    is_normalization,
    is_pointwise,
    is_product,
    weight_count,
)

Role = Literal["layer", "fork", "float", "elementwise", "rest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """``max_live``: tensors alive at a cut; ``max_linears`` and ``max_weights``: size from which a fork is cut
    further, in layers with weights and in weight elements."""

    max_live: int
    max_linears: int
    max_weights: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Scheduled nodes ``start`` to ``stop`` (excluded)."""

    start: int
    stop: int
    kind: Literal["plain", "fork", "float"]


@dataclass(slots=True, kw_only=True)
class _Group:
    """Units that become one block: ``core`` is the layer or fork among them, (start, stop)."""

    start: int
    stop: int
    core: tuple[int, int]
    role: Role

    @property
    def is_layer(self) -> bool:
        return self.role == "layer"

    @property
    def kind(self) -> Literal["plain", "fork", "float"]:
        return self.role if self.role == "fork" or self.role == "float" else "plain"


class Sweep:
    """Counts of live tensors over the schedule of ``flow``, and the cuts that they allow.

    ``foreign`` names the nodes that no gradient passes.
    """

    def __init__(self, flow: Dataflow, limits: Limits, foreign: Collection[str] = ()) -> None:
        self._flow = flow
        self._limits = limits
        self._is_foreign = [node.name in foreign for node in flow.nodes]
        live = flow.live()
        tensors = [len(names) for names in live]
        bundles = [len({self._future(name, i) for name in names}) for i, names in enumerate(live)]
        # The first sweep takes tensors as they are, so that a Concat's inputs are not cut off from it.
        self._levels = [
            [count <= 1 for count in tensors],
            *([count <= k for count in bundles] for k in range(1, limits.max_live + 1)),
        ]

    def spans(self) -> tuple[Span, ...]:
        """Consecutive spans over all nodes."""
        n = len(self._flow.nodes)
        return self._split(0, n, level=0) if n else ()

    def _future(self, name: str, position: int) -> object:
        readers = tuple(i for i in self._flow.consumers[name] if i > position)
        is_collected = all(self._flow.nodes[i].op in ("Concat", "SequenceConstruct") for i in readers)
        return readers if is_collected else name

    def _split(self, start: int, stop: int, *, level: int) -> tuple[Span, ...]:
        may_cut = self._levels[level]
        bounds = [start, *(p + 1 for p in range(start, stop - 1) if may_cut[p]), stop]
        units = list(pairwise(bounds))
        result: list[Span] = []
        for group in self._join_depthwise(self._groups(units)):
            if group.role != "fork" or not self._is_large(*group.core) or level + 1 == len(self._levels):
                result.append(Span(start=group.start, stop=group.stop, kind=group.kind))
                continue
            inner = self._split(*group.core, level=level + 1)
            starts = [group.start, *(span.start for span in inner[1:])]
            stops = [*(span.stop for span in inner[:-1]), group.stop]
            result.extend(
                Span(start=a, stop=b, kind=span.kind) for a, b, span in zip(starts, stops, inner, strict=True)
            )
        return tuple(result)

    def _groups(self, units: Sequence[tuple[int, int]]) -> list[_Group]:
        """Attach units without a product of their own to the layer or fork that they belong to.

        Behind a layer everything is its own (norm, activation, pool, reshape). Behind a fork only
        activations are, and a norm if the fork has none inside (post-norm); the rest opens the next block if
        that is a layer (a head's norm and pool, a downsampling's norm), and closes this one if another
        fork follows.
        """
        groups: list[_Group] = []
        loose: list[tuple[int, int]] = []
        for unit in units:
            role = self._role(*unit)
            if role in ("layer", "fork", "float"):
                start = loose[0][0] if loose else unit[0]
                if loose and groups and role != "layer":
                    groups[-1].stop = start = unit[0]
                loose = []
                groups.append(_Group(start=start, stop=unit[1], core=unit, role=role))
            elif groups and not loose and self._belongs_to(groups[-1], unit, role):
                groups[-1].stop = unit[1]
            else:
                loose.append(unit)
        if loose and groups:
            groups[-1].stop = loose[-1][1]
        return groups or [_Group(start=units[0][0], stop=units[-1][1], core=units[0], role="rest")]

    def _belongs_to(self, group: _Group, unit: tuple[int, int], role: Role) -> bool:
        if group.role == "float":
            return False
        if group.is_layer or role == "elementwise":
            return True
        inside = self._flow.nodes[group.start : group.stop]
        return is_normalization(self._flow.nodes[unit[0]]) and not any(map(is_normalization, inside))

    def _join_depthwise(self, groups: Sequence[_Group]) -> list[_Group]:
        """Join a depthwise layer with the pointwise one behind it and the expanding one before it."""
        result: list[_Group] = []
        is_open = False
        for group in groups:
            node = self._flow.nodes[group.core[0]]
            is_next = group.is_layer and bool(result)
            if is_next and is_open and is_pointwise(node):
                result[-1].stop, is_open = group.stop, False
                continue
            is_open = group.is_layer and is_depthwise(node)
            if is_next and is_open and self._is_expansion(result[-1]):
                result[-1].stop = group.stop
                result[-1].core = group.core
                continue
            result.append(group)
        return result

    def _is_expansion(self, group: _Group) -> bool:
        node = self._flow.nodes[group.core[0]]
        if not group.is_layer or not is_pointwise(node):
            return False
        shape = node.inputs[1].shape
        # A group whose core is still a pointwise layer is not the projection of an earlier depthwise one.
        return int(shape[0]) > int(shape[1])

    def _role(self, start: int, stop: int) -> Role:
        nodes = self._flow.nodes[start:stop]
        is_foreign = self._is_foreign[start:stop]
        if any(is_foreign) and all(
            of_its_own or not is_product(node) for node, of_its_own in zip(nodes, is_foreign, strict=True)
        ):
            return "float"
        if not any(is_product(node) for node in nodes):
            return "elementwise" if all(is_elementwise(node) for node in nodes) else "rest"
        if len(nodes) == 1:
            return "layer"
        return "elementwise" if self._is_gate(start, stop) else "fork"

    def _is_gate(self, start: int, stop: int) -> bool:
        """Whether the last node multiplies what came into these nodes by something computed in them."""
        reads = self._flow.reads[stop - 1]
        outside = [name for name in reads if self._flow.producer.get(name, -1) < start]
        return self._flow.nodes[stop - 1].op == "Mul" and len(outside) == 1 and len(reads) == 2

    def _is_large(self, start: int, stop: int) -> bool:
        nodes = self._flow.nodes[start:stop]
        linears = sum(is_linear(node) for node in nodes)
        weights = self._limits.max_weights
        if linears and any(self._is_foreign[start:stop]):
            return True
        return linears > 1 and (
            linears > self._limits.max_linears
            or (weights is not None and sum(map(weight_count, nodes)) > weights)
        )
