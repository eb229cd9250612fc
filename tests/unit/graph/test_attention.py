"""Attention, layers behind normalizations and Gelu outputs, in every form that graphs show them in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.graph.attention import find_attention, find_gelus, find_mixed_weights, find_post_norms
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.passes import root_softmax
from onnxptq.graph.surgeon import import_graph
from onnxptq.inspection import inspect
from tests.unit.rotate.rotate_nets import TOKENS, Blocks, transformer, written_rms_norm
from tests.unit.small_nets import vector_attention

WIDTH = 8


def _index(proto: onnx.ModelProto, folder: Path) -> GraphIndex:
    return GraphIndex(import_graph(proto, folder))


def _attend(net: Blocks, weights: str, *, values: str = "v") -> str:
    return net.op("MatMul", "pv", weights, net.linear(values, "x", WIDTH, WIDTH))


def _scores(net: Blocks) -> str:
    q, k = net.linear("q", "x", WIDTH, WIDTH), net.linear("k", "x", WIDTH, WIDTH)
    return net.op("MatMul", "qk", q, net.op("Transpose", "kt", k, perm=[0, 2, 1]))


def _built(build: Callable[[Blocks], str], *, opset: int = 21) -> onnx.ModelProto:
    net = Blocks(opset=opset)
    return net.proto({"x": [1, TOKENS, WIDTH]}, [build(net)])


def _plain(net: Blocks) -> str:
    return _attend(net, net.op("Softmax", "p", _scores(net), axis=-1))


def _windowed(net: Blocks) -> str:
    """As in Swin: a position bias, then a mask per window between two Reshapes, then dropout."""
    biased = net.op("Add", "biased", _scores(net), net.weight("bias", 1, TOKENS, TOKENS))
    split = net.op("Reshape", "split", biased, net.ints("s4", 1, -1, TOKENS, TOKENS))
    masked = net.op("Add", "masked", split, net.weight("mask", 1, 1, TOKENS, TOKENS))
    joined = net.op("Reshape", "joined", masked, net.ints("s3", -1, TOKENS, TOKENS))
    p = net.op("Softmax", "p", joined, axis=-1)
    return _attend(net, net.op("Dropout", "dropped", p))


def _hidden(net: Blocks) -> str:
    """Scores replaced where they are masked, and rows of nothing but masked scores set to 0 afterwards."""
    seen = net.constant("seen", np.tri(TOKENS, dtype=bool))
    scaled = net.op("Mul", "scaled", _scores(net), net.constant("factor", np.float32(0.3)))
    hidden = net.op("Where", "hidden", seen, scaled, net.constant("low", np.float32(-np.inf)))
    p = net.op("Softmax", "p", hidden, axis=-1)
    return _attend(
        net, net.op("Where", "safe", net.op("IsNaN", "nan", p), net.constant("zero", np.float32(0)), p)
    )


def _capped(net: Blocks) -> str:
    cap = net.constant("cap", np.float32(30))
    bounded = net.op("Tanh", "tanh", net.op("Div", "over", _scores(net), cap))
    return _attend(net, net.op("Softmax", "p", net.op("Mul", "times", bounded, cap), axis=-1))


def _written_out(net: Blocks) -> str:
    """A softmax of four nodes."""
    scores, last = _scores(net), net.ints("last", -1)
    top = net.op("ReduceMax", "top", scores, last)
    e = net.op("Exp", "e", net.op("Sub", "shifted", scores, top))
    return _attend(net, net.op("Div", "p", e, net.op("ReduceSum", "sum", e, last)))


def _renormalized(net: Blocks) -> str:
    """As in point cloud transformers: divided by sums along the other axis, and read from the right."""
    p = net.op("Softmax", "p", _scores(net), axis=-1)
    sums = net.op("ReduceSum", "sums", p, net.ints("axis", 1))
    q = net.op("Div", "divided", p, net.op("Add", "safe", sums, net.constant("eps", np.float32(1e-9))))
    v = net.op("Transpose", "vt", net.linear("v", "x", WIDTH, WIDTH), perm=[0, 2, 1])
    return net.op("MatMul", "pv", v, q)


def _remasked(net: Blocks) -> str:
    """Weights times a mask, over their sum: the sum is no attention of its own."""
    p = net.op("Softmax", "p", _scores(net), axis=-1)
    keep = net.op("Sigmoid", "keep", net.linear("gate", "x", WIDTH, TOKENS))
    kept = net.op("Mul", "kept", p, keep)
    return _attend(net, net.op("Div", "divided", kept, net.op("ReduceSum", "sum", kept, net.ints("a", -1))))


def _cross(net: Blocks) -> str:
    q, k = net.linear("q", "x", WIDTH, WIDTH), net.linear("k", "memory", WIDTH, WIDTH)
    scores = net.op("MatMul", "qk", q, net.op("Transpose", "kt", k, perm=[0, 2, 1]))
    p = net.op("Softmax", "p", scores, axis=-1)
    return net.op("MatMul", "pv", p, net.linear("v", "memory", WIDTH, WIDTH))


PRODUCTS = {
    "plain": (_plain, "p", False),
    "windowed": (_windowed, "dropped", True),
    "hidden": (_hidden, "safe", True),
    "capped": (_capped, "p", False),
    "written out": (_written_out, "p", False),
    "renormalized": (_renormalized, "divided", False),
    "remasked": (_remasked, "divided", False),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_softmax_weights_and_values(name: str, tmp_path: Path) -> None:
    build, weights, is_masked = PRODUCTS[name]
    index = _index(_built(build), tmp_path)
    (found,) = find_attention(index)
    assert (found.form, found.softmax.name, found.product.name) == ("product", "p", "pv")
    assert found.weights == weights == found.product.inputs[found.weights_index].name
    assert found.values == ("vt" if name == "renormalized" else "v")
    assert [node.name for node in found.scores] == ["qk"]
    assert found.is_masked == is_masked


def test_keys_and_values_of_other_tokens(tmp_path: Path) -> None:
    net = Blocks()
    y = _cross(net)
    (found,) = find_attention(_index(net.proto({"x": [1, 3, WIDTH], "memory": [1, 5, WIDTH]}, [y]), tmp_path))
    assert (found.weights, found.values, [n.name for n in found.scores]) == ("p", "v", ["qk"])


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "separate"])
def test_projections_fused_or_separate(fused: bool, tmp_path: Path) -> None:
    index = _index(transformer(fused=fused), tmp_path)
    found = find_attention(index)
    assert [a.weights for a in found] == ["block0.att.p", "block1.att.p"]
    assert [a.values for a in found] == [f"block{i}.att.v" for i in (0, 1)]
    assert [n.name for a in found for n in a.scores] == ["block0.att.qk", "block1.att.qk"]


def test_two_terms_of_scores(tmp_path: Path) -> None:
    """Content and position, each a product of activations."""

    def build(net: Blocks) -> str:
        r = net.linear("r", "x", WIDTH, WIDTH)
        content = _scores(net)
        position = net.op("MatMul", "qr", "q", net.op("Transpose", "rt", r, perm=[0, 2, 1]))
        return _attend(net, net.op("Softmax", "p", net.op("Add", "both", content, position), axis=-1))

    (found,) = find_attention(_index(_built(build), tmp_path))
    assert [node.name for node in found.scores] == ["qk", "qr"]


def test_every_channel_with_weights_of_its_own(tmp_path: Path) -> None:
    """Vector attention: gamma(q - k + delta) goes through layers, and the weights times v + delta are summed."""
    (found,) = find_attention(_index(vector_attention(), tmp_path))
    assert (found.form, found.product.name, found.weights, found.values) == (
        "weighted sum",
        "pv",
        "p",
        "v4",
    )
    assert found.scores == ()


def test_an_attention_node_is_its_own_product(tmp_path: Path) -> None:
    net = Blocks(opset=23)
    q, k, v = (net.linear(name, "x", WIDTH, WIDTH) for name in "qkv")
    mask = net.constant("mask", np.zeros((TOKENS, TOKENS), np.float32))
    y = net.op("Attention", "att", q, k, v, mask, q_num_heads=2, kv_num_heads=2)
    (found,) = find_attention(_index(net.proto({"x": [1, TOKENS, WIDTH]}, [y]), tmp_path))
    assert (found.form, found.product.name, found.values, found.is_masked) == ("operator", "att", "v", True)


def test_other_softmaxes_are_none(tmp_path: Path) -> None:
    """Class probabilities, and what a layer reads beside something else."""
    net = Blocks()
    p = net.op("Softmax", "p", net.linear("a", "x", WIDTH, WIDTH), axis=-1)
    mean = net.op("MatMul", "mean", net.op("Concat", "c", p, "x", axis=-1), net.weight("w", 2 * WIDTH, 1))
    classes = net.op("Softmax", "classes", net.linear("b", "x", WIDTH, 4), axis=-1)
    scaled = net.op("Mul", "scaled", classes, net.constant("two", np.float32(2)))
    total = net.op("ReduceSum", "total", scaled, net.ints("axis", -1))
    assert find_attention(_index(net.proto({"x": [1, TOKENS, WIDTH]}, [mean, total]), tmp_path)) == ()


def _by_more_than_the_sum(net: Blocks, extra: str) -> str:
    e = net.op("Exp", "e", _scores(net))
    s = net.op("ReduceSum", "s", e, net.ints("axis", -1))
    more = net.op("Exp", "sink", net.linear("z", "x", WIDTH, 1)) if extra == "sink" else "more"
    if extra != "sink":
        net.constant("more", np.float32({"eps": 1e-6, "one": 1, "bound": 0.1, "negative": -1}[extra]))
    return _attend(net, net.op("Div", "p", e, net.op("Max" if extra == "bound" else "Add", "t", more, s)))


@pytest.mark.parametrize(
    ("extra", "count"), [("eps", 1), ("one", 1), ("sink", 1), ("bound", 1), ("negative", 0)]
)
def test_exponentials_over_more_than_their_sum(extra: str, count: int, tmp_path: Path) -> None:
    index = _index(_built(lambda net: _by_more_than_the_sum(net, extra)), tmp_path)
    found = find_attention(index)
    assert [(a.form, a.softmax.name, a.product.name) for a in found] == count * [("product", "p", "pv")]
    reasons = [root_softmax.declined(index, a) for a in found]
    assert reasons == count * [
        "its weights are exponentials over more than their sum, which have no such root"
    ]


def _expectation(net: Blocks, op: str) -> str:
    p = net.op("Softmax", "p", net.linear("a", "x", WIDTH, WIDTH), axis=1 if op in ("Conv", "left") else -1)
    if op == "Gemm":
        rows = net.op("Reshape", "rows", p, net.ints("flat", -1, WIDTH))
        return net.op("Gemm", "y", rows, net.weight("w", 3, WIDTH), transB=1)
    if op == "left":
        return net.op("MatMul", "y", net.weight("w", 3, TOKENS), p)
    if op == "Conv":
        return net.op("Conv", "y", p, net.weight("w", 3, TOKENS, 1))
    return net.op("MatMul", "y", p, net.weight("w", WIDTH, 3))


@pytest.mark.parametrize("op", ["MatMul", "left", "Gemm", "Conv"])
def test_a_layer_that_reads_softmax_weights(op: str, tmp_path: Path) -> None:
    """As where a detector takes the mean of distances."""
    index = _index(_built(lambda net: _expectation(net, op)), tmp_path)
    (found,) = find_attention(index)
    assert (found.form, found.softmax.name, found.product.name, found.values) == ("layer", "p", "y", "w")
    assert found.weights_index == (1 if op == "left" else 0)
    assert find_mixed_weights(index) == ()


@pytest.mark.parametrize(("kernel", "group"), [(3, 1), (1, TOKENS)])
def test_other_convolutions_are_no_such_layer(kernel: int, group: int, tmp_path: Path) -> None:
    def build(net: Blocks) -> str:
        p = net.op("Softmax", "p", net.linear("a", "x", WIDTH, WIDTH), axis=1)
        return net.op("Conv", "y", p, net.weight("w", TOKENS, TOKENS // group, kernel), group=group)

    assert find_attention(_index(_built(build), tmp_path)) == ()


def _difference(net: Blocks) -> str:
    first = net.op("Softmax", "p", _scores(net), axis=-1)
    other = net.op("Softmax", "o", net.linear("more", "x", WIDTH, TOKENS), axis=-1)
    scaled = net.op("Mul", "scaled", other, net.constant("share", np.float32(0.3)))
    return _attend(net, net.op("Sub", "difference", first, scaled))


def _talking_heads(net: Blocks) -> str:
    """Weights of two heads, mixed along the axis of the heads."""
    heads = net.op(
        "Reshape", "heads", net.linear("q", "x", WIDTH, 2 * TOKENS), net.ints("s4", 1, TOKENS, 2, -1)
    )
    p = net.op("Softmax", "p", heads, axis=-1)
    back = net.op("Transpose", "back", p, perm=[0, 1, 3, 2])
    mixed = net.op("MatMul", "mixed", back, net.weight("mix", 2, 2))
    return _attend(net, net.op("Transpose", "forth", mixed, perm=[0, 3, 1, 2]))


@pytest.mark.parametrize(("build", "names"), [(_difference, ["p", "o"]), (_talking_heads, ["p"])])
def test_mixed_weights_are_told(build: Callable[[Blocks], str], names: list[str], tmp_path: Path) -> None:
    index = _index(_built(build), tmp_path)
    found = find_mixed_weights(index)
    assert [(entry.softmax.name, entry.product.name) for entry in found] == [(name, "pv") for name in names]
    assert "p: its softmax weights are mixed with others before pv applies them" in found[0].note
    onnx.save(_built(build), str(tmp_path / "model.onnx"))
    assert found[0].note in inspect(tmp_path / "model.onnx").notes


def test_attention_that_is_found_is_not_told_as_mixed(tmp_path: Path) -> None:
    assert find_mixed_weights(_index(transformer(), tmp_path)) == ()


def test_a_weighted_mean(tmp_path: Path) -> None:
    net = Blocks()
    w = net.op("Softmax", "p", net.linear("a", "x", WIDTH, WIDTH), axis=1)
    y = net.op(
        "ReduceMean", "y", net.op("Mul", "pv", w, net.linear("v", "x", WIDTH, WIDTH)), net.ints("axis", 1)
    )
    (found,) = find_attention(_index(net.proto({"x": [1, TOKENS, WIDTH]}, [y]), tmp_path))
    assert (found.form, found.product.name) == ("weighted sum", "pv")


def test_layers_behind_a_normalization(tmp_path: Path) -> None:
    net = Blocks()
    n = net.norm("n", "x", WIDTH)
    cut = [net.op("Slice", f"cut{i}", n, *(net.ints(f"c{i}{j}", v) for j, v in enumerate(ends)))
           for i, ends in enumerate([(2, TOKENS, 1), (0, 2, 1)])]  # fmt: skip
    rolled = net.op("Concat", "rolled", *cut, axis=1)
    flat = net.op("Reshape", "rows", rolled, net.ints("flat", -1, WIDTH))
    head = net.op("Gemm", "head", flat, net.weight("w", WIDTH, 4))
    k = net.linear("k", rolled, WIDTH, WIDTH)
    other = net.linear("other", net.op("Relu", "relu", n), WIDTH, 4)
    unread = net.norm("unread", k, WIDTH)
    proto = net.proto({"x": [1, TOKENS, WIDTH]}, [head, other, unread])
    (found,) = find_post_norms(_index(proto, tmp_path))
    assert found.norm.name == "n"
    assert [layer.node.name for layer in found.layers] == ["k.mm", "head"]


@pytest.mark.parametrize("scale", ["before", "after"])
def test_layers_behind_a_normalization_that_is_written_out(scale: str, tmp_path: Path) -> None:
    found = find_post_norms(_index(written_rms_norm(scale), tmp_path))
    assert [norm.norm.name for norm in found] == ["n1", "n2"]
    assert [layer.node.name for norm in found for layer in norm.layers] == ["mlp.up.mm", "head.mm"]


@pytest.mark.parametrize(("opset", "output"), [(21, "fused"), (17, "gelu")])
def test_gelu_outputs(opset: int, output: str, tmp_path: Path) -> None:
    net = Blocks(opset=opset)
    x = net.linear("up", "x", WIDTH, WIDTH)
    if opset == 21:
        y = net.op("Gelu", "fused", x)
    else:
        e = net.op("Erf", "erf", net.op("Div", "over", x, net.constant("root", np.float32(2**0.5))))
        y = net.op("Mul", "twice", x, net.op("Add", "plus", e, net.constant("one", np.float32(1))))
        y = net.op("Mul", "gelu", y, net.constant("half", np.float32(0.5)))
    y = net.op("Erf", "lonely", net.linear("down", y, WIDTH, WIDTH))
    assert find_gelus(_index(net.proto({"x": [1, TOKENS, WIDTH]}, [y]), tmp_path)) == (output,)


def test_inspect_lists_them(tmp_path: Path) -> None:
    onnx.save(transformer(), str(tmp_path / "model.onnx"))
    found = inspect(tmp_path / "model.onnx").to_json()
    assert [row["product"] for row in found["attention"]] == ["block0.att.pv", "block1.att.pv"]
    assert found["attention"][0] == {
        "form": "product",
        "softmax": "block0.att.p",
        "product": "block0.att.pv",
        "weights": "block0.att.p",
        "values": "block0.att.v",
        "scores": ("block0.att.qk",),
        "is_masked": False,
    }
    assert found["post_norms"][0] == {"norm": "block0.n1", "layers": ("block0.att.qkv.mm",)}
    assert found["gelus"] == ("block0.mlp.act", "block1.mlp.act")
