"""Gradients: finite differences in double for smooth operators, finite values for the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from onnxptq.lowering import lower
from tests.unit.lowering.lowering_oracle import freeze, graph_of, node_model, normal

Shapes = Mapping[str, tuple[int, ...]]

SMOOTH: list[tuple[str, int, Shapes, dict[str, Any]]] = [
    ("Conv", 11, {"x": (1, 2, 4, 4), "w": (2, 1, 3, 2), "b": (2,)}, {"group": 2, "pads": [0, 1, 1, 0]}),
    ("Conv", 11, {"x": (1, 2, 4, 4), "w": (2, 2, 3, 3)}, {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("ConvTranspose", 11, {"x": (1, 2, 2, 3), "w": (2, 2, 3, 3), "b": (2,)}, {"strides": [2, 2]}),
    (
        "ConvTranspose",
        11,
        {"x": (1, 2, 2, 3), "w": (2, 1, 3, 3), "b": (1,)},
        {"pads": [0, 1, 2, 0], "strides": [2, 2]},
    ),
    ("Gemm", 13, {"a": (2, 3), "b": (4, 3), "c": (4,)}, {"transB": 1}),
    ("Gemm", 13, {"a": (3, 2), "b": (3, 4), "c": (2, 1)}, {"transA": 1, "alpha": 0.5, "beta": 2.0}),
    ("MatMul", 13, {"a": (2, 2, 3), "b": (3, 2)}, {}),
    ("Einsum", 12, {"a": (2, 3), "b": (3, 2)}, {"equation": "ij,jk->ik"}),
    (
        "AveragePool",
        19,
        {"x": (1, 1, 5, 5)},
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "pads": [1] * 4},
    ),
    ("AveragePool", 19, {"x": (1, 1, 5, 5)}, {"kernel_shape": [2, 2], "dilations": [2, 2]}),
    ("GlobalAveragePool", 13, {"x": (2, 2, 3, 3)}, {}),
    ("LayerNormalization", 17, {"x": (2, 3, 4), "scale": (4,), "b": (4,)}, {}),
    ("BatchNormalization", 15, {"x": (2, 3, 2), "scale": (3,), "b": (3,), "mean": (3,), "var": (3,)}, {}),
    ("RMSNormalization", 23, {"x": (2, 4), "scale": (4,)}, {}),
    ("GroupNormalization", 21, {"x": (1, 4, 3), "scale": (4,), "b": (4,)}, {"num_groups": 2}),
    ("GroupNormalization", 18, {"x": (1, 4, 3), "scale": (2,), "b": (2,)}, {"num_groups": 2}),
    ("InstanceNormalization", 13, {"x": (2, 2, 4), "scale": (2,), "b": (2,)}, {}),
    ("LRN", 13, {"x": (1, 4, 2, 2)}, {"size": 3}),
    ("Sigmoid", 13, {"x": (6,)}, {}),
    ("Tanh", 13, {"x": (6,)}, {}),
    ("Softplus", 13, {"x": (6,)}, {}),
    ("Mish", 18, {"x": (6,)}, {}),
    ("Gelu", 20, {"x": (6,)}, {}),
    ("Gelu", 20, {"x": (6,)}, {"approximate": "tanh"}),
    ("Swish", 24, {"x": (6,)}, {"alpha": 0.7}),
    ("Erf", 13, {"x": (6,)}, {}),
    ("Exp", 13, {"x": (6,)}, {}),
    ("Sin", 13, {"x": (6,)}, {}),
    ("Softmax", 13, {"x": (2, 3, 2)}, {"axis": 1}),
    ("Softmax", 11, {"x": (2, 3, 2)}, {"axis": 1}),
    ("LogSoftmax", 13, {"x": (2, 3)}, {}),
    ("Add", 14, {"a": (2, 3), "b": (3,)}, {}),
    ("Mul", 14, {"a": (2, 1), "b": (3,)}, {}),
    ("Div", 14, {"a": (2, 3), "b": (3,)}, {}),
    ("ReduceMean", 18, {"x": (2, 3)}, {}),
    ("ReduceL2", 18, {"x": (2, 3)}, {}),
    ("ReduceLogSumExp", 18, {"x": (2, 3)}, {}),
    ("ReduceSumSquare", 18, {"x": (2, 3)}, {}),
    ("CumSum", 14, {"x": (2, 3), "axis": ()}, {"exclusive": 1, "reverse": 1}),
    ("Transpose", 13, {"x": (2, 3)}, {}),
    ("Concat", 13, {"a": (2, 1), "b": (2, 2)}, {"axis": 1}),
    ("DepthToSpace", 13, {"x": (1, 4, 2, 2)}, {"blocksize": 2}),
    ("Attention", 23, {"q": (1, 2, 3, 4), "k": (1, 1, 3, 4), "v": (1, 1, 3, 4)}, {"is_causal": 1}),
    ("RotaryEmbedding", 23, {"x": (1, 2, 3, 4), "cos": (1, 3, 2), "sin": (1, 3, 2)}, {}),
]

RESIZES: list[dict[str, Any]] = [
    {"mode": mode, "coordinate_transformation_mode": coordinates, "antialias": antialias}
    for mode in ("nearest", "linear", "cubic")
    for coordinates in ("half_pixel", "align_corners", "asymmetric")
    for antialias in ((0, 1) if mode != "nearest" else (0,))
]


def _gradcheck(
    op: str, opset: int, feed: dict[str, Any], names: list[str], attributes: dict[str, Any]
) -> None:
    """Compare the derivative by every float input with central differences."""
    model = node_model(op, feed, opset=opset, inputs=names, **attributes)
    graph = graph_of(model)
    module = lower(graph, inputs=list(feed), outputs=["y0"])
    floats = {
        n: torch.tensor(v, dtype=torch.float64) for n, v in feed.items() if np.asarray(v).dtype.kind == "f"
    }
    others = {n: torch.tensor(v) for n, v in feed.items() if n not in floats}
    values = [v.requires_grad_(True) for v in floats.values()]

    def run(*args: torch.Tensor) -> torch.Tensor:
        return module({**dict(zip(floats, args, strict=True)), **others})["y0"]

    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize(
    ("op", "opset", "shapes", "attributes"), SMOOTH, ids=[f"{c[0]}-{c[1]}-{i}" for i, c in enumerate(SMOOTH)]
)
def test_smooth_operators(op: str, opset: int, shapes: Shapes, attributes: dict[str, Any]) -> None:
    feed = {n: np.array(1) if n == "axis" else normal(*s) for n, s in shapes.items()}
    if "var" in feed:
        feed["var"] = np.abs(feed["var"]) + 0.5
    _gradcheck(op, opset, feed, list(feed), attributes)


@pytest.mark.parametrize("attributes", RESIZES, ids=lambda a: "-".join(map(str, a.values())))
@pytest.mark.parametrize("sizes", [(6, 4), (2, 5)], ids=["grow", "mixed"])
def test_resize(attributes: dict[str, Any], sizes: tuple[int, int]) -> None:
    feed = {"x": normal(1, 1, 3, 4), "sizes": np.array([1, 1, *sizes])}
    _gradcheck("Resize", 19, feed, ["x", "", "", "sizes"], attributes)


INDEXED: list[tuple[str, int, dict[str, Any], dict[str, Any]]] = [
    ("Gather", 13, {"x": normal(3, 2), "i": np.array([0, -1, 0])}, {"axis": 0}),
    ("GatherElements", 13, {"x": normal(3, 2), "i": np.array([[0, -1]])}, {"axis": 0}),
    ("GatherND", 13, {"x": normal(3, 2), "i": np.array([[0, -1], [2, 0]])}, {}),
    ("ScatterElements", 18, {"x": normal(3, 2), "i": np.array([[0, -1]]), "u": normal(1, 2)}, {"axis": 0}),
    (
        "ScatterND",
        18,
        {"x": normal(3, 2), "i": np.array([[0], [0]]), "u": normal(2, 2)},
        {"reduction": "add"},
    ),
    ("ScatterND", 18, {"x": normal(3, 2), "i": np.array([[0], [2]]), "u": normal(2, 2)}, {}),
    (
        "Slice",
        13,
        {"x": normal(3, 4), "s": np.array([3]), "e": np.array([-9]), "a": np.array([1]), "t": np.array([-2])},
        {},
    ),
    ("Pad", 19, {"x": normal(3, 4), "p": np.array([1, 2, 0, 1])}, {"mode": "reflect"}),
    ("Pad", 19, {"x": normal(3, 4), "p": np.array([1, -1, 0, 1])}, {}),
    ("Expand", 13, {"x": normal(3, 1), "s": np.array([2, 3, 2])}, {}),
    (
        "GridSample",
        16,
        {"x": normal(1, 1, 3, 3), "g": np.array([[[[0.3, -0.2], [0.7, 0.9]]]], np.float32)},
        {"padding_mode": "border"},
    ),
    ("Tile", 13, {"x": normal(2, 2), "r": np.array([2, 1])}, {}),
]


@pytest.mark.parametrize(
    ("op", "opset", "feed", "attributes"), INDEXED, ids=[f"{c[0]}-{i}" for i, c in enumerate(INDEXED)]
)
def test_moved_elements(op: str, opset: int, feed: dict[str, Any], attributes: dict[str, Any]) -> None:
    _gradcheck(op, opset, feed, list(feed), attributes)


@pytest.mark.parametrize(
    ("op", "opset", "attributes"),
    [
        ("Relu", 14, {}),
        ("LeakyRelu", 16, {}),
        ("HardSwish", 14, {}),
        ("HardSigmoid", 13, {}),
        ("Elu", 13, {}),
        ("Selu", 13, {}),
        ("Celu", 12, {}),
        ("Abs", 13, {}),
        ("Clip", 7, {"min": -0.5, "max": 0.5}),
        ("MaxPool", 12, {"kernel_shape": [2, 2], "pads": [1, 1, 1, 1]}),
        ("GlobalMaxPool", 13, {}),
        ("ReduceMax", 13, {"axes": [2]}),
        ("ReduceL2", 13, {"axes": [2]}),
        ("Round", 13, {}),
    ],
)
def test_kinks_and_zeros_have_finite_gradients(op: str, opset: int, attributes: dict[str, Any]) -> None:
    feed = {"x": np.concatenate([normal(1, 2, 3, 4), np.zeros((1, 2, 3, 4), np.float32)])}
    module = lower(graph_of(node_model(op, feed, opset=opset, **attributes)), inputs=["x"], outputs=["y0"])
    x = torch.tensor(feed["x"], requires_grad=True)
    module({"x": x})["y0"].sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_roi_align() -> None:
    feed = {"x": normal(1, 2, 5, 5), "r": np.array([[0.4, 0.3, 3.1, 4.2]], np.float32), "b": np.array([0])}
    model = freeze(node_model("RoiAlign", feed, opset=16, output_height=2, output_width=2), feed, ["r", "b"])
    module = lower(graph_of(model), inputs=["x"], outputs=["y0"]).double()
    x = torch.tensor(feed["x"], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: module({"x": v})["y0"], [x])


@pytest.mark.parametrize("exponent", [2.0, 0.5, 3.0])
def test_power_of_a_constant(exponent: float) -> None:
    feed = {"x": np.abs(normal(4)) + 0.5, "y": np.array(exponent, np.float32)}
    model = freeze(node_model("Pow", feed, opset=15), feed, ["y"])
    module = lower(graph_of(model), inputs=["x"], outputs=["y0"])
    x = torch.tensor(feed["x"], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: module({"x": v})["y0"], [x])
