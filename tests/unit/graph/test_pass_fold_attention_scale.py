"""The attention scale goes into the projections where that is exact, and stays where it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.graph.passes import fold_attention_scale
from tests.unit.graph.graph_helpers import apply, build, node, random

# A factor that is no power of two moves one rounding from the activations into the weights; softmax and the
# second product average it.
ROUNDING = 2e-6
N, C, H = 5, 8, 2
D = C // H
INTS = {
    "heads": np.array([0, N, H, D]),
    "fused": np.array([0, N, 3, H, D]),
    "fused_late": np.array([0, N, H, 3, D]),
    "joined": np.array([0, N, C]),
    "zero": np.array(0),
    "one": np.array(1),
    "two": np.array(2),
    "i0": np.array([0]),
    "i1": np.array([1]),
    "i2": np.array([2]),
    "c1": np.array([C]),
    "c2": np.array([2 * C]),
    "c3": np.array([3 * C]),
    "last": np.array([-1]),
    "three": np.array([1, 1, 1]),
}

Nodes = Sequence[onnx.NodeProto]


def separate() -> list[onnx.NodeProto]:
    """Three projections: MatMul+Add for Q, Gemm-like MatMul for K, MatMul for V."""
    nodes: list[onnx.NodeProto] = []
    for part in "qkv":
        nodes += [node("MatMul", f"x w{part}", f"{part}m"), node("Add", f"{part}m b{part}", f"{part}p")]
        nodes += [node("Reshape", f"{part}p heads", f"{part}r")]
        nodes += [node("Transpose", f"{part}r", part, perm=[0, 2, 1, 3])]
    return nodes


def fused_split() -> list[onnx.NodeProto]:
    """One projection, Reshape to (3, heads), Transpose, Split, Squeeze."""
    return [
        node("MatMul", "x wf", "fm"),
        node("Add", "bf fm", "f"),
        node("Reshape", "f fused", "fr"),
        node("Transpose", "fr", "ft", perm=[2, 0, 3, 1, 4]),
        node("Split", "ft three", "s0 s1 s2", axis=0),
        node("Squeeze", "s0 i0", "q"),
        node("Squeeze", "s1 i0", "k"),
        node("Squeeze", "s2 i0", "v"),
    ]


def fused_gather() -> list[onnx.NodeProto]:
    """The same with Gather, as legacy exports of ``qkv[0]`` have it; head-major columns."""
    return [
        node("MatMul", "x wf", "fm"),
        node("Add", "fm bf", "f"),
        node("Reshape", "f fused_late", "fr"),
        node("Transpose", "fr", "ft", perm=[3, 0, 2, 1, 4]),
        node("Gather", "ft zero", "q", axis=0),
        node("Gather", "ft one", "k", axis=0),
        node("Gather", "ft two", "v", axis=0),
    ]


def fused_slice() -> list[onnx.NodeProto]:
    """One projection, sliced before the heads are split off."""
    nodes = [node("MatMul", "x wf", "fm"), node("Add", "fm bf", "f")]
    for part, (start, end) in {"q": ("i0", "c1"), "k": ("c1", "c2"), "v": ("c2", "c3")}.items():
        nodes += [
            node("Slice", f"f {start} {end} last", f"{part}cut"),
            node("Reshape", f"{part}cut heads", f"{part}r"),
        ]
        nodes += [node("Transpose", f"{part}r", part, perm=[0, 2, 1, 3])]
    return nodes


LAYOUTS = {"separate": separate, "split": fused_split, "gather": fused_gather, "slice": fused_slice}


def scaled(place: str, op: str) -> list[onnx.NodeProto]:
    """Attention with the scale at ``place``."""
    scale = {
        "mul": lambda a, b: node("Mul", f"{a} scale", b),
        "div": lambda a, b: node("Div", f"{a} scale", b),
    }[op]
    if place == "q":
        first = [
            scale("q", "qs"),
            node("Transpose", "k", "kt", perm=[0, 1, 3, 2]),
            node("MatMul", "qs kt", "a"),
        ]
    elif place == "k":
        first = [
            scale("k", "ks"),
            node("Transpose", "ks", "kt", perm=[0, 1, 3, 2]),
            node("MatMul", "q kt", "a"),
        ]
    elif place == "k transposed":
        first = [
            node("Transpose", "k", "kt0", perm=[0, 1, 3, 2]),
            scale("kt0", "kt"),
            node("MatMul", "q kt", "a"),
        ]
    else:
        first = [
            node("Transpose", "k", "kt", perm=[0, 1, 3, 2]),
            node("MatMul", "q kt", "p"),
            scale("p", "a"),
        ]
    return [
        *first,
        node("Softmax", "a", "soft", axis=-1),
        node("MatMul", "soft v", "o"),
        node("Transpose", "o", "ot", perm=[0, 2, 1, 3]),
        node("Reshape", "ot joined", "y"),
    ]


def attention(
    nodes: Nodes, *, factor: float | np.ndarray = 0.3, outputs: Sequence[str] = ("y",), extra: Nodes = ()
) -> onnx.ModelProto:
    weights: Mapping[str, np.ndarray] = {
        **{f"w{part}": random(C, C, seed=i, scale=0.4) for i, part in enumerate("qkv")},
        **{f"b{part}": random(C, seed=i) for i, part in enumerate("qkv")},
        "wf": random(C, 3 * C, scale=0.4),
        "bf": random(3 * C),
        "scale": np.asarray(factor, np.float32),
        **INTS,
    }
    return build([*nodes, *extra], {"x": ["n", N, C]}, list(outputs), weights)


def scale_nodes(ops: Mapping[str, int]) -> int:
    return ops.get("Mul", 0) + ops.get("Div", 0)


@pytest.mark.parametrize("op", ["mul", "div"])
@pytest.mark.parametrize("place", ["q", "k", "k transposed", "product"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_folded(tmp_path: Path, layout: str, place: str, op: str) -> None:
    model = attention([*LAYOUTS[layout](), *scaled(place, op)])
    count, ops, _ = apply(model, fold_attention_scale.run, tmp_path, tolerance=ROUNDING)
    assert (count, scale_nodes(ops)) == (1, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_power_of_two_is_bit_exact(tmp_path: Path, layout: str) -> None:
    model = attention([*LAYOUTS[layout](), *scaled("product", "mul")], factor=0.125)
    count, ops, _ = apply(model, fold_attention_scale.run, tmp_path, tolerance=0)
    assert (count, scale_nodes(ops)) == (1, 0)


def test_both_operands_scaled(tmp_path: Path) -> None:
    first = [
        node("Mul", "q scale", "qs"),
        node("Mul", "k scale", "ks"),
        node("Transpose", "ks", "kt", perm=[0, 1, 3, 2]),
    ]
    rest = [n for n in scaled("product", "mul") if n.op_type not in ("Mul",)][1:]
    product = [node("MatMul", "qs kt", "a"), *[n for n in rest if n.output[0] not in ("p",)]]
    count, ops, _ = apply(
        attention([*fused_split(), *first, *product]), fold_attention_scale.run, tmp_path, tolerance=ROUNDING
    )
    assert (count, scale_nodes(ops)) == (2, 0)


def test_only_the_columns_of_q_change(tmp_path: Path) -> None:
    model = attention([*fused_split(), *scaled("q", "mul")], factor=0.5)
    _, _, graph = apply(model, fold_attention_scale.run, tmp_path, tolerance=0)
    weight = next(n for n in graph.nodes if n.op == "MatMul").inputs[1].values
    before = random(C, 3 * C, scale=0.4)
    np.testing.assert_array_equal(weight[:, :C], 0.5 * before[:, :C])
    np.testing.assert_array_equal(weight[:, C:], before[:, C:])


def test_a_shared_weight_is_copied(tmp_path: Path) -> None:
    nodes = separate()
    for n in nodes:
        n.input[:] = ["wq" if name == "wk" else name for name in n.input]
    count, _, _ = apply(
        attention([*nodes, *scaled("q", "mul")]), fold_attention_scale.run, tmp_path, tolerance=ROUNDING
    )
    assert count == 1


@pytest.mark.parametrize(
    "model",
    [
        attention([*separate(), *scaled("q", "mul")], extra=[node("Neg", "q", "z")], outputs=("y", "z")),
        attention([*separate(), *scaled("q", "mul")], extra=[node("Neg", "qp", "z")], outputs=("y", "z")),
        attention([*fused_split(), *scaled("q", "mul")], extra=[node("Neg", "ft", "z")], outputs=("y", "z")),
        attention([*fused_split(), *scaled("q", "mul")], extra=[node("Neg", "f", "z")], outputs=("y", "z")),
        attention([*separate(), *scaled("q", "mul")], outputs=("y", "q")),
        attention([*separate(), *scaled("q", "mul")], outputs=("y", "qp")),
        attention([*separate(), *scaled("q", "mul")], factor=random(D)),
        attention([*separate(), *scaled("q", "mul")], factor=0.0),
        attention([*separate(), *scaled("product", "mul")], outputs=("y", "p")),
    ],
    ids=[
        "second reader of q",
        "second reader of the projection",
        "second reader of fused qkv",
        "second reader of fused projection",
        "q is output",
        "projection is output",
        "vector scale",
        "zero scale",
        "product is output",
    ],
)
def test_declined(tmp_path: Path, model: onnx.ModelProto) -> None:
    count, ops, _ = apply(model, fold_attention_scale.run, tmp_path, tolerance=0)
    assert (count, scale_nodes(ops)) == (0, 1)


def test_the_other_operand_takes_the_scale_of_the_product(tmp_path: Path) -> None:
    """Q is seen elsewhere, K is not."""
    model = attention(
        [*separate(), *scaled("product", "mul")], extra=[node("Neg", "q", "z")], outputs=("y", "z")
    )
    count, ops, _ = apply(model, fold_attention_scale.run, tmp_path, tolerance=ROUNDING)
    assert (count, scale_nodes(ops)) == (1, 0)


def test_a_scaled_linear_layer_outside_of_attention_is_left_alone(tmp_path: Path) -> None:
    model = attention([node("MatMul", "x wq", "m"), node("Mul", "m scale", "y")])
    assert apply(model, fold_attention_scale.run, tmp_path, tolerance=0)[0] == 0


def test_q_and_k_of_the_same_columns_are_left_alone(tmp_path: Path) -> None:
    """The slice of K overlaps that of Q, so that scaling Q's columns would scale K's too."""
    nodes = fused_slice()
    for n in nodes:
        if n.output[0] == "kcut":
            n.input[:] = ["f", "i1", "c9", "last"]
    model = attention([*nodes, *scaled("q", "mul")])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([C + 1]), "c9"))
    assert apply(model, fold_attention_scale.run, tmp_path, tolerance=0)[0] == 0
