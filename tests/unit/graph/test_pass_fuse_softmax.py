"""Softmax in every spelling becomes one node, also where it divides the product; look-alikes do not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnxptq.graph.passes import fuse_softmax
from tests.unit.graph.graph_helpers import apply, build, node, random

# Sums and exponentials in float32 by two formulas: some roundings of 6e-8, against the largest output.
ROUNDING = 1e-6
SHAPE = ["n", 4, 6]
WEIGHTS = {
    "one": np.array(1, np.float32),
    "minus": np.array(-1, np.float32),
    "v": random(6, 5),
    "row": random(6),
}


def reduce(
    op: str, source: str, target: str, axes: Sequence[int], opset: int, keep: bool = True
) -> onnx.NodeProto:
    """A reduction with its axes as that opset has them: an attribute, or the input ``axes``."""
    if opset >= (13 if op == "ReduceSum" else 18):
        return node(op, f"{source} axes", target, keepdims=int(keep))
    return node(op, source, target, axes=list(axes), keepdims=int(keep))


def written(
    tail: Sequence[onnx.NodeProto] = (node("Div", "e s", "y"),),
    *,
    axes: Sequence[int] = (-1,),
    shift: str = "largest",
    keep: bool = True,
    bottom: str = "s",
    opset: int = 17,
    shape: Sequence[int | str] = SHAPE,
    outputs: Sequence[str] = ("y",),
    **weights: np.ndarray,
) -> onnx.ModelProto:
    """e = exp(x [- m]), ``bottom`` = sum(e), and ``tail``."""
    nodes = []
    if shift == "largest":
        nodes.append(reduce("ReduceMax", "x", "m", axes, opset))
    if shift:
        nodes.append(node("Sub", "x m", "u"))
    nodes += [node("Exp", "u" if shift else "x", "e"), reduce("ReduceSum", "e", bottom, axes, opset, keep)]
    return build(
        [*nodes, *tail], {"x": shape}, outputs, {**WEIGHTS, "axes": np.array(axes), **weights}, opset=opset
    )


PRODUCT = node("MatMul", "e v", "p")
DIVIDE = [node("Div", "e s", "y")]
RECIPROCAL = [node("Reciprocal", "s", "r"), node("Mul", "e r", "y")]
INVERSE = [node("Div", "one s", "r"), node("Mul", "r e", "y")]
POWER = [node("Pow", "s minus", "r"), node("Mul", "e r", "y")]


@pytest.mark.parametrize("opset", [13, 17, 18, 21])
@pytest.mark.parametrize("shift", ["largest", ""], ids=["shifted", "plain"])
@pytest.mark.parametrize(
    "tail", [DIVIDE, RECIPROCAL, INVERSE, POWER], ids=["divide", "reciprocal", "inverse", "power"]
)
def test_a_quotient(tmp_path: Path, tail: Sequence[onnx.NodeProto], shift: str, opset: int) -> None:
    model = written(tail, shift=shift, opset=opset)
    count, ops, graph = apply(model, fuse_softmax.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"Softmax": 1})
    assert (graph.nodes[0].name, graph.nodes[0].inputs[0].name) == ("n_y", "x")


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_any_axis(tmp_path: Path, axis: int) -> None:
    count, ops, graph = apply(written(axes=[axis]), fuse_softmax.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"Softmax": 1})
    assert graph.nodes[0].attrs["axis"] == axis % 3


@pytest.mark.parametrize("tail", [DIVIDE, [PRODUCT, node("Div", "p s", "y")]], ids=["quotient", "product"])
@pytest.mark.parametrize("axis", [-1, 2])
def test_an_unknown_rank(tmp_path: Path, axis: int, tail: Sequence[onnx.NodeProto]) -> None:
    """A quotient needs none; which axis a product sums up cannot be told without."""

    def run(graph: gs.Graph) -> int:
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Variable) and tensor.inputs and tensor.name != "y":
                tensor.shape = None
        return fuse_softmax.run(graph)

    count, ops, _ = apply(written(tail, axes=[axis]), run, tmp_path, tolerance=ROUNDING)
    assert (count, ops["Softmax"]) == ((1, 1) if tail is DIVIDE else (0, 0))


@pytest.mark.parametrize(
    ("nodes", "axis"),
    [
        ([node("LogSoftmax", "x", "l")], -1),
        ([node("LogSoftmax", "x", "l", axis=1)], 1),
        ([node("ReduceLogSumExp", "x", "z", axes=[1]), node("Sub", "x z", "l")], 1),
    ],
    ids=["logarithm", "along axis 1", "written out"],
)
def test_exp_of_a_logarithm(tmp_path: Path, nodes: Sequence[onnx.NodeProto], axis: int) -> None:
    model = build([*nodes, node("Exp", "l", "y")], {"x": SHAPE}, ["y"])
    count, ops, graph = apply(model, fuse_softmax.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"Softmax": 1})
    assert graph.nodes[0].attrs["axis"] % 3 == axis % 3


def test_the_difference_of_another_logarithm_stays(tmp_path: Path) -> None:
    nodes = [
        node("Neg", "x", "w"),
        node("ReduceLogSumExp", "w", "z", axes=[1]),
        node("Sub", "x z", "l"),
        node("Exp", "l", "y"),
    ]
    assert apply(build(nodes, {"x": SHAPE}, ["y"]), fuse_softmax.run, tmp_path, tolerance=0)[0] == 0


@pytest.mark.parametrize(
    ("shape", "read"),
    [
        ([4, 1], "x"),
        ([1], "x"),
        ([1, 4, 1], "x"),
        ([6], "u"),
        ([4, 6], "u"),
        ([1, 1, 1, 1], "u"),
        ([3, 1, 1], "u"),
    ],
    ids=str,
)
def test_another_shift_goes_where_shapes_allow_it(tmp_path: Path, shape: list[int], read: str) -> None:
    """The same along the axis, and of no more elements than x: n may be 1."""
    count, ops, graph = apply(
        written(shift="m", m=random(*shape)), fuse_softmax.run, tmp_path, tolerance=ROUNDING
    )
    assert count == 1
    assert ops == ({"Softmax": 1} if read == "x" else {"Sub": 1, "Softmax": 1})
    assert graph.nodes[-1].inputs[0].name == read


def test_the_largest_of_all_is_a_shift_as_well(tmp_path: Path) -> None:
    nodes = [
        node("ReduceMax", "x", "m", axes=[0, 1, 2]),
        node("Sub", "x m", "u"),
        node("Exp", "u", "e"),
        node("ReduceSum", "e axes", "s"),
        *DIVIDE,
    ]
    model = build(nodes, {"x": SHAPE}, ["y"], {"axes": np.array([-1])})
    count, ops, _ = apply(model, fuse_softmax.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"Softmax": 1})


def test_what_is_between_shift_and_exponential_stays(tmp_path: Path) -> None:
    nodes = [
        node("ReduceMax", "x", "m", axes=[-1]),
        node("Sub", "x m", "d"),
        node("Mul", "d half", "u"),
        node("Exp", "u", "e"),
        node("ReduceSum", "e axes", "s"),
        node("Div", "e s", "y"),
    ]
    model = build(nodes, {"x": SHAPE}, ["y"], {"axes": np.array([-1]), "half": np.array(0.5, np.float32)})
    count, ops, graph = apply(model, fuse_softmax.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"ReduceMax": 1, "Sub": 1, "Mul": 1, "Softmax": 1})
    assert graph.nodes[-1].inputs[0].name == "u"


@pytest.mark.parametrize("axes", [[-1], [0], [1]], ids=str)
def test_dimensions_that_come_back(tmp_path: Path, axes: list[int]) -> None:
    tail = [node("Unsqueeze", "t axes", "s"), *DIVIDE]
    model = written(tail, axes=axes, keep=False, bottom="t")
    count, ops, _ = apply(model, fuse_softmax.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"Softmax": 1})


def test_a_first_axis_lines_up_without_its_dimension(tmp_path: Path) -> None:
    count, ops, _ = apply(written(axes=[0], keep=False), fuse_softmax.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"Softmax": 1})


BASES = {"two": ("", 2.0), "half": ("", 0.5), "shifted": ("largest", 2.0)}


@pytest.mark.parametrize("late", [False, True], ids=["weights", "product"])
@pytest.mark.parametrize("kind", BASES)
def test_powers_of_another_base(tmp_path: Path, kind: str, late: bool) -> None:
    shift, base = BASES[kind]
    model = written(
        [PRODUCT, node("Div", "p s", "y")] if late else DIVIDE, shift=shift, b=np.array(base, np.float32)
    )
    for entry in model.graph.node:
        if entry.op_type == "Exp":
            entry.CopyFrom(node("Pow", f"b {entry.input[0]}", "e"))
    count, ops, graph = apply(model, fuse_softmax.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"Mul": 1, "Softmax": 1, **({"MatMul": 1} if late else {})})
    assert graph.nodes[0].inputs[0].name == "x"


def test_sums_of_another_base_stay(tmp_path: Path) -> None:
    model = written([node("Pow", "b u", "f"), node("Div", "f s", "y")], b=np.array(2, np.float32))
    assert apply(model, fuse_softmax.run, tmp_path, tolerance=0)[0] == 0


@pytest.mark.parametrize(("size", "expected"), [(1e-8, 1), (5.9e-8, 1), (6e-8, 0), (1e-6, 0), (-1e-8, 0)])
def test_an_epsilon(tmp_path: Path, size: float, expected: int) -> None:
    """It goes where float32 rounds it away, which a single element shows to the bit."""
    tail = [node("Add", "s eps", "t"), node("Div", "e t", "y")]
    model = written(tail, eps=np.array(size, np.float32), shape=["n", 4, 1])
    count, ops, _ = apply(model, fuse_softmax.run, tmp_path, tolerance=0)
    assert (count, ops["Softmax"]) == (expected, expected)


GUARDS = {
    "sum": node("Add", "eps s", "t"),
    "bound": node("Max", "s eps", "t"),
    "clip": node("Clip", "s eps", "t"),
}


@pytest.mark.parametrize("guard", ["bound", "clip"])
@pytest.mark.parametrize(("least", "expected"), [(1e-3, 1), (1.0, 1), (1.1, 0)])
def test_a_lower_bound(tmp_path: Path, guard: str, least: float, expected: int) -> None:
    model = written([GUARDS[guard], node("Div", "e t", "y")], eps=np.array(least, np.float32))
    count, ops, _ = apply(model, fuse_softmax.run, tmp_path, tolerance=ROUNDING * expected)
    assert (count, ops["Softmax"]) == (expected, expected)


def test_bounds_on_both_sides_stay(tmp_path: Path) -> None:
    model = written(
        [node("Clip", "s eps top", "t"), node("Div", "e t", "y")],
        eps=np.array(1e-3, np.float32),
        top=np.array(2, np.float32),
    )
    assert apply(model, fuse_softmax.run, tmp_path, tolerance=0)[0] == 0


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("shift", ["", "m"])
def test_guards_count_where_sums_may_be_small(tmp_path: Path, shift: str, guard: str) -> None:
    tail = [GUARDS[guard], node("Div", "e t", "y")]
    model = written(tail, shift=shift, eps=np.array(1e-8, np.float32), m=np.full(1, 20, np.float32))
    assert apply(model, fuse_softmax.run, tmp_path, tolerance=0)[0] == 0


@pytest.mark.parametrize("read", ["e", "s", "u", "m"])
def test_what_others_read_stays(tmp_path: Path, read: str) -> None:
    tail = [*DIVIDE, node("Neg", read, "other")]
    count, ops, _ = apply(
        written(tail, outputs=["y", "other"]), fuse_softmax.run, tmp_path, tolerance=ROUNDING
    )
    assert (count, ops["Softmax"], ops["Div"]) == (1, 1, 0)
    assert ops["Exp"] == (read in "es")
    assert ops["ReduceSum"] == (read == "s")


@pytest.mark.parametrize("read", ["e", "s"])
def test_outputs_of_the_graph_stay(tmp_path: Path, read: str) -> None:
    count, ops, _ = apply(written(outputs=["y", read]), fuse_softmax.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops["Softmax"], ops["Exp"]) == (1, 1, 1)


def test_two_exponentials_of_one_tensor(tmp_path: Path) -> None:
    nodes = [
        node("Exp", "x", "e"),
        node("Exp", "x", "f"),
        node("ReduceSum", "f axes", "s"),
        node("Div", "e s", "y"),
    ]
    model = build(nodes, {"x": SHAPE}, ["y"], {"axes": np.array([-1])})
    count, ops, _ = apply(model, fuse_softmax.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"Softmax": 1})


SQUARE = [4, 4, 4]


@pytest.mark.parametrize(
    "model",
    [
        written(axes=[1, 2]),
        written(axes=[-1], keep=False, shape=SQUARE),
        written([node("Unsqueeze", "t two", "s"), *DIVIDE], axes=[1], keep=False, bottom="t", shape=SQUARE,
                two=np.array([2])),
        written([node("Div", "s e", "y")]),
        written([node("Mul", "e s", "y")]),
        written([node("Abs", "e", "a"), node("Div", "a s", "y")]),
        written([node("Exp", "u", "o"), node("Exp", "o", "p"), node("Div", "p s", "y")]),
        written([node("Div", "two s", "r"), node("Mul", "e r", "y")], two=np.array(2, np.float32)),
        written([node("ReduceMean", "e", "a", axes=[-1]), node("Div", "e a", "y")]),
        written(opset=12),
    ],
    ids=["two axes", "sums of another axis", "back at another axis", "upside down", "a product", "another top",
         "another exponential", "two over the sum", "a mean", "old opset"],
)  # fmt: skip
def test_declined(tmp_path: Path, model: onnx.ModelProto) -> None:
    assert apply(model, fuse_softmax.run, tmp_path, tolerance=0)[0] == 0


def test_double_precision_stays(tmp_path: Path) -> None:
    nodes = [node("Exp", "x", "e"), node("ReduceSum", "e axes", "s"), node("Div", "e s", "y")]
    kind = onnx.TensorProto.DOUBLE
    model = build(nodes, {"x": SHAPE}, {"y": kind}, {"axes": np.array([-1])}, input_type=kind)
    assert apply(model, fuse_softmax.run, tmp_path, tolerance=0)[0] == 0


@pytest.mark.parametrize("opset", [13, 17, 21])
@pytest.mark.parametrize("shift", ["largest", ""], ids=["shifted", "plain"])
@pytest.mark.parametrize(
    "tail",
    [
        [node("Div", "p s", "y")],
        [node("Reciprocal", "s", "r"), node("Mul", "p r", "y")],
        [node("Reciprocal", "s", "r"), node("Mul", "r p", "y")],
    ],
    ids=["divide", "reciprocal", "reciprocal first"],
)
def test_a_division_behind_the_product(
    tmp_path: Path, tail: Sequence[onnx.NodeProto], shift: str, opset: int
) -> None:
    model = written([PRODUCT, *tail], shift=shift, opset=opset)
    count, ops, graph = apply(model, fuse_softmax.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (1, {"Softmax": 1, "MatMul": 1})
    softmax, product = graph.nodes
    assert (softmax.attrs["axis"], softmax.inputs[0].name) == (2, "x")
    assert (product.name, product.outputs[0].name) == ("n_p", "y")


@pytest.mark.parametrize(
    ("product", "axis", "shape", "values"),
    [
        ("e w", -1, [4, 6], (2, 6, 5)),
        ("e w", 1, [4, 6], (6, 5)),
        ("w e", -2, ["n", 4, 6], (3, 4)),
        ("w e", 1, ["n", 4, 6], (2, 1, 5, 4)),
        ("w e", 0, [4, 6], (2, 5, 4)),
    ],
    ids=["more values", "matrices", "from the left", "more from the left", "matrix from the left"],
)
def test_products_that_broadcast(
    tmp_path: Path, product: str, axis: int, shape: list[int | str], values: tuple[int, ...]
) -> None:
    tail = [node("MatMul", product, "p"), node("Div", "p s", "y")]
    model = written(tail, axes=[axis], shape=shape, w=random(*values))
    count, ops, _ = apply(model, fuse_softmax.run, tmp_path, tolerance=4 * ROUNDING)
    assert (count, ops) == (1, {"Softmax": 1, "MatMul": 1})


def test_two_products_of_the_same_weights(tmp_path: Path) -> None:
    tail = [
        PRODUCT,
        node("Div", "p s", "y"),
        node("MatMul", "e w", "q"),
        node("Div", "q s", "z"),
    ]
    model = written(tail, outputs=["y", "z"], w=random(6, 3))
    count, ops, _ = apply(model, fuse_softmax.run, tmp_path, tolerance=ROUNDING)
    assert (count, ops) == (2, {"Softmax": 2, "MatMul": 2})


@pytest.mark.parametrize(
    "model",
    [
        written([PRODUCT, node("Div", "p s", "y"), node("Neg", "p", "other")], outputs=["y", "other"]),
        written([PRODUCT, node("Div", "p s", "y")], outputs=["y", "p"]),
        written([node("MatMul", "e a", "p"), node("Div", "p s", "y")], axes=[1], a=random(6, 6)),
        written([node("MatMul", "left e", "p"), node("Div", "p s", "y")], shape=[3, 4, 6], left=random(4, 4)),
        written([node("MatMul", "e row", "p"), node("Div", "p s", "y")], shape=[3, 3, 6]),
        written([node("MatMul", "e a", "p"), node("Relu", "p", "q"), node("Div", "q s", "y")], a=random(6, 2)),
    ],
    ids=["second reader", "product is output", "another axis", "the axis of the rows", "values are a row",
         "something between"],
)  # fmt: skip
def test_products_declined(tmp_path: Path, model: onnx.ModelProto) -> None:
    count, ops, _ = apply(model, fuse_softmax.run, tmp_path, tolerance=0)
    assert (count, ops["Softmax"]) == (0, 0)
