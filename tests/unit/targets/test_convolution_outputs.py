"""Which outputs of convolutions are quantized for ort-cpu, by what follows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxptq.types import QuantPlan
from tests.unit.small_nets import Net
from tests.unit.targets.plans import edges_of, plan_of, reasons_of

CARRIERS: dict[str, dict[str, object]] = {
    "AveragePool": {"kernel_shape": [2, 2]},
    "Elu": {},
    "GlobalAveragePool": {},
    "HardSigmoid": {},
    "HardSwish": {},
    "LeakyRelu": {},
    "MaxPool": {"kernel_shape": [2, 2]},
    "Relu": {},
    "Sigmoid": {},
    "Transpose": {"perm": [0, 1, 3, 2]},
}


def _followed(op: str, folder: Path, *, group: int = 1, linear: bool = False) -> QuantPlan:
    """A convolution, ``op``, and a convolution or a linear layer."""
    net = Net()
    more: list[str] = []
    if op == "Resize":
        more = ["", "", net.constant("sizes", np.array([1, 16, 16, 16], np.int64))]
    if op in ("BatchNormalization", "InstanceNormalization"):
        more = [net.weight("scale", 16), net.weight("shift", 16)]
    if op == "BatchNormalization":
        more += [net.weight("mean", 16), net.constant("variance", np.ones(16, np.float32))]
    x = net.conv("conv", "x", (16, 16 // group, 3, 3), group=group)
    x = net.op(op, "between", x, *more, **CARRIERS.get(op, {}))
    if linear:
        net.op("MatMul", "next", x, net.weight("w", 8, 8))
    else:
        net.conv("next", x, (16, 16, 1, 1))
    return plan_of(net.proto({"x": [1, 16, 8, 8]}, ["next"]), folder, "ort-cpu")


@pytest.mark.parametrize("op", [*CARRIERS, "BatchNormalization", "Resize", "Erf", "InstanceNormalization"])
def test_outputs_of_convolutions_are_quantized_where_another_follows(op: str, tmp_path: Path) -> None:
    plan = _followed(op, tmp_path)
    assert "conv" not in reasons_of(plan)
    assert (("between", 0) in edges_of(plan)) == (op != "Relu")


@pytest.mark.parametrize(
    ("op", "group", "is_quantized"),
    [("Sigmoid", 1, True), ("InstanceNormalization", 1, False), ("Erf", 1, False), ("Erf", 16, True)],
)
def test_outputs_of_convolutions_in_front_of_linear_layers(
    op: str, group: int, is_quantized: bool, tmp_path: Path
) -> None:
    """Behind a normalization they begin what all layers read; a grouped convolution in float would be too slow."""
    plan = _followed(op, tmp_path, group=group, linear=True)
    assert ("linear layers follow" in reasons_of(plan).get("conv", "")) != is_quantized
    assert (("between", 0) in edges_of(plan)) == is_quantized


@pytest.mark.parametrize("op", ["Erf", "Softmax"])
def test_the_output_of_a_convolution_that_no_kernel_follows_stays_in_float(op: str, tmp_path: Path) -> None:
    net = Net()
    x = net.op(op, "y", net.conv("conv", net.op("Abs", "abs", "x"), (16, 16, 3, 3)))
    plan = plan_of(net.proto({"x": [1, 16, 8, 8]}, [x]), tmp_path, "ort-cpu")
    assert "no integer kernel follows" in reasons_of(plan)["conv"]
    assert ("y", 0) not in edges_of(plan)
