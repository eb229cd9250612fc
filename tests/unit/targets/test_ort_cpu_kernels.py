"""The integer kernels that the ort-cpu table promises are the ones that onnxruntime runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxptq.calibrate.observers import Observer
from onnxptq.runtime import Session, count_kernels
from tests.unit.small_nets import NETS, Net
from tests.unit.targets.plans import kernels_of, quantized_file


@pytest.mark.parametrize(
    ("net", "wanted"),
    [
        # The first convolutions on three channels are faster in float.
        ("conv_relu_conv", {"FLOAT": 1, "QLinearConv": 1}),
        ("residual_block", {"FLOAT": 1, "QLinearConv": 2, "QGemm": 1, "Add": 1}),
        ("concat_block", {"QLinearConv": 3, "QLinearConcat": 2}),
        ("attention_block", {"QGemm": 4, "MatMul": 1, "FusedMatMul": 1, "Softmax": 1}),
        ("vit_mlp", {"QGemm": 2, "Gelu": 1, "LayerNormalization": 1}),
        ("max_pool_net", {"FLOAT": 1, "QLinearConv": 1, "QGemm": 1}),
        ("depthwise_block", {"QLinearConv": 3, "Add": 1}),
    ],
)
def test_networks_run_on_integer_kernels(net: str, wanted: dict[str, int], tmp_path: Path) -> None:
    found = dict(kernels_of(NETS[net](), tmp_path))
    found["FLOAT"] = sum(found.pop(op, 0) for op in ("Conv", "FusedConv", "Gemm", "FusedGemm"))
    wanted = {"FLOAT": 0, **wanted}
    assert {op: found.get(op, 0) for op in wanted} == wanted


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [([1, 8, 16], "QGemm"), (["n", 8, 16], "MatMulIntegerToFloat"), (["n", 16], "QGemm"), ([8, 16], "QGemm")],
    ids=["static", "dynamic", "dynamic_matrix", "matrix"],
)
@pytest.mark.parametrize("follower", ["Relu", "Gelu", "Tanh", "Identity"])
@pytest.mark.parametrize("opset", [20, 21])
def test_linear_layers_run_on_integer_kernels(
    shape: list[int | str], kernel: str, follower: str, opset: int, tmp_path: Path
) -> None:
    """With static shapes onnxruntime makes a Gemm of them, which is integer only if the bias is."""
    net = Net(opset=opset)
    net.op(follower, "y", net.linear("fc", "x", 16, 24))
    found = kernels_of(net.proto({"x": shape}, ["y"]), tmp_path)
    assert found.get(kernel) == 1, found
    assert not {"Gemm", "FusedGemm", "MatMul"} & set(found)


@pytest.mark.parametrize("follower", ["Relu", "Tanh", "Sigmoid", "LeakyRelu"])
@pytest.mark.parametrize("bias", [True, False])
def test_gemms_with_an_activation_behind_them_run_on_integer_kernels(
    follower: str, bias: bool, tmp_path: Path
) -> None:
    net = Net()
    weights = [net.weight("w", 16, 8), *([net.weight("b", 8)] if bias else [])]
    net.op(follower, "y", net.op("Gemm", "gemm", "x", *weights))
    found = kernels_of(net.proto({"x": ["n", 16]}, ["y"]), tmp_path)
    assert found.get("QGemm") == 1, found


@pytest.mark.parametrize(
    ("shape", "group", "is_float"),
    [
        ((8, 3, 3, 3), 1, True),
        ((8, 1, 5, 5), 1, True),
        ((8, 3, 9), 1, True),
        ((8, 3, 11), 1, False),
        ((8, 3, 4, 4), 1, False),
        ((8, 4, 2, 2), 1, False),
        ((8, 1, 3, 3), 8, False),
    ],
)
def test_convolutions_that_sum_few_products_stay_in_float(
    shape: tuple[int, ...], group: int, is_float: bool, tmp_path: Path
) -> None:
    net = Net()
    first = net.op("Conv", "first", "x", net.weight("w", *shape), net.weight("b", 8), group=group)
    second = net.op("Conv", "second", first, net.weight("v", 8, 8, *[1] * (len(shape) - 2)))
    size = [1, shape[1] * group, *[16] * (len(shape) - 2)]
    found = kernels_of(net.proto({"x": size}, [second]), tmp_path)
    assert found.get("QLinearConv", 0) == 2 - is_float
    assert found.get("Conv", 0) == is_float


@pytest.mark.parametrize("is_activated", [True, False])
def test_a_small_convolution_in_front_of_a_pool_runs_on_integers(is_activated: bool, tmp_path: Path) -> None:
    """Otherwise onnxruntime would quantize in front of the pool, which then runs in neither of the fast layouts."""
    net = Net()
    x = net.conv("first", "x", (8, 3, 3, 3))
    x = net.op("Relu", "act", x) if is_activated else x
    x = net.op("MaxPool", "pool", x, kernel_shape=[2, 2], strides=[2, 2])
    found = kernels_of(net.proto({"x": [1, 3, 16, 16]}, [net.conv("next", x, (8, 8, 3, 3))]), tmp_path)
    assert found["QLinearConv"] == 2
    assert found["NhwcMaxPool"] == 1
    assert not {"Conv", "FusedConv", "MaxPool"} & set(found)


@pytest.mark.parametrize(
    ("channels", "group", "is_float"), [(3, 8, True), (3, 4, False), (3, 1, False), (4, 8, False)]
)
def test_a_depthwise_convolution_behind_a_float_one_stays_in_float(
    channels: int, group: int, is_float: bool, tmp_path: Path
) -> None:
    net = Net()
    x = net.relu6("act", net.conv("first", "x", (8, channels, 3, 3)))
    x = net.op("Relu", "middle_act", net.conv("middle", x, (8, 8 // group, 3, 3), group=group))
    model = net.proto({"x": [1, channels, 16, 16]}, [net.conv("last", x, (16, 8, 1, 1))])
    found = kernels_of(model, tmp_path)
    assert found.get("QLinearConv", 0) == (1 if is_float else 2 if channels == 3 else 3)


@pytest.mark.parametrize("end", [6.0, 1.0, 0.3, 5.3, 20.7, 7e-3])
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_a_clip_in_front_of_a_quantizer_vanishes(end: float, observer: str, tmp_path: Path) -> None:
    """It does only if 255 * scale, rounded, stays within the clip: true of 6 / 255 only after a nudge."""
    net = Net()
    x = net.conv("conv", "x", (16, 4, 3, 3))
    x = net.op("Clip", "act", x, *(net.constant(n, np.float32(v)) for n, v in (("low", 0.0), ("high", end))))
    model = net.proto({"x": [1, 4, 16, 16]}, [net.conv("next", x, (16, 16, 1, 1))])
    found = kernels_of(model, tmp_path, Observer(name=observer))  # type: ignore[arg-type]
    assert found.get("QLinearConv") == 2, found
    assert "Clip" not in found


def test_a_relu_in_front_of_a_quantizer_vanishes_for_every_observer(tmp_path: Path) -> None:
    for name in ("minmax", "percentile", "entropy", "mse"):
        found = kernels_of(NETS["conv_relu_conv"](), tmp_path, Observer(name=name))  # type: ignore[arg-type]
        assert "Relu" not in found


@pytest.mark.parametrize("net", NETS)
def test_integer_kernels_compute_what_the_file_means(net: str, tmp_path: Path) -> None:
    path = quantized_file(NETS[net](), tmp_path, Observer(name="minmax"))
    exact, fast = Session(path, exact=True, threads=1), Session(path, threads=1)
    feed = {i: np.random.default_rng(5).standard_normal(s).astype(np.float32) for i, s in _inputs(path)}
    wanted, found = exact.run(feed), fast.run(feed)
    for name in exact.output_names:
        noise = float(np.square(wanted[name] - found[name]).sum())
        # Integer kernels requantize with one rounding of their own: single steps of 1/256 may differ here
        # and there, far below the quantization noise of about -35 dB.
        assert noise <= 1e-4 * float(np.square(wanted[name]).sum())


def _inputs(path: Path) -> list[tuple[str, list[int]]]:
    graph = onnx.load(str(path)).graph
    return [(i.name, [d.dim_value for d in i.type.tensor_type.shape.dim]) for i in graph.input]


def test_a_declined_convolution_between_quantized_ones_is_not_quantized_by_the_runtime(
    tmp_path: Path,
) -> None:
    net = Net()
    x = "x"
    for i in range(3):
        x = net.op("Relu", f"relu{i}", net.conv(f"conv{i}", x, (8, 8, 3, 3)))
    model = net.proto({"x": [1, 8, 8, 8]}, [x])
    path = quantized_file(model, tmp_path, Observer(name="minmax"), declined={"conv1": "asked for"})
    found = count_kernels(path, tmp_path)
    assert found.get("QLinearConv", 0) == 1
    sample = {"x": np.random.default_rng(3).standard_normal((1, 8, 8, 8)).astype(np.float32)}
    exact, fast = (Session(path, exact=flag).run(sample)[x] for flag in (True, False))
    # The integer convolution rounds its sums once more than the exact session: at most one output step.
    step = (exact.max() - exact.min()) / 255
    assert np.abs(exact - fast).max() <= 1.01 * step


@pytest.mark.parametrize(("divisor", "kernels"), [("constant", 1), ("measured", 0)])
def test_a_division_by_a_constant_is_part_of_an_activation(
    divisor: str, kernels: int, tmp_path: Path
) -> None:
    """x clip(x + 3, 0, 6) / 6 lies between two integer kernels; dividing by a mean is a normalization."""
    net = Net()
    x = net.conv("conv", "x", (8, 8, 3, 3))
    moved = net.op("Add", "moved", x, net.constant("three", np.float32(3)))
    product = net.op("Mul", "product", x, net.relu6("clip", moved))
    mean = net.op("ReduceMean", "mean", product, keepdims=1)
    x = net.op("Div", "act", product, net.constant("six.0", np.float32(6)) if divisor == "constant" else mean)
    model = net.proto({"x": [1, 8, 8, 8]}, [net.op("MatMul", "last", x, net.weight("last.w", 8, 8)), mean])
    assert kernels_of(model, tmp_path).get("QLinearConv", 0) == kernels
