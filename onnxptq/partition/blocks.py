"""Cutting any graph into reconstruction units, by its data flow alone.

A block boundary is a tensor through which every path from inputs to outputs passes; where long skips leave
no such tensor for too many layers, it is a small set of tensors (see :mod:`onnxptq.partition.units`).
Nothing is decided by names or by knowing an architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxptq.graph.attention import is_mixing
from onnxptq.graph.index import is_constant
from onnxptq.lowering import foreign_nodes
from onnxptq.partition.dataflow import Dataflow
from onnxptq.partition.operators import is_linear
from onnxptq.partition.units import Limits, Span, Sweep
from onnxptq.types import GRAPH_OUTPUT, Block, BlockKind, Site


def find_blocks(
    graph: gs.Graph,
    *,
    max_live: int = 4,
    max_linears: int = 10,
    max_weights: int | None = None,
    join: bool = True,
) -> tuple[Block, ...]:
    """The blocks of a sorted graph with uniquely named nodes, in an order in which they can run.

    Every node that a graph output depends on and that handles data is in exactly one block. Same graph,
    same blocks.

    Args:
        max_live: tensors that may be alive at a boundary; more than one only inside forks above the size cap.
        max_linears: a fork with more layers than this is cut at several tensors.
        max_weights: the same in weight elements; None for no such cap. Caps are kept where cuts exist.
        join: take attention and MLP halves together, see :func:`join_halves`.

    Raises:
        ValueError: ``max_live`` or ``max_linears`` is below 1.
    """
    if max_live < 1 or max_linears < 1:
        raise ValueError(f"max_live and max_linears start at 1, got {max_live} and {max_linears}")
    flow = Dataflow(graph)
    limits = Limits(max_live=max_live, max_linears=max_linears, max_weights=max_weights)
    spans = Sweep(flow, limits, foreign_nodes(graph)).spans()
    blocks = tuple(_block_of_span(flow, i, span) for i, span in enumerate(spans))
    return join_halves(graph, blocks) if join else blocks


def join_halves(graph: gs.Graph, blocks: Sequence[Block]) -> tuple[Block, ...]:
    """``blocks`` with attention and MLP halves joined into the usual transformer block.

    An attention half is a fork that multiplies two computed tensors; an MLP half is a fork with layers but
    without that, fed by the half before it alone. One or more attention halves (self, cross) and the MLP half
    behind them are joined if the same sequence occurs at least twice in the network.
    """
    by_name = {node.name: node for node in graph.nodes}
    letters = [_letter(block, [by_name[name] for name in block.nodes]) for block in blocks]
    for i in range(1, len(blocks)):
        if letters[i] == "M" and not set(blocks[i].inputs) <= set(blocks[i - 1].outputs):
            letters[i] = "-"
    runs: list[tuple[int, int]] = []
    start = 0
    for i, letter in enumerate(letters):
        if letter == "M" and start < i:
            runs.append((start, i + 1))
        if letter != "A":
            start = i + 1
    lengths = [stop - start for start, stop in runs]
    stop_of = {start: stop for start, stop in runs if lengths.count(stop - start) > 1}
    result: list[Block] = []
    i = 0
    while i < len(blocks):
        stop = stop_of.get(i, i + 1)
        if stop > i + 1:
            result.append(merge_blocks(blocks[i:stop], [*blocks[:i], *blocks[stop:]], index=len(result)))
        else:
            result.append(replace(blocks[i], index=len(result)))
        i = stop
    return tuple(result)


def verify_blocks(graph: gs.Graph, blocks: Sequence[Block]) -> None:
    """Check that ``blocks`` partition the data nodes of ``graph`` and can run one after the other.

    Raises:
        ValueError: a node is missing, foreign or repeated; a tensor is read before it is computed; or the
            inputs, outputs or shape inputs of a block are not those of its nodes. The block is named.
    """
    flow = Dataflow(graph)
    position = {node.name: i for i, node in enumerate(flow.nodes)}
    names = [name for block in blocks for name in block.nodes]
    repeated = (
        next((name for name in names if names.count(name) > 1), None)
        if len(set(names)) < len(names)
        else None
    )
    if repeated is not None or set(names) != set(position):
        wrong = {repeated} if repeated is not None else set(names) ^ set(position)
        raise ValueError(f"blocks do not partition the data nodes: {sorted(wrong)[0]!r}")
    known = {t.name for t in graph.inputs}
    for index, block in enumerate(blocks):
        for name in block.nodes:
            i = position[name]
            missing = [t for t in (*flow.reads[i], *flow.shape_reads[i]) if t not in known]
            if missing:
                raise ValueError(f"block {index} reads {missing[0]!r} before it is computed")
            known.update(flow.writes[i])
        want = _block(flow, index, [position[name] for name in block.nodes], block.kind)
        if want != block:
            raise ValueError(
                f"block {index} does not state what its nodes read and write: {want} is not {block}"
            )


def merge_blocks(members: Sequence[Block], others: Sequence[Block], *, index: int) -> Block:
    """Consecutive blocks as one; what only they read of each other is no longer an output.

    ``others`` are all remaining blocks of the network.
    """
    written = {name for block in members for name in block.outputs}
    sites = [site for block in members for site in block.sites]
    sites.sort(key=lambda site: site.consumer == GRAPH_OUTPUT)
    read = {site.tensor for site in sites if not site.is_weight and site.consumer != GRAPH_OUTPUT}
    wanted = {name for block in others for name in block.inputs}
    wanted |= {site.tensor for site in sites if site.consumer == GRAPH_OUTPUT}
    # Nobody reads its values: it exists for the sake of its shape.
    wanted |= {name for block in others for name in block.shape_inputs if name not in read}
    inputs = dict.fromkeys(name for b in members for name in b.inputs if name not in written)
    # A shape may come from a tensor inside another member, which is not among that member's outputs.
    inside = (written | read) - set(inputs)
    shapes = dict.fromkeys(
        name for b in members for name in b.shape_inputs if name not in inside and name not in inputs
    )
    return Block(
        index=index,
        kind="joined",
        nodes=tuple(name for block in members for name in block.nodes),
        inputs=tuple(inputs),
        outputs=tuple(name for block in members for name in block.outputs if name in wanted),
        shape_inputs=tuple(shapes),
        sites=tuple(sites),
    )


def _letter(block: Block, nodes: Sequence[gs.Node]) -> str:
    """A for an attention half, M for what may be an MLP half, - for anything else."""
    if block.kind in ("plain", "float"):
        return "-"
    if any(is_mixing(node) for node in nodes):
        return "A"
    return "M" if any(is_linear(node) for node in nodes) else "-"


def _block_of_span(flow: Dataflow, index: int, span: Span) -> Block:
    positions = range(span.start, span.stop)
    block = _block(flow, index, positions, span.kind)
    is_single = len(block.inputs) <= 1 and len(block.outputs) <= 1
    return block if is_single or span.kind == "float" else replace(block, kind="region")


def _block(flow: Dataflow, index: int, positions: Sequence[int], kind: BlockKind) -> Block:
    own = set(positions)
    written = dict.fromkeys(name for i in positions for name in flow.writes[i])
    read = dict.fromkeys(name for i in positions for name in flow.reads[i])
    shaped = dict.fromkeys(name for i in positions for name in flow.shape_reads[i])

    def is_output(name: str) -> bool:
        if name in flow.outputs or any(i not in own for i in flow.consumers.get(name, ())):
            return True
        # Nobody reads its values: it exists for the sake of its shape.
        return name not in read and any(i not in own for i in flow.shape_consumers.get(name, ()))

    outputs = tuple(name for name in written if is_output(name))
    sites = [site for i in positions for site in _sites(flow, flow.nodes[i])]
    sites += [
        Site(tensor=name, consumer=GRAPH_OUTPUT, input_index=flow.outputs.index(name))
        for name in outputs
        if name in flow.outputs
    ]
    return Block(
        index=index,
        kind=kind,
        nodes=tuple(flow.nodes[i].name for i in positions),
        inputs=tuple(name for name in read if name not in written),
        outputs=outputs,
        shape_inputs=tuple(name for name in shaped if name not in written and name not in read),
        sites=tuple(sites),
    )


def _sites(flow: Dataflow, node: gs.Node) -> list[Site]:
    """Edges of ``node`` that carry data or floats: everything but shapes, axes and indices."""
    return [
        Site(tensor=tensor.name, consumer=node.name, input_index=i, is_weight=is_constant(tensor))
        for i, tensor in enumerate(node.inputs)
        if tensor.name and (flow.is_data(tensor.name) or _holds_floats(tensor))
    ]


def _holds_floats(tensor: gs.Tensor) -> bool:
    dtype = tensor.dtype
    if isinstance(dtype, int):
        return dtype in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
    return dtype is not None and np.issubdtype(dtype, np.floating)
