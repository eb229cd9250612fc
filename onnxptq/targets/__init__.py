"""One file per deployment target: what is legal and where quantizers go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from onnxptq.graph.index import GraphIndex
from onnxptq.targets import ort_cpu, simulate, tensorrt
from onnxptq.targets.placement import PlacementRequest
from onnxptq.types import QuantPlan

Place = Callable[[GraphIndex, PlacementRequest], QuantPlan]

TARGETS: Mapping[str, Place] = {
    ort_cpu.NAME: ort_cpu.place,
    tensorrt.NAME: tensorrt.place,
    simulate.NAME: simulate.place,
}
"""The placement function of every target, by name."""

WRITTEN_OUT: Mapping[str, Sequence[str]] = {
    ort_cpu.NAME: (),
    tensorrt.NAME: ("Attention",),
    simulate.NAME: ("Attention",),
}
"""Operators that a target has written out by their definitions, because it quantizes products inside them."""

SYMMETRIC: frozenset[str] = frozenset({tensorrt.NAME})
"""Targets whose activations have grids that are symmetric about 0."""


def candidate_tensors(index: GraphIndex) -> tuple[str, ...]:
    """Every activation that some target may quantize, in graph order: calibrating these serves all targets."""
    wanted = {
        quantizer.tensor
        for place in TARGETS.values()
        for quantizer in place(index, PlacementRequest()).quantizers
        if quantizer.role == "activation"
    }
    produced = [t.name for node in index.nodes for t in node.outputs]
    return tuple(name for name in (*index.graph_inputs, *produced) if name in wanted)


__all__ = ["SYMMETRIC", "TARGETS", "WRITTEN_OUT", "PlacementRequest", "candidate_tensors"]
