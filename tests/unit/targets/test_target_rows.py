"""One test per row of each target's placement table, and per exception that its docstring names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import pytest
from onnx import TensorProto

from onnxptq.graph.index import GraphIndex
from onnxptq.targets import TARGETS, PlacementRequest, candidate_tensors
from onnxptq.targets.placement import ScaleGroups, known_bounds
from onnxptq.types import GRAPH_OUTPUT, PerAxis, PerTensor, QType
from tests.unit.small_nets import NETS, Net, graph_of, vector_attention
from tests.unit.targets.plans import edges_of, plan_of, reasons_of

U8, S8 = QType.unsigned(8), QType.signed(8)
ALL = pytest.mark.parametrize("target", TARGETS)
GRIDS = {"ort-cpu": (U8, False), "tensorrt": (S8, True), "simulate": (U8, False)}


def _single(op: str, *weights: tuple[int, ...], shape: list[int | str], **attrs: object) -> onnx.ModelProto:
    net = Net()
    net.op(op, "y", "x", *(net.weight(f"w{i}", *w) for i, w in enumerate(weights)), **attrs)
    return net.proto({"x": shape}, ["y"])


LINEARS = {
    "conv": (_single("Conv", (32, 16, 3, 3), (32,), shape=[1, 16, 8, 8]), 0),
    "conv1d": (_single("Conv", (32, 16, 3), (32,), shape=[1, 16, 8]), 0),
    "conv_transpose": (_single("ConvTranspose", (16, 32, 3, 3), (32,), shape=[1, 16, 8, 8]), 1),
    "gemm": (_single("Gemm", (16, 32), (32,), shape=["n", 16]), 1),
    "gemm_transB": (_single("Gemm", (32, 16), (32,), shape=["n", 16], transB=1), 0),
    "matmul": (_single("MatMul", (16, 32), shape=["n", 4, 16]), 1),
}


@ALL
@pytest.mark.parametrize("kind", LINEARS)
def test_weights_are_int8_per_output_channel_and_inputs_on_the_targets_grid(
    kind: str, target: str, tmp_path: Path
) -> None:
    model, axis = LINEARS[kind]
    plan = plan_of(model, tmp_path, target)
    edges = edges_of(plan)
    if target == "ort-cpu" and kind == "conv_transpose":
        assert not edges
        return
    activation, weight = edges["y", 0], edges["y", 1]
    assert (activation.qtype, activation.symmetric) == GRIDS[target]
    assert activation.granularity == PerTensor()
    assert (weight.qtype, weight.granularity, weight.role) == (S8, PerAxis(axis), "weight")
    has_int32_bias = target == "ort-cpu" and kind != "matmul"
    assert (("y", 2) in edges) == has_int32_bias
    if has_int32_bias:
        assert edges["y", 2].qtype == QType.signed(32, "int32")
        assert edges["y", 2].derived_from == (activation.quantizer_id, weight.quantizer_id)
    # Only the convolution kernels of onnxruntime need a quantized output.
    assert ((GRAPH_OUTPUT, 0) in edges) == (target == "ort-cpu" and kind.startswith("conv"))


@ALL
@pytest.mark.parametrize("activation", ["Relu", "Clip"])
def test_nothing_stands_between_a_convolution_and_its_activation(
    activation: str, target: str, tmp_path: Path
) -> None:
    net = Net()
    x = net.conv("conv", "x", (32, 16, 3, 3))
    x = net.relu6("act", x) if activation == "Clip" else net.op("Relu", "act", x)
    model = net.proto({"x": [1, 16, 8, 8]}, [net.conv("next", x, (32, 32, 1, 1))])
    edges = edges_of(plan_of(model, tmp_path, target))
    assert ("act", 0) not in edges
    assert edges["next", 0].tensor == "act"


def test_an_activation_that_is_not_the_only_reader_is_not_fused(tmp_path: Path) -> None:
    net = Net()
    x = net.conv("conv", "x", (32, 16, 3, 3))
    net.op("Mul", "y", net.op("Relu", "act", x), x)
    edges = edges_of(plan_of(net.proto({"x": [1, 16, 8, 8]}, ["y"]), tmp_path, "ort-cpu"))
    assert edges["act", 0].tensor == edges["y", 1].tensor == "conv"


@pytest.mark.parametrize("op", ["Softmax", "Sigmoid", "Gelu", "GlobalAveragePool"])
def test_everything_else_stays_float_on_the_cpu(op: str, tmp_path: Path) -> None:
    model = _single(op, shape=[1, 16, 8, 8])
    assert plan_of(model, tmp_path, "ort-cpu").quantizers == ()


@pytest.mark.parametrize(
    ("target", "quantized"), [("ort-cpu", False), ("tensorrt", True), ("simulate", True)]
)
def test_products_of_two_activations(target: str, quantized: bool, tmp_path: Path) -> None:
    plan = plan_of(NETS["attention_block"](), tmp_path, target)
    for node in ("qk", "pv"):
        for i in (0, 1):
            assert ((node, i) in edges_of(plan)) == quantized
        assert (node in reasons_of(plan)) != quantized


@ALL
def test_distances_that_only_choose_neighbours_stay_float(target: str, tmp_path: Path) -> None:
    net = Net()
    product = net.op("MatMul", "distances", "x", net.op("Transpose", "turned", "x", perm=[0, 2, 1]))
    net.op("TopK", "closest", product, net.constant("one", [1]), outputs=["near"])
    rows = net.op(
        "Reshape", "rows", net.op("Gather", "taken", "x", "near", axis=1), net.constant("s", [4, 16])
    )
    plan = plan_of(net.proto({"x": [1, 4, 16]}, [net.linear("y", rows, 16, 32)]), tmp_path, target)
    assert "only chooses which elements are taken" in reasons_of(plan)["distances"]
    assert {node for node, _ in edges_of(plan)} <= {"y.mm", "y"}
    assert ("y.mm", 0) in edges_of(plan)


@ALL
def test_a_layer_that_only_chooses_is_quantized(target: str, tmp_path: Path) -> None:
    """Weights are read from memory all the same."""
    net = Net()
    net.op("TopK", "best", net.linear("router", "x", 16, 32), net.constant("one", [1]), outputs=["which"])
    net.op("Gather", "y", net.weight("experts", 32, 4), "which")
    plan = plan_of(net.proto({"x": [4, 16]}, ["y"]), tmp_path, target)
    assert {("router.mm", 0), ("router.mm", 1)} <= set(edges_of(plan))


@ALL
def test_a_product_of_constants_is_left_alone(target: str, tmp_path: Path) -> None:
    net = Net()
    net.op("MatMul", "folded", net.weight("a", 4, 4), net.weight("b", 4, 4))
    net.op("Add", "y", "x", "folded")
    plan = plan_of(net.proto({"x": [4, 4]}, ["y"]), tmp_path, target)
    assert plan.quantizers == ()
    assert reasons_of(plan)["folded"] == "all its inputs are constant"


@pytest.mark.parametrize(
    ("attrs", "shape", "word"),
    [
        ({"transA": 1}, [16, "n"], "transA"),
        ({"alpha": 0.5}, ["n", 16], "alpha"),
        ({"beta": 2.0}, ["n", 16], "beta"),
    ],
)
def test_gemms_that_qgemm_does_not_take(
    attrs: dict[str, object], shape: list[int | str], word: str, tmp_path: Path
) -> None:
    model = _single("Gemm", (16, 32), (32,), shape=shape, **attrs)
    plan = plan_of(model, tmp_path, "ort-cpu")
    assert plan.quantizers == ()
    assert word in reasons_of(plan)["y"]
    assert plan_of(model, tmp_path, "simulate").quantizers


def test_a_gemm_bias_that_is_no_vector_stays_float(tmp_path: Path) -> None:
    model = _single("Gemm", (16, 32), (1, 32), shape=["n", 16])
    edges = edges_of(plan_of(model, tmp_path, "ort-cpu"))
    assert ("y", 1) in edges
    assert ("y", 2) not in edges


@ALL
def test_the_bias_that_an_add_puts_on_a_matmul(target: str, tmp_path: Path) -> None:
    net = Net()
    y = net.linear("fc", "x", 16, 24)
    edges = edges_of(plan_of(net.proto({"x": ["n", 4, 16]}, [y]), tmp_path, target))
    assert (("fc", 1) in edges) == (target == "ort-cpu")
    if target == "ort-cpu":
        assert edges["fc", 1].role == "bias"
        assert edges["fc", 1].derived_from == ("x", "fc.w")
        assert edges["fc", 1].sites[0].tensor == "fc.b"


@pytest.mark.parametrize("left", ["constant", "batched"])
def test_matmuls_without_a_fast_kernel_on_the_cpu(left: str, tmp_path: Path) -> None:
    net = Net()
    if left == "constant":
        net.op("MatMul", "y", net.weight("w", 8, 16), "x")
    else:
        net.op("MatMul", "y", "x", net.weight("w", 2, 16, 8))
    plan = plan_of(net.proto({"x": [2, 16, 16]}, ["y"]), tmp_path, "ort-cpu")
    assert plan.quantizers == ()
    assert "no fast integer kernel" in reasons_of(plan)["y"]


def test_tensorrt_quantizes_the_skip_input_of_a_residual_sum(tmp_path: Path) -> None:
    edges = edges_of(plan_of(NETS["residual_block"](), tmp_path, "tensorrt"))
    assert edges["sum", 1].tensor == "stem_relu"
    assert ("sum", 0) not in edges
    edges = edges_of(plan_of(NETS["vit_mlp"](), tmp_path, "tensorrt"))
    assert edges["sum", 0].tensor == "x"
    assert ("sum", 1) not in edges


def test_a_product_that_others_read_too_fuses_with_no_sum(tmp_path: Path) -> None:
    net = Net()
    net.op("Sigmoid", "other", net.conv("conv", "x", (16, 16, 3, 3)))
    net.op("Add", "sum", "conv", net.op("Sigmoid", "skip", "x"))
    plan = plan_of(net.proto({"x": [1, 16, 8, 8]}, ["sum", "other"]), tmp_path, "tensorrt")
    assert {node for node, _ in edges_of(plan)} == {"conv"}


def test_an_output_that_cannot_be_calibrated_stays_float(tmp_path: Path) -> None:
    plan = plan_of(LINEARS["conv"][0], tmp_path, "ort-cpu", uncalibrated={"y": "NaN"})
    assert {q.tensor for q in plan.quantizers} == {"x", "w0", "w1"}


@pytest.mark.parametrize(
    ("op", "ends"),
    [
        ("Relu", (0.0, np.inf)),
        ("Sigmoid", (0.0, 1.0)),
        ("HardSigmoid", (0.0, 1.0)),
        ("Softmax", (0.0, 1.0)),
        ("Tanh", (-1.0, 1.0)),
        ("Elu", None),
    ],
)
def test_bounds_of_operators_are_met_and_never_left(
    op: str, ends: tuple[float, float] | None, tmp_path: Path
) -> None:
    graph = graph_of(_single(op, shape=[1, 4]), tmp_path)
    assert known_bounds(graph.nodes[0]) == ends
    if ends is not None:
        x = np.float32([[-80.0, 0.0, 1e-3, 80.0]])
        (y,) = onnx.reference.ReferenceEvaluator(_single(op, shape=[1, 4])).run(None, {"x": x})
        assert ends[0] <= y.min()
        assert y.max() <= ends[1]
        assert y.min() == pytest.approx(ends[0])
        assert y.max() == pytest.approx(min(ends[1], 80.0))


@pytest.mark.parametrize(
    ("given", "bounds"),
    [(("low", "high"), (-1.0, 6.0)), (("low", ""), None), (("", "high"), None), ((), None)],
)
def test_a_clip_has_bounds_where_both_are_known(
    given: tuple[str, ...], bounds: tuple[float, float] | None, tmp_path: Path
) -> None:
    net = Net()
    known = {"low": net.constant("low", np.float32(-1)), "high": net.constant("high", np.float32(6)), "": ""}
    net.op("Clip", "y", "x", *(known[name] for name in given))
    graph = graph_of(net.proto({"x": [1, 4]}, ["y"]), tmp_path)
    assert known_bounds(graph.nodes[0]) == bounds
    assert known_bounds(None) is None


def test_a_skip_input_that_cannot_be_calibrated_stays_float(tmp_path: Path) -> None:
    net = Net()
    skip = net.op("Sigmoid", "skip", "x")
    net.op("Add", "sum", net.conv("conv", "x", (16, 16, 3, 3)), skip)
    model = net.proto({"x": [1, 16, 8, 8]}, ["sum"])
    assert ("sum", 1) in edges_of(plan_of(model, tmp_path, "tensorrt"))
    plan = plan_of(model, tmp_path, "tensorrt", uncalibrated={"skip": "NaN"})
    assert ("sum", 1) not in edges_of(plan)
    assert ("conv", 0) in edges_of(plan)


def test_a_product_left_in_float_keeps_reading_what_is_quantized_in_front_of_it(tmp_path: Path) -> None:
    """Unless a quantizer stands behind it too: then onnxruntime would run it on integers all the same."""
    net = Net()
    net.conv(
        "last", net.conv("middle", net.conv("first", "x", (16, 16, 1, 1)), (16, 16, 1, 1)), (16, 16, 1, 1)
    )
    model = net.proto({"x": [1, 16, 8, 8]}, ["last"])
    for declined, is_read in (("last", True), ("middle", False)):
        plan = plan_of(model, tmp_path, "ort-cpu", declined={declined: "no"})
        assert ((declined, 0) in edges_of(plan)) == is_read


@pytest.mark.parametrize("residuals", [False, True])
def test_simulation_quantizes_sums_of_residual_connections_where_asked(
    residuals: bool, tmp_path: Path
) -> None:
    edges = edges_of(
        plan_of(NETS["residual_block"](), tmp_path, "simulate", residuals=residuals, activation_bits=5)
    )
    assert (("sum", 1) in edges) == residuals
    if residuals:
        assert edges["sum", 1].qtype.bits == 5
    assert ("sum", 0) not in edges


@pytest.mark.parametrize("swapped", [False, True])
def test_of_two_products_in_a_sum_the_later_one_fuses(swapped: bool, tmp_path: Path) -> None:
    net = Net()
    short, long = net.conv("short", "x", (16, 16, 1, 1)), net.conv("long", "x", (16, 16, 3, 3))
    net.op("Add", "y", *((long, short) if swapped else (short, long)))
    edges = edges_of(plan_of(net.proto({"x": [1, 16, 8, 8]}, ["y"]), tmp_path, "tensorrt"))
    assert {edges[key].tensor for key in edges if key[0] == "y"} == {"short"}


def test_a_sum_of_two_float_tensors_stays_float(tmp_path: Path) -> None:
    net = Net()
    net.op("Add", "y", net.op("Relu", "a", "x"), net.op("Sigmoid", "b", "x"))
    assert plan_of(net.proto({"x": [1, 4]}, ["y"]), tmp_path, "tensorrt").quantizers == ()


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "GlobalAveragePool"])
def test_tensorrt_pools_between_products_are_quantized(op: str, tmp_path: Path) -> None:
    net = Net()
    attrs = {} if op.startswith("Global") else {"kernel_shape": [2, 2], "strides": [2, 2]}
    x = net.op(op, "pool", net.op("Relu", "act", net.conv("conv", "x", (16, 16, 3, 3))), **attrs)
    x = net.op(op, "again", x, **attrs)
    model = net.proto({"x": [1, 16, 8, 8]}, [net.conv("next", x, (16, 16, 1, 1))])
    plan = plan_of(model, tmp_path, "tensorrt")
    edges = edges_of(plan)
    assert edges["pool", 0].tensor == "act"
    assert edges["again", 0].tensor == "pool"
    same = {edges[k].scale_group for k in (("pool", 0), ("again", 0), ("next", 0))}
    # A maximum is one of its inputs; an average is not, and keeps a scale of its own.
    assert len(same) == (1 if op == "MaxPool" else 3)
    last = net.op(op, "last", "next", **attrs)
    plan = plan_of(net.proto({"x": [1, 16, 8, 8]}, [last]), tmp_path, "tensorrt")
    assert ("last", 0) not in edges_of(plan)


def test_a_pool_that_is_to_stay_float_does(tmp_path: Path) -> None:
    net = Net()
    pool = net.op("MaxPool", "pool", net.conv("conv", "x", (16, 16, 3, 3)), kernel_shape=[2, 2])
    model = net.proto({"x": [1, 16, 8, 8]}, [net.conv("next", pool, (16, 16, 1, 1))])
    assert ("pool", 0) in edges_of(plan_of(model, tmp_path, "tensorrt"))
    assert ("pool", 0) not in edges_of(plan_of(model, tmp_path, "tensorrt", declined={"pool": "no"}))
    assert ("pool", 0) not in edges_of(plan_of(model, tmp_path, "tensorrt", uncalibrated={"conv": "NaN"}))


def test_a_concat_of_what_cannot_be_calibrated_says_why_it_stays_float(tmp_path: Path) -> None:
    net = Net()
    parts = [net.op("Sigmoid", name, "x") for name in ("a", "b")]
    model = net.proto(
        {"x": [1, 16, 8, 8]}, [net.conv("y", net.op("Concat", "cat", *parts, axis=1), (16, 32, 1, 1))]
    )
    assert ("cat", 1) in edges_of(plan_of(model, tmp_path, "tensorrt"))
    plan = plan_of(model, tmp_path, "tensorrt", uncalibrated={"b": "NaN"})
    assert {node for node, _ in edges_of(plan)} == {"y"}
    assert "'b' cannot be calibrated: NaN" in reasons_of(plan)["cat"]


def test_parts_of_a_tensor_keep_its_scale(tmp_path: Path) -> None:
    net = Net()
    x = net.op("LeakyRelu", "act", net.conv("conv", "x", (16, 16, 3, 3)))
    pool = net.op("MaxPool", "pool", "conv", kernel_shape=[2, 2])
    net.op("Split", "first", pool, outputs=["second"], axis=1, num_outputs=2)
    outputs = [net.conv(f"{part}_conv", part, (16, 8, 1, 1)) for part in ("first", "second")]
    edges = edges_of(plan_of(net.proto({"x": [1, 16, 8, 8]}, [*outputs, x]), tmp_path, "ort-cpu"))
    groups = {edges[key].scale_group for key in (("pool", 0), ("first_conv", 0), ("second_conv", 0))}
    assert len(groups) == 1


def test_concats_share_one_scale_through_nesting_and_movement(tmp_path: Path) -> None:
    plan = plan_of(NETS["concat_block"](), tmp_path, "tensorrt")
    edges = edges_of(plan)
    wanted = {("inner", 0), ("inner", 1), ("outer", 0), ("outer", 1), ("pool", 0), ("last", 0)}
    assert wanted <= set(edges)
    assert len({edges[key].scale_group for key in wanted}) == 1
    assert edges["left", 0].scale_group != edges["last", 0].scale_group


def test_concats_that_share_an_input_share_everything(tmp_path: Path) -> None:
    net = Net()
    a, b, c = (net.op("Relu", n, net.conv(f"{n}.c", "x", (16, 16, 1, 1))) for n in "abc")
    net.conv("y", net.op("Concat", "ab", a, b, axis=1), (16, 32, 1, 1))
    net.conv("z", net.op("Concat", "bc", b, c, axis=1), (16, 32, 1, 1))
    plan = plan_of(net.proto({"x": [1, 16, 4, 4]}, ["y", "z"]), tmp_path, "tensorrt")
    groups = {q.tensor: q.scale_group for q in plan.quantizers if q.role == "activation"}
    assert len({groups[t] for t in ("a", "b", "c", "ab", "bc")}) == 1


def test_a_concat_with_a_constant_says_why_it_stays_float(tmp_path: Path) -> None:
    net = Net()
    x = net.op("Concat", "cat", "x", net.weight("extra", 1, 16, 8, 8), axis=1)
    plan = plan_of(net.proto({"x": [1, 16, 8, 8]}, [net.conv("y", x, (16, 32, 1, 1))]), tmp_path, "tensorrt")
    assert ("cat", 0) not in edges_of(plan)
    assert "'extra' is constant" in reasons_of(plan)["cat"]


@pytest.mark.parametrize(
    ("shape", "channels", "group", "is_float"),
    [
        ((32, 3, 3, 3), 3, 1, False),
        ((32, 4, 3, 3), 4, 1, False),
        ((32, 5, 3, 3), 5, 1, True),
        ((32, 8, 3, 3), 8, 1, True),
        ((8, 32, 3, 3), 32, 1, True),
        ((32, 1, 3, 3), 32, 32, False),
        ((8, 1, 3, 3), 8, 8, True),
        ((32, 8, 3, 3), 32, 4, False),
    ],
    ids=["pictures", "four_in", "five_in", "few_in", "few_out", "depthwise", "narrow_depthwise", "groups"],
)
def test_narrow_convolutions_stay_float_for_tensorrt(
    shape: tuple[int, ...], channels: int, group: int, is_float: bool, tmp_path: Path
) -> None:
    model = _single("Conv", shape, shape=[1, channels, 8, 8], group=group)
    plan = plan_of(model, tmp_path, "tensorrt")
    assert (plan.quantizers == ()) == is_float
    assert ("y" in reasons_of(plan)) == is_float


@pytest.mark.parametrize(
    ("shape", "group", "is_float"),
    [((3, 32), 1, False), ((8, 32), 1, True), ((32, 8), 1, True), ((32, 8), 4, False)],
    ids=["pictures", "few_in", "few_out", "groups"],
)
def test_narrow_transposed_convolutions_stay_float_for_tensorrt(
    shape: tuple[int, int], group: int, is_float: bool, tmp_path: Path
) -> None:
    """Their weights hold the channels that are read first."""
    model = _single("ConvTranspose", (*shape, 3, 3), shape=[1, shape[0], 8, 8], group=group)
    plan = plan_of(model, tmp_path, "tensorrt")
    assert (plan.quantizers == ()) == is_float
    assert ("y" in reasons_of(plan)) == is_float


@pytest.mark.parametrize(
    ("left", "right", "is_float"),
    [
        ([1, 16], [16, 8], True),
        ([8, 16], [16, 1], True),
        ([8, 16], [16, 8], False),
        # Of one axis: the product says nothing of rows and columns.
        ([16], [16, 8], False),
        ([8, 16], [16], False),
    ],
)
def test_vector_products_stay_float_for_tensorrt(
    left: list[int | str], right: list[int | str], is_float: bool, tmp_path: Path
) -> None:
    net = Net()
    net.op("MatMul", "y", net.op("Relu", "a", "x"), net.op("Relu", "b", "z"))
    plan = plan_of(net.proto({"x": left, "z": right}, ["y"]), tmp_path, "tensorrt")
    assert ("single vector" in reasons_of(plan).get("y", "")) == is_float
    assert (("y", 1) in edges_of(plan)) != is_float


def test_a_layer_on_a_single_vector_is_quantized_for_tensorrt(tmp_path: Path) -> None:
    model = _single("MatMul", (16, 32), shape=[1, 16])
    assert ("y", 1) in edges_of(plan_of(model, tmp_path, "tensorrt"))


def test_tensorrt_uses_one_kind_of_grid_everywhere(tmp_path: Path) -> None:
    for build in NETS.values():
        for q in plan_of(build(), tmp_path, "tensorrt").quantizers:
            assert q.symmetric
            assert q.qtype.storage == "int8"
            assert q.role != "bias"


@ALL
def test_data_movement_keeps_the_scale_in_front_of_it(target: str, tmp_path: Path) -> None:
    net = Net()
    x = net.op("Relu", "act", net.conv("conv", "x", (16, 16, 3, 3)))
    net.conv("other", x, (16, 16, 1, 1))
    x = net.op("MaxPool", "pool", x, kernel_shape=[8, 8])
    x = net.op("Flatten", "flat", x)
    net.op("Gemm", "y", x, net.weight("w", 16, 32), net.weight("b", 32))
    plan = plan_of(net.proto({"x": [1, 16, 8, 8]}, ["y", "other"]), tmp_path, target)
    edges = edges_of(plan)
    moves_quantized_values = ("pool", 0) in edges
    assert moves_quantized_values == (target != "simulate")
    assert (edges["y", 0].scale_group == edges["other", 0].scale_group) == moves_quantized_values


def test_quantizers_of_one_scale_group_have_one_grid(tmp_path: Path) -> None:
    """Movement cannot tie a 4-bit quantizer to an 8-bit one."""
    net = Net()
    x = net.op("Relu", "act", net.conv("conv", "x", (16, 16, 3, 3)))
    x = net.op("MaxPool", "pool", x, kernel_shape=[2, 2])
    net.conv("y", x, (16, 16, 1, 1))
    net.op("MatMul", "z", "pool", net.weight("w", 7, 4))
    index = GraphIndex(graph_of(net.proto({"x": [1, 16, 8, 8]}, ["y", "z"]), tmp_path))
    request = PlacementRequest(bits_of={"y": (8, 4), "conv": (4, 3)})
    for place in TARGETS.values():
        grids: dict[str, set[object]] = {}
        for q in place(index, request).quantizers:
            grids.setdefault(q.scale_group, set()).add((q.qtype, q.symmetric))
        assert all(len(found) == 1 for found in grids.values())


def test_bits_per_node(tmp_path: Path) -> None:
    model = NETS["conv_relu_conv"]()
    plan = plan_of(model, tmp_path, "simulate", weight_bits=4, activation_bits=6, bits_of={"conv2": (3, 5)})
    edges = edges_of(plan)
    assert edges["conv1", 0].qtype == QType.unsigned(6)
    assert edges["conv1", 1].qtype == QType.signed(4)
    assert edges["conv2", 0].qtype == QType.unsigned(5)
    assert edges["conv2", 1].qtype == QType.signed(3)


@pytest.mark.parametrize("bits", [3, 4])
def test_int4_storage_is_for_weights_of_up_to_4_bits(bits: int, tmp_path: Path) -> None:
    plan = plan_of(
        NETS["conv_relu_conv"](),
        tmp_path,
        "simulate",
        weight_bits=bits,
        weight_storage="int4",
        bits_of={"conv2": (5, 8)},
    )
    edges = edges_of(plan)
    assert edges["conv1", 1].qtype == QType.signed(bits, "int4")
    assert edges["conv2", 1].qtype == QType.signed(5, "int8")


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
def test_activation_bits_that_no_kernel_runs_are_mapped_and_said(target: str, tmp_path: Path) -> None:
    plan = plan_of(NETS["conv_relu_conv"](), tmp_path, target, activation_bits=4)
    assert all(q.qtype.bits == 8 for q in plan.quantizers if q.role == "activation")
    assert "4-bit activations" in reasons_of(plan)["conv2"]


@ALL
def test_two_readers_at_different_bits_get_two_quantizers(target: str, tmp_path: Path) -> None:
    net = Net()
    for name in ("y", "z"):
        net.conv(name, "x", (16, 16, 1, 1))
    plan = plan_of(net.proto({"x": [1, 16, 4, 4]}, ["y", "z"]), tmp_path, target, bits_of={"z": (8, 4)})
    found = {q.quantizer_id: q for q in plan.quantizers if q.tensor == "x"}
    assert len(found) == (2 if target == "simulate" else 1)
    assert len({q.scale_group for q in found.values()}) == len(found)
    if target == "simulate":
        readers = {q.qtype.bits: [site.consumer for site in q.sites] for q in found.values()}
        assert readers == {8: ["y"], 4: ["z"]}


@ALL
def test_a_weight_read_twice_has_one_quantizer_per_axis(target: str, tmp_path: Path) -> None:
    net = Net()
    w = net.weight("w", 16, 16)
    first = net.op("MatMul", "a", "x", w)
    second = net.op("MatMul", "b", first, w)
    net.op("Gemm", "c", second, w, transB=1)
    plan = plan_of(net.proto({"x": [4, 16]}, ["c"]), tmp_path, target)
    weights = [q for q in plan.quantizers if q.tensor == "w"]
    readers = {tuple(s.consumer for s in q.sites): q.granularity for q in weights}
    assert readers == {("a", "b"): PerAxis(1), ("c",): PerAxis(0)}


@ALL
def test_a_weight_read_at_different_bits_has_a_quantizer_for_each(target: str, tmp_path: Path) -> None:
    net = Net()
    w = net.weight("w", 16, 16)
    net.op("MatMul", "b", net.op("MatMul", "a", "x", w), w)
    plan = plan_of(net.proto({"x": [4, 16]}, ["b"]), tmp_path, target, bits_of={"b": (4, 8)})
    weights = [q for q in plan.quantizers if q.tensor == "w"]
    assert {q.sites[0].consumer: q.qtype.bits for q in weights} == {"a": 8, "b": 4}
    assert len({q.quantizer_id for q in weights}) == 2


@ALL
def test_declined_and_uncalibrated_nodes_are_listed(target: str, tmp_path: Path) -> None:
    plan = plan_of(
        NETS["conv_relu_conv"](),
        tmp_path,
        target,
        declined={"conv1": "because"},
        uncalibrated={"relu": "NaN"},
    )
    assert plan.quantizers == ()
    assert reasons_of(plan) == {"conv1": "because", "conv2": "its input 'relu' cannot be calibrated: NaN"}


@ALL
def test_weights_of_operators_without_a_row_are_listed(target: str, tmp_path: Path) -> None:
    net = Net()
    taken = net.op(
        "Gather", "taken", net.weight("table", 50, 8), net.op("Cast", "ids", "x", to=TensorProto.INT64)
    )
    gates = [net.weight(name, 1, 24, width) for name, width in (("w", 8), ("r", 6))]
    hidden = net.op("LSTM", "hidden", taken, *gates, hidden_size=6)
    net.op("MatMul", "y", hidden, net.weight("f", 6, 12))
    # Not weights: two values per channel, and numbers that are added.
    net.op("PRelu", "z", taken, net.weight("slope", 1, 8))
    net.op("Add", "shifted", taken, net.weight("places", 4, 8))
    graph = graph_of(net.proto({"x": [12, 4]}, ["y", "z", "shifted"]), tmp_path)
    (custom,) = (node for node in graph.nodes if node.op == "MatMul")
    custom.op, custom.domain = "FusedMatMul", "com.microsoft"
    plan = TARGETS[target](GraphIndex(graph), PlacementRequest(declined={"hidden": "no"}))
    assert reasons_of(plan) == {
        "taken": "a table that is looked up stays in float",
        "hidden": "no",
        "y": "operators of com.microsoft stay in float",
    }


@ALL
def test_an_operator_of_another_domain_is_not_the_one_of_the_table(target: str, tmp_path: Path) -> None:
    graph = graph_of(LINEARS["matmul"][0], tmp_path)
    graph.nodes[0].domain = "com.microsoft"
    plan = TARGETS[target](GraphIndex(graph), PlacementRequest())
    assert plan.quantizers == ()
    assert reasons_of(plan) == {"y": "operators of com.microsoft stay in float"}


def test_a_product_of_activations_reads_what_a_convolution_writes_quantized(tmp_path: Path) -> None:
    """It has no weights that onnxruntime could quantize on its own, so it does not matter that it runs in float."""
    net = Net()
    product = net.op(
        "MatMul", "product", net.conv("a", "x", (16, 16, 1, 1)), net.conv("b", "x", (16, 16, 1, 1))
    )
    model = net.proto({"x": [1, 16, 8, 8]}, [net.conv("y", product, (16, 16, 1, 1))])
    edges = edges_of(plan_of(model, tmp_path, "ort-cpu"))
    assert {("product", 0), ("product", 1), ("y", 0)} <= set(edges)


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
def test_transposed_convolutions_are_quantized_or_listed(target: str, tmp_path: Path) -> None:
    plan = plan_of(LINEARS["conv_transpose"][0], tmp_path, target)
    wanted = {"y": "this target leaves ConvTranspose in float"} if target == "ort-cpu" else {}
    assert reasons_of(plan) == wanted


def test_integer_products_are_left_alone(tmp_path: Path) -> None:
    net = Net()
    net.op("Cast", "ints", "x", to=onnx.TensorProto.INT32)
    net.op("MatMul", "product", "ints", net.constant("w", np.ones((4, 4), np.int32)))
    net.op("Cast", "y", "product", to=onnx.TensorProto.FLOAT)
    model = net.proto({"x": [4, 4]}, ["y"])
    for target in TARGETS:
        plan = plan_of(model, tmp_path, target)
        assert plan.quantizers == ()
        assert "not float32" in reasons_of(plan)["product"]


def test_candidates_serve_every_target(tmp_path: Path) -> None:
    for build in NETS.values():
        index = GraphIndex(graph_of(build(), tmp_path))
        candidates = candidate_tensors(index)
        assert len(set(candidates)) == len(candidates)
        for place in TARGETS.values():
            plan = place(index, PlacementRequest())
            assert {q.tensor for q in plan.quantizers if q.role == "activation"} <= set(candidates)


def test_scale_groups_join_transitively() -> None:
    groups = ScaleGroups()
    groups.join(["d", "c"])
    groups.join(["b", "e"])
    groups.join(["e", "d"])
    assert {groups.of(t) for t in "bcde"} == {"b"}
    assert groups.of("a") == "a"
    groups.join(["a", "c"])
    assert {groups.of(t) for t in "abcde"} == {"a"}


@ALL
def test_weighted_sums_of_vector_attention(target: str, tmp_path: Path) -> None:
    edges = edges_of(plan_of(vector_attention(), tmp_path, target, activation_bits=4))
    if target != "simulate":
        assert not {("pv", 0), ("pv", 1)} & set(edges)
        return
    assert [edges["pv", i].tensor for i in (0, 1)] == ["p", "v4"]
    assert edges["pv", 0].qtype == QType.unsigned(4)
    declined = plan_of(vector_attention(), tmp_path, target, declined={"pv": "excluded"})
    assert ("pv", 0) not in edges_of(declined)
    assert reasons_of(declined) == {"pv": "excluded"}
