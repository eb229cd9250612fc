"""What became of each node of the user's file: the nodes of the canonical graph that compute what it computed.

Both graphs are cut at the tensors that both have. Nodes of the canonical graph that are joined by tensors which the
user does not know form a *region*; what the user's file computes between the tensors that a region reads and those
that it writes is what the region stands for::

    user        x -> Conv -> c -> BatchNormalization -> y          canonical   x -> Conv -> y
    regions     {Conv}, which reads x and writes y; so it stands for Conv and BatchNormalization

A node that is in the canonical graph under its own name and type, in such a region, stands for itself alone. Nothing
is left of nodes that compute with constants or shapes only, and were folded, nor of those that change nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

import onnx
import onnx_graphsurgeon as gs

from onnxptq.graph import proto
from onnxptq.types import UserNode

_PASSIVE = frozenset({"Identity", "Dropout"})
_SHAPES = frozenset({"Shape", "Size"})

FOLDED = "folded into a constant"
PASSIVE = "it changes nothing"
UNUSED = "no output needs it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """Nodes of the canonical graph joined by tensors ``inner`` that the user does not know, and what they write for
    others, by the user's names; in graph order."""

    nodes: tuple[str, ...]
    inner: tuple[str, ...]
    outputs: tuple[str, ...]


def find_regions(
    reference: onnx.ModelProto, graph: gs.Graph, user_names: Mapping[str, str]
) -> tuple[Region, ...]:
    """The regions of ``graph``, in the order of their first nodes.

    Args:
        reference: the user's graph (``weights.structure_only``), nodes named.
        graph: the canonical graph.
        user_names: names in the user's file of tensors that have another in the canonical graph.
    """
    known = {name for node in reference.graph.node for name in node.output if name}
    group = {node.name: node.name for node in graph.nodes}

    def root(name: str) -> str:
        while group[name] != name:
            group[name] = name = group[group[name]]
        return name

    for node in graph.nodes:
        for tensor in node.outputs:
            if user_names.get(tensor.name, tensor.name) not in known:
                for reader in tensor.outputs:
                    if reader.name in group:  # and not in a nested graph
                        group[root(reader.name)] = root(node.name)
    members: dict[str, list[gs.Node]] = defaultdict(list)
    for node in graph.nodes:
        members[root(node.name)].append(node)
    return tuple(_region(nodes, user_names, known) for nodes in members.values())


def _region(nodes: list[gs.Node], user_names: Mapping[str, str], known: Set[str]) -> Region:
    written = [tensor.name for node in nodes for tensor in node.outputs if tensor.name]
    named = [user_names.get(name, name) for name in written]
    return Region(
        nodes=tuple(node.name for node in nodes),
        inner=tuple(name for name, user in zip(written, named, strict=True) if user not in known),
        outputs=tuple(user for user in named if user in known),
    )


def inner_names(regions: Iterable[Region], user_names: Mapping[str, str]) -> dict[str, str]:
    """What reports call the tensors that the user's file does not have: parts of the tensor that they lead to."""
    return {
        name: f"part {number} of {region.outputs[-1]}"
        for region in regions
        if region.outputs
        for number, name in enumerate(region.inner, start=1)
        if name not in user_names
    }


def user_nodes(
    reference: onnx.ModelProto, graph: gs.Graph, regions: Iterable[Region]
) -> tuple[UserNode, ...]:
    """Every node of the user's graph and what became of it, in the order of the file."""
    regions = tuple(regions)
    writers = {name: node for node in reference.graph.node for name in node.output if name}
    alive = {name for region in regions for name in region.outputs}
    data = _data_nodes(reference.graph)
    homes: dict[str, list[str]] = defaultdict(list)
    for region in regions:
        for node in _between(region.outputs, writers, alive):
            # Constants belong to nobody, unless they are still computed.
            if node.name in data or not alive.isdisjoint(node.output):
                homes[node.name] += region.nodes
    operators = {node.name: node.op for node in graph.nodes}
    return tuple(_user_node(node, operators, homes[node.name], data) for node in reference.graph.node)


def _data_nodes(graph: onnx.GraphProto) -> set[str]:
    """Names of the nodes that values of the graph's inputs flow through, not only their shapes."""
    values = {entry.name for entry in graph.input} - {tensor.name for tensor in graph.initializer}
    found = set()
    for node in graph.node:
        if node.op_type not in _SHAPES and not values.isdisjoint(_reads(node)):
            found.add(node.name)
            values.update(name for name in node.output if name)
    return found


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    yield from (name for name in node.input if name)
    for nested in proto.subgraphs_of(node):
        for inner in nested.node:
            yield from _reads(inner)


def _between(
    outputs: Iterable[str], writers: Mapping[str, onnx.NodeProto], alive: Set[str]
) -> Iterator[onnx.NodeProto]:
    """The user's nodes that compute ``outputs`` from tensors that are ``alive``."""
    seen: set[str] = set()
    pending = [writers[name] for name in outputs]
    while pending:
        node = pending.pop()
        if node.name in seen:
            continue
        seen.add(node.name)
        yield node
        pending += [writers[name] for name in _reads(node) if name in writers and name not in alive]


def _user_node(
    node: onnx.NodeProto, operators: Mapping[str, str], homes: list[str], data: Set[str]
) -> UserNode:
    outputs = tuple(name for name in node.output if name)
    reason = ""
    if operators.get(node.name) == node.op_type and (not homes or node.name in homes):
        homes = [node.name]
    elif node.op_type in _PASSIVE and node.domain in proto.ONNX_DOMAINS:
        homes, reason = [], PASSIVE
    elif not homes:
        reason = UNUSED if node.name in data else FOLDED
    return UserNode(
        name=node.name, op=node.op_type, outputs=outputs, homes=tuple(dict.fromkeys(homes)), reason=reason
    )
