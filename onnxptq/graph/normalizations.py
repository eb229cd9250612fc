"""Finds normalizations over features, with a scale per channel: one node, or RMS normalization written out."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.passes.fuse_rms_norm import match_rms_norm

NORMALIZATIONS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
"""Operators that normalize over features."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Normalization:
    """One normalization over features.

    Attributes:
        node: writes what is normalized and scaled.
        source: the tensor that is normalized.
        scale: the node that scales, ``node`` itself if it does all; None where nothing is scaled.
        scale_index: the input of ``scale`` that is its factors. A bias is the one behind.
    """

    node: gs.Node
    source: str
    scale: gs.Node | None
    scale_index: int


def find_normalizations(index: GraphIndex) -> tuple[Normalization, ...]:
    """Every normalization over features, in the order of the graph."""
    found = []
    for node in index.nodes:
        if node.op in NORMALIZATIONS:
            found.append(Normalization(node=node, source=node.inputs[0].name, scale=node, scale_index=1))
        elif node.op == "ReduceMean" and (match := match_rms_norm(index.graph, node)) is not None:
            found.append(
                Normalization(
                    node=match.tail,
                    source=match.source.name,
                    scale=match.scale,
                    scale_index=match.gamma_index,
                )
            )
    return tuple(found)
