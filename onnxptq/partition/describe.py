"""Blocks as rows of a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxptq.partition.operators import is_linear, weight_count
from onnxptq.types import Block, BlockKind, CanonicalModel


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRow:
    """One block: ``layers`` counts products with a weight, ``weights`` their elements, ``operators`` all its
    nodes by type, most frequent first. Tensors have the names that the user's file gives them."""

    index: int
    kind: BlockKind
    nodes: int
    layers: int
    weights: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: Mapping[str, int]


def describe_blocks(blocks: Sequence[Block], model: CanonicalModel) -> list[BlockRow]:
    """One row per block of ``model``, in order."""
    by_name = {node.name: node for node in model.graph.nodes}
    rows = []
    for block in blocks:
        nodes = [by_name[name] for name in block.nodes]
        rows.append(
            BlockRow(
                index=block.index,
                kind=block.kind,
                nodes=len(nodes),
                layers=sum(map(is_linear, nodes)),
                weights=sum(map(weight_count, nodes)),
                inputs=tuple(map(model.user_name, block.inputs)),
                outputs=tuple(map(model.user_name, block.outputs)),
                operators=dict(Counter(node.op for node in nodes).most_common()),
            )
        )
    return rows
