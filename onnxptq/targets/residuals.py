"""Sums of residual connections: the skip input is quantized, so that a kernel can take the sum in with the product.

The other input is what a product has just computed; it is added before it is rounded, as TensorRT's fused kernels do.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_graphsurgeon as gs

from onnxptq.graph.index import is_constant
from onnxptq.targets.placement import Placer


def place_residual_sums(placer: Placer, products: Collection[str]) -> None:
    """Quantize the skip input of every sum that a quantized product feeds.

    Args:
        products: operators that count as such.
    """
    position = {node.name: i for i, node in enumerate(placer.index.nodes)}
    for node in placer.index.nodes:
        if (
            node.op != "Add"
            or any(is_constant(t) for t in node.inputs)
            or node.name in placer.request.declined
        ):
            continue
        fed = [i for i in (0, 1) if _is_product_output(placer, node.inputs[i].name, node, products)]
        if not fed:
            continue
        # With a product on both sides the later one fuses; the other is then the skip input.
        fused = max(fed, key=lambda i: position[_producer_name(placer, node.inputs[i].name)])
        skip = 1 - fused
        if node.inputs[skip].name not in placer.request.uncalibrated:
            placer.add_edge(node, skip)
            placer.quantized_nodes.add(node.name)


def _producer_name(placer: Placer, tensor: str) -> str:
    producer = placer.index.producer(tensor)
    assert producer is not None
    return str(producer.name)


def _is_product_output(placer: Placer, tensor: str, reader: gs.Node, products: Collection[str]) -> bool:
    """Whether ``tensor`` is a quantized product (with its bias Add) that only ``reader`` reads."""
    producer = placer.index.producer(tensor)
    if producer is None or placer.index.sole_user(tensor) is not reader:
        return False
    if producer.op == "Add" and sum(is_constant(t) for t in producer.inputs) == 1:
        bias = next(i for i, t in enumerate(producer.inputs) if is_constant(t))
        return _is_product_output(placer, producer.inputs[1 - bias].name, producer, products)
    return producer.op in products and producer.name in placer.quantized_nodes
