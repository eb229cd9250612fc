"""Whether the low-rank branches of a file are those of the solution, in structure and in value.

A branch is found by following the edges from its layer: the layer's output has one reader, an Add; what that adds
comes from two operators that begin where the layer begins.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxptq.errors import OutputCheckError
from onnxptq.graph.branches import DOWN, OUTPUT, UP, WEIGHT, branch_graph, branch_nodes
from onnxptq.graph.save import export_node, save_graph
from onnxptq.graph.surgeon import quiet_surgeon
from onnxptq.runtime import SAME_FUNCTION, difference, group_within, open_exposed, open_transient
from onnxptq.types import CanonicalModel, Sample, Solution
from onnxptq.validate.exposure import sizes_of
from onnxptq.validate.reading import WrittenModel


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenBranch:
    """A branch of a file: the layer reads ``source`` and writes ``product``, and ``output`` is that with the branch.

    ``nodes`` and ``initializers`` are the names of all that belongs to the branch.
    """

    source: str
    product: str
    output: str
    nodes: tuple[str, ...]
    initializers: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchParity:
    """The branch beside ``node`` in the exact session: the largest difference from the solution's, relative to the
    largest value of the sum."""

    node: str
    elements: int
    difference: float


def locate_branches(
    written: WrittenModel, model: CanonicalModel, solution: Solution
) -> Mapping[str, WrittenBranch]:
    """Every branch of ``solution``, by the name of its layer's node.

    Raises:
        OutputCheckError: one is missing, or differs from the solution's.
    """
    layers = {node.name: node for node in model.graph.nodes if node.name in solution.branches}
    return {name: _located(written, layer, solution) for name, layer in layers.items()}


def _located(written: WrittenModel, layer: gs.Node, solution: Solution) -> WrittenBranch:
    def refuse(what: str) -> OutputCheckError:
        return OutputCheckError(f"{written.path}: the branch beside node '{layer.name}' {what}.")

    found = written.nodes.get(layer.name)
    if found is None or len(found.output) != 1:
        raise refuse("has no layer")
    source, product = found.input[0], found.output[0]
    readers = [node for node in written.graph.node if product in node.input]
    if len(readers) != 1 or readers[0].op_type != "Add" or readers[0].input[0] != product:
        raise refuse("is not added to the layer's output")
    total = readers[0]
    up = written.producers.get(total.input[1])
    down = None if up is None else written.producers.get(up.input[0])
    if up is None or down is None or len(down.input) != 2 or len(up.input) != 2:
        raise refuse("is not made of two operators")
    branch = solution.branches[layer.name]
    constants = {down.input[1]: branch.down, up.input[1]: branch.up}
    names = {
        DOWN: down.name,
        UP: up.name,
        DOWN + OUTPUT: down.output[0],
        DOWN + WEIGHT: down.input[1],
        UP + WEIGHT: up.input[1],
    }
    read, made = gs.Variable(source), gs.Variable(total.input[1])
    with quiet_surgeon():
        wanted = [export_node(node) for node in branch_nodes(layer, branch, read, made, lambda r: names[r])]
    if not all(_is_same(a, b) for a, b in zip(wanted, (down, up), strict=True)):
        raise refuse("computes with other operators than the solution's")
    for name, value in constants.items():
        if name not in written.initializers or not np.array_equal(written.value(name), value):
            raise refuse("holds other constants than the solution's")
    return WrittenBranch(
        source=source,
        product=product,
        output=total.output[0],
        nodes=(down.name, up.name, total.name),
        initializers=tuple(constants),
    )


def _is_same(wanted: onnx.NodeProto, found: onnx.NodeProto) -> bool:
    """Whether two nodes are equal but for their metadata."""
    bare = onnx.NodeProto()
    bare.CopyFrom(found)
    del bare.metadata_props[:]
    for node in (bare, wanted):
        node.attribute.sort(key=lambda attribute: attribute.name)
    return bool(bare == wanted)


def compare_branches(
    path: Path, model: CanonicalModel, solution: Solution, samples: Sequence[Sample], group_bytes: int
) -> tuple[BranchParity, ...]:
    """What every branch of the staged file at ``path`` adds, against the same operators alone with the solution's
    constants.

    Raises:
        OutputCheckError: naming the first that differs by more than float rounding.
    """
    if not solution.branches:
        return ()
    located = locate_branches(WrittenModel(path), model, solution)
    units = [[b.source, b.product, b.output] for b in located.values()]
    units = [[name for name in unit if name not in samples[0]] for unit in units]
    sizes = sizes_of(path, sorted({name for unit in units for name in unit}), samples[0], exact=True)
    layers, found = {node.name: node for node in model.graph.nodes}, []
    names = list(located)
    for members in group_within(units, sizes, group_bytes):
        fetched = sorted({name for i in members for name in units[i]})
        session = open_exposed(path, fetched, exact=True)
        values = [{**sample, **session.run(sample, fetched)} for sample in samples]
        for name in (names[i] for i in members):
            branch = located[name]
            graph = branch_graph(model.graph, layers[name], solution.branches[name])
            alone = open_transient(
                path.with_name(f"branch_{path.name}"), functools.partial(save_graph, graph), exact=True
            )
            elements, gap = 0, 0.0
            for value in values:
                made = alone.run({"x": value[branch.source]})["y"]
                wanted = {name: value[branch.product] + made}
                gap = max(gap, difference(wanted, {name: value[branch.output]}))
                elements += made.size
            if not gap <= SAME_FUNCTION:
                raise OutputCheckError(
                    f"{path}: the branch beside node '{name}' computes other values than the simulation: "
                    f"they differ by {gap:.1e} of the largest."
                )
            found.append(BranchParity(node=name, elements=elements, difference=gap))
    return tuple(found)
