"""``Einsum`` of two operands -> ``MatMul``, or ``Mul`` and ``ReduceSum``.

With b for letters that both operands and the result have, k for those that both operands have and the result has
not, i and j for those of the left and of the right operand alone::

    (b i k), (b k j) -> (b i j)     MatMul, for one k, one j, and one i (any number of i without b)
    (b k), (b k) -> (b)             Mul, ReduceSum over k (Mul alone without k)

Operands are transposed into that order and the result out of it, constants for good; a matrix whose letters stand on
the other side takes the other operand's place. So products that are written as equations are found like all others:
the scores and sums of attention, layers over the last axis, the weighted sums of vector attention.

MatMul adds the same products in an order of its own; the other form is exact but for that of the sum. Declined: one
operand or more than two, ellipses, a letter twice in an operand, sums over one operand alone, more letters of a kind
than MatMul has axes for, axes of size 1 that stand for more, and element types other than float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxptq.graph.index import is_float32
from onnxptq.graph.surgeon import free_name, live_nodes, new_constant, unique_tensor_name

MIN_OPSET = 13

_Sizes = Mapping[str, "int | str | None"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Equation:
    """Letters of the operands and of the result, and the numbers of the operands in the order used."""

    left: str
    right: str
    result: str
    order: tuple[int, int] = (0, 1)

    @property
    def batch(self) -> str:
        """In all three; in the order of the result."""
        return "".join(c for c in self.result if c in self.left and c in self.right)

    @property
    def summed(self) -> str:
        """In both operands alone."""
        return "".join(c for c in self.left if c in self.right and c not in self.result)

    @property
    def rows(self) -> str:
        """In the left operand and the result; in the order of the result."""
        return "".join(c for c in self.result if c not in self.right)

    @property
    def columns(self) -> str:
        """In the right operand and the result; in the order of the result."""
        return "".join(c for c in self.result if c not in self.left)

    def swapped(self) -> _Equation:
        """The same with the operands exchanged."""
        return _Equation(left=self.right, right=self.left, result=self.result, order=self.order[::-1])


NOTE = (
    "One Einsum node was written as a product.",
    "{} Einsum nodes were written as products.",
)


def run(graph: gs.Graph) -> int:
    """Rewrite in place; returns how many were replaced."""
    if graph.opset < MIN_OPSET:
        return 0
    return sum(_lower(graph, node) for node in live_nodes(graph, "Einsum"))


def _lower(graph: gs.Graph, node: gs.Node) -> bool:
    equation = _parsed(str(node.attrs["equation"]))
    if equation is None or len(node.inputs) != 2 or not all(is_float32(t) for t in node.inputs):
        return False
    sizes = _sizes(equation, node)
    if sizes is None:
        return False
    e = equation
    if not e.rows and not e.columns:
        _write_sum(graph, node, e, sizes)
        return True
    if len(e.rows) == 1 and (len(e.columns) > 1 or (len(e.right) > len(e.left) and not e.batch)):
        e = e.swapped()
    is_product = (
        len(e.summed) == 1 and len(e.columns) == 1 and (len(e.rows) == 1 if e.batch else bool(e.rows))
    )
    if is_product:
        _write_product(graph, node, e, sizes)
    return is_product


def _parsed(text: str) -> _Equation | None:
    text = text.replace(" ", "")
    operands, arrow, result = text.partition("->")
    left, comma, right = operands.partition(",")
    if not arrow:
        both = left + right
        result = "".join(sorted(c for c in set(both) if both.count(c) == 1))
    if not comma or not all(c.isalpha() for c in left + right + result):
        return None
    if any(len(set(term)) < len(term) for term in (left, right, result)):
        return None
    alone = set(left) ^ set(right)
    return _Equation(left=left, right=right, result=result) if alone <= set(result) else None


def _sizes(e: _Equation, node: gs.Node) -> _Sizes | None:
    """The size of every letter; None where one of two sizes is 1 and stands for more, or a rank does not fit."""
    found: dict[str, int | str | None] = {}
    for letters, tensor in zip((e.left, e.right), node.inputs, strict=True):
        if tensor.shape is None or len(tensor.shape) != len(letters):
            return None
        for letter, size in zip(letters, tensor.shape, strict=True):
            known = found.setdefault(letter, size)
            if known != size and 1 in (known, size):
                return None
            if isinstance(size, int):
                found[letter] = size
    return found


def _write_product(graph: gs.Graph, node: gs.Node, e: _Equation, sizes: _Sizes) -> None:
    first, second = (node.inputs[i] for i in e.order)
    draft = _Draft(graph, node, sizes)
    left = draft.ordered(first, e.left, e.batch + e.rows + e.summed, "left")
    right = draft.ordered(second, e.right, e.batch + e.summed + e.columns, "right")
    draft.add("MatMul", [left, right], e.batch + e.rows + e.columns, node.name)
    draft.finish(e.result)


def _write_sum(graph: gs.Graph, node: gs.Node, e: _Equation, sizes: _Sizes) -> None:
    draft = _Draft(graph, node, sizes)
    right = draft.ordered(node.inputs[1], e.right, e.left, "right")
    product = draft.add("Mul", [node.inputs[0], right], e.left, node.name)
    if e.summed:
        axes = new_constant(graph, f"{node.name}/axes", np.array([e.left.index(c) for c in e.summed]))
        kept = "".join(c for c in e.left if c in e.result)
        draft.add("ReduceSum", [product, axes], kept, f"{node.name}/sum", keepdims=0)
    draft.finish(e.result)


class _Draft:
    """The nodes that take the place of ``node``; each writes a tensor with given letters."""

    def __init__(self, graph: gs.Graph, node: gs.Node, sizes: _Sizes) -> None:
        self._graph, self._node, self._sizes = graph, node, sizes
        self._taken = {other.name for other in graph.nodes if other is not node}
        self._nodes: list[gs.Node] = []
        self._letters = ""

    def add(
        self, op: str, inputs: Sequence[gs.Tensor], letters: str, name: str, **attrs: object
    ) -> gs.Tensor:
        """Append a node and return what it writes."""
        name = free_name(name, self._taken)
        output = gs.Variable(
            unique_tensor_name(self._graph, f"{name}/{op}"), np.float32, [self._sizes[c] for c in letters]
        )
        self._nodes.append(gs.Node(op, name, attrs=attrs, inputs=list(inputs), outputs=[output]))
        self._letters = letters
        return output

    def ordered(self, tensor: gs.Tensor, letters: str, wanted: str, name: str) -> gs.Tensor:
        """``tensor`` with its axes in the order ``wanted``."""
        order = [letters.index(c) for c in wanted]
        if letters == wanted:
            return tensor
        if isinstance(tensor, gs.Constant):
            return new_constant(
                self._graph, f"{tensor.name}/{wanted}", np.ascontiguousarray(tensor.values.transpose(order))
            )
        return self.add("Transpose", [tensor], wanted, f"{self._node.name}/{name}", perm=order)

    def finish(self, result: str) -> None:
        """Let the last node write what the old one wrote, its axes in the order ``result``."""
        self.ordered(self._nodes[-1].outputs[0], self._letters, result, "result")
        self._nodes[-1].outputs = [self._node.outputs[0]]
        position = next(i for i, other in enumerate(self._graph.nodes) if other is self._node)
        self._node.inputs.clear()
        self._node.outputs.clear()
        self._graph.nodes[position : position + 1] = self._nodes
