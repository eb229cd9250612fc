"""Error-compensated rounding against a literal version, and its rows against onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import find_linears
from onnxptq.quantizers.affine import fake_quantize, search_weight_qparams
from onnxptq.ranks import ALONE
from onnxptq.reconstruct.closed_form import DAMPING, round_weights
from onnxptq.reconstruct.gram import Gram, layer_rows, picked, weight_matrix, weight_tensor
from onnxptq.runtime import Session
from onnxptq.types import PerAxis, QParams, QType
from tests.unit.small_nets import Net, canonical

RNG = np.random.default_rng(0)


def _rows(groups: int, n: int, width: int) -> np.ndarray:
    mixing = RNG.standard_normal((groups, max(2, width // 3), width))
    base = RNG.standard_normal((groups, n, mixing.shape[1])) @ mixing
    return (base + 0.2 * RNG.standard_normal((groups, n, width))).astype(np.float32)


def _literal(weight: np.ndarray, g: np.ndarray, c: np.ndarray, qparams: QParams) -> np.ndarray:
    """One group, one input after the other, as the module's docstring says it."""
    k = g.shape[0]
    lam = DAMPING * np.trace(g) / k * np.eye(k)
    work = np.linalg.solve(g + lam, (c + lam) @ weight.T.astype(np.float64)).T
    order = np.argsort(-np.diag(g), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv((g + lam)[np.ix_(order, order)])).T
    done = np.zeros_like(work)
    for place, column in enumerate(order):
        done[:, column] = fake_quantize(work[:, column].astype(np.float32)[:, None], qparams)[:, 0]
        error = (work[:, column] - done[:, column]) / upper[place, place]
        for later in range(place + 1, k):
            work[:, order[later]] -= error * upper[place, later]
    return done.astype(np.float32)


@pytest.mark.parametrize("limit", [20, 21, 24, 1000])
def test_all_rows_are_taken_where_there_is_room(limit: int) -> None:
    np.testing.assert_array_equal(picked(20, limit), np.arange(20))
    assert len(picked(2000, limit)) == limit


def test_a_transposed_input_has_no_rows(tmp_path: Path) -> None:
    net = Net()
    net.op("Gemm", "y", "x", net.weight("w", 5, 4), transA=1)
    model = canonical(net.proto({"x": [5, 3]}, ["y"]), tmp_path)
    for layer in find_linears(GraphIndex(model.graph)):
        assert layer_rows(layer, np.zeros((5, 3), np.float32), None, 10) is None


def test_sums_of_rows_that_stay_as_they_are_remain_one_array() -> None:
    """By that the rounding knows that there is no error of inputs to make up for."""
    rows = _rows(1, 30, 5)
    for is_mixed in (False, True):
        first, second = (Gram.empty(1, 5, is_mixed=is_mixed) for _ in range(2))
        first.add(rows[:, :10], rows[:, :10])
        second.add(rows[:, 10:], rows[:, 10:])
        whole = Gram.empty(1, 5, is_mixed=is_mixed)
        whole.add(rows, rows)
        both = first.plus(second)
        for found in (both, both.centred(), whole.sum_over(ALONE)):
            assert (found.mixed is found.quantized) == (not is_mixed)
            np.testing.assert_allclose(found.mixed, found.quantized, rtol=1e-5, atol=1e-4)
        assert both.rows == whole.rows == 30
        np.testing.assert_allclose(both.quantized, whole.quantized, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("groups", "channels", "width"), [(1, 5, 7), (3, 2, 9), (1, 4, 150)])
@pytest.mark.parametrize("bits", [3, 8])
def test_it_is_the_literal_algorithm(groups: int, channels: int, width: int, bits: int) -> None:
    x = _rows(groups, 400, width)
    xq = (np.round(x * 2) / 2).astype(np.float32)
    gram = Gram.empty(groups, width)
    gram.add(x, xq)
    weight = RNG.standard_normal((groups, channels, width)).astype(np.float32)
    qparams = search_weight_qparams(weight.reshape(-1, width), QType.signed(bits), PerAxis(0))
    found = round_weights(weight, gram, qparams)
    for i in range(groups):
        own = QParams(
            scale=qparams.scale[i * channels : (i + 1) * channels],
            zero_point=qparams.zero_point[i * channels : (i + 1) * channels],
            qtype=qparams.qtype,
            granularity=PerAxis(0),
        )
        wanted = _literal(weight[i], gram.quantized[i], gram.mixed[i], own)
        # Blocks add the same terms in another order: where a value sits on a rounding tie, a step may differ.
        assert np.mean(found[i] != wanted) <= 0.01


def test_the_output_error_falls_and_weights_lie_on_the_grid() -> None:
    x = _rows(1, 2000, 40)
    gram = Gram.empty(1, 40, is_mixed=False)
    gram.add(x, x)
    weight = RNG.standard_normal((1, 16, 40)).astype(np.float32)
    qparams = search_weight_qparams(weight[0], QType.signed(4), PerAxis(0))
    nearest, found = fake_quantize(weight[0], qparams), round_weights(weight, gram, qparams)[0]
    assert np.array_equal(fake_quantize(found, qparams), found)
    errors = [float(np.square(x[0] @ (weight[0] - w).T).mean()) for w in (nearest, found)]
    assert errors[1] < 0.5 * errors[0]


def test_inputs_that_are_always_zero_keep_the_nearest_weights() -> None:
    gram = Gram.empty(2, 6)
    gram.add(np.zeros((2, 50, 6), np.float32), np.zeros((2, 50, 6), np.float32))
    weight = RNG.standard_normal((2, 3, 6)).astype(np.float32)
    qparams = search_weight_qparams(weight.reshape(-1, 6), QType.signed(8), PerAxis(0))
    found = round_weights(weight, gram, qparams)
    assert np.array_equal(found.reshape(-1, 6), fake_quantize(weight.reshape(-1, 6), qparams))


CONVOLUTIONS = {
    "plain": ((6, 4, 3, 3), {}),
    "strided": ((6, 4, 3, 2), {"strides": [2, 1], "pads": [1, 0, 2, 1]}),
    "dilated": ((6, 4, 2, 3), {"dilations": [3, 2], "pads": [0, 0, 0, 0]}),
    "grouped": ((6, 2, 3, 3), {"group": 2}),
    "depthwise": ((8, 1, 3, 3), {"group": 4}),
}


@pytest.mark.parametrize("kind", [*CONVOLUTIONS, "linear", "gemm", "gemm transposed"])
def test_rows_times_weights_are_the_layers_outputs(kind: str, tmp_path: Path) -> None:
    net = Net()
    if kind in CONVOLUTIONS:
        shape, attributes = CONVOLUTIONS[kind]
        value, output = [2, 4, 9, 8], net.conv("y", "x", shape, bias=False, **attributes)
    elif kind == "linear":
        value, output = [2, 5, 6], net.op("MatMul", "y", "x", net.weight("w", 6, 3))
    else:
        transposed = int(kind != "gemm")
        weight = net.weight("w", *((3, 6) if transposed else (6, 3)))
        value, output = [5, 6], net.op("Gemm", "y", "x", weight, transB=transposed)
    model = canonical(net.proto({"x": value}, [output]), tmp_path)
    (layer,) = find_linears(GraphIndex(model.graph))
    x = RNG.standard_normal(value).astype(np.float32)
    y = Session(model.path, exact=True).run({"x": x})[output]
    rows = layer_rows(layer, x, None, limit=10**6)
    assert rows is not None
    matrix = weight_matrix(layer, layer.weight.values)
    assert np.array_equal(weight_tensor(layer, matrix), layer.weight.values)
    found = np.einsum("gnk,gck->ngc", rows[0], matrix)
    wanted = y.reshape(-1, y.shape[-1]) if kind not in CONVOLUTIONS else np.moveaxis(y, 1, -1)
    # Single-precision sums of at most 54 products in another order.
    np.testing.assert_allclose(
        found.reshape(wanted.reshape(-1, matrix.shape[0] * matrix.shape[1]).shape),
        wanted.reshape(-1, matrix.shape[0] * matrix.shape[1]),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("limit", [1, 7, 50])
def test_about_as_many_rows_are_taken_as_asked(limit: int, tmp_path: Path) -> None:
    net = Net()
    model = canonical(net.proto({"x": [1, 4, 9, 8]}, [net.conv("y", "x", (6, 4, 3, 3))]), tmp_path)
    (layer,) = find_linears(GraphIndex(model.graph))
    rows = layer_rows(layer, RNG.standard_normal((1, 4, 9, 8)).astype(np.float32), None, limit)
    assert rows is not None
    assert limit / 2 <= rows[0].shape[1] <= limit


@pytest.mark.parametrize(("samples", "side", "limit"), [(8, 32, 264), (4, 16, 64), (16, 8, 100)])
@pytest.mark.parametrize("kind", ["Conv", "MatMul"])
def test_rows_come_from_every_column(kind: str, samples: int, side: int, limit: int, tmp_path: Path) -> None:
    """Steps of a multiple of the width would see one column of pictures, or one token of windows, and no other."""
    net = Net()
    columns = np.arange(side, dtype=np.float32)
    if kind == "Conv":
        output, value = net.conv("y", "x", (2, 1, 1, 1)), np.tile(columns, (samples, 1, side, 1))
    else:
        output, value = (
            net.op("MatMul", "y", "x", net.weight("w", 1, 3)),
            np.tile(columns, (samples, side, 1)),
        )
        value = value[..., None]
    model = canonical(net.proto({"x": list(value.shape)}, [output]), tmp_path)
    (layer,) = find_linears(GraphIndex(model.graph))
    rows = layer_rows(layer, value, None, limit)
    assert rows is not None
    seen, counts = np.unique(rows[0], return_counts=True)
    assert 0.8 * limit <= counts.sum() <= limit
    assert seen.tolist() == columns.tolist()
    assert counts.max() <= 3 * counts.mean()


def test_a_group_that_is_close_to_singular_leaves_the_others_alone() -> None:
    """Inputs that hardly leave their mean have sums about it that are not definite: they alone are damped more."""
    x = _rows(1, 400, 6)
    gram = Gram.empty(2, 6)
    gram.add(np.repeat(x, 2, axis=0), np.round(np.repeat(x, 2, axis=0) * 2) / 2)
    gram.quantized[1] -= 1.5 * np.linalg.eigvalsh(gram.quantized[1])[3] * np.eye(6)
    weight = RNG.standard_normal((2, 4, 6)).astype(np.float32)
    qparams = search_weight_qparams(weight.reshape(8, 6), QType.signed(3), PerAxis(0))
    found = round_weights(weight, gram, qparams)
    own = QParams(
        scale=qparams.scale[:4],
        zero_point=qparams.zero_point[:4],
        qtype=qparams.qtype,
        granularity=PerAxis(0),
    )
    alone = Gram(
        *(getattr(gram, name)[:1] for name in ("quantized", "mixed", "float_total", "quantized_total")), 400
    )
    np.testing.assert_array_equal(found[:1], round_weights(weight[:1], alone, own))


@pytest.mark.parametrize(
    ("size", "read", "is_finite"), [(1.0, 1.0, True), (1e30, 1e10, False), (1e30, 1e30, False)]
)
def test_sums_know_whether_they_are_finite(size: float, read: float, is_finite: bool) -> None:
    """Quantized rows may be cut off where the float ones are not."""
    gram = Gram.empty(1, 2)
    gram.add(np.full((1, 3, 2), size, np.float32), np.full((1, 3, 2), read, np.float32))
    assert gram.is_finite == is_finite
