"""Element-wise operators, activations, normalizations, products and reductions against onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.unit.lowering.lowering_oracle import (
    RNG,
    check_against_onnxruntime,
    named,
    node_model,
    normal,
    run_lowered,
)

BROADCASTS = [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (4,)), ((3, 1), (2, 1, 4)), ((2, 3), ())]


@pytest.mark.parametrize("shapes", BROADCASTS, ids=named)
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div"])
@pytest.mark.parametrize("opset", [7, 13, 14])
def test_arithmetic(op: str, shapes: Any, opset: int) -> None:
    check_against_onnxruntime(op, {"a": normal(*shapes[0]), "b": normal(*shapes[1])}, opset=opset)


@pytest.mark.parametrize("dtype", [np.int32, np.int64], ids=["int32", "int64"])
def test_integer_division_truncates(dtype: Any) -> None:
    a, b = np.array([7, -7, 7, -7, 6], dtype), np.array([2, 2, -2, -2, 3], dtype)
    check_against_onnxruntime("Div", {"a": a, "b": b}, opset=14)


@pytest.mark.parametrize(
    ("dtype", "fmod"), [(np.int64, 0), (np.int32, 1), (np.float32, 1)], ids=["python", "C", "C-float"]
)
def test_mod(dtype: Any, fmod: int) -> None:
    a, b = np.array([7, -7, 7, -7, 5], dtype), np.array([3, 3, -3, -3, 5], dtype)
    check_against_onnxruntime("Mod", {"a": a, "b": b}, opset=13, fmod=fmod)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 0.5, -1.0, 2.5], ids=str)
@pytest.mark.parametrize("opset", [7, 13, 15])
def test_pow(exponent: float, opset: int) -> None:
    x = np.abs(normal(2, 5)) + 0.1
    # A power multiplies the rounding of the logarithm by the exponent.
    check_against_onnxruntime("Pow", {"x": x, "y": np.float32(exponent)}, opset=opset, rtol=1e-5)


def test_pow_keeps_the_type_of_the_base() -> None:
    check_against_onnxruntime("Pow", {"x": np.array([1, 2, 3]), "y": np.float32(2.0)}, opset=13)
    check_against_onnxruntime("Pow", {"x": normal(3), "y": np.array([1, 2, 3])}, opset=13)


UNARY_FROM = {
    **dict.fromkeys(["Abs", "Neg", "Exp", "Reciprocal", "Floor", "Ceil", "Sin", "Cos", "Tan", "Atan"], 7),
    **dict.fromkeys(["Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Elu", "Selu", "HardSigmoid"], 7),
    **dict.fromkeys(["Sign", "Erf", "Sinh", "Cosh", "Asinh", "Shrink"], 9),
    "LeakyRelu": 7,
    "ThresholdedRelu": 10,
    "Round": 11,
    "Celu": 12,
    "HardSwish": 14,
    "Mish": 18,
    "Gelu": 20,
}


@pytest.mark.parametrize("op", UNARY_FROM)
def test_unary(op: str) -> None:
    x = np.concatenate([normal(3, 7) * 3, np.array([[0, 0.5, 1.5, 2.5, -0.5, -1.5, 30]], np.float32)])
    for opset in sorted({UNARY_FROM[op], 13, 22} - set(range(UNARY_FROM[op]))):
        # onnxruntime's exp-based kernels are approximations within a few units in the last place.
        check_against_onnxruntime(op, {"x": x}, opset=opset, rtol=3e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("op", "attributes", "opset"),
    [
        ("LeakyRelu", {"alpha": 0.3}, 7),
        ("Elu", {"alpha": 2.0}, 7),
        ("Celu", {"alpha": 0.5}, 12),
        ("Selu", {"alpha": 2.0, "gamma": 3.0}, 7),
        ("HardSigmoid", {"alpha": 0.25, "beta": 0.4}, 7),
        ("ThresholdedRelu", {"alpha": 0.4}, 10),
        ("Shrink", {"bias": 0.3, "lambd": 0.7}, 9),
        ("Gelu", {"approximate": "tanh"}, 20),
    ],
    ids=named,
)
def test_activation_attributes(op: str, attributes: dict[str, Any], opset: int) -> None:
    check_against_onnxruntime(op, {"x": normal(4, 6) * 2}, opset=opset, **attributes)


@pytest.mark.parametrize("op", ["Sqrt", "Log"])
def test_unary_of_positives(op: str) -> None:
    check_against_onnxruntime(op, {"x": np.abs(normal(3, 5)) + 0.01}, opset=13)


@pytest.mark.parametrize("op", ["Asin", "Acos", "Atanh"])
def test_unary_inside_one(op: str) -> None:
    check_against_onnxruntime(op, {"x": np.tanh(normal(3, 5))}, opset=13)


def test_acosh() -> None:
    check_against_onnxruntime("Acosh", {"x": np.abs(normal(9)) + 1.1}, opset=9)


@pytest.mark.parametrize("slope", [(3, 1, 1), (1,), (5,), (2, 3, 4, 5)], ids=named)
@pytest.mark.parametrize("opset", [7, 9, 16])
def test_prelu(slope: tuple[int, ...], opset: int) -> None:
    check_against_onnxruntime("PRelu", {"x": normal(2, 3, 4, 5), "slope": normal(*slope)}, opset=opset)


@pytest.mark.parametrize("op", ["Softmax", "LogSoftmax", "Hardmax"])
@pytest.mark.parametrize(
    ("opset", "axis"),
    [(9, None), (9, 0), (9, 2), (11, -1), (11, 1), (12, -3), (13, None), (13, 0), (13, 1), (13, -2)],
    ids=named,
)
def test_softmax_family(op: str, opset: int, axis: int | None) -> None:
    attributes = {} if axis is None else {"axis": axis}
    check_against_onnxruntime(op, {"x": normal(2, 3, 4)}, opset=opset, **attributes)


@pytest.mark.parametrize(
    "limits",
    [{"low": -0.5, "high": 0.5}, {"low": -0.5}, {"high": 0.25}, {"low": 1.0, "high": -1.0}],
    ids=named,
)
@pytest.mark.parametrize("opset", [7, 11, 12, 13])
def test_clip(limits: dict[str, float], opset: int) -> None:
    if opset < 11:
        attributes = {{"low": "min", "high": "max"}[k]: v for k, v in limits.items()}
        if attributes.get("min", -9.0) > attributes.get("max", 9.0):
            attributes = {"min": attributes["max"], "max": attributes["min"]}  # onnxruntime refuses the other
        check_against_onnxruntime("Clip", {"x": normal(3, 4)}, opset=opset, **attributes)
        return
    feed = {"x": normal(3, 4), **{k: np.float32(v) for k, v in limits.items()}}
    names = ["x", *(k if k in limits else "" for k in ("low", "high"))]
    check_against_onnxruntime("Clip", feed, opset=opset, inputs=names)


def test_clip_of_integers() -> None:
    feed = {"x": np.arange(-5, 6), "low": np.array(-2), "high": np.array(3)}
    check_against_onnxruntime("Clip", feed, opset=12)


@pytest.mark.parametrize("op", ["Min", "Max", "Sum", "Mean"])
@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("opset", [8, 13])
def test_variadic(op: str, n: int, opset: int) -> None:
    feed = {f"x{i}": normal(*((2, 3), (3,), (1, 1), (2, 1))[i]) for i in range(n)}
    check_against_onnxruntime(op, feed, opset=opset)


@pytest.mark.parametrize("op", ["Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual"])
@pytest.mark.parametrize("dtype", [np.float32, np.int64], ids=["float", "int"])
def test_comparisons(op: str, dtype: Any) -> None:
    a, b = (RNG.integers(0, 3, s).astype(dtype) for s in ((2, 3, 4), (3, 1)))
    check_against_onnxruntime(op, {"a": a, "b": b}, opset=13)


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
def test_boolean(op: str) -> None:
    a, b = (RNG.integers(0, 2, s).astype(bool) for s in ((2, 3, 4), (3, 1)))
    check_against_onnxruntime(op, {"a": a, "b": b}, opset=13)


def test_where_not_and_special_values() -> None:
    x = np.array([1.0, np.nan, np.inf, -np.inf, 0.0], np.float32)
    choice = np.array([[True], [False]])
    check_against_onnxruntime("Where", {"c": choice, "a": normal(2, 3), "b": normal(3)}, opset=9)
    check_against_onnxruntime("Not", {"x": choice}, opset=7)
    check_against_onnxruntime("IsNaN", {"x": x}, opset=13)
    for positive, negative in ((1, 1), (1, 0), (0, 1)):
        check_against_onnxruntime(
            "IsInf", {"x": x}, opset=10, detect_positive=positive, detect_negative=negative
        )


def test_batch_normalization() -> None:
    for opset in (7, 9, 14, 15):
        for shape in ((2, 3), (2, 3, 4), (2, 3, 4, 5), (1, 3, 2, 2, 2)):
            feed = {"x": normal(*shape), "scale": normal(3), "b": normal(3), "mean": normal(3)}
            feed["var"] = np.abs(normal(3)) + 0.1
            check_against_onnxruntime("BatchNormalization", feed, opset=opset, epsilon=1e-3, rtol=1e-4)


@pytest.mark.parametrize("axis", [-1, 1, 2, -2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_layer_normalization(axis: int, bias: bool) -> None:
    x = normal(2, 3, 4, 5)
    feed = {"x": x, "scale": normal(*x.shape[axis:])}
    if bias:
        feed["b"] = normal(*x.shape[axis:])
    check_against_onnxruntime(
        "LayerNormalization", feed, opset=17, axis=axis, epsilon=1e-4, rtol=1e-4, atol=1e-5
    )
    check_against_onnxruntime(
        "LayerNormalization", feed, opset=17, axis=axis, n_outputs=3, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 3, 3), (2, 4, 1, 1)], ids=named)
def test_channel_normalizations(shape: tuple[int, ...]) -> None:
    feed = {"x": normal(*shape), "scale": normal(4), "b": normal(4)}
    # A variance of few elements cancels; its rounding shows at 1e-4.
    check_against_onnxruntime("InstanceNormalization", feed, opset=7, rtol=1e-4, atol=1e-4)
    if shape[-1] > 1:
        check_against_onnxruntime("GroupNormalization", feed, opset=21, num_groups=2, rtol=1e-4, atol=1e-4)


def test_group_normalization_with_a_scale_per_group() -> None:
    feed = {"x": normal(2, 6, 3, 2), "scale": normal(2), "b": normal(2)}
    got = run_lowered(node_model("GroupNormalization", feed, opset=18, num_groups=2, epsilon=1e-3), feed)[
        "y0"
    ]
    parts = feed["x"].reshape(2, 2, 18).astype(np.float64)
    want = (parts - parts.mean(-1, keepdims=True)) / np.sqrt(parts.var(-1, keepdims=True) + 1e-3)
    want = want * feed["scale"].reshape(1, 2, 1) + feed["b"].reshape(1, 2, 1)
    np.testing.assert_allclose(got, want.reshape(2, 6, 3, 2), rtol=1e-5, atol=1e-5)  # float32 rounding


def test_lrn_of_even_size_looks_ahead() -> None:
    x = normal(1, 5, 2)
    got = run_lowered(node_model("LRN", {"x": x}, opset=13, size=4, alpha=0.4, beta=1.0, bias=2.0), {"x": x})
    # ONNX: from c - floor(3 / 2) to c + ceil(3 / 2). onnxruntime accepts odd sizes only.
    total = np.stack([(x[:, max(c - 1, 0) : c + 3] ** 2).sum(1) for c in range(5)], 1)
    np.testing.assert_allclose(got["y0"], x / (2.0 + 0.1 * total), rtol=1e-5)  # float32 rounding


@pytest.mark.parametrize("size", [1, 3, 5])
def test_lrn(size: int) -> None:
    x = normal(2, 6, 3, 4)
    check_against_onnxruntime("LRN", {"x": x}, opset=13, size=size, alpha=0.01, beta=0.6, bias=1.5)


@pytest.mark.parametrize(("p", "axis"), [(1, 1), (2, -1), (2, 0)])
def test_lp_normalization(p: int, axis: int) -> None:
    check_against_onnxruntime("LpNormalization", {"x": normal(3, 4, 5)}, opset=7, p=p, axis=axis)


def test_mean_variance_normalization() -> None:
    check_against_onnxruntime(
        "MeanVarianceNormalization", {"x": normal(2, 3, 4, 5)}, opset=9, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "shapes",
    [
        ((3, 4), (4, 5)),
        ((2, 3, 4), (4, 5)),
        ((2, 1, 3, 4), (5, 4, 2)),
        ((4,), (4, 5)),
        ((3, 4), (4,)),
        ((4,), (4,)),
    ],
    ids=named,
)
def test_matmul(shapes: Any) -> None:
    check_against_onnxruntime("MatMul", {"a": normal(*shapes[0]), "b": normal(*shapes[1])}, opset=13)


@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("c", [None, (5,), (3, 5), (3, 1), (1,), ()], ids=named)
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 2.0)])
def test_gemm(trans_a: int, trans_b: int, c: Any, alpha: float, beta: float) -> None:
    feed = {"a": normal(*((4, 3) if trans_a else (3, 4))), "b": normal(*((5, 4) if trans_b else (4, 5)))}
    if c is not None:
        feed["c"] = normal(*c)
    check_against_onnxruntime(
        "Gemm", feed, opset=11, transA=trans_a, transB=trans_b, alpha=alpha, beta=beta, atol=1e-5
    )


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bij,bjk->bik", [(2, 3, 4), (2, 4, 5)]),
        ("ij->ji", [(2, 3)]),
        ("bhid , bhjd -> bhij", [(2, 2, 3, 4), (2, 2, 5, 4)]),
        ("...ij,...jk->...ik", [(2, 3, 4), (2, 4, 5)]),
        ("ii->i", [(3, 3)]),
        ("i,i->", [(4,), (4,)]),
    ],
)
def test_einsum(equation: str, shapes: list[tuple[int, ...]]) -> None:
    feed = {f"x{i}": normal(*s) for i, s in enumerate(shapes)}
    check_against_onnxruntime("Einsum", feed, opset=12, equation=equation)


REDUCTIONS = [
    "ReduceSum",
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceProd",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
    "ReduceLogSum",
    "ReduceLogSumExp",
]


@pytest.mark.parametrize("op", REDUCTIONS)
@pytest.mark.parametrize("keep", [0, 1], ids=["drop", "keep"])
@pytest.mark.parametrize("axes", [None, [1], [0, -1]], ids=named)
def test_reductions(op: str, axes: list[int] | None, keep: int) -> None:
    x = np.abs(normal(2, 3, 4)) + 0.5
    for opset in (11, 13, 18):
        as_input = opset >= (13 if op == "ReduceSum" else 18)
        if as_input:
            feed = {"x": x} if axes is None else {"x": x, "axes": np.array(axes)}
            check_against_onnxruntime(op, feed, opset=opset, keepdims=keep)
        else:
            attributes = {} if axes is None else {"axes": axes}
            check_against_onnxruntime(op, {"x": x}, opset=opset, keepdims=keep, **attributes)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax"])
@pytest.mark.parametrize("noop", [0, 1])
def test_reduction_of_no_axes(op: str, noop: int) -> None:
    feed = {"x": normal(2, 3), "axes": np.array([], np.int64)}
    check_against_onnxruntime(op, feed, opset=18, noop_with_empty_axes=noop)


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceProd", "ReduceSumSquare"])
def test_reductions_of_integers(op: str) -> None:
    feed = {"x": RNG.integers(-9, 9, (3, 4)).astype(np.int32), "axes": np.array([1])}
    check_against_onnxruntime(op, feed, opset=18)


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("last", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize(("axis", "keep"), [(0, 1), (1, 0), (-1, 1)])
def test_arg_reductions(op: str, axis: int, keep: int, last: int) -> None:
    x = RNG.integers(0, 3, (3, 4, 5)).astype(np.float32)
    check_against_onnxruntime(op, {"x": x}, opset=13, axis=axis, keepdims=keep, select_last_index=last)


@pytest.mark.parametrize(("axis", "largest"), [(-1, 1), (0, 0), (1, 1)])
def test_top_k_breaks_ties_by_index(axis: int, largest: int) -> None:
    x = RNG.integers(0, 4, (900, 1000)).astype(np.float32)
    check_against_onnxruntime(
        "TopK", {"x": x, "k": np.array([4])}, opset=11, n_outputs=2, axis=axis, largest=largest
    )
    check_against_onnxruntime("TopK", {"x": x}, opset=9, n_outputs=2, axis=axis, k=3)


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_cum_sum(axis: int, exclusive: int, reverse: int) -> None:
    feed = {"x": normal(3, 4, 2), "axis": np.array(axis)}
    check_against_onnxruntime("CumSum", feed, opset=14, exclusive=exclusive, reverse=reverse)
