"""Small networks, one per placement pattern, and how tests make canonical models and plans of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.surgeon import import_graph
from onnxptq.targets import TARGETS, PlacementRequest
from onnxptq.types import CanonicalModel, InputSpec, QuantPlan, Sample


class Net:
    """Collects nodes; every method returns the name of the tensor it writes, which is also the node's."""

    def __init__(self, *, seed: int = 0, opset: int = 21) -> None:
        self._rng = np.random.default_rng(seed)
        self._opset = opset
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, np.ndarray] = {}

    def weight(self, name: str, *shape: int, scale: float = 0.3) -> str:
        return self.constant(name, (self._rng.standard_normal(shape) * scale).astype(np.float32))

    def constant(self, name: str, value: Any) -> str:
        self._weights[name] = np.asarray(value)
        return name

    def op(self, op: str, output: str, *inputs: str, outputs: Sequence[str] = (), **attrs: Any) -> str:
        self._nodes.append(helper.make_node(op, list(inputs), [output, *outputs], name=output, **attrs))
        return output

    def conv(self, output: str, x: str, shape: tuple[int, ...], *, bias: bool = True, **attrs: Any) -> str:
        inputs = [x, self.weight(f"{output}.w", *shape)]
        if bias:
            inputs.append(self.weight(f"{output}.b", shape[0]))
        attrs.setdefault("pads", [shape[-1] // 2] * 4)
        return self.op("Conv", output, *inputs, **attrs)

    def linear(self, output: str, x: str, n_in: int, n_out: int) -> str:
        product = self.op("MatMul", f"{output}.mm", x, self.weight(f"{output}.w", n_in, n_out))
        return self.op("Add", output, product, self.weight(f"{output}.b", n_out))

    def relu6(self, output: str, x: str) -> str:
        low, high = (self.constant(n, np.float32(v)) for n, v in (("zero", 0.0), ("six", 6.0)))
        return self.op("Clip", output, x, low, high)

    def proto(self, inputs: Mapping[str, Sequence[int | str]], outputs: Sequence[str]) -> onnx.ModelProto:
        graph = helper.make_graph(
            self._nodes,
            "net",
            [helper.make_tensor_value_info(k, TensorProto.FLOAT, list(v)) for k, v in inputs.items()],
            [helper.make_tensor_value_info(k, TensorProto.FLOAT, None) for k in outputs],
            [numpy_helper.from_array(v, k) for k, v in self._weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self._opset)], ir_version=10)
        model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        onnx.checker.check_model(model, full_check=True)
        return model


def conv_relu_conv() -> onnx.ModelProto:
    net = Net()
    x = net.op("Relu", "relu", net.conv("conv1", "x", (16, 3, 3, 3)))
    return net.proto({"x": [1, 3, 8, 8]}, [net.conv("conv2", x, (16, 16, 3, 3))])


def residual_block() -> onnx.ModelProto:
    net = Net()
    stem = net.op("Relu", "stem_relu", net.conv("stem", "x", (16, 3, 3, 3)))
    x = net.op("Relu", "relu1", net.conv("conv1", stem, (16, 16, 3, 3)))
    x = net.op("Add", "sum", net.conv("conv2", x, (16, 16, 3, 3)), stem)
    x = net.op("Relu", "relu2", x)
    x = net.op("Flatten", "flat", net.op("GlobalAveragePool", "pool", x))
    x = net.op("Gemm", "head", x, net.weight("head.w", 10, 16), net.weight("head.b", 10), transB=1)
    return net.proto({"x": [1, 3, 8, 8]}, [x])


def concat_block() -> onnx.ModelProto:
    net = Net()
    left = net.op("Relu", "left_relu", net.conv("left", "x", (16, 16, 1, 1)))
    right = net.op("Relu", "right_relu", net.conv("right", "x", (16, 16, 3, 3)))
    pooled = net.op("MaxPool", "pool", right, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    inner = net.op("Concat", "inner", left, pooled, axis=1)
    outer = net.op("Concat", "outer", inner, right, axis=1)
    return net.proto({"x": [1, 16, 8, 8]}, [net.conv("last", outer, (16, 48, 1, 1))])


def attention_block() -> onnx.ModelProto:
    net, tokens, width, heads = Net(), 8, 32, 2
    size = width // heads
    split = net.constant("split", np.array([0, tokens, heads, size], np.int64))
    q, k, v = (
        net.op(
            "Transpose",
            f"{n}_heads",
            net.op("Reshape", f"{n}_split", net.linear(n, "x", width, width), split),
            perm=[0, 2, 3, 1] if n == "k" else [0, 2, 1, 3],
        )
        for n in "qkv"
    )
    scores = net.op("Mul", "scaled", q, net.constant("factor", np.float32(size**-0.5)))
    p = net.op("Softmax", "softmax", net.op("MatMul", "qk", scores, k), axis=-1)
    y = net.op("Transpose", "merge", net.op("MatMul", "pv", p, v), perm=[0, 2, 1, 3])
    y = net.op("Reshape", "join", y, net.constant("joined", np.array([0, tokens, width], np.int64)))
    y = net.linear("proj", y, width, width)
    return net.proto({"x": [1, tokens, width]}, [net.op("Add", "sum", "x", y)])


def vector_attention() -> onnx.ModelProto:
    """Point Transformer: every channel of every pair has a weight, softmax over the neighbours."""
    net, width = Net(), 16
    two, one = (net.constant(f"axis{i}", np.array([i], np.int64)) for i in (2, 1))
    q = net.op("Unsqueeze", "q4", net.linear("q", "x", width, width), two)
    k = net.op("Unsqueeze", "k4", net.linear("k", "x", width, width), one)
    v = net.op("Unsqueeze", "v4", net.linear("v", "x", width, width), one)
    gamma = net.linear("gamma", net.op("Sub", "apart", q, k), width, width)
    p = net.op("Softmax", "p", gamma, axis=2)
    y = net.op("ReduceSum", "y", net.op("Mul", "pv", p, v), two, keepdims=0)
    return net.proto({"x": [1, 6, width]}, [net.linear("out", y, width, 4)])


def vit_mlp() -> onnx.ModelProto:
    net, width = Net(), 32
    scale, shift = net.constant("ln.w", np.ones(width, np.float32)), net.weight("ln.b", width)
    y = net.op("LayerNormalization", "ln", "x", scale, shift, axis=-1)
    y = net.op("Gelu", "gelu", net.linear("fc1", y, width, 64))
    return net.proto({"x": [1, 8, width]}, [net.op("Add", "sum", "x", net.linear("fc2", y, 64, width))])


def centred_mlp() -> onnx.ModelProto:
    """The same with a constant taken from the channels behind its activation."""
    net, width = Net(), 32
    y = net.op("Gelu", "gelu", net.linear("fc1", "x", width, 64))
    y = net.op("Sub", "centred", y, net.weight("middle", 64))
    return net.proto({"x": [1, 8, width]}, [net.op("Add", "sum", "x", net.linear("fc2", y, 64, width))])


def max_pool_net() -> onnx.ModelProto:
    net = Net()
    x = net.op("Transpose", "channels", "x", perm=[0, 2, 1])
    x = net.op("Relu", "relu1", net.conv("conv1", x, (16, 3, 1), pads=[0, 0]))
    x = net.op("Relu", "relu2", net.conv("conv2", x, (32, 16, 1), pads=[0, 0]))
    x = net.op("ReduceMax", "pool", x, net.constant("axes", np.array([2], np.int64)), keepdims=0)
    x = net.op("Gemm", "head", x, net.weight("head.w", 32, 10), net.weight("head.b", 10))
    return net.proto({"x": [1, 64, 3]}, [x])


def depthwise_block() -> onnx.ModelProto:
    net = Net()
    x = net.relu6("expand_act", net.conv("expand", "x", (32, 16, 1, 1)))
    x = net.relu6("depthwise_act", net.conv("depthwise", x, (32, 1, 3, 3), group=32))
    return net.proto(
        {"x": [1, 16, 8, 8]}, [net.op("Add", "sum", net.conv("project", x, (16, 32, 1, 1)), "x")]
    )


def silu(net: Net, output: str, x: str) -> str:
    return net.op("Mul", output, x, net.op("Sigmoid", f"{output}.sigmoid", x))


def csp_block() -> onnx.ModelProto:
    """Of a YOLO: half of the channels pass a block with a sum, and all meet in a Concat; then they are enlarged."""
    net = Net()
    stem = silu(net, "stem_act", net.conv("stem", "x", (16, 8, 3, 3)))
    net.op("Split", "kept", stem, outputs=["passed"], axis=1, num_outputs=2)
    x = silu(net, "inner_act", net.conv("inner", "passed", (8, 8, 3, 3)))
    x = net.op("Add", "sum", "passed", silu(net, "outer_act", net.conv("outer", x, (8, 8, 3, 3))))
    x = net.op("Concat", "joined", "kept", "passed", x, axis=1)
    x = silu(net, "merged_act", net.conv("merged", x, (16, 24, 1, 1)))
    sizes = net.constant("sizes", np.array([1, 16, 16, 16], np.int64))
    x = net.op("Resize", "larger", x, "", "", sizes, mode="nearest")
    return net.proto(
        {"x": [1, 8, 8, 8]}, [net.conv("last", net.op("Concat", "all", x, x, axis=1), (8, 32, 3, 3))]
    )


def squeezed_block() -> onnx.ModelProto:
    """Sums along a skip connection, with channels weighed by what is on their average."""
    net = Net()
    x = net.op("LeakyRelu", "stem_act", net.conv("stem", "x", (16, 8, 3, 3)), alpha=0.1)
    for i in (1, 2):
        y = net.conv(f"inner{i}", x, (16, 16, 3, 3))
        pooled = net.op("GlobalAveragePool", f"pool{i}", y)
        squeezed = net.op("Relu", f"squeeze_act{i}", net.conv(f"squeeze{i}", pooled, (4, 16, 1, 1)))
        weighed = net.op("Sigmoid", f"gate{i}", net.conv(f"excite{i}", squeezed, (16, 4, 1, 1)))
        y = net.op("Mul", f"weighed{i}", y, weighed)
        x = net.op("Relu", f"act{i}", net.op("Add", f"sum{i}", y, x))
    x = net.op("AveragePool", "smaller", x, kernel_shape=[2, 2], strides=[2, 2])
    return net.proto({"x": [1, 8, 8, 8]}, [net.conv("last", x, (8, 16, 1, 1))])


NETS = {
    "conv_relu_conv": conv_relu_conv,
    "residual_block": residual_block,
    "concat_block": concat_block,
    "attention_block": attention_block,
    "vit_mlp": vit_mlp,
    "centred_mlp": centred_mlp,
    "max_pool_net": max_pool_net,
    "depthwise_block": depthwise_block,
    "csp_block": csp_block,
    "squeezed_block": squeezed_block,
}


def graph_of(model: onnx.ModelProto, folder: Path) -> gs.Graph:
    return import_graph(model, folder)


def canonical(model: onnx.ModelProto, folder: Path) -> CanonicalModel:
    """``model``, which is in canonical form already, as a CanonicalModel in ``folder``."""
    path = folder / "model.onnx"
    onnx.save(model, str(path))
    graph = import_graph(model, folder)
    return CanonicalModel(
        path=path,
        graph=graph,
        source=path,
        source_bytes=path.stat().st_size,
        fingerprint="",
        opset=model.opset_import[0].version,
        inputs=tuple(
            InputSpec(name=t.name, dtype=np.dtype(np.float32), shape=tuple(t.shape)) for t in graph.inputs
        ),
        outputs=tuple(t.name for t in graph.outputs),
        user_names={},
    )


def planned(model: CanonicalModel, target: str, **request: Any) -> QuantPlan:
    return TARGETS[target](GraphIndex(model.graph), PlacementRequest(**request))


def random_samples(model: CanonicalModel, count: int, *, seed: int = 1) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        {
            spec.name: rng.standard_normal([d if isinstance(d, int) else 1 for d in spec.shape]).astype(
                np.float32
            )
            for spec in model.inputs
        }
        for _ in range(count)
    ]
