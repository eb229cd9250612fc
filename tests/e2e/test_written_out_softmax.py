"""Attention whose softmax is written out: found, and its weights quantized, as if one node had written them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxptq
from onnxptq.recipe import Recipe
from tests.unit.rotate.rotate_nets import TOKENS, Blocks

WIDTH = 16
SPELLINGS = {
    "one node": ("p", "y"),
    "quotient": ("p", "y"),
    "reciprocal": ("p", "y"),
    "logarithm": ("p", "y"),
    "deferred": ("part 1 of y", "pv"),
}
"""What the weights and the node that applies them are called."""


def _attention(spelling: str) -> onnx.ModelProto:
    """Attention of one head with the softmax in that spelling; the constants are the same in all."""
    net = Blocks()
    q, k, v = (net.linear(name, "x", WIDTH, WIDTH) for name in "qkv")
    scores = net.op("MatMul", "qk", q, net.op("Transpose", "kt", k, perm=[0, 2, 1]))
    last = net.ints("last", -1)
    if spelling == "one node":
        y = net.op("MatMul", "y", net.op("Softmax", "p", scores), v)
    elif spelling == "logarithm":
        y = net.op("MatMul", "y", net.op("Exp", "p", net.op("LogSoftmax", "log", scores)), v)
    else:
        shifted = net.op("Sub", "shifted", scores, net.op("ReduceMax", "top", scores, last))
        e = net.op("Exp", "e", shifted)
        total = net.op("ReduceSum", "total", e, last)
        if spelling == "deferred":
            y = net.op("Div", "y", net.op("MatMul", "pv", e, v), total)
        elif spelling == "quotient":
            y = net.op("MatMul", "y", net.op("Div", "p", e, total), v)
        else:
            y = net.op("MatMul", "y", net.op("Mul", "p", e, net.op("Reciprocal", "r", total)), v)
    return net.proto({"x": ["n", TOKENS, WIDTH]}, [net.linear("out", y, WIDTH, WIDTH)])


def _data() -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(3).standard_normal((16, 1, TOKENS, WIDTH)).astype(np.float32)}


def _quantized(spelling: str, folder: Path) -> onnxptq.Result:
    path = folder / "model.onnx"
    onnx.save(_attention(spelling), str(path))
    recipe = Recipe(target="simulate", weight_bits=8, activation_bits=6, observer="auto", softmax_root=1)
    return onnxptq.quantize(
        path, folder / "q.onnx", calibration=_data(), recipe=recipe, work_dir=folder / "work"
    )


@pytest.mark.parametrize("simplify", [True, False], ids=["simplified", "as it is"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_inspect_lists_it(spelling: str, simplify: bool, tmp_path: Path) -> None:
    onnx.save(_attention(spelling), str(tmp_path / "model.onnx"))
    found = onnxptq.inspect(tmp_path / "model.onnx", recipe=Recipe(simplify=simplify))
    (row,) = found.attention
    weights, product = SPELLINGS[spelling]
    assert (row.form, row.weights, row.values, row.scores) == ("product", weights, "v", ("qk",))
    assert row.product == product
    assert found.operators["Softmax"] == 1
    assert (
        not {"Exp", "Div", "ReduceSum", "ReduceMax", "Sub", "Reciprocal", "LogSoftmax"}
        & found.operators.keys()
    )
    # Every node of the file that is gone has become part of one that is there.
    gone = [node for node in found.names if node.op in ("Exp", "Div", "ReduceSum", "ReduceMax", "LogSoftmax")]
    assert all(node.homes for node in gone)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> onnxptq.Result:
    return _quantized("one node", tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if name != "one node"])
def test_its_weights_are_quantized(spelling: str, expected: onnxptq.Result, tmp_path: Path) -> None:
    report = _quantized(spelling, tmp_path).report
    assert report.parity is not None
    assert report.parity.max_steps == 0.0
    (softmax,), (plain,) = report.softmax, expected.report.softmax
    weights, product = SPELLINGS[spelling]
    rows = {row.tensor: row for row in report.quantized}
    assert rows[weights].readers == (product,)
    assert rows[weights].bits == softmax.bits == 6
    assert (softmax.low, softmax.high) == pytest.approx((plain.low, plain.high))
    assert report.outputs[0].sqnr_db == pytest.approx(expected.report.outputs[0].sqnr_db, abs=0.5)
