"""Softmax weights as a power of their root, so that a quantizer can work on the root.

::

    P = softmax(x) = R^g,     R = exp(logsoftmax(x) / g)

A uniform grid of R is one of P whose points b (q / Q)^g lie the closer the smaller they are, 0 among them: most
attention weights are small, and together they matter as much as the few large ones. Rounding in this way is
PowerQuant's (arXiv 2301.09858). The identity is exact in real arithmetic; the logarithm keeps gradients finite where
a weight is 0.

This is no part of the canonical form: it is applied where it is asked for. Declined: weights that anything but one
product (or weighted sum of one) reads, or reads other than directly. Putting some to 0 with Where
does no harm.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.attention import Attention, find_attention, reads_directly
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.surgeon import free_name, new_constant
from onnxptq.types import Skip

_PRODUCTS = ("MatMul", "Gemm", "Mul", "Conv")


def run(graph: gs.Graph, power: int) -> tuple[int, list[Skip]]:
    """Rewrite in place; returns how many softmaxes became powers, and those that did not, with reasons."""
    index = GraphIndex(graph)
    names = {node.name for node in graph.nodes}
    count, skips = 0, []
    for found in find_attention(index):
        reason = declined(index, found)
        if reason is not None:
            skips.append(Skip(site=found.softmax.name, reason=reason))
            continue
        _rewrite(graph, found.softmax, power, lambda name: free_name(name, names))
        count += 1
    return count, skips


def declined(index: GraphIndex, found: Attention) -> str | None:
    """Why the weights of ``found`` cannot become powers; None where they can."""
    if found.softmax.op in ("Div", "Mul"):
        return "its weights are exponentials over more than their sum, which have no such root"
    if found.softmax.op != "Softmax" or found.product.op not in _PRODUCTS:
        return f"its softmax weights are applied by {found.product.op}, in the form of a {found.form}"
    if not reads_directly(index, found):
        return "its softmax weights are changed on their way to the product, or read by others"
    return None


def _rewrite(graph: gs.Graph, softmax: gs.Node, power: int, name: Callable[[str], str]) -> None:
    source, weights = softmax.inputs[0], softmax.outputs[0]

    def step(op: str, suffix: str, *inputs: gs.Tensor, **attrs: int) -> gs.Variable:
        made = name(f"{weights.name}_{suffix}")
        output = gs.Variable(made, dtype=weights.dtype, shape=weights.shape)
        position = next(i for i, node in enumerate(graph.nodes) if node is softmax)
        node = gs.Node(op, made, attrs=attrs, inputs=list(inputs), outputs=[output])
        graph.nodes.insert(position, node)
        return output

    share = new_constant(graph, f"{weights.name}_share", np.asarray(1.0 / power, np.float32))
    exponent = new_constant(graph, f"{weights.name}_power", np.asarray(power, np.float32))
    log = step("LogSoftmax", "log", source, axis=int(softmax.attrs.get("axis", -1)))
    root = step("Exp", "root", step("Mul", "scaled", log, share))
    softmax.op = "Pow"
    softmax.attrs.clear()
    softmax.inputs = [root, exponent]
