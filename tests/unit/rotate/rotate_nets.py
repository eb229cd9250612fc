"""Networks with residual streams, for the tests of ``onnxptq.rotate``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx

from tests.unit.small_nets import Net

TOKENS = 5


class Blocks(Net):
    """Adds the parts of transformers; all take and return names."""

    def ints(self, name: str, *values: int) -> str:
        return self.constant(name, np.array(values, np.int64))

    def norm(self, name: str, x: str, width: int, op: str = "LayerNormalization", **attrs: Any) -> str:
        scale = self.constant(f"{name}.g", (1 + 0.4 * self._rng.standard_normal(width)).astype(np.float32))
        parts = [scale] if op == "RMSNormalization" else [scale, self.weight(f"{name}.c", width)]
        return self.op(op, name, x, *parts, axis=-1, **attrs)

    def mlp(self, name: str, x: str, width: int, *, out: int | None = None) -> str:
        y = self.op("Gelu", f"{name}.act", self.linear(f"{name}.up", x, width, 2 * width))
        return self.linear(f"{name}.down", y, 2 * width, out or width)

    def fused_attention(self, name: str, x: str, width: int, heads: int, tokens: int = TOKENS) -> str:
        y = self.linear(f"{name}.qkv", x, width, 3 * width)
        size = width // heads
        y = self.op("Reshape", f"{name}.r", y, self.ints(f"{name}.s", 0, tokens, 3, heads, size))
        y = self.op("Transpose", f"{name}.t", y, perm=[2, 0, 3, 1, 4])
        parts = [f"{name}.{part}4" for part in "qkv"]
        self.op("Split", parts[0], y, outputs=parts[1:], axis=0, num_outputs=3)
        zero = self.ints(f"{name}.zero", 0)
        q, k, v = (
            self.op("Squeeze", f"{name}.{c}", part, zero) for c, part in zip("qkv", parts, strict=True)
        )
        return self._attend(
            name, q, self.op("Transpose", f"{name}.kt", k, perm=[0, 1, 3, 2]), v, width, tokens
        )

    def attention(self, name: str, x: str, width: int, heads: int, tokens: int = TOKENS) -> str:
        split = self.ints(f"{name}.split", 0, tokens, heads, width // heads)
        q, k, v = (
            self.op(
                "Transpose",
                f"{name}.{c}",
                self.op("Reshape", f"{name}.{c}r", self.linear(f"{name}.{c}l", x, width, width), split),
                perm=[0, 2, 3, 1] if c == "k" else [0, 2, 1, 3],
            )
            for c in "qkv"
        )
        factor = self.constant(f"{name}.factor", np.float32((width // heads) ** -0.5))
        return self._attend(name, self.op("Mul", f"{name}.scaled", q, factor), k, v, width, tokens)

    def _attend(self, name: str, q: str, k: str, v: str, width: int, tokens: int) -> str:
        p = self.op("Softmax", f"{name}.p", self.op("MatMul", f"{name}.qk", q, k), axis=-1)
        y = self.op("Transpose", f"{name}.back", self.op("MatMul", f"{name}.pv", p, v), perm=[0, 2, 1, 3])
        y = self.op("Reshape", f"{name}.join", y, self.ints(f"{name}.joined", 0, tokens, width))
        return self.linear(f"{name}.proj", y, width, width)


def add_block(net: Blocks, name: str, x: str, width: int, heads: int, *, fused: bool = True) -> str:
    """One pre-normalization transformer block."""
    attend = net.fused_attention if fused else net.attention
    tokens = TOKENS
    x = net.op(
        "Add", f"{name}.a", x, attend(f"{name}.att", net.norm(f"{name}.n1", x, width), width, heads, tokens)
    )
    return net.op("Add", f"{name}.b", x, net.mlp(f"{name}.mlp", net.norm(f"{name}.n2", x, width), width))


def transformer(*, fused: bool = True, width: int = 24, heads: int = 3, seed: int = 0) -> onnx.ModelProto:
    """A linear stem with positions and a class token, two blocks, a head that reads one token and the mean."""
    net = Blocks(seed=seed)
    x = net.linear("stem", "x", 7, width)
    x = net.op("Add", "placed", x, net.weight("position", 1, TOKENS - 1, width))
    x = net.op("Concat", "tokens", net.weight("class", 1, 1, width), x, axis=1)
    for i in range(2):
        x = add_block(net, f"block{i}", x, width, heads, fused=fused)
    x = net.norm("last", x, width)
    first = net.op("Gather", "first", x, net.constant("index", np.int64(0)), axis=1)
    mean = net.op("ReduceMean", "mean", x, net.ints("axes", 1), keepdims=0)
    both = net.op("Concat", "both", first, mean, axis=-1)
    y = net.op("Gemm", "logits", both, net.weight("head.w", 4, 2 * width), net.weight("head.b", 4), transB=1)
    return net.proto({"x": [1, TOKENS - 1, 7]}, [y])


def patches(*, width: int = 16) -> onnx.ModelProto:
    """Patches by Conv, channels to the back, one block, a head."""
    net = Blocks()
    x = net.conv("stem", "x", (width, 3, 2, 2), strides=[2, 2], pads=[0] * 4)
    x = net.op("Reshape", "flat", x, net.ints("shape", 0, width, -1))
    x = add_block(net, "block", net.op("Transpose", "channels", x, perm=[0, 2, 1]), width, 2)
    x = net.op("ReduceMean", "mean", net.norm("last", x, width), net.ints("axes", 1), keepdims=0)
    y = net.op("Gemm", "logits", x, net.weight("head.w", width, 4))
    return net.proto({"x": [1, 3, 2, 2 * TOKENS]}, [y])


def two_widths() -> onnx.ModelProto:
    """A stream of 16 channels whose neighbours are merged into one of 32, by a layer without bias."""
    net = Blocks()
    x = net.linear("stem", "x", 7, 16)
    x = net.op("Add", "a", x, net.mlp("mlp1", net.norm("n1", x, 16), 16))
    pairs = net.op("Reshape", "pairs", x, net.ints("shape", 0, 3, 32))
    y = net.op("MatMul", "merged", net.norm("n2", pairs, 32), net.weight("merge", 32, 32))
    y = net.op("Add", "b", y, net.mlp("mlp2", net.norm("n3", y, 32), 32))
    return net.proto({"x": [1, 6, 7]}, [net.linear("head", net.norm("n4", y, 32), 32, 4)])


def post_norm() -> onnx.ModelProto:
    """Normalization after the sum: its scale reaches the next sum, where no layer can take it up."""
    net = Blocks()
    x = net.linear("stem", "x", 7, 16)
    for i in range(2):
        x = net.norm(f"n{i}", net.op("Add", f"a{i}", x, net.mlp(f"mlp{i}", x, 16)), 16)
    return net.proto({"x": [1, 6, 7]}, [net.linear("head", x, 16, 4)])


def rms_norm() -> onnx.ModelProto:
    net = Blocks(opset=23)
    return _between_norms(net, lambda name, x: net.norm(name, x, 16, "RMSNormalization"))


def written_rms_norm(scale: str, last: str = "Identity") -> onnx.ModelProto:
    """RMS normalization in several nodes, with its scale ``"before"`` or ``"after"`` the division, or ``"none"``.

    ``last`` is an operator in front of the head.
    """
    net = Blocks(opset=20)

    def norm(name: str, x: str) -> str:
        factors = net.constant(
            f"{name}.g", (1 + 0.4 * np.random.default_rng(1).standard_normal(16)).astype("f4")
        )
        mean = net.op(
            "ReduceMean",
            f"{name}.mean",
            net.op("Mul", f"{name}.sq", x, x),
            net.ints(f"{name}.axes", -1),
        )
        shifted = net.op("Add", f"{name}.shifted", mean, net.constant(f"{name}.eps", np.float32(1e-3)))
        root = net.op("Sqrt", f"{name}.root", shifted)
        if scale == "before":
            return net.op("Div", name, net.op("Mul", f"{name}.scaled", x, factors), root)
        y = net.op("Div", f"{name}.divided", x, root)
        return net.op("Mul", name, y, factors) if scale == "after" else y

    return _between_norms(net, norm, last)


def _between_norms(net: Blocks, norm: Callable[[str, str], str], last: str = "Identity") -> onnx.ModelProto:
    x = net.linear("stem", "x", 7, 16)
    x = net.op("Add", "a", x, net.mlp("mlp", norm("n1", x), 16))
    y = net.op(last, "y", norm("n2", x))
    return net.proto({"x": [1, 6, 7]}, [net.linear("head", y, 16, 4)])


def embedding() -> onnx.ModelProto:
    """Rows of a table as tokens, and the same table as the last layer."""
    net = Blocks()
    table = net.weight("table", 11, 16)
    x = net.op("Gather", "embedded", table, net.constant("ids", np.array([[3, 1, 4, 1, 5]])), axis=0)
    x = net.op("Add", "start", x, net.linear("stem", "x", 7, 16))
    x = add_block(net, "block", x, 16, 2)
    y = net.op("Reshape", "rows", net.norm("last", x, 16), net.ints("shape", -1, 16))
    y = net.op("Gemm", "logits", y, table, transB=1)
    return net.proto({"x": [1, TOKENS, 7]}, [y])


def without_biases() -> onnx.ModelProto:
    """A stream that Gemms without bias read and write, all of which get one."""
    net = Blocks()
    x = net.op("Gemm", "stem", "x", net.weight("stem.w", 7, 16))
    x = net.op("Add", "a", x, net.op("Gemm", "mix", net.norm("n1", x, 16), net.weight("mix.w", 16, 16)))
    return net.proto(
        {"x": [6, 7]}, [net.op("Gemm", "head", net.norm("n2", x, 16), net.weight("head.w", 16, 4))]
    )


def one_stream(middle: str) -> onnx.ModelProto:
    """A stream with one more reader, writer or step, named by ``middle``; "none" is the plain one."""
    net, width = Blocks(), 16
    x = net.linear("stem", "x", width, width)
    outputs = []
    if middle == "relu":
        x = net.op("Relu", "relu", x)
    elif middle == "layer scale":
        x = net.op("Mul", "scaled", x, net.weight("gamma", width))
    elif middle == "input":
        x = net.op("Add", "with input", x, "x")
    elif middle == "output":
        outputs = ["stem"]
    elif middle == "shift":
        parts = net.op("Split", "left", x, outputs=["right"], axis=2, num_outputs=2)
        moved = net.op(
            "Slice", "later", "right", *(net.ints(n, v) for n, v in [("from", 1), ("to", 6), ("on", 1)])
        )
        kept = net.op(
            "Slice", "earlier", "right", *(net.ints(n, v) for n, v in [("f2", 0), ("t2", 1), ("o2", 1)])
        )
        rolled = net.op("Concat", "rolled", moved, kept, axis=1)
        x = net.op("Concat", "shifted", parts, rolled, axis=2)
    elif middle == "reversed":
        minus = (("s", -1), ("e", -100), ("a", 2), ("d", -1))
        x = net.op("Add", "mirrored", x, net.op("Slice", "back", x, *(net.ints(n, v) for n, v in minus)))
    elif middle == "number":
        x = net.op("Add", "plus", net.op("Mul", "times", x, net.constant("two", np.float32(2))),
                   net.constant("one", np.full((1, 1, 1), 1.5, np.float32)))  # fmt: skip
    elif middle == "gate":
        gate = net.op("Sigmoid", "gate", net.linear("gates", "x", width, 1))
        x = net.op("Add", "offset", net.op("Mul", "gated", x, gate), net.linear("level", "x", width, 1))
    elif middle == "registers":
        x = net.op("Concat", "more", x, net.weight("registers", 1, 3, width), axis=1)
    elif middle.startswith("neighbours"):
        # Of each token the one that comes next in the order of the first input channel.
        key = net.op("Slice", "key", "x", *(net.ints(n, v) for n, v in [("f3", 0), ("t3", 1), ("a3", 2)]))
        count = net.ints("six", 6)
        net.op("TopK", "sorted", key, count, outputs=["order"], axis=1)
        if middle == "neighbours":
            where = net.op("Expand", "where", "order", net.ints("wide", 1, 6, width))
            taken = net.op("GatherElements", "taken", x, where, axis=1)
        elif middle == "neighbours of each channel":
            net.op("TopK", "all sorted", "x", count, outputs=["orders"], axis=1)
            taken = net.op("GatherElements", "taken", x, "orders", axis=1)
        else:
            taken = net.op("GatherND", "taken", x, "order", batch_dims=1)
        x = net.op("Add", "with neighbours", x, taken)
    elif middle == "chosen channels":
        row = net.op("ReduceSum", "row", "x", net.ints("tokens", 0, 1), keepdims=0)
        net.op("TopK", "top", row, net.ints("all", width), outputs=["best"], axis=0)
        x = net.op("Gather", "chosen", x, "best", axis=2)
    y = net.op("Add", "sum", x, net.mlp("mlp", net.norm("n1", x, width), width))
    return net.proto({"x": [1, 6, width]}, [net.linear("head", net.norm("n2", y, width), width, 4), *outputs])
