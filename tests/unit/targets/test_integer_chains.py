"""Operators between integer kernels: which are quantized, and that onnxruntime then leaves none of them in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.types import QuantPlan
from tests.unit.small_nets import NETS, Net, silu
from tests.unit.targets.plans import edges_of, kernels_of, plan_of

FLOAT_OPS = {
    "Add",
    "AveragePool",
    "Concat",
    "GlobalAveragePool",
    "LeakyRelu",
    "Mul",
    "QuickGelu",
    "Relu",
    "Sigmoid",
}


@pytest.mark.parametrize(
    ("net", "wanted"),
    [
        (
            "csp_block",
            {"QLinearConv": 5, "QLinearSigmoid": 4, "QLinearMul": 4, "QLinearAdd": 1, "QLinearConcat": 2},
        ),
        (
            "squeezed_block",
            {
                "QLinearConv": 8,
                "QLinearLeakyRelu": 1,
                "QLinearGlobalAveragePool": 2,
                "QLinearSigmoid": 2,
                "QLinearMul": 2,
                "QLinearAdd": 2,
                "QLinearAveragePool": 1,
            },
        ),
    ],
)
def test_chains_run_on_integers(net: str, wanted: Mapping[str, int], tmp_path: Path) -> None:
    found = kernels_of(NETS[net](), tmp_path)
    assert {op: found.get(op) for op in wanted} == wanted
    assert not FLOAT_OPS & set(found)
    # The input is quantized once, and the output becomes float once.
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1


def _between(build: Callable[[Net, str], str], folder: Path, **request: object) -> QuantPlan:
    """Two convolutions, and what ``build`` puts between them."""
    net = Net()
    x = build(net, net.conv("first", "x", (8, 8, 3, 3)))
    model = net.proto({"x": [1, 8, 8, 8]}, [net.conv("last", x, (8, 8, 1, 1))])
    return plan_of(model, folder, "ort-cpu", **request)


def test_a_gate_is_quantized_with_what_it_weighs(tmp_path: Path) -> None:
    found = edges_of(_between(lambda net, x: silu(net, "act", x), tmp_path))
    assert {("act.sigmoid", 0), ("act", 0), ("act", 1), ("last", 0)} <= set(found)
    assert found["act", 0].quantizer_id == found["act.sigmoid", 0].quantizer_id == "first"
    assert found["act", 1].bounds == (0.0, 1.0)


def _through_float(net: Net, x: str) -> str:
    return net.op("Mul", "product", x, net.op("Erf", "erf", x))


def _with_a_constant(net: Net, x: str) -> str:
    return net.op("Add", "sum", x, net.weight("c", 1, 8, 1, 1))


def _read_in_float(net: Net, x: str) -> str:
    return net.op("Erf", "erf", net.op("LeakyRelu", "leaky", x))


@pytest.mark.parametrize(
    ("build", "reads_float"),
    [(_through_float, ("product", 1)), (_with_a_constant, ("sum", 1)), (_read_in_float, ("erf", 0))],
)
def test_what_float_operators_feed_or_read_stays_in_float(
    build: Callable[[Net, str], str], reads_float: tuple[str, int], tmp_path: Path
) -> None:
    assert reads_float not in edges_of(_between(build, tmp_path))


def test_a_member_that_is_taken_out_takes_its_chain_along(tmp_path: Path) -> None:
    """Without its sigmoid the product would read a float tensor."""
    for declined in ("act.sigmoid", "act"):
        plan = _between(lambda net, x: silu(net, "act", x), tmp_path, declined={declined: "asked for"})
        assert "act.sigmoid" not in {q.tensor for q in plan.quantizers}


def test_a_tensor_that_cannot_be_calibrated_takes_its_chain_along(tmp_path: Path) -> None:
    plan = _between(lambda net, x: silu(net, "act", x), tmp_path, uncalibrated={"act.sigmoid": "NaN"})
    assert "act.sigmoid" not in {q.tensor for q in plan.quantizers}
    assert ("last", 0) in edges_of(plan)


def _sums(stem_channels: int) -> onnx.ModelProto:
    """Three sums along one skip connection that starts at a convolution of so many input channels."""
    net = Net()
    x = net.op("Relu", "stem_act", net.conv("stem", "x", (8, stem_channels, 3, 3)))
    for i in range(3):
        x = net.op("Relu", f"act{i}", net.op("Add", f"sum{i}", net.conv(f"conv{i}", x, (8, 8, 3, 3)), x))
    return net.proto({"x": [1, stem_channels, 8, 8]}, [net.conv("last", x, (8, 8, 1, 1))])


@pytest.mark.parametrize("channels", [3, 4])
def test_sums_run_on_integers_all_along_a_skip_connection(channels: int, tmp_path: Path) -> None:
    """With three channels the first convolution runs in float, but a kernel reads its output quantized anyway."""
    found = kernels_of(_sums(channels), tmp_path)
    assert found["QLinearAdd"] == 3
    assert "Add" not in found


def test_a_sum_with_a_float_tensor_stays_in_float(tmp_path: Path) -> None:
    net = Net()
    x = net.op("Add", "sum", net.conv("first", "x", (8, 8, 3, 3)), net.op("Erf", "erf", "x"))
    plan = plan_of(net.proto({"x": [1, 8, 8, 8]}, [net.conv("last", x, (8, 8, 1, 1))]), tmp_path, "ort-cpu")
    assert ("sum", 1) not in edges_of(plan)


def test_only_nearest_neighbours_are_moved(tmp_path: Path) -> None:
    """Interpolated values lie between the steps of the grid in front; copies have its scale."""
    sizes = np.array([1, 8, 16, 16], np.int64)
    for mode in ("nearest", "linear"):

        def enlarged(net: Net, x: str, mode: str = mode) -> str:
            return net.op("Resize", "larger", x, "", "", net.constant("sizes", sizes), mode=mode)

        found = edges_of(_between(enlarged, tmp_path))
        assert (found["larger", 0].scale_group == found["last", 0].scale_group) == (mode == "nearest")


def test_pools_behind_pools_run_on_integers(tmp_path: Path) -> None:
    """Each is read by the next one and by the Concat."""
    net = Net()
    parts = [net.op("Relu", "act", net.conv("first", "x", (8, 8, 3, 3)))]
    for i in range(3):
        parts.append(net.op("MaxPool", f"pool{i}", parts[-1], kernel_shape=[3, 3], pads=[1, 1, 1, 1]))
    x = net.op("Concat", "joined", *parts, axis=1)
    found = kernels_of(net.proto({"x": [1, 8, 8, 8]}, [net.conv("last", x, (8, 32, 1, 1))]), tmp_path)
    assert found["NhwcMaxPool"] == 3
    assert found["QLinearConcat"] == 1
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == 1
