"""Weights that several nodes read, through rewrites that give each of them a copy of its own.

Layers that share their weights are mostly rewritten alike, and then share what comes out as well.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.index import is_large_weight

Reads = dict[str, list[tuple[gs.Node, int]]]
"""Node and input of every read of a constant, by its name."""


def shared_reads(graph: gs.Graph) -> Reads:
    """The reads of every large constant that has more than one."""
    found: Reads = {}
    for node in graph.nodes:
        for i, tensor in enumerate(node.inputs):
            if is_large_weight(tensor):
                found.setdefault(tensor.name, []).append((node, i))
    return {name: reads for name, reads in found.items() if len(reads) > 1}


def share_again(reads: Reads) -> None:
    """Let what read one constant before a rewrite read one again, as far as their copies are equal."""
    for name, found in reads.items():
        left = [(node, i) for node, i in found if i < len(node.inputs)]
        left = [(node, i) for node, i in left if isinstance(node.inputs[i], gs.Constant)]
        kept: list[gs.Constant] = []
        # The one that has kept the user's name comes first, so that it stays.
        for node, i in sorted(left, key=lambda read: read[0].inputs[read[1]].name != name):
            own = node.inputs[i]
            same = next((other for other in kept if _are_equal(other, own)), None)
            if same is None:
                kept.append(own)
            elif same is not own:
                node.inputs[i] = same


def _are_equal(first: gs.Constant, second: gs.Constant) -> bool:
    if first is second:
        return True
    return (
        first.dtype == second.dtype
        and tuple(first.shape) == tuple(second.shape)
        and np.array_equal(first.values, second.values)
    )
