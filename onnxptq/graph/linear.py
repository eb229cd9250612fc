"""Recognises linear layers: one weighted operator, its bias wherever it is written, as one thing."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from onnxptq.graph.index import GraphIndex, is_constant
from onnxptq.graph.proto import ONNX_DOMAINS

_OPS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linear:
    """``output = input (*) weight + bias`` with a constant weight.

    Attributes:
        node: the Conv, ConvTranspose, Gemm or MatMul.
        input: the tensor that the weight is applied to.
        weight: the constant; of any shape the operator accepts.
        weight_index: which input of ``node`` it is (0 for a MatMul ``W x``).
        axis: the axis of ``weight`` along which output channels are counted; for a grouped ConvTranspose
            output channel ``c`` is index ``c mod (channels / group)`` of it.
        group: of Conv and ConvTranspose, else 1.
        bias: the constant bias, or None.
        bias_node: the node that reads it: ``node`` itself, or the ``Add`` behind a MatMul; None without bias.
        bias_index: which input of ``bias_node`` it is; None without bias.
        output: what the layer writes, bias included.
    """

    node: gs.Node
    input: gs.Tensor
    weight: gs.Constant
    weight_index: int
    axis: int
    group: int
    bias: gs.Constant | None
    bias_node: gs.Node | None
    bias_index: int | None
    output: gs.Tensor


def find_linears(index: GraphIndex) -> tuple[Linear, ...]:
    """Every linear layer with a constant weight, in graph order.

    A MatMul takes the following Add as its bias if that Add is its only reader, adds a constant vector along
    the output channels, and the caller does not see the MatMul's output.
    """
    found = (linear_of(index, node) for node in index.nodes)
    return tuple(linear for linear in found if linear is not None)


def linear_of(index: GraphIndex, node: gs.Node) -> Linear | None:
    """The linear layer whose weighted operator is ``node``, if it is one."""
    if node.op not in _OPS or (node.domain or "") not in ONNX_DOMAINS:
        return None
    weight_index = _weight_index(node)
    if weight_index is None:
        return None
    weight = node.inputs[weight_index]
    axis = _kept_axis(node, weight, weight_index)
    if axis is None:
        return None
    bias, bias_node, bias_index, output = None, None, None, node.outputs[0]
    if node.op == "MatMul":
        found = _added_bias(index, node, weight, axis)
        if found is not None:
            bias_node, bias_index = found
            bias, output = bias_node.inputs[bias_index], bias_node.outputs[0]
    elif len(node.inputs) > 2 and is_constant(node.inputs[2]):
        bias, bias_node, bias_index = node.inputs[2], node, 2
    return Linear(
        node=node,
        input=node.inputs[1 - weight_index],
        weight=weight,
        weight_index=weight_index,
        axis=axis,
        group=int(node.attrs.get("group", 1)),
        bias=bias,
        bias_node=bias_node,
        bias_index=bias_index,
        output=output,
    )


def _weight_index(node: gs.Node) -> int | None:
    """The constant operand; None if there is none, or if both are constant and nothing flows through."""
    first, second = is_constant(node.inputs[0]), is_constant(node.inputs[1])
    if first == second:
        return None
    if second:
        return 1
    return 0 if node.op in ("MatMul", "Gemm") else None


def _kept_axis(node: gs.Node, weight: gs.Constant, weight_index: int) -> int | None:
    rank = len(weight.shape)
    if node.op == "Conv":
        return 0
    if node.op == "ConvTranspose":
        return 1
    if node.op == "Gemm":
        transposed = bool(node.attrs.get("transA" if weight_index == 0 else "transB", 0))
        # As the right operand (K, N) the output channel is N; as the left one (M, K) it is M.
        plain = 1 if weight_index == 1 else 0
        return 1 - plain if transposed else plain
    if rank < 2:
        return None
    return rank - 1 if weight_index == 1 else rank - 2


def _added_bias(
    index: GraphIndex, node: gs.Node, weight: gs.Constant, axis: int
) -> tuple[gs.Node, int] | None:
    reader = index.sole_user(node.outputs[0].name)
    if reader is None or reader.op != "Add" or (reader.domain or "") not in ONNX_DOMAINS:
        return None
    if weight is not node.inputs[1]:
        return None
    position = 1 if reader.inputs[0] is node.outputs[0] else 0
    other = reader.inputs[position]
    if not is_constant(other) or other.shape is None:
        return None
    shape = [int(dim) for dim in other.shape]
    rank = None if node.outputs[0].shape is None else len(node.outputs[0].shape)
    is_vector = shape[-1:] == [int(weight.shape[axis])] and all(dim == 1 for dim in shape[:-1])
    # More axes than the product has would change the rank of the result.
    if is_vector and (len(shape) == 1 or (rank is not None and len(shape) <= rank)):
        return reader, position
    return None
