"""The operators of a low-rank branch beside a linear layer, the same for what is written and what is simulated.

::

    x --> layer ----------------------> + -> y
      \\-> down (to r) -> up (to all) -> /

MatMul and Gemm get two MatMul; a Conv gets one with its own kernel, strides and padding but r channels, and a 1 x 1
Conv. ``x`` is what the layer reads, quantized where that is, so a branch needs no quantizer of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.linear import Linear
from onnxptq.types import Array, Branch, FloatArray

DOWN = "_branch_down"
UP = "_branch_up"
SUM = "_branch_Add"
WEIGHT = "_weight"
OUTPUT = "_Output"

Name = Callable[[str], str]
"""From the role of a node or tensor to its name."""


def make_branch(layer: Linear, left: FloatArray, right: FloatArray, *, before: float, after: float) -> Branch:
    """The branch that adds ``left`` (channels, r) times ``right`` (r, K) to the matrix of an ungrouped layer.

    K is in the order of the weight's elements per channel; a Gemm scales what it multiplies, so it scales this too.
    """
    if layer.node.op == "Conv":
        channels, rank = left.shape
        kernel = layer.weight.shape[2:]
        down = right.reshape(rank, *layer.weight.shape[1:])
        up = left.reshape(channels, rank, *[1] * len(kernel))
    else:
        down, up = right.T, left.T * np.float32(layer.node.attrs.get("alpha", 1.0))
    return Branch(
        down=np.ascontiguousarray(down, np.float32),
        up=np.ascontiguousarray(up, np.float32),
        before=before,
        after=after,
    )


def branch_nodes(
    node: gs.Node, branch: Branch, source: gs.Tensor, output: gs.Tensor, name: Name
) -> tuple[gs.Node, gs.Node]:
    """The two operators beside ``node`` that compute ``output`` from ``source``."""
    is_conv = node.op == "Conv"
    op = "Conv" if is_conv else "MatMul"
    attrs: dict[str, Any] = dict(node.attrs) if is_conv else {}
    shape = None if output.shape is None else list(output.shape)
    if shape is not None:
        shape[1 if is_conv else -1] = branch.rank
    inner = gs.Variable(name(DOWN + OUTPUT), dtype=np.float32, shape=shape)

    def constant(suffix: str, values: Array) -> gs.Constant:
        return gs.Constant(name(suffix + WEIGHT), values)

    return (
        gs.Node(op, name(DOWN), attrs, [source, constant(DOWN, branch.down)], [inner]),
        gs.Node(op, name(UP), {}, [inner, constant(UP, branch.up)], [output]),
    )


def branch_graph(graph: gs.Graph, node: gs.Node, branch: Branch) -> gs.Graph:
    """The branch beside ``node`` of ``graph`` alone, from ``x`` to ``y``."""
    x, y = gs.Variable("x", dtype=np.float32), gs.Variable("y", dtype=np.float32)
    x.shape, y.shape = node.inputs[0].shape, node.outputs[0].shape
    nodes = branch_nodes(node, branch, x, y, lambda role: f"branch{role}")
    return gs.Graph(
        list(nodes),
        [x],
        [y],
        opset=graph.opset,
        import_domains=graph.import_domains,
        ir_version=graph.ir_version,
    )
