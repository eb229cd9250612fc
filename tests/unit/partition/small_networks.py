"""Small random networks with the structure of well-known ones, and the tensors that end their blocks.

Every function returns the graph and what each block writes, as the architecture's own definition groups its
layers: ``blocks[i]`` are the outputs of block i.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

Expected = list[tuple[str, ...]]
Built = tuple[gs.Graph, Expected]


class Net:
    """Writes nodes one by one; every method returns the name of the tensor that it adds."""

    def __init__(self, inputs: Mapping[str, Sequence[int | str]], types: Mapping[str, int] = {}) -> None:
        self.rng = np.random.default_rng(0)
        self._inputs = [
            helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), list(shape))
            for name, shape in inputs.items()
        ]
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, np.ndarray] = {}
        self.blocks: Expected = []

    def op(self, kind: str, *inputs: str, n: int = 1, **attrs: Any) -> str:
        return self.ops(kind, *inputs, n=n, **attrs)[0]

    def ops(self, kind: str, *inputs: str, n: int = 1, **attrs: Any) -> list[str]:
        index = len(self._nodes)
        outputs = [f"{kind}_{index}" if n == 1 else f"{kind}_{index}.{i}" for i in range(n)]
        self._nodes.append(helper.make_node(kind, list(inputs), outputs, name=f"node_{index}", **attrs))
        return outputs

    def const(self, value: Any, dtype: Any = np.float32) -> str:
        name = f"const_{len(self._weights)}"
        self._weights[name] = np.asarray(value, dtype)
        return name

    def ints(self, *values: int) -> str:
        return self.const(list(values), np.int64)

    def weight(self, *shape: int) -> str:
        fan = max(1, int(np.prod(shape[1:])))
        return self.const(self.rng.normal(size=shape) / np.sqrt(fan))

    def conv(self, x: str, cin: int, cout: int, k: int = 3, stride: int = 1, group: int = 1) -> str:
        return self.op(
            "Conv", x, self.weight(cout, cin // group, k, k), self.weight(cout),
            kernel_shape=[k, k], pads=[k // 2] * 4, strides=[stride] * 2, group=group,
        )  # fmt: skip

    def conv_relu(self, x: str, cin: int, cout: int, k: int = 3, stride: int = 1, group: int = 1) -> str:
        return self.op("Relu", self.conv(x, cin, cout, k, stride, group))

    def linear(self, x: str, cin: int, cout: int) -> str:
        return self.op("Add", self.op("MatMul", x, self.weight(cin, cout)), self.weight(cout))

    def norm(self, x: str, c: int) -> str:
        return self.op("LayerNormalization", x, self.const(np.ones(c)), self.weight(c), axis=-1)

    def head(self, x: str, c: int, classes: int = 5) -> str:
        flat = self.op("Flatten", self.op("GlobalAveragePool", x), axis=1)
        return self.op("Gemm", flat, self.weight(classes, c), self.weight(classes), transB=1)

    def end_block(self, *outputs: str) -> str:
        """State that a block of the architecture ends here."""
        self.blocks.append(outputs)
        return outputs[0]

    def model(self, *outputs: str) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        weights = [numpy_helper.from_array(value, name) for name, value in self._weights.items()]
        graph = helper.make_graph(self._nodes, "net", self._inputs, infos, weights)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
        return onnx.shape_inference.infer_shapes(model)

    def built(self, *outputs: str) -> Built:
        return gs.import_onnx(self.model(*outputs)), self.blocks


def image_net(side: int = 16) -> Net:
    return Net({"x": ["n", 3, side, side]})


def resnet50() -> Built:
    net = image_net(32)
    x = net.conv_relu("x", 3, 4, 7, 2)
    x = net.end_block(net.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4))
    c = 4
    for stage, depth in enumerate((3, 4, 6, 3)):
        width = 2 << stage
        for i in range(depth):
            stride = 2 if stage and i == 0 else 1
            y = net.conv_relu(net.conv_relu(x, c, width, 1), width, width, 3, stride)
            y = net.conv(y, width, 4 * width, 1)
            skip = net.conv(x, c, 4 * width, 1, stride) if i == 0 else x
            x, c = net.end_block(net.op("Relu", net.op("Add", y, skip))), 4 * width
    return net.built(net.end_block(net.head(x, c)))


def mobilenet_v2() -> Built:
    net = image_net(32)

    def act(x: str) -> str:
        return net.op("Clip", x, net.const(0.0), net.const(6.0))

    x, c = net.end_block(act(net.conv("x", 3, 4, 3, 2))), 4
    table = ((1, 2, 1, 1), (6, 3, 2, 2), (6, 4, 3, 2), (6, 5, 4, 2), (6, 6, 3, 1), (6, 7, 3, 2), (6, 8, 1, 1))
    for expand, out, repeat, stride in table:
        for i in range(repeat):
            step = stride if i == 0 else 1
            wide = c * expand
            y = act(net.conv(x, c, wide, 1)) if expand > 1 else x
            y = net.conv(act(net.conv(y, wide, wide, 3, step, wide)), wide, out, 1)
            x = net.end_block(net.op("Add", y, x) if step == 1 and c == out else y)
            c = out
    x = net.op("GlobalAveragePool", act(net.conv(x, c, 20, 1)))
    x = net.end_block(net.op("Flatten", x))
    return net.built(net.end_block(net.op("Gemm", x, net.weight(20, 5), net.weight(5))))


def attention(net: Net, x: str, c: int, heads: int, tokens: int, mask: str | None = None) -> str:
    """Fused query, key and value, split by Split and Squeeze as torch's exporter writes it."""
    d = c // heads
    qkv = net.op("Reshape", net.linear(x, c, 3 * c), net.ints(-1, tokens, 3, heads, d))
    parts = net.ops("Split", net.op("Transpose", qkv, perm=[2, 0, 3, 1, 4]), n=3, axis=0, num_outputs=3)
    q, k, v = (net.op("Squeeze", part, net.ints(0)) for part in parts)
    scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 1, 3, 2]))
    scores = net.op("Mul", scores, net.const(d**-0.5))
    if mask is not None:
        scores = net.op("Add", scores, mask)
    y = net.op("MatMul", net.op("Softmax", scores, axis=-1), v)
    y = net.op("Reshape", net.op("Transpose", y, perm=[0, 2, 1, 3]), net.ints(-1, tokens, c))
    return net.linear(y, c, c)


def mlp(net: Net, x: str, c: int) -> str:
    return net.linear(net.op("Gelu", net.linear(x, c, 2 * c)), 2 * c, c)


def vit(*, join: bool = True, depth: int = 12) -> Built:
    net = image_net(8)
    x = net.op("Reshape", net.conv("x", 3, 8, 4, 4), net.ints(0, 8, -1))
    # Padding makes 9 patches; with the class token there are 10.
    x = net.op("Transpose", x, perm=[0, 2, 1])
    batch = net.op("Gather", net.op("Shape", x), net.const(0, np.int64))
    shape = net.op("Concat", net.op("Unsqueeze", batch, net.ints(0)), net.ints(1, 8), axis=0)
    token = net.op("Expand", net.weight(1, 1, 8), shape)
    x = net.end_block(net.op("Add", net.op("Concat", token, x, axis=1), net.weight(1, 10, 8)))
    for _ in range(depth):
        x = net.op("Add", x, attention(net, net.norm(x, 8), 8, 2, 10))
        if not join:
            net.end_block(x)
        x = net.end_block(net.op("Add", x, mlp(net, net.norm(x, 8), 8)))
    x = net.op("Gather", net.norm(x, 8), net.const(0, np.int64), axis=1)
    return net.built(net.end_block(net.op("Gemm", x, net.weight(8, 5), net.weight(5))))


def swin() -> Built:
    """Windows by Reshape and Transpose, shifts by Slice and Concat with a mask, merging by strided slices."""
    net = image_net(16)
    c, side, window = 8, 8, 4
    x = net.op("Transpose", net.conv("x", 3, c, 3, 2), perm=[0, 2, 3, 1])
    x = net.end_block(net.norm(x, c))

    def rolled(x: str, shift: int) -> str:
        for axis in (1, 2):
            front = net.op("Slice", x, net.ints(0), net.ints(shift), net.ints(axis))
            back = net.op("Slice", x, net.ints(shift), net.ints(10**6), net.ints(axis))
            x = net.op("Concat", back, front, axis=axis)
        return x

    for stage, depth in enumerate((2, 2)):
        for i in range(depth):
            # A mask that the graph computes from the batch alone.
            y, shift, mask = net.norm(x, c), 2 if i % 2 else 0, None
            if shift:
                y = rolled(y, shift)
                mask = net.weight(1, 1, window**2, window**2)
            n = side // window
            y = net.op("Reshape", y, net.ints(-1, n, window, n, window, c))
            y = net.op("Reshape", net.op("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), net.ints(-1, window**2, c))
            y = attention(net, y, c, 2, window**2, mask)
            y = net.op("Reshape", y, net.ints(-1, n, n, window, window, c))
            y = net.op(
                "Reshape", net.op("Transpose", y, perm=[0, 1, 3, 2, 4, 5]), net.ints(-1, side, side, c)
            )
            x = net.op("Add", x, rolled(y, side - shift) if shift else y)
            x = net.end_block(net.op("Add", x, mlp(net, net.norm(x, c), c)))
        if stage == 0:
            starts = ((0, 0), (1, 0), (0, 1), (1, 1))
            parts = [
                net.op("Slice", x, net.ints(*s), net.ints(10**6, 10**6), net.ints(1, 2), net.ints(2, 2))
                for s in starts
            ]
            x = net.op("MatMul", net.norm(net.op("Concat", *parts, axis=3), 4 * c), net.weight(4 * c, 2 * c))
            x, c, side = net.end_block(x), 2 * c, side // 2
    x = net.op("ReduceMean", net.norm(x, c), net.ints(1, 2), keepdims=0)
    return net.built(net.end_block(net.op("Gemm", x, net.weight(c, 5), net.weight(5))))


def convnext() -> Built:
    net = image_net(32)

    def norm(x: str, c: int) -> str:
        last = net.norm(net.op("Transpose", x, perm=[0, 2, 3, 1]), c)
        return net.op("Transpose", last, perm=[0, 3, 1, 2])

    c = 4
    x = net.end_block(norm(net.conv("x", 3, c, 3, 2), c))
    for stage, depth in enumerate((3, 3, 9, 3)):
        if stage:
            x, c = net.end_block(net.conv(norm(x, c), c, c + 2, 3, 2)), c + 2
        for _ in range(depth):
            y = net.op("Transpose", net.conv(x, c, c, 7, 1, c), perm=[0, 2, 3, 1])
            y = net.op("Mul", mlp(net, net.norm(y, c), c), net.weight(c))
            x = net.end_block(net.op("Add", net.op("Transpose", y, perm=[0, 3, 1, 2]), x))
    return net.built(net.end_block(net.head(x, c)))


def excite(net: Net, x: str, c: int) -> str:
    gate = net.conv_relu(net.op("GlobalAveragePool", x), c, 2, 1)
    return net.op("Mul", x, net.op("Sigmoid", net.conv(gate, 2, c, 1)))


def regnet_y() -> Built:
    net = image_net(32)
    x, c = net.end_block(net.conv_relu("x", 3, 4, 3, 2)), 4
    for stage, depth in enumerate((1, 3, 6, 6)):
        out = 4 + 4 * stage
        for i in range(depth):
            stride = 2 if i == 0 else 1
            y = net.conv_relu(net.conv_relu(x, c, out, 1), out, out, 3, stride, out // 4)
            y = net.conv(excite(net, y, out), out, out, 1)
            skip = net.conv(x, c, out, 1, stride) if i == 0 else x
            x, c = net.end_block(net.op("Relu", net.op("Add", y, skip))), out
    return net.built(net.end_block(net.head(x, c)))


def efficientnet() -> Built:
    """Inverted residuals with squeeze-and-excitation and SiLU written as x * sigmoid(x)."""
    net = image_net(16)

    def silu(x: str) -> str:
        return net.op("Mul", x, net.op("Sigmoid", x))

    x, c = net.end_block(silu(net.conv("x", 3, 4, 3, 2))), 4
    for out, stride in ((4, 1), (6, 2), (6, 1), (8, 2)):
        y = silu(net.conv(x, c, 3 * c, 1))
        y = silu(net.conv(y, 3 * c, 3 * c, 3, stride, 3 * c))
        y = net.conv(excite(net, y, 3 * c), 3 * c, out, 1)
        x, c = net.end_block(net.op("Add", y, x) if stride == 1 and c == out else y), out
    x = net.op("GlobalAveragePool", silu(net.conv(x, c, 12, 1)))
    x = net.end_block(net.op("Flatten", x))
    return net.built(net.end_block(net.op("Gemm", x, net.weight(12, 5), net.weight(5))))


def densenet() -> Built:
    net = image_net(16)
    x = net.end_block(net.op("MaxPool", net.conv_relu("x", 3, 4), kernel_shape=[2, 2], strides=[2, 2]))
    c = 4

    def preactivated(x: str, c: int, out: int, k: int) -> str:
        ones, zeros = net.const(np.ones(c)), net.const(np.zeros(c))
        return net.conv(
            net.op("Relu", net.op("BatchNormalization", x, ones, net.weight(c), zeros, ones)), c, out, k
        )

    for last in (False, True):
        features = [x]
        for i in range(6):
            joined = net.op("Concat", *features, axis=1) if i else features[0]
            features.append(preactivated(preactivated(joined, c, 4, 1), 4, 2, 3))
            c += 2
            if i < 5:
                net.end_block(features[-1])
        x = net.end_block(net.op("Concat", *features, axis=1))
        if not last:
            x = preactivated(x, c, c // 2, 1)
            x, c = net.end_block(net.op("AveragePool", x, kernel_shape=[2, 2], strides=[2, 2])), c // 2
    return net.built(net.end_block(net.head(x, c)))


def hrnet() -> Built:
    """Two, then three resolutions in parallel with exchange between them; the order of blocks is free."""
    net = image_net(16)
    x = net.end_block(net.conv_relu("x", 3, 4))
    branches = [net.end_block(net.conv_relu(x, 4, 4)), net.end_block(net.conv_relu(x, 4, 6, 3, 2))]
    widths = [4, 6, 8]

    def basic(x: str, c: int) -> str:
        return net.end_block(net.op("Relu", net.op("Add", net.conv(net.conv_relu(x, c, c), c, c), x)))

    def resized(x: str, i: int, j: int) -> str:
        if j > i:
            y = net.conv(x, widths[j], widths[i], 1)
            scales = net.const([1, 1, 2 ** (j - i), 2 ** (j - i)])
            return net.op("Resize", y, "", scales, mode="nearest")
        for k in range(j, i):
            x = net.conv(x, widths[k], widths[k + 1], 3, 2)
        return x

    def exchanged(branches: Sequence[str]) -> list[str]:
        result = []
        for i in range(len(branches)):
            total = branches[i]
            for j in range(len(branches)):
                if j != i:
                    total = net.op("Add", total, resized(branches[j], i, j))
            result.append(net.op("Relu", total))
        net.end_block(*result)
        return result

    branches = [basic(basic(x, c), c) for x, c in zip(branches, widths, strict=False)]
    branches = exchanged(branches)
    branches.append(net.end_block(net.conv_relu(branches[1], 6, 8, 3, 2)))
    branches = [basic(basic(x, c), c) for x, c in zip(branches, widths, strict=True)]
    branches = exchanged(branches)
    pooled = [net.op("GlobalAveragePool", x) for x in branches]
    x = net.op("Flatten", net.op("Concat", *pooled, axis=1))
    net.blocks.pop()  # the last exchange ends in the pools and the head; where it is cut is left open
    return net.built(net.op("Gemm", x, net.weight(18, 5), net.weight(5)))


def pointnet() -> Built:
    net = Net({"x": ["n", 3, 32, 1]})
    x, c = "x", 3
    for out in (4, 4, 6, 8):
        x, c = net.end_block(net.conv_relu(x, c, out, 1)), out
    x = net.conv_relu(x, c, 16, 1)
    x = net.end_block(net.op("ReduceMax", x, net.ints(2, 3), keepdims=0))
    x = net.end_block(net.op("Relu", net.op("Gemm", x, net.weight(16, 8), net.weight(8))))
    return net.built(net.end_block(net.op("Gemm", x, net.weight(8, 5), net.weight(5))))


def vgg() -> Built:
    net = image_net(16)
    x, c = "x", 3
    for out, pool in ((4, False), (4, True), (6, False), (6, True)):
        x, c = net.conv_relu(x, c, out), out
        x = net.end_block(net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]) if pool else x)
    x = net.op("Reshape", x, net.ints(0, -1))
    net.blocks[-1] = (x,)
    x = net.end_block(net.op("Relu", net.op("Gemm", x, net.weight(96, 8), net.weight(8))))
    return net.built(net.end_block(net.op("Gemm", x, net.weight(8, 5), net.weight(5))))


def bert() -> Built:
    """Post-norm, separate projections, an attention mask that every layer reads, token and type inputs."""
    ints = TensorProto.INT64
    net = Net(
        {"ids": ["n", 6], "mask": ["n", 6], "types": ["n", 6]}, {"ids": ints, "mask": ints, "types": ints}
    )
    mask = net.op("Unsqueeze", net.op("Cast", "mask", to=TensorProto.FLOAT), net.ints(1, 2))
    mask = net.op("Mul", net.op("Sub", net.const(1.0), mask), net.const(-1e4))
    x = net.op("Add", net.op("Gather", net.weight(11, 8), "ids"), net.op("Gather", net.weight(2, 8), "types"))
    x = net.norm(net.op("Add", x, net.weight(1, 6, 8)), 8)
    # The embedding has no product; it stays with the first layer.

    def heads(x: str, perm: Sequence[int]) -> str:
        return net.op("Transpose", net.op("Reshape", net.linear(x, 8, 8), net.ints(0, 6, 2, 4)), perm=perm)

    for i in range(3):
        q, k, v = heads(x, [0, 2, 1, 3]), heads(x, [0, 2, 3, 1]), heads(x, [0, 2, 1, 3])
        p = net.op("Softmax", net.op("Add", net.op("MatMul", q, k), mask), axis=-1)
        y = net.op("Transpose", net.op("MatMul", p, v), perm=[0, 2, 1, 3])
        x = net.norm(net.op("Add", net.linear(net.op("Reshape", y, net.ints(0, 6, 8)), 8, 8), x), 8)
        x = net.norm(net.op("Add", mlp(net, x, 8), x), 8)
        net.end_block(*((mask, x) if i == 0 else (x,)))
    x = net.op("Gather", x, net.const(0, np.int64), axis=1)
    return net.built(net.end_block(net.op("Gemm", x, net.weight(8, 2), net.weight(2))))


KNOWN: Mapping[str, Callable[[], Built]] = {
    "resnet50": resnet50,
    "mobilenet_v2": mobilenet_v2,
    "vit": vit,
    "swin": swin,
    "convnext": convnext,
    "regnet_y": regnet_y,
    "efficientnet": efficientnet,
    "densenet": densenet,
    "hrnet": hrnet,
    "pointnet": pointnet,
    "vgg": vgg,
    "bert": bert,
}


def unet() -> gs.Graph:
    net = image_net(16)
    x, c, skips = "x", 3, []
    for out in (4, 6, 8):
        x = net.conv_relu(net.conv_relu(x, c, out), out, out)
        skips.append((x, out))
        x, c = net.op("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), out
    x = net.conv_relu(net.conv_relu(x, c, 8), 8, 8)
    c = 8
    for skip, out in reversed(skips):
        up = net.op("ConvTranspose", x, net.weight(c, out, 2, 2), kernel_shape=[2, 2], strides=[2, 2])
        x = net.conv_relu(net.conv_relu(net.op("Concat", skip, up, axis=1), 2 * out, out), out, out)
        c = out
    return net.built(net.conv(x, c, 2, 1))[0]


def detector() -> gs.Graph:
    """A feature pyramid with heads on three levels and two outputs; boxes are resized by the input's shape."""
    net = image_net(32)
    levels, x, c = [], "x", 3
    for out in (4, 6, 8):
        x = net.conv_relu(x, c, out, 3, 2)
        y = net.conv(net.conv_relu(x, out, out), out, out)
        x, c = net.op("Relu", net.op("Add", y, x)), out
        levels.append((x, out))
    top, pyramid = "", []
    for feature, width in reversed(levels):
        lateral = net.conv(feature, width, 4, 1)
        if top:
            size = net.op("Shape", lateral)
            lateral = net.op("Add", lateral, net.op("Resize", top, "", "", size, mode="nearest"))
        top = lateral
        pyramid.append(top)
    boxes, scores = [], []
    for feature in pyramid:
        tower = net.conv_relu(net.conv_relu(feature, 4, 4), 4, 4)
        for found, width in ((boxes, 4), (scores, 3)):
            y = net.op("Transpose", net.conv(tower, 4, width), perm=[0, 2, 3, 1])
            found.append(net.op("Reshape", y, net.ints(0, -1, width)))
    side = net.op(
        "Cast", net.op("Slice", net.op("Shape", "x"), net.ints(2), net.ints(3)), to=TensorProto.FLOAT
    )
    box = net.op("Mul", net.op("Concat", *boxes, axis=1), side)
    return net.built(box, net.op("Sigmoid", net.op("Concat", *scores, axis=1)))[0]


def two_towers() -> gs.Graph:
    net = Net({"left": ["n", 3, 8, 8], "right": ["n", 3, 8, 8]})
    towers = []
    for name in ("left", "right"):
        x = net.conv_relu(name, 3, 4)
        for _ in range(2):
            x = net.op("Relu", net.op("Add", net.conv(net.conv_relu(x, 4, 4), 4, 4), x))
        towers.append(net.head(x, 4, 8))
    return net.built(net.op("MatMul", towers[0], net.op("Transpose", towers[1], perm=[1, 0])))[0]


def decoder(depth: int = 5) -> gs.Graph:
    """Layers of self-attention, attention over one memory, and MLP; nothing is shared but the memory."""
    net = Net({"x": ["n", 6, 8], "memory": ["n", 10, 4]})

    def attend(query: str, read: str, width: int) -> str:
        q, k, v = net.linear(query, 8, 8), net.linear(read, width, 8), net.linear(read, width, 8)
        scores = net.op("MatMul", q, net.op("Transpose", k, perm=[0, 2, 1]))
        return net.linear(net.op("MatMul", net.op("Softmax", scores, axis=-1), v), 8, 8)

    x, memory = "x", net.op("Relu", net.linear("memory", 4, 4))
    for _ in range(depth):
        y = net.norm(x, 8)
        x = net.op("Add", x, attend(y, y, 8))
        x = net.op("Add", x, attend(net.norm(x, 8), memory, 4))
        x = net.op("Add", x, mlp(net, net.norm(x, 8), 8))
    return net.built(net.linear(x, 8, 5))[0]


OTHERS: Mapping[str, Callable[[], gs.Graph]] = {
    "decoder": decoder,
    "unet": unet,
    "detector": detector,
    "two_towers": two_towers,
}
