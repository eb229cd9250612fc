"""Small networks with an operator that torch has no form of, between two layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.unit.small_nets import Net


def branch(name: str, op: str, reads: str) -> onnx.GraphProto:
    writes = f"{name}.y"
    return helper.make_graph(
        [helper.make_node(op, [reads], [writes])],
        name,
        [],
        [helper.make_tensor_value_info(writes, TensorProto.FLOAT, None)],
    )


def recurrent(op: str, net: Net, x: str) -> str:
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    weights = net.weight("r.w", 2, gates * 6, 8), net.weight("r.r", 2, gates * 6, 6)
    net.op(op, "r", x, *weights, hidden_size=6, direction="bidirectional")
    turned = net.op("Transpose", "turned", "r", perm=[0, 2, 1, 3])
    return net.op("Reshape", "flat", turned, net.constant("s", np.array([0, 0, 12])))


def with_if(net: Net, x: str) -> str:
    mean = net.op("ReduceMean", "mean", x, keepdims=0)
    above = net.op("Greater", "above", mean, net.constant("limit", np.float32(0.1)))
    branches = {"then_branch": branch("then", "Neg", x), "else_branch": branch("else", "Abs", x)}
    return net.op("Concat", "both", net.op("If", "either", above, **branches), x, axis=-1)


def with_loop(net: Net, x: str) -> str:
    body = helper.make_graph(
        [
            helper.make_node("Mul", ["state", "factor"], ["next"]),
            helper.make_node("Add", ["next", x], ["sum"]),
            helper.make_node("Identity", ["go"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, list("abc")),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("sum", TensorProto.FLOAT, list("abc")),
        ],
    )
    net.constant("factor", np.float32(0.5))
    often = net.constant("often", np.array(3))
    looped = net.op("Loop", "looped", often, net.constant("yes", np.array(True)), x, body=body)
    return net.op("Reshape", "same", looped, net.constant("s", np.array([-1, 5, 8])))


def suppressed(net: Net, x: str) -> str:
    boxes = net.op("Reshape", "boxes", x, net.constant("bs", np.array([1, -1, 4])))
    scores = net.op(
        "Reshape",
        "scores",
        net.op("ReduceMax", "best", boxes, axes=[2]),
        net.constant("ss", np.array([1, 1, -1])),
    )
    limits = net.constant("most", np.array(5)), net.constant("iou", np.float32(0.4))
    kept = net.op("NonMaxSuppression", "kept", boxes, scores, *limits)
    rows = net.op("Gather", "rows", kept, net.constant("two", np.array(2)), axis=1)
    return net.op("Gather", "picked", boxes, rows, axis=1)


BUILT: dict[str, Any] = {
    **{op: lambda net, x, op=op: recurrent(op, net, x) for op in ("LSTM", "GRU", "RNN")},
    "If": with_if,
    "Loop": with_loop,
    "NonMaxSuppression": suppressed,
}


def model_of(kind: str) -> onnx.ModelProto:
    """A layer, the operator, and a layer behind it."""
    net = Net(opset=17)
    found = BUILT[kind](net, net.op("Relu", "front", net.linear("fc", "x", 8, 8)))
    last = {"If": 16, "NonMaxSuppression": 4, "Loop": 8}.get(kind, 12)
    return net.proto({"x": ["n", 5, 8]}, [net.linear("y", found, last, 3)])
