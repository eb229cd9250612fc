"""Convolutions and pools against onnxruntime."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from tests.unit.lowering.lowering_oracle import RNG, check_against_onnxruntime, named, normal

CONV_CASES: list[dict[str, Any]] = [
    {},
    {"pads": [1, 1, 1, 1]},
    {"pads": [0, 1, 2, 0]},
    {"strides": [2, 1], "pads": [1, 1, 1, 1]},
    {"dilations": [2, 2], "pads": [2, 2, 2, 2]},
    {"auto_pad": "SAME_UPPER", "strides": [2, 2]},
    {"auto_pad": "SAME_LOWER", "strides": [2, 2]},
    {"auto_pad": "SAME_UPPER", "strides": [3, 2]},
    {"auto_pad": "VALID", "strides": [2, 2]},
    {"group": 2},
    {"group": 4, "pads": [1, 1, 1, 1]},
]


@pytest.mark.parametrize("case", CONV_CASES, ids=named)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_conv_2d(case: dict[str, Any], bias: bool) -> None:
    feed = {"x": normal(2, 4, 8, 9), "w": normal(4, 4 // case.get("group", 1), 3, 2)}
    if bias:
        feed["b"] = normal(4)
    check_against_onnxruntime("Conv", feed, opset=11, kernel_shape=[3, 2], **case)


@pytest.mark.parametrize("opset", [7, 11, 22])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_ranks_and_opsets(dims: int, opset: int) -> None:
    feed = {"x": normal(2, 3, *(6, 5, 4)[:dims]), "w": normal(5, 3, *(3, 2, 2)[:dims]), "b": normal(5)}
    check_against_onnxruntime("Conv", feed, opset=opset, pads=[1, 0, 1][:dims] + [0, 1, 1][:dims])


CONV_TRANSPOSE_CASES: list[dict[str, Any]] = [
    {},
    {"strides": [2, 2]},
    {"strides": [2, 3], "pads": [1, 1, 1, 1]},
    {"strides": [2, 2], "pads": [0, 1, 2, 0]},
    {"strides": [2, 2], "output_padding": [1, 1]},
    {"strides": [3, 2], "pads": [1, 0, 1, 1], "output_padding": [2, 1]},
    {"dilations": [2, 2], "pads": [1, 1, 1, 1]},
    {"strides": [2, 2], "output_shape": [9, 11]},
    {"strides": [2, 2], "output_shape": [10, 12]},
    {"strides": [2, 2], "output_shape": [8, 9], "auto_pad": "SAME_UPPER"},
    {"strides": [2, 2], "output_shape": [8, 9], "auto_pad": "SAME_LOWER"},
    {"strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"strides": [2, 2], "auto_pad": "SAME_LOWER"},
    {"strides": [2, 2], "auto_pad": "VALID"},
    {"group": 2, "strides": [2, 2], "pads": [1, 0, 0, 1]},
]


@pytest.mark.parametrize("case", CONV_TRANSPOSE_CASES, ids=named)
def test_conv_transpose_2d(case: dict[str, Any]) -> None:
    feed = {"x": normal(2, 4, 4, 5), "w": normal(4, 3, 3, 3), "b": normal(3 * case.get("group", 1))}
    check_against_onnxruntime("ConvTranspose", feed, opset=11, rtol=1e-4, atol=1e-5, **case)


@pytest.mark.parametrize("opset", [7, 11, 22])
@pytest.mark.parametrize("dims", [1, 3])
def test_conv_transpose_ranks_and_opsets(dims: int, opset: int) -> None:
    feed = {"x": normal(1, 3, *(4, 3, 3)[:dims]), "w": normal(3, 2, *(3, 2, 2)[:dims])}
    check_against_onnxruntime("ConvTranspose", feed, opset=opset, strides=[2] * dims, rtol=1e-4, atol=1e-5)


POOL_CASES: list[dict[str, Any]] = [
    {"kernel_shape": [2, 2], "strides": [2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
    {"kernel_shape": [3, 2], "pads": [0, 1, 2, 0]},
    {"kernel_shape": [3, 3], "pads": [2, 2, 2, 2]},
    {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "strides": [3, 3], "ceil_mode": 1},
    {"kernel_shape": [2, 2], "strides": [3, 3], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1], "ceil_mode": 1},
    {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "VALID"},
]


@pytest.mark.parametrize("case", POOL_CASES, ids=named)
@pytest.mark.parametrize("size", [(8, 8), (7, 10)], ids=["8x8", "7x10"])
def test_max_pool(case: dict[str, Any], size: tuple[int, int]) -> None:
    check_against_onnxruntime("MaxPool", {"x": normal(2, 3, *size)}, opset=12, **case)


@pytest.mark.parametrize("case", POOL_CASES, ids=named)
@pytest.mark.parametrize(
    ("size", "include"), [((8, 8), 0), ((7, 10), 0), ((7, 10), 1)], ids=["8x8", "7x10", "7x10-padding"]
)
def test_average_pool(case: dict[str, Any], size: tuple[int, int], include: int) -> None:
    feed = {"x": normal(2, 3, *size)}
    check_against_onnxruntime("AveragePool", feed, opset=19, count_include_pad=include, **case)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize("ceil", [0, 1], ids=["floor", "ceil"])
@pytest.mark.parametrize("pad", [0, 1])
def test_dilated_pools(op: str, ceil: int, pad: int) -> None:
    case = {"kernel_shape": [3, 2], "dilations": [2, 3], "strides": [2, 2], "pads": [pad] * 4}
    check_against_onnxruntime(op, {"x": normal(2, 3, 9, 10)}, opset=19, ceil_mode=ceil, **case)


@pytest.mark.parametrize(
    ("op", "opset", "dims"),
    list(product(["MaxPool", "AveragePool", "LpPool"], [7, 11, 22], [1, 2, 3])),
    ids=lambda v: str(v),
)
def test_pool_ranks_and_opsets(op: str, opset: int, dims: int) -> None:
    x = np.abs(normal(2, 3, *(6, 5, 4)[:dims]))
    check_against_onnxruntime(op, {"x": x}, opset=opset, kernel_shape=[2] * dims, strides=[2, 1, 2][:dims])


@pytest.mark.parametrize("p", [1, 2, 3])
def test_lp_pool_pads(p: int) -> None:
    case = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 0, 1, 1], "p": p}
    # Cube roots and powers of sums: two roundings more than a plain sum.
    check_against_onnxruntime("LpPool", {"x": normal(1, 2, 7, 8)}, opset=18, rtol=1e-4, atol=1e-5, **case)


@pytest.mark.parametrize("most", [127, -100])
def test_max_pool_of_integers(most: int) -> None:
    x = RNG.integers(-128, most, (1, 2, 6, 6)).astype(np.int8)
    check_against_onnxruntime("MaxPool", {"x": x}, opset=12, kernel_shape=[3, 3], pads=[1, 1, 1, 1])


@pytest.mark.parametrize("op", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 3, 5, 4), (2, 3, 2, 3, 4)], ids=["1d", "2d", "3d"])
def test_global_pools(op: str, shape: tuple[int, ...]) -> None:
    check_against_onnxruntime(op, {"x": normal(*shape)}, opset=7)
