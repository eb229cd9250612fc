"""``fake_quantize`` against onnxruntime's own QuantizeLinear and DequantizeLinear: equal to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxptq.quantizers.affine import fake_quantize, range_of
from onnxptq.runtime import Session
from onnxptq.types import PerAxis, PerTensor, QParams, QType

GRIDS = {
    "uint8": QType.unsigned(8),
    "int8": QType.signed(8),
    "uint16": QType.unsigned(16, "uint16"),
    "int16": QType.signed(16, "int16"),
    "uint8 of 3 bits": QType.unsigned(3),
    "int8 of 5 bits": QType.signed(5),
}


def _session(qtype: QType, axis: int | None) -> Session:
    """[Clip ->] QuantizeLinear -> DequantizeLinear with all parameters as inputs."""
    storage = getattr(TensorProto, qtype.storage.upper())
    attributes = {} if axis is None else {"axis": axis}
    source = "clipped" if qtype.is_narrow else "x"
    nodes = [
        helper.make_node("QuantizeLinear", [source, "scale", "zero"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"], **attributes),
    ]
    inputs = [
        ("x", TensorProto.FLOAT, ["r", "c"]),
        ("scale", TensorProto.FLOAT, [] if axis is None else ["s"]),
    ]
    inputs.append(("zero", storage, [] if axis is None else ["s"]))
    if qtype.is_narrow:
        nodes.insert(0, helper.make_node("Clip", ["x", "low", "high"], ["clipped"]))
        inputs += [("low", TensorProto.FLOAT, []), ("high", TensorProto.FLOAT, [])]
    graph = helper.make_graph(
        nodes,
        "formula",
        [helper.make_tensor_value_info(*entry) for entry in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["r", "c"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    return Session(model.SerializeToString(), exact=True)


@pytest.fixture(scope="module")
def sessions() -> dict[tuple[str, int | None], Session]:
    return {(name, axis): _session(qtype, axis) for name, qtype in GRIDS.items() for axis in (None, 0, 1)}


def _compare(session: Session, x: np.ndarray, qparams: QParams) -> None:
    feed = {
        "x": x,
        "scale": qparams.scale,
        "zero": qparams.zero_point.astype(qparams.qtype.storage),
    }
    if qparams.qtype.is_narrow:
        low, high = range_of(qparams)
        feed |= {"low": np.asarray(low), "high": np.asarray(high)}
    found = session.run(feed)["y"]
    wanted = fake_quantize(x, qparams)
    # Equality, not closeness: both are one division, one rounding, one product in single precision.
    assert np.array_equal(wanted, found), (
        x[wanted != found],
        wanted[wanted != found],
        found[wanted != found],
    )


@pytest.mark.parametrize("name", GRIDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_per_tensor(sessions: dict[tuple[str, int | None], Session], name: str, data: st.DataObject) -> None:
    qtype = GRIDS[name]
    scale = np.float32(data.draw(st.floats(2.0**-126, 1e10, width=32), label="scale"))
    zero = data.draw(st.integers(qtype.qmin, qtype.qmax), label="zero point")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1), label="seed"))
    steps = np.concatenate(
        [
            rng.uniform(qtype.qmin - zero - 3, qtype.qmax - zero + 3, 200),
            np.arange(-20, 21) + 0.5,  # exact ties wherever scale is a power of two, near ties elsewhere
            [0.0, -0.0, 1e12, -1e12],
        ]
    )
    with np.errstate(over="ignore"):
        x = (steps.astype(np.float32) * scale).reshape(1, -1)
    x = np.clip(x, -3e38, 3e38)
    qparams = QParams(
        scale=np.asarray(scale), zero_point=np.asarray(zero, np.int32), qtype=qtype, granularity=PerTensor()
    )
    with np.errstate(over="ignore"):
        _compare(sessions[name, None], x, qparams)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", [name for name, qtype in GRIDS.items() if not qtype.is_narrow])
def test_per_axis(sessions: dict[tuple[str, int | None], Session], name: str, axis: int) -> None:
    qtype = GRIDS[name]
    rng = np.random.default_rng(5)
    x = rng.normal(0, 3, (37, 37)).astype(np.float32)
    scale = rng.uniform(1e-4, 0.1, 37).astype(np.float32)
    zero = rng.integers(qtype.qmin, qtype.qmax, 37).astype(np.int32)
    qparams = QParams(scale=scale, zero_point=zero, qtype=qtype, granularity=PerAxis(axis))
    _compare(sessions[name, axis], x, qparams)


@pytest.mark.parametrize("name", GRIDS)
def test_ties_round_to_even(sessions: dict[tuple[str, int | None], Session], name: str) -> None:
    """On a power-of-two scale every half step is a tie, exactly."""
    qtype = GRIDS[name]
    middle = (qtype.qmin + qtype.qmax) // 2
    x = (np.arange(-400, 401, dtype=np.float32) * np.float32(0.125)).reshape(1, -1)
    qparams = QParams(
        scale=np.asarray(0.25, np.float32),
        zero_point=np.asarray(middle, np.int32),
        qtype=qtype,
        granularity=PerTensor(),
    )
    _compare(sessions[name, None], x, qparams)
