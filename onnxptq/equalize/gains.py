"""How much a channel's noise matters: a backward pass of variances.

``gain[T][c]`` is the growth of the network's noise-to-signal ratio per unit of noise variance in every
element of class c of tensor T, with noise taken as uncorrelated. Backwards through y = W x it is

    gain[x][c] = sum_o gain[y][o] sum_{j in c} W_oj^2

(sums over kernel taps included); operators that pass factors pass gains, Relu and Clip for the fraction of
elements that is not 0 behind them. Means do not lessen them: what quantization does to neighbouring elements
is too much alike. Where the factors of y are pinned the pass ends and starts anew with the ratio at y itself,
1 / sum_o E[y_o^2]: what follows is not linear, and every such tensor is taken to matter alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from onnxptq.equalize.observe import Spread
from onnxptq.equalize.tracing import Product, Trace
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.tracing import Shapes

Floats = npt.NDArray[np.float64]
Gains = Mapping[str, Mapping[int, float]]


_GATES = ("Relu", "Clip")


def tensors_behind(index: GraphIndex, trace: Trace) -> set[str]:
    """Tensors whose spread :func:`channel_gains` needs: where gains start anew, or pass a Relu or Clip."""
    names = {name for c in trace.contractions for name in (c.left, c.right)}
    names |= {
        node.outputs[0].name
        for node in index.nodes
        if node.op in _GATES and node.outputs[0].name in trace.labels
    }
    for product in trace.products:
        roots = np.unique(trace.classes.roots(product.over)).tolist()
        if any(trace.classes.is_pinned(root) for root in roots):
            names.add(product.target)
    return names


def channel_gains(index: GraphIndex, trace: Trace, spreads: Mapping[str, Spread], shapes: Shapes) -> Gains:
    """Gains by tensor and class."""
    gains: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    products = {product.node.name: product for product in trace.products}
    contractions = {(c.left, c.right) for c in trace.contractions}
    for node in reversed(index.nodes):
        product = products.get(node.name)
        if product is not None:
            _through_product(product, trace, spreads, gains)
        elif node.op == "MatMul" and (node.inputs[0].name, node.inputs[1].name) in contractions:
            _through_contraction(node, spreads, gains)
        else:
            _pass_on(node, trace, spreads, gains, shapes)
    return gains


def row_gains(
    product: Product, trace: Trace, spreads: Mapping[str, Spread], gains: Gains
) -> tuple[Floats, npt.NDArray[np.int64]]:
    """Gain of every output element of a product's labels ``over``, and their roots, in its shape."""
    roots = trace.classes.roots(product.over)
    unique, inverse, counts = np.unique(roots, return_inverse=True, return_counts=True)
    spread = spreads.get(product.target)
    channels = roots.size if product.rows is not None else product.node.inputs[product.index].values.size
    total = float((spread.energy * spread.share).sum()) * channels if spread is not None else 0.0
    anew = 1.0 / total if total > 0 else 0.0
    known = gains.get(product.target, {})
    values = np.array(
        [
            anew if trace.classes.is_pinned(root) else known.get(root, 0.0) / count
            for root, count in zip(unique.tolist(), counts.tolist(), strict=True)
        ]
    )
    return values[inverse].reshape(roots.shape), roots


def _through_product(
    product: Product, trace: Trace, spreads: Mapping[str, Spread], gains: dict[str, dict[int, float]]
) -> None:
    weight = product.node.inputs[product.index].values
    rows, _ = row_gains(product, trace, spreads, gains)
    if product.node.op == "Div":
        weight = 1.0 / np.where(weight == 0, np.inf, weight)
    effect = np.square(weight, dtype=np.float64) * rows
    roots = trace.classes.roots(product.times)
    flat = tuple(a for a in range(effect.ndim) if roots.shape[a] == 1)
    effect = effect.sum(axis=flat, keepdims=True)
    roots = np.broadcast_to(roots, effect.shape)
    unique, inverse = np.unique(roots, return_inverse=True)
    sums = np.bincount(inverse.reshape(-1), weights=effect.reshape(-1))
    for root, value in zip(unique.tolist(), sums.tolist(), strict=True):
        gains[product.source][root] += value


def _through_contraction(
    node: gs.Node, spreads: Mapping[str, Spread], gains: dict[str, dict[int, float]]
) -> None:
    left, right = (spreads.get(node.inputs[i].name) for i in (0, 1))
    for i, own, other in ((0, left, right), (1, right, left)):
        if own is None or other is None or own.roots.size != other.roots.size:
            continue
        # Classes meet along the contracted axis: 1 / s on one side, s on the other; roots sort alike in pairs.
        order = np.argsort(own.roots // 2), np.argsort(other.roots // 2)
        total = float((own.energy[order[0]] * other.energy[order[1]]).sum())
        for root, energy in zip(own.roots[order[0]].tolist(), other.energy[order[1]].tolist(), strict=True):
            if total > 0:
                gains[node.inputs[i].name][root] += energy / total


def _pass_on(
    node: gs.Node,
    trace: Trace,
    spreads: Mapping[str, Spread],
    gains: dict[str, dict[int, float]],
    shapes: Shapes,
) -> None:
    for target in node.outputs:
        known = gains.get(target.name)
        if not known:
            continue
        for source in node.inputs:
            labels = trace.labels.get(source.name)
            if labels is None or source.name not in shapes:
                continue
            spread = spreads.get(target.name) if node.op in _GATES else None
            density = dict(zip(spread.roots.tolist(), spread.density.tolist(), strict=True)) if spread else {}
            for root in np.unique(trace.classes.roots(labels)).tolist():
                if root in known:
                    gains[source.name][root] += known[root] * density.get(root, 1.0)
