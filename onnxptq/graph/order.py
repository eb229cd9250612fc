"""Nodes in the order that ONNX asks for: each behind those that it reads.

Tools that cast a model to half precision put the casts at its end. onnxruntime sorts nodes itself and runs such
files; the ONNX checker refuses them.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from onnxptq.graph import proto


def sort_nodes(model: onnx.ModelProto) -> bool:
    """Sort the nodes of every graph of ``model`` in place, as little as it takes.

    A graph whose nodes read each other in a circle stays as it is, for the checker to refuse.

    Returns:
        Whether any node was moved.
    """
    moved = [_sort(graph) for graph in proto.walk_graphs(model.graph)]
    return any(moved)


def _sort(graph: onnx.GraphProto) -> bool:
    nodes = list(graph.node)
    # Of a tensor that several nodes write, which is an error, any will do.
    writers = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    needed = [sorted({writers[name] for name in _reads(node) if name in writers}) for node in nodes]
    if all(earlier < i for i, before in enumerate(needed) for earlier in before):
        return False
    order = _order(needed)
    if order is None:
        return False
    del graph.node[:]
    graph.node.extend(nodes[i] for i in order)
    return True


def _order(needed: list[list[int]]) -> list[int] | None:
    """The numbers of all nodes, each behind its ``needed`` ones and otherwise as before; None in a circle."""
    order: list[int] = []
    done, opened = [False] * len(needed), [False] * len(needed)
    for first in range(len(needed)):
        stack = [first]
        while stack:
            node = stack[-1]
            missing = [] if done[node] else [other for other in needed[node] if not done[other]]
            if any(opened[other] for other in missing):
                return None
            if missing:
                opened[node] = True
                stack += reversed(missing)
                continue
            stack.pop()
            if not done[node]:
                done[node] = True
                order.append(node)
    return order


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that ``node`` reads, those that graphs inside it take from around them included."""
    yield from node.input
    for graph in proto.subgraphs_of(node):
        for inner in graph.node:
            yield from _reads(inner)
        yield from (value.name for value in graph.output)
