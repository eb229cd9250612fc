"""``fake_quantize`` is what onnxruntime computes for [Clip,] QuantizeLinear, DequantizeLinear: bit for bit."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper

from onnxptq.quantizers.affine import (
    SMALLEST_SCALE,
    asymmetric_qparams,
    dequantize,
    fake_quantize,
    quantize,
    range_of,
    symmetric_qparams,
)
from onnxptq.runtime import Session
from onnxptq.types import PerAxis, PerTensor, QParams, QType

GRIDS = [QType.signed(b) for b in range(2, 9)] + [QType.unsigned(b) for b in range(2, 9)]
GRIDS += [QType.signed(4, "int4"), QType.signed(3, "int4"), QType.unsigned(4, "uint4")]
IDS = [f"{'s' if g.is_signed else 'u'}{g.bits}_{g.storage}" for g in GRIDS]
_ONNX_TYPES = {
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
}
ANY_FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)
SCALES = st.floats(min_value=float(np.finfo(np.float32).tiny), max_value=float(np.float32(3e38)), width=32)


@cache
def _session(storage: str, axis: int | None, clipped: bool) -> Session:
    """x, low, high, scale, zero (int32) -> dequantized; as written files have it, but with every number an input."""
    attrs = {} if axis is None else {"axis": axis}
    nodes = [helper.make_node("Cast", ["zero"], ["zp"], to=_ONNX_TYPES[storage])]
    source = "x"
    if clipped:
        nodes.append(helper.make_node("Clip", ["x", "low", "high"], ["c"]))
        source = "c"
    nodes += [
        helper.make_node("QuantizeLinear", [source, "scale", "zp"], ["q"], **attrs),
        helper.make_node("DequantizeLinear", ["q", "scale", "zp"], ["y"], **attrs),
    ]
    kinds = {"x": None, "scale": None, "zero": TensorProto.INT32} | (
        {"low": None, "high": None} if clipped else {}
    )
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(k, v or TensorProto.FLOAT, None) for k, v in kinds.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return Session(model.SerializeToString(), exact=True, threads=1)


def _by_onnxruntime(x: np.ndarray, qparams: QParams) -> np.ndarray:
    axis = qparams.granularity.axis if isinstance(qparams.granularity, PerAxis) else None
    feed = {"x": x, "scale": qparams.scale, "zero": qparams.zero_point}
    clipped = qparams.qtype.is_narrow
    if clipped:
        feed["low"], feed["high"] = range_of(qparams)
    return _session(qparams.qtype.storage, axis, clipped).run(feed)["y"]


def _assert_same_bits(found: np.ndarray, wanted: np.ndarray) -> None:
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == wanted.dtype == np.float32


@pytest.mark.parametrize("qtype", GRIDS, ids=IDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_float_on_any_grid(qtype: QType, data: st.DataObject) -> None:
    scale = np.float32(data.draw(SCALES))
    zero_point = data.draw(st.integers(qtype.qmin, qtype.qmax))
    qparams = QParams(
        scale=np.asarray(scale),
        zero_point=np.asarray(zero_point, np.int32),
        qtype=qtype,
        granularity=PerTensor(),
    )
    x = data.draw(hnp.arrays(np.float32, st.integers(1, 40), elements=ANY_FLOAT))
    steps = np.arange(-4, 5, dtype=np.float32) + np.float32(0.5)
    with np.errstate(over="ignore", invalid="ignore"):
        ties = np.nan_to_num(np.concatenate([steps, np.nextafter(steps, np.float32(0))]) * scale)
    x = np.concatenate([x, ties, np.array([0.0, -0.0, 1e-45, -1e-45, 3.4e38, -3.4e38], np.float32)])
    _assert_same_bits(fake_quantize(x, qparams), _by_onnxruntime(x, qparams))


@pytest.mark.parametrize("qtype", [QType.signed(8), QType.unsigned(8)], ids=["s8", "u8"])
@pytest.mark.parametrize("axis", [0, 1, 2])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_per_axis(qtype: QType, axis: int, data: st.DataObject) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=5))
    x = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-1e3, 1e3, width=32)))
    n = shape[axis]
    qparams = QParams(
        scale=data.draw(hnp.arrays(np.float32, n, elements=st.floats(2.0**-10, 16.0, width=32))),
        zero_point=data.draw(hnp.arrays(np.int32, n, elements=st.integers(qtype.qmin, qtype.qmax))),
        qtype=qtype,
        granularity=PerAxis(axis),
    )
    _assert_same_bits(fake_quantize(x, qparams), _by_onnxruntime(x, qparams))


@pytest.mark.parametrize("qtype", GRIDS, ids=IDS)
@settings(max_examples=40, deadline=None)
@example(low=-3.4028234663852886e38, high=0.0)
@example(low=-3.4028234663852886e38, high=3.4028234663852886e38)
@given(low=ANY_FLOAT, high=ANY_FLOAT)
def test_asymmetric_parameters_cover_their_range_and_zero(qtype: QType, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    qparams = asymmetric_qparams(low, high, qtype)
    assert qparams.scale >= SMALLEST_SCALE
    assert qtype.qmin <= qparams.zero_point <= qtype.qmax
    assert fake_quantize(np.zeros(1, np.float32), qparams)[0] == 0.0
    bottom, top = (float(v) for v in range_of(qparams))
    # The zero point moves by up to half a step when it is rounded; a thousandth more for the scale's rounding.
    slack = 0.501 * float(qparams.scale)
    assert bottom <= min(low, 0.0) + slack
    assert top >= max(high, 0.0) - slack


@pytest.mark.parametrize("qtype", GRIDS, ids=IDS)
@settings(max_examples=60, deadline=None)
@given(end=st.floats(min_value=float(np.float32(1e-10)), max_value=float(np.float32(3e38)), width=32))
def test_a_one_sided_range_is_never_exceeded(qtype: QType, end: float) -> None:
    """Runtimes drop a Relu or Clip before a quantizer only if the quantizer stays inside its bounds."""
    assert range_of(asymmetric_qparams(0.0, end, qtype))[1] <= np.float32(end)
    assert range_of(asymmetric_qparams(-end, 0.0, qtype))[0] >= np.float32(-end)
    assert asymmetric_qparams(0.0, end, qtype).zero_point == qtype.qmin
    assert asymmetric_qparams(-end, 0.0, qtype).zero_point == qtype.qmax


@pytest.mark.parametrize("qtype", GRIDS, ids=IDS)
@settings(max_examples=40, deadline=None)
@given(absmax=st.floats(min_value=0.0, max_value=float(np.float32(3e38)), width=32))
def test_symmetric_parameters_reach_both_ends(qtype: QType, absmax: float) -> None:
    qparams = symmetric_qparams(np.asarray(absmax), qtype, PerTensor())
    low, high = (float(v) for v in range_of(qparams))
    # Two roundings, of the quotient and of the product, each within half a unit in the last place.
    assert high >= absmax * (1 - 2.0**-22)
    assert low <= -absmax * (1 - 2.0**-22)
    assert fake_quantize(np.zeros(1, np.float32), qparams)[0] == 0.0


@settings(max_examples=60, deadline=None)
@given(values=hnp.arrays(np.int32, st.integers(1, 50), elements=st.integers(-(2**31), 2**31 - 1)))
def test_int32_biases_saturate_instead_of_wrapping(values: np.ndarray) -> None:
    qparams = QParams(
        scale=np.ones((), np.float32),
        zero_point=np.zeros((), np.int32),
        qtype=QType.signed(32, "int32"),
        granularity=PerTensor(),
    )
    floats = np.concatenate([values.astype(np.float32), np.array([3e38, -3e38, 2.0**31], np.float32)])
    wanted = np.clip(floats.astype(np.float64), -(2**31), 2**31 - 1).astype(np.int64)
    np.testing.assert_array_equal(quantize(floats, qparams), wanted)


def test_dequantized_integers_beyond_the_floats_become_infinite_like_onnxruntimes() -> None:
    qparams = symmetric_qparams(np.asarray(3.4e38), QType.signed(8), PerTensor())
    found = dequantize(np.array([-128, 127], np.int8), qparams)
    assert found[0] == -np.inf
    assert np.isfinite(found[1])


def test_the_onnx_types_of_the_oracle_are_those_of_the_writer() -> None:
    assert {g.storage for g in GRIDS} == set(_ONNX_TYPES)
    assert onnx.helper.tensor_dtype_to_np_dtype(TensorProto.INT8) == np.int8
