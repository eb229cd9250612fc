"""Simulation of any bit width with standard operators: for research and for choosing, not for speed.

| operator | activations | weight | bias | output |
|---|---|---|---|---|
| Conv, ConvTranspose, Gemm | input 0 | per output channel | float | float |
| MatMul | both inputs, or the one that is not constant | per output channel; a stack per tensor | float | float |
| Mul of softmax weights and values, summed or averaged | both inputs | | | float |
| with `residuals`: Add behind a product | the skip input | | | float |

Activation grids are unsigned and asymmetric, stored in uint8 behind a Clip where they are narrower than
8 bits; weight grids are signed and symmetric. This is the placement of the quantization literature: the
inputs of every product. Softmax weights that are written as powers of a root are quantized as the root.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnxptq.graph.attention import find_attention
from onnxptq.graph.index import GraphIndex
from onnxptq.targets.placement import (
    PlacementRequest,
    Placer,
    Row,
    channel_axis_of_gemm,
    channel_axis_of_matmul,
    tie_movements,
)
from onnxptq.targets.residuals import place_residual_sums
from onnxptq.types import QType, QuantPlan

NAME = "simulate"

TABLE: Mapping[str, Row] = {
    "Conv": Row(activations=(0,), weight=1, weight_axis=lambda node: 0),
    "ConvTranspose": Row(activations=(0,), weight=1, weight_axis=lambda node: 1),
    "Gemm": Row(activations=(0,), weight=1, weight_axis=channel_axis_of_gemm),
    "MatMul": Row(activations=(0,), weight=1, weight_axis=channel_axis_of_matmul),
}

_WEIGHTED_SUM = Row(activations=(0, 1))


def place(index: GraphIndex, request: PlacementRequest) -> QuantPlan:
    """Quantizers on the inputs of every product, at the requested bits."""
    placer = Placer(index, request, activation=QType.unsigned, symmetric=False)
    placer.apply(TABLE)
    for found in find_attention(index):
        if found.form == "weighted sum":
            placer.apply_row(found.product, _WEIGHTED_SUM)
        if found.root and placer.is_quantized_edge(found.weights, found.product):
            placer.move_edge(found.product, found.weights_index, found.softmax, 0)
    if request.residuals:
        place_residual_sums(placer, tuple(TABLE))
    return placer.finish(NAME, tie_movements(placer))
