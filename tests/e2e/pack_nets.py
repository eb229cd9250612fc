"""Small networks of every kind that packs must get through, with the shapes of one sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx

from tests.unit.small_nets import Net, attention_block, max_pool_net, residual_block, vector_attention

Shapes = Mapping[str, tuple[int, ...]]
ONE: Shapes = {"x": (1, 3, 8, 8)}


def windows() -> onnx.ModelProto:
    """Depthwise and grouped, non-square, dilated and transposed convolutions."""
    net = Net(seed=2)
    x = net.op("Relu", "r1", net.conv("square", "x", (16, 3, 3, 3)))
    x = net.relu6("r2", net.conv("depthwise", x, (16, 1, 3, 3), group=16))
    x = net.op("Relu", "r3", net.conv("flat", x, (16, 8, 1, 5), group=2, pads=[0, 2, 0, 2]))
    x = net.op("Relu", "r4", net.conv("dilated", x, (12, 16, 3, 2), dilations=[2, 1], pads=[2, 0, 2, 1]))
    up = net.op(
        "ConvTranspose",
        "up",
        x,
        net.weight("up.w", 12, 4, 2, 2),
        net.weight("up.b", 8),
        group=2,
        strides=[2, 2],
    )
    return net.proto({"x": ["n", 3, 8, 8]}, [net.conv("last", net.op("Relu", "r5", up), (4, 8, 3, 3))])


def attention_node() -> onnx.ModelProto:
    """One operator for all of it, with a mask, behind three projections."""
    net = Net(seed=6, opset=23)
    q, k, v = (net.linear(name, "x", 32, 32) for name in "qkv")
    mask = net.constant("mask", np.where(np.tri(8, dtype=bool), 0, -1e4).astype(np.float32))
    y = net.op("Attention", "att", q, k, v, mask, q_num_heads=2, kv_num_heads=2)
    return net.proto({"x": [1, 8, 32]}, [net.linear("out", y, 32, 8)])


def even_attention() -> onnx.ModelProto:
    """Over four tokens, with weights near a quarter."""
    net = Net(seed=5, opset=20)
    q, v = net.linear("q", "x", 16, 16), net.linear("v", "x", 16, 16)
    scores = net.op("MatMul", "qk", q, net.op("Transpose", "kt", "x", perm=[0, 2, 1]))
    p = net.op("Softmax", "p", net.op("Mul", "c", scores, net.constant("cool", np.float32(0.05))), axis=-1)
    y = net.op("Add", "sum", net.op("MatMul", "pv", p, v), "x")
    return net.proto({"x": ["n", 4, 16]}, [net.linear("y", y, 16, 8)])


def stacked_matrices() -> onnx.ModelProto:
    """A constant matrix for each of three experts, one for all of them, and a constant vector."""
    net = Net(seed=8)
    x = net.op("Relu", "r1", net.op("MatMul", "experts", "x", net.weight("experts.w", 3, 16, 16)))
    x = net.op("Relu", "r2", net.op("MatMul", "shared", x, net.weight("shared.w", 1, 16, 16)))
    gate = net.op("MatMul", "gate", x, net.weight("gate.w", 16))
    gated = net.op("Mul", "gated", x, net.op("Unsqueeze", "u", gate, net.constant("last", np.array([-1]))))
    return net.proto({"x": [1, 3, 8, 16]}, [net.linear("y", gated, 16, 8)])


def two_inputs() -> onnx.ModelProto:
    net = Net(seed=3)
    a = net.op("Relu", "ra", net.linear("a", "left", 6, 16))
    b = net.op("Relu", "rb", net.linear("b", "right", 4, 16))
    return net.proto(
        {"left": ["n", 6], "right": ["n", 4]}, [net.linear("y", net.op("Add", "s", a, b), 16, 8)]
    )


def two_outputs() -> onnx.ModelProto:
    net = Net(seed=4)
    x = net.op("Relu", "r1", net.conv("stem", "x", (16, 3, 3, 3)))
    first = net.conv("map", x, (2, 16, 3, 3))
    y = net.op("Relu", "r2", net.conv("deep", x, (16, 16, 3, 3)))
    y = net.op("Flatten", "f", net.op("GlobalAveragePool", "p", y))
    return net.proto({"x": ["n", 3, 8, 8]}, [first, net.linear("scores", y, 16, 10)])


def chain(size: int) -> onnx.ModelProto:
    """Four blocks with skip connections, between two convolutions."""
    net = Net(seed=5)
    x = net.op("Relu", "stem_relu", net.conv("stem", "x", (16, 3, 3, 3)))
    for i in range(4):
        y = net.op("Relu", f"r{i}", net.conv(f"a{i}", x, (16, 16, 3, 3)))
        x = net.op("Add", f"s{i}", net.conv(f"b{i}", y, (16, 16, 3, 3)), x)
    return net.proto({"x": ["n", 3, size, size]}, [net.conv("last", x, (4, 16, 1, 1))])


def segmentation() -> onnx.ModelProto:
    """Ends in ArgMax: the last block writes integers only."""
    net = Net(seed=1)
    x = net.op("Relu", "r1", net.conv("stem", "x", (8, 3, 3, 3)))
    x = net.op("Relu", "r2", net.conv("deep", x, (8, 8, 3, 3)))
    proto = net.proto({"x": ["n", 3, 8, 8]}, [net.conv("head", x, (4, 8, 3, 3))])
    scores = proto.graph.output.pop().name
    proto.graph.node.append(onnx.helper.make_node("ArgMax", [scores], ["classes"], "choose", axis=1))
    proto.graph.output.append(
        onnx.helper.make_tensor_value_info("classes", onnx.TensorProto.INT64, ["n", 1, 8, 8])
    )
    return proto


def of_any_size() -> onnx.ModelProto:
    """Pictures of any height and width."""
    net = Net(seed=1)
    x = net.op("Relu", "r1", net.conv("stem", "x", (8, 3, 3, 3)))
    x = net.op("Relu", "r2", net.conv("deep", x, (8, 8, 3, 3)))
    y = net.linear("y", net.op("Flatten", "f", net.op("GlobalAveragePool", "p", x)), 8, 4)
    return net.proto({"x": ["n", 3, "h", "w"]}, [y])


NETS: Mapping[str, tuple[Callable[[], onnx.ModelProto], Shapes]] = {
    "residual, fixed batch": (residual_block, ONE),
    "windows": (windows, ONE),
    "attention": (attention_block, {"x": (1, 8, 32)}),
    "vector attention": (vector_attention, {"x": (1, 6, 16)}),
    "attention node": (attention_node, {"x": (1, 8, 32)}),
    "even attention": (even_attention, {"x": (1, 4, 16)}),
    "points, fixed batch": (max_pool_net, {"x": (1, 64, 3)}),
    "stacked matrices": (stacked_matrices, {"x": (1, 3, 8, 16)}),
    "two inputs": (two_inputs, {"left": (5, 6), "right": (5, 4)}),
    "two outputs": (two_outputs, {"x": (2, 3, 8, 8)}),
}
