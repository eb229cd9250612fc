"""Lookup by version, declining, and the promise of the reviewed opset."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from onnxptq.lowering import (
    MIN_OPSET,
    REVIEWED_OPSET,
    Unsupported,
    check_supported,
    entries,
    lookup,
    register,
)

# fmt: off
CORE = [
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "MaxPool", "AveragePool", "GlobalAveragePool",
    "GlobalMaxPool", "BatchNormalization", "LayerNormalization", "GroupNormalization",
    "InstanceNormalization", "RMSNormalization", "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu",
    "Sigmoid", "HardSigmoid", "HardSwish", "Mish", "Softplus", "Softsign", "Tanh", "Erf", "Gelu",
    "Softmax", "LogSoftmax", "Swish", "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Log", "Abs",
    "Neg", "Reciprocal", "Floor", "Ceil", "Round", "Sign", "Min", "Max", "Mean", "Sum", "Mod", "Clip",
    "Sin", "Cos", "Tan", "Where", "Equal", "Greater", "Less", "GreaterOrEqual", "LessOrEqual", "And",
    "Or", "Not", "IsNaN", "IsInf", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd",
    "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp", "ArgMax", "ArgMin",
    "TopK", "CumSum", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Split",
    "Slice", "Pad", "Expand", "Tile", "Gather", "GatherElements", "GatherND", "ScatterElements",
    "ScatterND", "ConstantOfShape", "Shape", "Size", "Range", "Identity", "Cast", "CastLike", "Dropout",
    "DepthToSpace", "SpaceToDepth", "Resize", "Upsample", "GridSample", "Trilu", "EyeLike", "OneHot",
    "NonZero", "Hardmax", "LRN", "MeanVarianceNormalization", "Attention",
]
# fmt: on


def one_node(
    op: str, attributes: dict[str, Any] | None = None, *, opset: int = 17, domain: str = ""
) -> gs.Graph:
    x, y = gs.Variable("x", np.float32), gs.Variable("y", np.float32)
    node = gs.Node(op, "the node", attributes or {}, [x], [y], domain=domain)
    return gs.Graph(nodes=[node], inputs=[x], outputs=[y], opset=opset)


def test_core_operators_are_registered() -> None:
    assert not [op for op in CORE if lookup("", op, REVIEWED_OPSET) is None]


@pytest.mark.parametrize(
    ("op", "opset", "since"),
    [
        ("Softmax", 12, 1),
        ("Softmax", 13, 13),
        ("Softmax", 21, 13),
        ("Clip", 10, 6),
        ("Clip", 11, 11),
        ("Gelu", 20, 20),
    ],
)
def test_lookup_takes_the_greatest_version_not_above_the_opset(op: str, opset: int, since: int) -> None:
    found = lookup("", op, opset)
    assert found is not None
    assert found.since_version == since


def test_lookup_below_the_first_version() -> None:
    assert lookup("", "Gelu", 19) is None
    assert lookup("ai.onnx", "Gelu", 20) is lookup("", "Gelu", 20)
    assert lookup("elsewhere", "Gelu", 20) is None


def test_a_version_is_registered_once() -> None:
    with pytest.raises(ValueError, match="Relu version 6 is registered twice"):
        register("", "Relu", 6)(lambda _: lambda x: x)


@pytest.mark.parametrize("op", ["NonMaxSuppression", "LSTM", "GRU", "RNN", "If", "Loop", "Scan"])
def test_float_regions_are_reported(op: str) -> None:
    (found,) = check_supported(one_node(op))
    assert (found.node, found.op, found.reason) == ("the node", op, "no lowering for this operator")


@pytest.mark.parametrize(
    ("op", "attributes", "reason"),
    [
        ("Relu", {"strange": 1}, "attribute strange is not handled"),
        ("Resize", {"mode": "area"}, "Resize with mode area"),
        ("Pad", {"mode": "mirror"}, "Pad mode mirror"),
        ("Cast", {"to": onnx.TensorProto.STRING}, "STRING"),
        ("BatchNormalization", {"training_mode": 1}, "training mode"),
        ("Conv", {"auto_pad": "SAME"}, "auto_pad SAME"),
    ],
)
def test_what_a_builder_cannot_say_is_declined(op: str, attributes: dict[str, Any], reason: str) -> None:
    (found,) = check_supported(one_node(op, attributes))
    assert reason in found.reason


def test_max_pool_indices_are_declined_only_where_they_are_read() -> None:
    graph = one_node("MaxPool", {"kernel_shape": [2, 2]})
    graph.nodes[0].outputs.append(gs.Variable.empty())
    assert not check_supported(graph)
    graph.nodes[0].outputs[1] = gs.Variable("indices")
    assert "Indices" in check_supported(graph)[0].reason


def test_opsets_outside_the_reviewed_range(monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = check_supported(one_node("Relu", opset=MIN_OPSET - 1))
    assert "older than" in found.reason
    monkeypatch.setattr("onnxptq.lowering.registry.REVIEWED_OPSET", 12)
    (found,) = check_supported(one_node("Relu", opset=17))
    assert (found.version, found.reason) == (14, "its definition changed after opset 12")
    assert not check_supported(one_node("HardSigmoid", opset=17))


def test_other_domains_are_unsupported_by_name() -> None:
    (found,) = check_supported(one_node("FusedConv", domain="com.microsoft"))
    assert str(found).startswith("com.microsoft.FusedConv version")


def test_unsupported_reads_as_one_line() -> None:
    found = Unsupported(node="n", op="NonMaxSuppression", domain="", version=11, reason="no lowering")
    assert str(found) == "NonMaxSuppression version 11 (node 'n'): no lowering"


def test_nodes_can_be_checked_alone() -> None:
    graph = one_node("LSTM")
    assert not check_supported(graph, [])


def test_registrations_start_at_versions_that_onnx_knows() -> None:
    known = {(s.name, s.since_version) for s in onnx.defs.get_all_schemas_with_history() if s.domain == ""}
    served_from = {(e.op, e.since_version) for e in entries()}
    first = {op: min(v for name, v in known if name == op) for op, _ in known}
    assert not [(op, v) for op, v in served_from if (op, v) not in known and v != first[op]]
