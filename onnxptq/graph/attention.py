"""Finds the parts of transformers by structure: attention, layers that read a normalization, Gelu outputs.

Attention takes one of these forms, whatever surrounds it (fused or separate projections, windows, masks, position
biases, other tokens as keys):

    product        softmax(scores) V, or V softmax(scores): a product of two activations
    weighted sum   sum_j softmax(scores)_ijc v_ijc: every channel has weights of its own (Point Transformer,
                   arXiv 2012.09164)
    layer          a weighted layer takes the mean over softmax(scores): its weights are the values, as distances are
                   in heads of detectors
    operator       an Attention node, whose weights no tensor of the graph holds

Softmax is a node of its own in the canonical graph, however the file spells it
(:mod:`onnxptq.graph.passes.fuse_softmax`).
Between softmax and product the weights may be moved, dropped out, masked or rescaled. Scores are the products of
two activations that reach the softmax, however they are moved, scaled, masked and biased on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.index import GraphIndex, Use, constant_value, is_constant
from onnxptq.graph.linear import Linear, linear_of
from onnxptq.graph.movements import MOVEMENTS
from onnxptq.graph.normalizations import find_normalizations
from onnxptq.graph.passes.fuse_gelu import match_gelu
from onnxptq.graph.passes.fuse_softmax import match_weights
from onnxptq.graph.surgeon import scalar_constant

_OPERATORS = frozenset({"Attention", "MultiHeadAttention", "GroupQueryAttention"})
_MOVING = frozenset({*MOVEMENTS, "Cast", "Dropout", "Identity"})
_CARRYING = _MOVING - {"Concat"}
_RESCALING = frozenset({"Where", "Mul", "Div"})
_SCORING = _MOVING | _RESCALING | {"Add", "Clip", "Max", "Min", "Neg", "Sub", "Tanh"}

Form = Literal["product", "weighted sum", "layer", "operator"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attention:
    """Weights between 0 and 1, which sum to one or, where the denominator is more than the sum, less; with values.

    Attributes:
        form: see the module.
        softmax: the node that writes the softmax or what stands for one, or the Attention node that holds it.
        product: the node that applies the weights to the values; an Attention node is its own.
        weights: the weights as ``product`` reads them; "" inside an Attention node.
        weights_index: which input of ``product`` they are.
        values: what they are applied to; a constant in a layer.
        scores: the products of two activations that the softmax gets; none in the scores of vector attention,
            which are subtracted or computed by layers.
        is_masked: whether anything but 0 is added to the scores, or anything put in their place, on the way.
        root: the tensor of which ``softmax`` is the Pow to ``power``, where the weights were written so
            (:mod:`onnxptq.graph.passes.root_softmax`); else "".
        power: see ``root``; else 1.
    """

    form: Form
    softmax: gs.Node
    product: gs.Node
    weights: str
    weights_index: int
    values: str
    scores: tuple[gs.Node, ...]
    is_masked: bool
    root: str = ""
    power: float = 1.0

    @property
    def quantized(self) -> str:
        """The tensor that a quantizer of the weights reads: them, or their root."""
        return self.root or self.weights

    @property
    def edge(self) -> tuple[str, int]:
        """The node and its input that read ``quantized``."""
        return (self.softmax.name, 0) if self.root else (self.product.name, self.weights_index)


@dataclass(frozen=True, slots=True, eq=False)
class _Softmax:
    """What a softmax is of, and its axis where it is one; with ``root`` and ``power`` as in :class:`Attention`."""

    logits: gs.Tensor
    axis: int | None
    root: str = ""
    power: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixedWeights:
    """Softmax weights that are added to others, or mixed over heads by a layer, before ``product`` applies them."""

    softmax: gs.Node
    product: gs.Node

    @property
    def note(self) -> str:
        """What that means for their range."""
        return (
            f"{self.softmax.name}: its softmax weights are mixed with others before {self.product.name} applies "
            "them; mixed weights may be negative, so their range is chosen like that of any other activation"
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PostNorm:
    """The layers that read what the node ``norm`` writes, moved at most."""

    norm: gs.Node
    layers: tuple[Linear, ...]


def is_mixing(node: gs.Node) -> bool:
    """Whether ``node`` multiplies tensors that are all computed: scores and values of an attention."""
    return node.op in _OPERATORS or (
        node.op in ("MatMul", "Gemm", "Einsum") and not any(is_constant(t) for t in node.inputs)
    )


def reads_directly(index: GraphIndex, found: Attention) -> bool:
    """Whether the product alone reads the weights, and as the softmax writes them: some may be put to 0 before."""
    tensor = found.softmax.outputs[0].name
    while tensor != found.weights:
        uses = [use for use in index.uses(tensor) if not _is_test(use)]
        if len(uses) != 1 or uses[0].node.op != "Where" or uses[0].index == 0 or tensor in index.output_names:
            return False
        tensor = uses[0].node.outputs[0].name
    return index.sole_user(tensor) is found.product


def _is_test(use: Use) -> bool:
    """Whether only the type is read, or where NaN is: exporters replace it in rows where everything is masked."""
    return use.node.op == "IsNaN" or (use.node.op == "CastLike" and use.index == 1)


def find_attention(index: GraphIndex) -> tuple[Attention, ...]:
    """Every application of softmax weights to values, in the order of the graph."""
    found: list[Attention] = []
    for node in index.nodes:
        if node.op in _OPERATORS:
            found.append(_inside(node))
        elif (inner := _softmax(index, node)) is not None:
            scores, is_masked = _scores(index, inner.logits)
            for form, use in _applications(index, node, inner.axis):
                found.append(
                    Attention(
                        form=form,
                        softmax=node,
                        product=use.node,
                        weights=use.node.inputs[use.index].name,
                        weights_index=use.index,
                        values=use.node.inputs[1 - use.index].name,
                        scores=scores,
                        is_masked=is_masked,
                        root=inner.root,
                        power=inner.power,
                    )
                )
    return tuple(found)


def find_mixed_weights(index: GraphIndex) -> tuple[MixedWeights, ...]:
    """Softmaxes whose weights meet values only after they were mixed, in the order of the graph."""
    found = []
    for node in index.nodes:
        inner = _softmax(index, node)
        if inner is None or any(True for _ in _applications(index, node, inner.axis)):
            continue
        product = _mixed_into(index, node, inner.axis)
        if product is not None:
            found.append(MixedWeights(softmax=node, product=product))
    return tuple(found)


def find_post_norms(index: GraphIndex) -> tuple[PostNorm, ...]:
    """Every normalization over features that layers with weights read, in the order of the graph."""
    found = []
    for norm in find_normalizations(index):
        uses = _uses_behind(index, norm.node.outputs[0].name, _MOVING)
        layers = (linear_of(index, use.node) for use in uses)
        readers = tuple(layer for layer in layers if layer is not None)
        if readers:
            found.append(PostNorm(norm=norm.node, layers=readers))
    return tuple(found)


def find_gelus(index: GraphIndex) -> tuple[str, ...]:
    """Every tensor that is the Gelu of another: written by one node or, before opset 20, by several."""
    found = []
    for node in index.nodes:
        if node.op == "Gelu":
            found.append(node.outputs[0].name)
        elif node.op in ("Erf", "Tanh") and (match := match_gelu(index.graph, node)) is not None:
            found.append(match.tail.outputs[0].name)
    return tuple(found)


def _inside(node: gs.Node) -> Attention:
    names = [tensor.name for tensor in node.inputs]
    return Attention(
        form="operator",
        softmax=node,
        product=node,
        weights="",
        weights_index=-1,
        values=names[2] if len(names) > 2 else "",
        scores=(node,),
        is_masked=len(names) > 3 and bool(names[3]),
    )


def _softmax(index: GraphIndex, node: gs.Node) -> _Softmax | None:
    """The softmax that ends at ``node``: one node; several, as over more axes than one or with more than the sum
    below; or a power of exp(logsoftmax(x) / power)."""
    if node.op == "Softmax":
        return _Softmax(node.inputs[0], int(node.attrs.get("axis", -1)))
    if (match := match_weights(node)) is not None:
        return _Softmax(match.source, match.axes[0] if len(match.axes) == 1 else None)
    if node.op == "Pow":
        power, root = scalar_constant(node.inputs[1]), index.producer(node.inputs[0].name)
        scaled = index.producer(root.inputs[0].name) if root is not None and root.op == "Exp" else None
        if power is None or scaled is None or scaled.op != "Mul":
            return None
        share, log = scalar_constant(scaled.inputs[1]), index.producer(scaled.inputs[0].name)
        if share is not None and log is not None and log.op == "LogSoftmax":
            is_inverse = math.isclose(share * power, 1.0, rel_tol=1e-6)
            axis = int(log.attrs.get("axis", -1))
            return _Softmax(log.inputs[0], axis, node.inputs[0].name, power) if is_inverse else None
    return None


def _applications(index: GraphIndex, softmax: gs.Node, axis: int | None) -> Iterator[tuple[Form, Use]]:
    """Where the weights meet values."""
    for use in _uses_behind(index, softmax.outputs[0].name, _MOVING | _RESCALING):
        if use.node.op == "Mul" and _is_summed(index, use.node):
            yield "weighted sum", use
        elif is_mixing(use.node) and len(use.node.inputs) >= 2 and use.index < 2:
            yield "product", use
    for use, place in _walk(index, softmax.outputs[0], axis, _carries):
        if place is not None and place == _summed_axis(index, use):
            yield "layer", use


def _mixed_into(index: GraphIndex, softmax: gs.Node, axis: int | None) -> gs.Node | None:
    """The first product of two activations that sums, layers over other axes and movements lead to."""
    uses = (use for use, _ in _walk(index, softmax.outputs[0], axis, _mixes))
    return next((use.node for use in uses if is_mixing(use.node)), None)


def _walk(
    index: GraphIndex,
    weights: gs.Tensor,
    axis: int | None,
    passes: Callable[[GraphIndex, Use, int | None], bool],
) -> Iterator[tuple[Use, int | None]]:
    """Every read of ``weights`` and of what nodes that pass make of them, with the axis of the softmax there."""
    rank = None if weights.shape is None else len(weights.shape)
    waiting = [(weights.name, None if axis is None or rank is None else axis % rank)]
    seen: set[str] = set()
    while waiting:
        tensor, axis = waiting.pop(0)
        for use in index.uses(tensor):
            yield use, axis
            if use.node.name not in seen and passes(index, use, axis):
                seen.add(use.node.name)
                waiting += [(t.name, _moved(use.node, axis)) for t in use.node.outputs if t.name]


def _carries(_: GraphIndex, use: Use, __: int | None) -> bool:
    return use.node.op in _CARRYING and _keeps_values(use)


def _mixes(index: GraphIndex, use: Use, axis: int | None) -> bool:
    """Whether what ``use`` reads goes on as weights: moved, scaled, added to others, or mixed along another axis than
    the ``axis`` of the softmax."""
    if use.node.op in ("Add", "Sub"):
        return True
    if use.node.op in ("Mul", "Div"):
        return is_constant(use.node.inputs[1 - use.index])
    summed = _summed_axis(index, use)
    if summed is not None:
        return axis is not None and axis != summed
    return use.node.op in _CARRYING | {"Where"} and _keeps_values(use)


def _summed_axis(index: GraphIndex, use: Use) -> int | None:
    """The axis that a layer which reads at ``use`` multiplies and sums: a matrix, or a kernel of one place."""
    layer = linear_of(index, use.node)
    if layer is None or layer.input.shape is None or use.index != 1 - layer.weight_index:
        return None
    rank, op = len(layer.input.shape), use.node.op
    if op == "Conv" and layer.group == 1 and math.prod(layer.weight.shape[2:]) == 1:
        return 1
    if op == "Gemm":
        is_turned = bool(use.node.attrs.get("transA" if use.index == 0 else "transB", 0))
        return use.index if is_turned else 1 - use.index
    return rank - 1 - use.index if op == "MatMul" and rank > 1 else None


def _moved(node: gs.Node, axis: int | None) -> int | None:
    """Where ``axis`` is behind ``node``; None where that is not known."""
    if axis is None or node.op not in MOVEMENTS:
        return axis
    if node.op == "Transpose":
        return list(node.attrs["perm"]).index(axis) if "perm" in node.attrs else None
    before, after = node.inputs[0].shape, node.outputs[0].shape
    is_last = before is not None and bool(after) and axis == len(before) - 1
    is_kept = node.op == "Reshape" and is_last and isinstance(after[-1], int) and after[-1] == before[-1]
    return len(after) - 1 if is_kept else None


def _is_summed(index: GraphIndex, node: gs.Node) -> bool:
    """Whether the product of two activations goes into a sum or mean over axes and nowhere else (as it does
    where masked weights are divided by their sum)."""
    if any(is_constant(tensor) for tensor in node.inputs):
        return False
    reader = index.sole_user(node.outputs[0].name)
    while reader is not None and reader.op in _MOVING:
        reader = index.sole_user(reader.outputs[0].name)
    return reader is not None and reader.op in ("ReduceSum", "ReduceMean")


def _uses_behind(index: GraphIndex, tensor: str, through: frozenset[str]) -> Iterator[Use]:
    """Every read of ``tensor``, and of what nodes of ``through`` make of it; nodes are passed through once."""
    waiting, seen = [tensor], set()
    while waiting:
        for use in index.uses(waiting.pop(0)):
            yield use
            if use.node.op in through and use.node.name not in seen and _keeps_values(use):
                seen.add(use.node.name)
                waiting += [t.name for t in use.node.outputs if t.name]


def _keeps_values(use: Use) -> bool:
    """Whether the output holds what is read, and not only its shape, indices or a choice by it."""
    if use.node.op == "Where":
        return use.index > 0
    return use.index == 0 or use.node.op in ("Concat", "Mul")


def _adds_zeros(node: gs.Node) -> bool:
    """Whether a constant operand is 0 everywhere, as the bias of an Attention node that has none is written out."""
    values = (constant_value(tensor) for tensor in node.inputs)
    return any(value is not None and not np.any(value) for value in values)


def _scores(index: GraphIndex, logits: gs.Tensor) -> tuple[tuple[gs.Node, ...], bool]:
    """The products of activations that ``logits`` come from, and whether something else joins them."""
    found: dict[str, gs.Node] = {}
    seen: set[str] = set()
    is_masked = False
    waiting = [logits]
    while waiting:
        node = index.producer(waiting.pop(0).name)
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if is_mixing(node):
            found[node.name] = node
        elif node.op in _SCORING:
            joins = node.op in ("Add", "Where", "Min", "Max")
            is_masked |= joins and len(node.inputs) > 1 and not (node.op == "Add" and _adds_zeros(node))
            several = joins or node.op in ("Concat", "Mul", "Sub")
            waiting += list(node.inputs) if several else [node.inputs[0]]
    order = [node for node in index.nodes if node.name in found]
    return tuple(order), is_masked and bool(found)
