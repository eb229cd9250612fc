"""Every operator rule: rescaling is exact, and channels are free wherever they can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.unit.equalize.equalize_helpers import assert_exact, canonical, free_classes
from tests.unit.graph.graph_helpers import build, feed_for, node

RNG = np.random.default_rng(5)


def w(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def i64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@dataclass(frozen=True)
class Case:
    """A graph from ``x`` to ``y`` and the number of free factors of some tensors; 0 means pinned."""

    nodes: list[onnx.NodeProto]
    free: Mapping[str, int]
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    shape: tuple[int, ...] = (2, 3, 6, 6)
    opset: int = 18


CONV_IN = node("Conv", "x w1 b1", "a", pads=[1, 1, 1, 1])
CONV_OUT = node("Conv", "z w2", "y")
CONVS = {"w1": w(4, 3, 3, 3), "b1": w(4), "w2": w(5, 4, 1, 1)}


def between(*nodes: onnx.NodeProto, free: Mapping[str, int], opset: int = 18, **weights: np.ndarray) -> Case:
    """Operators on the four channels of ``a`` that end in ``z``."""
    return Case([CONV_IN, *nodes, CONV_OUT], free, CONVS | weights, opset=opset)


LINEAR = {"w1": w(8, 12), "b1": w(12), "w2": w(12, 5), "b2": w(5)}


def tokens(*nodes: onnx.NodeProto, free: Mapping[str, int], opset: int = 18, **weights: np.ndarray) -> Case:
    """Operators on ``a``, [2, 7, 12], that end in ``z``, of the same width."""
    first = [node("MatMul", "x w1", "m"), node("Add", "m b1", "a")]
    last = [node("MatMul", "z w2", "n"), node("Add", "b2 n", "y")]
    return Case([*first, *nodes, *last], free, LINEAR | weights, shape=(2, 7, 8), opset=opset)


CASES: dict[str, Case] = {
    "relu": between(node("Relu", "a", "z"), free={"a": 4, "z": 4, "x": 0, "y": 0}),
    "leaky relu, prelu": between(
        node("LeakyRelu", "a", "b"), node("PRelu", "b s", "z"), free={"z": 4}, s=w(4, 1, 1)
    ),
    "clip at 0": between(node("Clip", "a low", "z"), free={"z": 4}, low=np.float32(0)),
    "clip at 6": between(
        node("Clip", "a low high", "z"), free={"a": 4, "z": 4}, low=np.float32(0), high=np.float32(6)
    ),
    "clip on both sides": between(
        node("Clip", "a low high", "z"), free={"a": 4, "z": 4}, low=np.float32(-40), high=np.float32(50)
    ),
    "clip above 0": between(
        node("Clip", "a low high", "z"), free={"a": 0, "z": 0}, low=np.float32(1), high=np.float32(6)
    ),
    "clip below 0": between(
        node("Clip", "a low high", "z"), free={"a": 0, "z": 0}, low=np.float32(-6), high=np.float32(-1)
    ),
    "clip at what is computed": between(
        node("ReduceMax", "x", "m", keepdims=0),
        node("Clip", "a low m", "z"),
        free={"a": 0, "z": 0},
        low=np.float32(0),
    ),
    "hard sigmoid and swish": between(
        node("HardSigmoid", "a", "b"), node("HardSwish", "b", "z"), free={"a": 0, "b": 0, "z": 0}
    ),
    "sigmoid": between(node("Sigmoid", "a", "z"), free={"a": 0, "z": 0}),
    "max pool": between(node("MaxPool", "a", "z", kernel_shape=[2, 2]), free={"z": 4}),
    "average pool": between(
        node("AveragePool", "a", "z", kernel_shape=[2, 2], pads=[1, 1, 1, 1]), free={"z": 4}
    ),
    "global pool": between(node("GlobalAveragePool", "a", "z"), free={"z": 4}),
    "reduce over space": between(node("ReduceMean", "a axes", "z"), free={"z": 4}, axes=i64(2, 3)),
    "reduce over channels": between(
        node("ReduceMax", "a axes", "m"), node("Add", "a m", "z"), free={"a": 1, "z": 1}, axes=i64(1)
    ),
    "residual sum": between(
        node("Conv", "a w3", "c"),
        node("Relu", "c", "d"),
        node("Add", "a d", "z"),
        free={"a": 4, "d": 4},
        w3=w(4, 4, 1, 1),
    ),
    "sum that broadcasts space": between(
        node("GlobalMaxPool", "a", "g"), node("Sub", "a g", "z"), free={"a": 4, "g": 4}
    ),
    "sum that broadcasts channels": between(
        node("Conv", "a w3", "c"), node("Add", "a c", "z"), free={"a": 1, "c": 1}, w3=w(1, 4, 1, 1)
    ),
    "constant vector added": between(node("Add", "k a", "z"), free={"z": 4}, k=w(4, 1, 1)),
    "constant picture added": between(node("Add", "a k", "z"), free={"z": 4}, k=w(1, 4, 6, 6)),
    "constant row added joins nothing": between(node("Add", "a k", "z"), free={"z": 1}, k=w(6)),
    "number added": between(node("Add", "a k", "z"), free={"a": 0}, k=np.float32(3)),
    "number multiplied": between(node("Mul", "a k", "z"), free={"z": 4}, k=np.float32(3)),
    "constant vector multiplied decouples": between(
        node("Relu", "a", "r"),
        node("Mul", "r k", "s"),
        node("Add", "s a", "z"),
        free={"r": 4, "s": 4},
        k=w(4, 1, 1),
    ),
    "divided by a constant vector": between(node("Div", "a k", "z"), free={"a": 4, "z": 4}, k=w(4, 1, 1) + 5),
    "gate": between(
        node("GlobalAveragePool", "a", "g"),
        node("Conv", "g w3", "h"),
        node("Sigmoid", "h", "q"),
        node("Mul", "q a", "z"),
        free={"a": 4, "z": 4, "h": 0, "q": 0},
        w3=w(4, 4, 1, 1),
    ),
    "product of two free activations": between(
        node("Conv", "a w3", "c"), node("Mul", "a c", "z"), free={"a": 0, "c": 0}, w3=w(4, 4, 1, 1)
    ),
    "square": between(node("Mul", "a a", "z"), free={"a": 0}),
    "divided by an activation": between(
        node("Sigmoid", "x", "q"),
        node("Conv", "q w3", "c"),
        node("Div", "a c", "z"),
        free={"a": 0},
        w3=w(4, 3, 1, 1),
    ),
    "maximum with a constant": between(node("Max", "a k", "z"), free={"z": 4}, k=w(4, 1, 1)),
    "where": between(
        node("Greater", "x t", "q0"),
        node("ReduceMax", "q1 axes", "q2", keepdims=1),
        node("Cast", "q2", "q", to=TensorProto.BOOL),
        node("Where", "q a k", "z"),
        node("Cast", "q0", "q1", to=TensorProto.FLOAT),
        free={"a": 4, "z": 4},
        t=np.float32(0),
        k=w(4, 1, 1),
        axes=i64(1),
    ),
    "depthwise": between(
        node("Conv", "a w3", "z", group=4, pads=[1, 1, 1, 1]), free={"a": 4, "z": 4}, w3=w(4, 1, 3, 3)
    ),
    "depthwise with multiplier": Case(
        [CONV_IN, node("Conv", "a w3 b3", "z", group=4), node("Conv", "z w2", "y")],
        {"a": 4, "z": 8},
        CONVS | {"w3": w(8, 1, 3, 3), "b3": w(8), "w2": w(5, 8, 1, 1)},
    ),
    "groups": between(node("Conv", "a w3", "z", group=2), free={"a": 4, "z": 4}, w3=w(4, 2, 1, 1)),
    "transposed": between(
        node("ConvTranspose", "a w3 b3", "z", strides=[2, 2]),
        free={"a": 4, "z": 4},
        w3=w(4, 4, 2, 2),
        b3=w(4),
    ),
    "transposed with groups": Case(
        [CONV_IN, node("ConvTranspose", "a w3", "z", group=2), node("Conv", "z w2", "y")],
        {"a": 4, "z": 6},
        CONVS | {"w3": w(4, 3, 2, 2), "w2": w(5, 6, 1, 1)},
    ),
    "batch norm": between(
        node("BatchNormalization", "a s b m v", "z"),
        free={"a": 4, "z": 4},
        s=w(4),
        b=w(4),
        m=w(4),
        v=np.abs(w(4)) + 1,
    ),
    "instance norm": between(
        node("InstanceNormalization", "a s b", "z"), free={"a": 0, "z": 4}, s=w(4), b=w(4)
    ),
    "group norm": between(
        node("GroupNormalization", "a s b", "z", num_groups=2),
        free={"a": 0, "z": 4},
        s=w(4),
        b=w(4),
        opset=21,
    ),
    "resize": between(
        node("Resize", "a _ k", "z", mode="linear"), free={"z": 4}, k=np.array([1, 1, 2, 2], np.float32)
    ),
    "pad space": between(node("Pad", "a p", "z"), free={"z": 4}, p=i64(0, 0, 1, 0, 0, 0, 2, 1)),
    "pad space by reflection": between(
        node("Pad", "a p", "z", mode="reflect"), free={"z": 4}, p=i64(0, 0, 1, 0, 0, 0, 2, 1)
    ),
    "pad with ones": between(
        node("Pad", "a p one", "z"), free={"a": 0}, p=i64(0, 0, 1, 0, 0, 0, 2, 1), one=np.float32(1)
    ),
    "pad channels with zeros": Case(
        [CONV_IN, node("Pad", "a p", "z"), node("Conv", "z w2", "y")],
        {"a": 4, "z": 7},
        CONVS | {"p": i64(0, 1, 0, 0, 0, 2, 0, 0), "w2": w(5, 7, 1, 1)},
    ),
    "concat": Case(
        [CONV_IN, node("Relu", "a", "r"), node("Concat", "r x a", "z", axis=1), node("Conv", "z w2", "y")],
        {"a": 4, "z": 4, "x": 0},
        CONVS | {"w2": w(5, 11, 1, 1)},
    ),
    "concat of a constant": Case(
        [CONV_IN, node("Concat", "a k", "z", axis=1), node("Conv", "z w2", "y")],
        {"a": 4, "z": 6},
        CONVS | {"k": w(2, 2, 6, 6), "w2": w(5, 6, 1, 1)},
    ),
    "split, halves swapped": between(
        node("Split", "a sizes", "h1 h2", axis=1),
        node("Concat", "h2 h1", "z", axis=1),
        free={"h1": 1, "h2": 3, "z": 4},
        sizes=i64(1, 3),
    ),
    "slice with a step": between(
        node("Slice", "a s e ax st", "h"),
        node("Concat", "h h", "z", axis=1),
        free={"h": 2, "z": 2, "a": 4},
        s=i64(3),
        e=i64(-9),
        ax=i64(1),
        st=i64(-2),
    ),
    "gather of channels": between(node("Gather", "a i", "z", axis=1), free={"z": 3}, i=i64(2, 0, -1, 2)),
    "gather of elements in space": between(
        node("GatherElements", "a i", "z", axis=2),
        free={"a": 4, "z": 4},
        i=RNG.integers(-6, 6, (2, 4, 3, 6)),
    ),
    "gather of elements among channels": between(
        node("GatherElements", "a i", "z", axis=1), free={"a": 1, "z": 1}, i=RNG.integers(0, 4, (2, 4, 6, 6))
    ),
    "gather of rows by position": tokens(
        node("GatherND", "a i", "z", batch_dims=1), free={"a": 12, "z": 12}, i=RNG.integers(0, 7, (2, 5, 1))
    ),
    "gather of rows by sample and position": tokens(
        node("GatherND", "a i", "z"), free={"a": 12, "z": 12}, i=RNG.integers(0, 2, (2, 3, 4, 2))
    ),
    "channel shuffle": between(
        node("Reshape", "a s1", "r1"),
        node("Transpose", "r1", "r2", perm=[0, 2, 1, 3, 4]),
        node("Reshape", "r2 s2", "z"),
        free={"z": 4},
        s1=i64(2, 2, 2, 6, 6),
        s2=i64(0, 4, 6, 6),
    ),
    "depth to space": Case(
        [CONV_IN, node("DepthToSpace", "a", "z", blocksize=2), node("Conv", "z w2", "y")],
        {"a": 1, "z": 1},
        CONVS | {"w2": w(5, 1, 1, 1)},
    ),
    "depth to space, columns first": Case(
        [
            node("Conv", "x w1 b1", "a"),
            node("DepthToSpace", "a", "z", blocksize=2, mode="CRD"),
            node("Conv", "z w2", "y"),
        ],
        {"a": 2, "z": 2},
        {"w1": w(8, 3, 1, 1), "b1": w(8), "w2": w(5, 2, 1, 1)},
    ),
    "space to depth": Case(
        [CONV_IN, node("SpaceToDepth", "a", "z", blocksize=2), node("Conv", "z w2", "y")],
        {"a": 4, "z": 4},
        CONVS | {"w2": w(5, 16, 1, 1)},
    ),
    "flatten into gemm": Case(
        [CONV_IN, node("Flatten", "a", "z"), node("Gemm", "z w2 b2", "y", transB=1)],
        {"a": 4, "z": 4},
        CONVS | {"w2": w(5, 144), "b2": w(5)},
    ),
    "two gemms": Case(
        [
            node("Gemm", "x w1 b1", "a", alpha=0.5, beta=2.0),
            node("Relu", "a", "z"),
            node("Gemm", "z w2", "y", transB=1),
        ],
        {"a": 6, "z": 6},
        {"w1": w(8, 6), "b1": w(1, 6), "w2": w(5, 6)},
        shape=(3, 8),
    ),
    "constant on the left": Case(
        [node("MatMul", "w1 x", "a"), node("Relu", "a", "z"), node("MatMul", "w2 z", "y")],
        {"a": 6, "z": 6},
        {"w1": w(6, 3), "w2": w(5, 6)},
        shape=(2, 3, 7),
    ),
    "one matrix per head": Case(
        [node("MatMul", "x w1", "a"), node("MatMul", "a w2", "y")],
        {"a": 12},
        {"w1": w(3, 7, 4), "w2": w(3, 4, 5)},
        shape=(2, 3, 6, 7),
    ),
    "layer norm": tokens(
        node("LayerNormalization", "a g b", "z", axis=-1), free={"a": 0, "z": 12}, g=w(12), b=w(12)
    ),
    "layer norm over two axes": tokens(
        node("LayerNormalization", "a g b", "z", axis=1), free={"z": 0}, g=w(7, 12), b=w(7, 12)
    ),
    "positions added": tokens(node("Add", "a k", "z"), free={"z": 12}, k=w(1, 7, 12)),
    "class token in front": Case(
        [
            node("MatMul", "x w1", "a"),
            node("Expand", "k s", "cls"),
            node("Concat", "cls a", "b", axis=1),
            node("Gather", "b first", "z", axis=1),
            node("MatMul", "b w2", "n"),
            node("MatMul", "z w2", "y0"),
            node("Gather", "n first", "y1", axis=1),
            node("Add", "y0 y1", "y"),
        ],
        {"a": 12, "b": 12, "z": 12, "n": 0},
        {"w1": w(8, 12), "w2": w(12, 5), "k": w(1, 1, 12), "s": i64(2, 1, 1), "first": np.array(0, np.int64)},
        shape=(2, 7, 8),
    ),
    "probabilities times values with a class token": Case(
        [
            node("MatMul", "x w1", "a"),
            node("Expand", "k s", "cls"),
            node("Concat", "cls a", "v", axis=1),
            node("MatMul", "x w3", "l"),
            node("Softmax", "l", "p"),
            node("MatMul", "p v", "z"),
            node("MatMul", "z w2", "y"),
        ],
        {"v": 12, "z": 12, "p": 0},
        {"w1": w(8, 12), "w2": w(12, 5), "w3": w(8, 8), "k": w(1, 1, 12), "s": i64(2, 1, 1)},
        shape=(2, 7, 8),
    ),
    "gated mlp": tokens(
        node("MatMul", "x w3", "u"),
        node("Sigmoid", "u", "q"),
        node("Mul", "a q", "z"),
        free={"a": 12, "z": 12, "u": 0},
        w3=w(8, 12),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rescaling_is_exact_and_channels_are_free(case: Case, tmp_path: Path) -> None:
    model = build(case.nodes, {"x": case.shape}, ["y"], case.weights, opset=case.opset)
    model = onnx.shape_inference.infer_shapes(_sorted(model))
    if "GroupNormalization" in {
        n.op_type for n in case.nodes
    }:  # whose output type shape inference leaves open
        model.graph.value_info.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 4, 6, 6]))
    trace = assert_exact(canonical(model, tmp_path), feed_for(model))
    assert {name: free_classes(trace, name) for name in case.free} == dict(case.free)


def _sorted(model: onnx.ModelProto) -> onnx.ModelProto:
    """Nodes in execution order, so that cases may list them in the order that reads best."""
    known = {t.name for t in (*model.graph.input, *model.graph.initializer)} | {""}
    rest, done = list(model.graph.node), []
    while rest:
        ready = next(n for n in rest if all(name in known for name in n.input))
        rest.remove(ready)
        done.append(ready)
        known |= set(ready.output)
    del model.graph.node[:]
    model.graph.node.extend(done)
    return model


def attention(fused: bool) -> tuple[list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Self-attention of 2 heads of width 4 on [2, 5, 8]; q, k, v from one product or from three."""
    weights: dict[str, np.ndarray] = {"wo": w(8, 8), "back": i64(0, 0, 8), "s": np.float32(0.5)}
    if fused:
        weights |= {"wqkv": w(8, 24), "bqkv": w(24), "heads": i64(0, 0, 3, 2, 4), "one": i64(0)}
        weights |= {f"i{n}": np.array(n, np.int64) for n in range(3)}
        nodes = [
            node("MatMul", "x wqkv", "qkv0"),
            node("Add", "qkv0 bqkv", "qkv1"),
            node("Reshape", "qkv1 heads", "qkv2"),
            node("Transpose", "qkv2", "qkv", perm=[2, 0, 3, 1, 4]),
            node("Gather", "qkv i0", "q"),
            node("Gather", "qkv i1", "k0"),
            node("Gather", "qkv i2", "v"),
        ]
    else:
        weights |= {"wq": w(8, 8), "wk": w(8, 8), "wv": w(8, 8), "heads": i64(0, 0, 2, 4)}
        nodes = []
        for name, target in (("q", "q"), ("k", "k0"), ("v", "v")):
            nodes += [
                node("MatMul", f"x w{name}", f"{name}p"),
                node("Reshape", f"{name}p heads", f"{name}r"),
                node("Transpose", f"{name}r", target, perm=[0, 2, 1, 3]),
            ]
    nodes += [
        node("Transpose", "k0", "k", perm=[0, 1, 3, 2]),
        node("MatMul", "q k", "l0"),
        node("Mul", "l0 s", "l"),
        node("Softmax", "l", "p"),
        node("MatMul", "p v", "c0"),
        node("Transpose", "c0", "c1", perm=[0, 2, 1, 3]),
        node("Reshape", "c1 back", "c"),
        node("MatMul", "c wo", "y"),
    ]
    return nodes, weights


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_attention(fused: bool, tmp_path: Path) -> None:
    nodes, weights = attention(fused)
    model = build(nodes, {"x": (2, 5, 8)}, ["y"], weights)
    trace = assert_exact(canonical(model, tmp_path), feed_for(model))
    # Values have a factor per head and channel; queries and keys one each, with keys the inverse of queries.
    assert [free_classes(trace, name) for name in ("v", "c", "q", "k", "l0", "p")] == [8, 8, 8, 8, 0, 0]
    q, k = (trace.classes.roots(trace.labels[name]) for name in ("q", "k"))
    np.testing.assert_array_equal(q, k.swapaxes(-1, -2) ^ 1)


def test_keys_that_are_also_queries_are_pinned(tmp_path: Path) -> None:
    """With s = 1 / s only s = 1 is left."""
    nodes = [
        node("MatMul", "x w1", "a"),
        node("Transpose", "a", "t", perm=[0, 2, 1]),
        node("MatMul", "a t", "y"),
    ]
    model = build(nodes, {"x": (2, 5, 8)}, ["y"], {"w1": w(8, 6)})
    trace = assert_exact(canonical(model, tmp_path), feed_for(model))
    assert free_classes(trace, "a") == 0
    assert "inverse" in trace.classes.reason(int(trace.classes.roots(trace.labels["a"]).reshape(-1)[0]))


def test_a_weight_read_twice_is_copied(tmp_path: Path) -> None:
    nodes = [node("Conv", "x k", "a"), node("Relu", "a", "b"), node("Conv", "b k", "y")]
    model = build(nodes, {"x": (1, 3, 4, 4)}, ["y"], {"k": w(3, 3, 1, 1)})
    trace = assert_exact(canonical(model, tmp_path), feed_for(model))
    assert free_classes(trace, "a") == 3


def test_tensors_of_nested_graphs_are_pinned(tmp_path: Path) -> None:
    inner = helper.make_graph(
        [node("Neg", "a", "inner")],
        "then",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [node("Mul", "a k", "inner2")],
        "else",
        [],
        [helper.make_tensor_value_info("inner2", TensorProto.FLOAT, None)],
    )
    nodes = [
        node("Conv", "x w1", "a"),
        node("Conv", "a k", "b"),
        helper.make_node("If", ["c"], ["d"], name="if", then_branch=inner, else_branch=other),
        node("Conv", "b w2", "e"),
        node("Add", "d e", "y"),
    ]
    weights = {"w1": w(4, 3, 1, 1), "k": w(4, 4, 1, 1), "w2": w(4, 4, 1, 1), "c": np.array(False)}
    model = build(nodes, {"x": (1, 3, 4, 4)}, ["y"], weights)
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model)
    trace = assert_exact(canonical(model, tmp_path), feed_for(model))
    assert (free_classes(trace, "a"), free_classes(trace, "b")) == (0, 4)


def test_shapes_that_depend_on_the_input_are_followed(tmp_path: Path) -> None:
    """Slice bounds and reshape targets computed from Shape: as exporters write them for dynamic axes."""
    nodes = [
        node("Conv", "x w1", "a"),
        node("Shape", "a", "s"),
        node("Gather", "s one", "c"),
        node("Div", "c two", "half"),
        node("Slice", "a zero half one", "z"),
        node("Conv", "z w2", "y"),
    ]
    weights = {"w1": w(4, 3, 1, 1), "w2": w(5, 2, 1, 1), "one": i64(1), "two": i64(2), "zero": i64(0)}
    model = build(nodes, {"x": ("n", 3, "h", "h")}, ["y"], weights)
    trace = assert_exact(canonical(model, tmp_path), feed_for(model))
    assert free_classes(trace, "z") == 2


def test_custom_operators_pin(tmp_path: Path) -> None:
    nodes = [
        node("Conv", "x w1", "a"),
        helper.make_node("Gelu", ["a"], ["z"], name="gelu", domain="com.microsoft"),
        node("Conv", "z w2", "y"),
    ]
    weights = {"w1": w(4, 3, 1, 1), "w2": w(5, 4, 1, 1)}
    model = build(nodes, {"x": (1, 3, 4, 4)}, ["y"], weights, extra_domains={"com.microsoft": 1})
    trace = assert_exact(canonical(model, tmp_path), feed_for(model))
    assert free_classes(trace, "a") == 0


def shared_weight(*middle: onnx.NodeProto) -> onnx.ModelProto:
    """Two layers of one weight ``s`` between layers of weights of their own."""
    nodes = [node("MatMul", "x w1", "a"), node("MatMul", "a s", "b"), *middle, node("MatMul", "d w2", "y")]
    return build(nodes, {"x": [2, 8]}, ["y"], {"w1": w(8, 64), "s": w(64, 64), "w2": w(64, 5)})


def test_a_weight_of_two_layers_stays_one(tmp_path: Path) -> None:
    model = shared_weight(node("Relu", "b", "c"), node("MatMul", "c s", "d"))
    trace = assert_exact(canonical(model, tmp_path), feed_for(model), seed=1)
    # Both layers read it, so what they read and write shares its factors, channel by channel.
    assert [free_classes(trace, name) for name in "abcd"] == [64, 64, 64, 64]
    assert (trace.classes.roots(trace.labels["a"]) == trace.classes.roots(trace.labels["d"])).all()
    rescaled = onnx.load(tmp_path / "rescaled.onnx")
    assert sorted(tensor.name for tensor in rescaled.graph.initializer) == ["s", "w1", "w2"]


def test_a_weight_that_something_else_reads_as_well_stays(tmp_path: Path) -> None:
    model = shared_weight(node("Exp", "s", "t"), node("MatMul", "b t", "d"))
    trace = assert_exact(canonical(model, tmp_path), feed_for(model), seed=1)
    assert [free_classes(trace, name) for name in "abd"] == [0, 0, 0]
    rescaled = onnx.load(tmp_path / "rescaled.onnx")
    assert sorted(tensor.name for tensor in rescaled.graph.initializer) == ["s", "w1", "w2"]
