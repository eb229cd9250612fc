"""The nodes through which a network's data flows, in an order that keeps few tensors alive.

A tensor is *data* if it depends on the values of the graph's inputs. What depends on their shapes only
(``Shape -> Gather -> Concat`` chains, a class token expanded to the batch, masks and position constants)
is transparent: it is recomputed where it is read and never separates or connects blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_graphsurgeon as gs

from onnxptq.graph.index import read_tensors
from onnxptq.partition.operators import SHAPE_READERS, is_parametrised, is_product


class Dataflow:
    """Data nodes of a graph in the order in which they are to run.

    Attributes:
        nodes: data nodes that a graph output depends on.
        reads: per node, the data tensors that it reads, each once.
        shape_reads: per node, the data tensors that it reads only through their shape.
        writes: per node, the tensors that it writes.
        producer: position of the node that writes a data tensor; graph inputs have none.
        consumers: positions of the nodes that read a data tensor, rising.
        shape_consumers: positions of the nodes that read a data tensor only through its shape.
        free: data tensors that no cut counts: what is computed from inputs that only ever join the data
            elementwise (an attention mask), without a parameter.
        outputs: names of the graph outputs that are data.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self._data = _data_tensors(graph)
        self._origins = _shape_origins(graph, self._data)
        chosen = _needed(graph, self._data, self._origins)
        reads = [_unique(t.name for t in read_tensors(node) if t.name in self._data) for node in chosen]
        self.free: frozenset[str] = _free_tensors(graph, chosen, reads)
        shape_reads = [self._shape_reads(node, read) for node, read in zip(chosen, reads, strict=True)]
        order = _schedule(chosen, reads, shape_reads, self.free)
        self.nodes: Sequence[gs.Node] = tuple(chosen[i] for i in order)
        self.reads: Sequence[tuple[str, ...]] = tuple(reads[i] for i in order)
        self.shape_reads: Sequence[tuple[str, ...]] = tuple(shape_reads[i] for i in order)
        self.writes: Sequence[tuple[str, ...]] = tuple(
            tuple(t.name for t in node.outputs if t.name) for node in self.nodes
        )
        self.producer: Mapping[str, int] = {name: i for i, names in enumerate(self.writes) for name in names}
        consumers: dict[str, list[int]] = {}
        for i, names in enumerate(self.reads):
            for name in names:
                consumers.setdefault(name, []).append(i)
        self.consumers: Mapping[str, Sequence[int]] = consumers
        shape_consumers: dict[str, list[int]] = {}
        for i, names in enumerate(self.shape_reads):
            for name in names:
                shape_consumers.setdefault(name, []).append(i)
        self.shape_consumers: Mapping[str, Sequence[int]] = shape_consumers
        self.outputs: Sequence[str] = _unique(t.name for t in graph.outputs if t.name in self._data)

    def is_data(self, tensor: str) -> bool:
        """Whether ``tensor`` depends on the values of a graph input."""
        return tensor in self._data

    def live(self) -> Sequence[tuple[str, ...]]:
        """Per node, the counted tensors that are alive once it has run: computed, or taken up by an earlier
        reader if the caller gives them, and still to be read."""
        n = len(self.nodes)
        born: list[list[str]] = [[] for _ in range(n)]
        for name, readers in self.consumers.items():
            if name not in self.free:
                born[self.producer.get(name, readers[0])].append(name)
        result: list[tuple[str, ...]] = []
        alive: list[str] = []
        for i in range(n):
            alive = [name for name in (*alive, *born[i]) if self.consumers[name][-1] > i]
            result.append(tuple(alive))
        return result

    def _shape_reads(self, node: gs.Node, reads: Sequence[str]) -> tuple[str, ...]:
        found = (o for t in read_tensors(node) for o in self._origins.get(t.name, ()))
        return tuple(name for name in _unique(found) if name not in reads)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(names))


def _data_tensors(graph: gs.Graph) -> frozenset[str]:
    data = {t.name for t in graph.inputs}
    for node in graph.nodes:
        if node.op not in SHAPE_READERS and any(t.name in data for t in read_tensors(node)):
            data.update(t.name for t in node.outputs if t.name)
    return frozenset(data)


def _shape_origins(graph: gs.Graph, data: frozenset[str]) -> Mapping[str, tuple[str, ...]]:
    """For each transparent tensor, the data tensors whose shape it depends on."""
    origins: dict[str, tuple[str, ...]] = {}
    for node in graph.nodes:
        if any(t.name in data for t in node.outputs if t.name):
            continue
        found = _unique(
            o for t in read_tensors(node) for o in ((t.name,) if t.name in data else origins.get(t.name, ()))
        )
        origins.update({t.name: found for t in node.outputs if t.name})
    return origins


def _needed(
    graph: gs.Graph, data: frozenset[str], origins: Mapping[str, tuple[str, ...]]
) -> Sequence[gs.Node]:
    """Data nodes that a graph output depends on, by value or by shape, in graph order."""
    wanted = {o for t in graph.outputs for o in (t.name, *origins.get(t.name, ()))}
    chosen: list[gs.Node] = []
    for node in reversed(graph.nodes):
        if any(t.name in wanted and t.name in data for t in node.outputs if t.name):
            chosen.append(node)
            for t in read_tensors(node):
                wanted.update((t.name, *origins.get(t.name, ())))
    return tuple(reversed(chosen))


def _free_tensors(
    graph: gs.Graph, nodes: Sequence[gs.Node], reads: Sequence[tuple[str, ...]]
) -> frozenset[str]:
    sources: dict[str, frozenset[str]] = {t.name: frozenset({t.name}) for t in graph.inputs}
    main: set[str] = set()
    for node, names in zip(nodes, reads, strict=True):
        found = [sources[name] for name in names if name in sources]
        if is_parametrised(node):
            main.update(*found)
        elif len(found) == len(names):
            joined = frozenset().union(*found)
            sources.update({t.name: joined for t in node.outputs if t.name})
    if not main:
        return frozenset()
    return frozenset(name for name, origin in sources.items() if not origin & main)


def _schedule(
    nodes: Sequence[gs.Node],
    reads: Sequence[tuple[str, ...]],
    shape_reads: Sequence[tuple[str, ...]],
    free: frozenset[str],
) -> Sequence[int]:
    """A topological order that finishes one path before it starts the next.

    Among the nodes that can run, the one after which the fewest tensors are alive goes first. Where that
    is not more than before, the one that reads the newest tensor (it continues a path); where it is more,
    the one that reads the oldest (it starts the path that has waited longest). Products of one tensor whose results
    are needed one after the other, as the keys and values of all layers of a decoder are, wait until nothing else can
    run, and then go in that order: the tensor takes less than all of them. Of the readers of one tensor
    products go last: a pooled skip then takes the tensor's place early. Free tensors come first of all.
    """
    writers = {t.name: i for i, node in enumerate(nodes) for t in node.outputs if t.name}
    pending: dict[str, int] = {}
    waiting: list[int] = []
    dependents: dict[int, list[int]] = {}
    for i in range(len(nodes)):
        for name in reads[i]:
            pending[name] = pending.get(name, 0) + 1
        needed = {writers[name] for name in (*reads[i], *shape_reads[i]) if name in writers}
        waiting.append(len(needed))
        for j in needed:
            dependents.setdefault(j, []).append(i)
    born: dict[str, int] = {}
    comes_back = _returns(reads, dependents)
    waits = _waits(nodes, reads, dependents, free)

    def priority(i: int) -> tuple[int, int, int, int, bool, bool, int]:
        names = [name for name in reads[i] if name not in free]
        if not names:
            return -len(nodes), 0, 0, 0, False, False, i
        freed = sum(pending[name] == 1 and name in born for name in names)
        # An input of the graph becomes alive when it is first read, if it will be read again.
        taken = sum(pending[name] > 1 and name not in born for name in names)
        made = sum(pending.get(t.name, 0) > 0 for t in nodes[i].outputs if t.name)
        growth = made + taken - freed
        newest = max(born.get(name, -1) for name in names)
        wait, more, age = (waits[i], growth, newest) if growth > 0 else (0, 0, -newest)
        return min(growth, 1), wait, more, age, comes_back[i], is_product(nodes[i]), i

    ready = [i for i, count in enumerate(waiting) if count == 0]
    order: list[int] = []
    while ready:
        chosen = min(ready, key=priority)
        ready.remove(chosen)
        for name in reads[chosen]:
            pending[name] -= 1
            born.setdefault(name, len(order))
        born.update({t.name: len(order) for t in nodes[chosen].outputs if t.name})
        order.append(chosen)
        for i in dependents.get(chosen, ()):
            waiting[i] -= 1
            if waiting[i] == 0:
                ready.append(i)
    return order


def _returns(reads: Sequence[tuple[str, ...]], dependents: Mapping[int, Sequence[int]]) -> Sequence[bool]:
    """Per node, whether another reader of a tensor that it reads lies behind it. Nodes are sorted."""
    readers: dict[str, int] = {}
    for i, names in enumerate(reads):
        for name in names:
            readers[name] = readers.get(name, 0) | 1 << i
    behind = [0] * len(reads)  # sets of positions as bits
    for i in reversed(range(len(reads))):
        for j in dependents.get(i, ()):
            behind[i] |= behind[j] | 1 << j
    return [any(behind[i] & readers[name] for name in names) for i, names in enumerate(reads)]


def _waits(
    nodes: Sequence[gs.Node],
    reads: Sequence[tuple[str, ...]],
    dependents: Mapping[int, Sequence[int]],
    free: frozenset[str],
) -> Sequence[int]:
    """Per node, the turn of a product whose tensor has at least two products that are needed later than its first
    one; 0 for the others."""
    meetings = _meetings(reads, dependents, free)
    products: dict[str, list[int]] = {}
    for i, names in enumerate(reads):
        if is_product(nodes[i]):
            for name in names:
                products.setdefault(name, []).append(meetings[i])
    queued = {name for name, found in products.items() if sum(turn > min(found) for turn in found) > 1}
    return [
        meetings[i] if is_product(nodes[i]) and not queued.isdisjoint(names) else 0
        for i, names in enumerate(reads)
    ]


def _meetings(
    reads: Sequence[tuple[str, ...]], dependents: Mapping[int, Sequence[int]], free: frozenset[str]
) -> Sequence[int]:
    """Per node, how deep the first node lies in which its result meets another tensor, as the most nodes on a path to
    it; that of the result's end where there is none. Nodes are sorted."""
    depth = [0] * len(reads)
    for i in range(len(reads)):
        for j in dependents.get(i, ()):
            depth[j] = max(depth[j], depth[i] + 1)
    found = list(depth)
    for i in reversed(range(len(reads))):
        found[i] = min(
            (
                depth[j] if sum(name not in free for name in reads[j]) > 1 else found[j]
                for j in dependents.get(i, ())
            ),
            default=depth[i],
        )
    return found
