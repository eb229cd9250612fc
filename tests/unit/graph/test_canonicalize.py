"""The canonical form: same outputs, the user's names, types and order, and a report of what was done."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxptq.errors import InvalidModelError, OutputPathError, UnsupportedModelError
from onnxptq.graph import canonicalize as module
from onnxptq.graph.attention import find_attention
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.load import read_model
from onnxptq.graph.passes import PASSES
from onnxptq.runtime import Session
from onnxptq.types import CanonicalModel
from tests.unit.graph.graph_helpers import assert_close, build, feed_for, node, random, run

# Half precision keeps 11 bits; the original rounds after each node, the canonical form at the end only.
HALF_ROUNDING = 4e-3
FLOAT_ROUNDING = 2e-6


def canonical(
    tmp_path: Path, model: onnx.ModelProto, name: str = "work", **options: object
) -> CanonicalModel:
    source, work = tmp_path / "model.onnx", tmp_path / name
    work.mkdir()
    onnx.save(model, source)
    result = canonicalize(source, work, **options)  # type: ignore[arg-type]
    onnx.checker.check_model(str(result.path), full_check=True)
    return result


def ops(result: CanonicalModel) -> Counter[str]:
    return Counter(n.op for n in result.graph.nodes)


def network(**options: object) -> onnx.ModelProto:
    """Conv, BatchNorm, a shape computation, an Identity, and a MatMul with bias."""
    nodes = [
        node("Conv", "image w", "c", pads=[1, 1]),
        node("BatchNormalization", "c gamma beta mean var", "n"),
        node("Relu", "n", "r"),
        node("Shape", "r", "s"),
        node("Constant", "", "zero", value_int=0),
        node("Gather", "s zero", "batch"),
        node("Constant", "", "axes", value_ints=[0]),
        node("Unsqueeze", "batch axes", "batch1"),
        node("Constant", "", "rest", value_ints=[-1]),
        node("Concat", "batch1 rest", "shape", axis=0),
        node("Reshape", "r shape", "f"),
        node("Identity", "f", "same"),
        node("MatMul", "same v", "m"),
        node("Add", "m b", "logits"),
    ]
    weights = {
        "w": random(3, 2, 3),
        "gamma": random(3, seed=1),
        "beta": random(3, seed=2),
        "mean": random(3, seed=3),
        "var": np.abs(random(3, seed=4)) + 0.5,
        "v": random(18, 5),
        "b": random(5),
    }
    return build(nodes, {"image": ["samples", 2, 6]}, ["logits"], weights, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("simplify", [True, False])
def test_outputs_names_and_dynamic_batch_stay(tmp_path: Path, simplify: bool) -> None:
    model = network()
    result = canonical(tmp_path, model, simplify=simplify)
    for batch in (1, 4):
        feed = feed_for(model, symbol=batch)
        assert_close(run(model, feed), run(result.path, feed), FLOAT_ROUNDING)
    assert [(i.name, i.dtype, i.shape) for i in result.inputs] == [
        ("image", np.dtype(np.float32), ("samples", 2, 6))
    ]
    assert result.outputs == ("logits",)
    assert ops(result)["BatchNormalization"] == ops(result)["Identity"] == ops(result)["Constant"] == 0
    names = [n.name for n in result.graph.nodes]
    assert len(set(names)) == len(names)
    assert all(names)
    assert result.source_bytes == result.source.stat().st_size
    assert sorted(file.name for file in result.path.parent.iterdir()) == ["canonical.onnx"]


def test_every_tensor_carries_a_type_and_a_shape(tmp_path: Path) -> None:
    result = canonical(tmp_path, network())
    assert all(t.dtype is not None and t.shape is not None for t in result.graph.tensors().values())


def test_unnamed_and_repeated_nodes_get_stable_unique_names(tmp_path: Path) -> None:
    model = network()
    for i, n in enumerate(model.graph.node):
        n.name = "" if i % 2 else "same"
    first = canonical(tmp_path, model, "first", simplify=False)
    second = canonical(tmp_path, model, "second", simplify=False)
    names = [n.name for n in first.graph.nodes]
    assert len(set(names)) == len(names)
    assert names == [n.name for n in second.graph.nodes]
    assert first.fingerprint == second.fingerprint
    assert first.path.read_bytes() == second.path.read_bytes()


def same_names() -> onnx.ModelProto:
    """Two nodes of one name, and three more inside a branch."""

    def branch(op: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node(op, ["h"], [f"{op}_a"], name="same"),
            helper.make_node("Relu", [f"{op}_a"], [f"{op}_b"], name="same"),
            helper.make_node("Tanh", [f"{op}_b"], [f"{op}_y"]),
        ]
        output = helper.make_tensor_value_info(f"{op}_y", TensorProto.FLOAT, ["n", 3])
        return helper.make_graph(nodes, op, [], [output])

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "same"),
        helper.make_node("ReduceSum", ["h"], ["total"], "same", keepdims=0),
        node("Cast", "total", "flag", to=TensorProto.BOOL),
        helper.make_node(
            "If", ["flag"], ["y"], "choice", then_branch=branch("Neg"), else_branch=branch("Abs")
        ),
    ]
    model = build(nodes, {"x": ["n", 40]}, ["y"], {"w": random(40, 3)})
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3]))
    return model


@pytest.mark.parametrize("external", [False, True])
def test_nodes_of_one_name_are_numbered_in_a_copy(tmp_path: Path, external: bool) -> None:
    model = same_names()
    source, work = tmp_path / "m.onnx", tmp_path / "work"
    work.mkdir()
    onnx.save(model, source, save_as_external_data=external, location="m.bin", size_threshold=0)
    with pytest.raises(InvalidModelError, match="same node name"):
        Session(source)
    result = canonicalize(source, work)
    assert result.source == source
    assert result.reference == result.renamed_source
    assert any("'same'" in note for note in result.notes)
    assert {n.name for n in result.graph.nodes} >= {"same", "same_0", "choice"}
    feed = feed_for(model)
    assert_close(run(result.reference, feed), run(result.path, feed), 0)
    hidden = feed["x"] @ random(40, 3)
    chosen = np.negative if hidden.sum() else np.abs
    # One float32 matrix product in two summation orders.
    np.testing.assert_allclose(
        run(result.reference, feed)["y"], np.tanh(np.maximum(chosen(hidden), 0)), rtol=1e-4, atol=1e-5
    )


def test_a_copy_with_numbered_nodes_shares_the_data_of_the_original(tmp_path: Path) -> None:
    source, data, work = tmp_path / "m.onnx", tmp_path / "m.bin", tmp_path / "work"
    onnx.save(same_names(), source, save_as_external_data=True, location=data.name, size_threshold=0)
    work.mkdir()
    before = data.read_bytes()
    for _ in range(2):  # a second run finds what the first has left
        copy = canonicalize(source, work).reference
        assert copy.with_name(data.name).samefile(data)
    assert data.read_bytes() == before
    assert [n.name for n in onnx.load(source, load_external_data=False).graph.node].count("same") == 2


def test_the_fingerprint_covers_weights_external_data_and_options(tmp_path: Path) -> None:
    path, data = tmp_path / "m.onnx", tmp_path / "m.bin"
    onnx.save(network(), path, save_as_external_data=True, location=data.name, size_threshold=100)

    def fingerprint(*options: object) -> str:
        return module._fingerprint(module._sha256(read_model(path), path), options)

    def contents() -> str:
        return hashlib.sha256(path.read_bytes() + data.read_bytes()).hexdigest()

    assert canonicalize(path, tmp_path).source_sha256 == contents()
    base = fingerprint(None, 13, True)
    assert fingerprint(None, 13, True) == base
    assert fingerprint(None, 13, False) != base
    for file in (path, data):
        content = file.read_bytes()
        # A bit of a float in both: of the bias that is inside the model file, and of the external weight.
        position = content.index(random(5).tobytes()) if file == path else 0
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert fingerprint(None, 13, True) != base
        file.write_bytes(content)
    assert fingerprint(None, 13, True) == base


def test_a_work_folder_that_is_absent(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "m.onnx")
    with pytest.raises(OutputPathError, match="absent cannot take"):
        canonicalize(tmp_path / "m.onnx", tmp_path / "absent")


@pytest.mark.parametrize(
    ("own", "options", "wanted"),
    [(11, {}, 13), (17, {}, 17), (13, {"opset": 21}, 21), (17, {"opset": 13}, 17)],
)
def test_opset(tmp_path: Path, own: int, options: dict[str, int], wanted: int) -> None:
    model = build(
        [node("Softmax", "x", "s", axis=1), node("Clip", "s low", "y")],
        {"x": ["n", 4]},
        ["y"],
        {"low": np.array(0.1, np.float32)},
        opset=own,
    )
    result = canonical(tmp_path, model, **options)
    assert result.opset == result.graph.opset == wanted
    stays = [note for note in result.notes if "only ever raised" in note]
    assert len(stays) == (options.get("opset", own) < own)
    assert any("operator set was raised" in note for note in result.notes) == (wanted != own)
    feed = feed_for(model)
    assert_close(run(model, feed), run(result.path, feed), FLOAT_ROUNDING)


@pytest.mark.parametrize("axis", [-1, 3])
def test_an_old_softmax_over_the_last_axis_stays_one_node(tmp_path: Path, axis: int) -> None:
    nodes = [node("Relu", "x", "r"), node("Softmax", "r", "y", axis=axis)]
    model = build(nodes, {"x": ["n", 2, 3, 4]}, ["y"], opset=11)
    del model.graph.value_info[:]
    assert ops(canonical(tmp_path, model, opset=17)) == {"Relu": 1, "Softmax": 1}


def test_a_conversion_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="raised to 200"):
        canonical(tmp_path, network(), opset=200)


def test_initializers_that_are_inputs_too_become_constants(tmp_path: Path) -> None:
    model = network()
    model.graph.input.append(helper.make_tensor_value_info("v", TensorProto.FLOAT, [18, 5]))
    result = canonical(tmp_path, model)
    assert [i.name for i in result.inputs] == ["image"]


def half_network() -> onnx.ModelProto:
    """FP16 with a mixed interface, an output that is also read inside, and casts."""
    nodes = [
        node("MatMul", "x w", "a"),
        node("Relu", "a", "hidden"),
        node("Cast", "t", "t16", to=TensorProto.FLOAT16),
        node("Add", "hidden t16", "s"),
        node("Constant", "", "c", value=numpy_helper.from_array(np.array(0.5, np.float16))),
        node("Mul", "s c", "y"),
        node("Cast", "y", "z", to=TensorProto.FLOAT),
    ]
    half, single = TensorProto.FLOAT16, TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        "half",
        [helper.make_tensor_value_info("x", half, ["n", 8]), helper.make_tensor_value_info("t", single, [6])],
        [
            helper.make_tensor_value_info(name, kind, ["n", 6])
            for name, kind in (("hidden", half), ("y", half), ("z", single))
        ],
        [numpy_helper.from_array(random(8, 6).astype(np.float16), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("large", [False, True], ids=["small", "road of large models"])
def test_half_precision_becomes_float_behind_the_same_interface(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    model = half_network()
    if large:
        monkeypatch.setattr(module, "LARGE_MODEL_BYTES", 10)
    result = canonical(tmp_path, model)
    feed = feed_for(model)
    assert_close(run(model, feed), run(result.path, feed), HALF_ROUNDING)
    assert [i.dtype for i in result.inputs] == [np.float16, np.float32]
    inner = [t for t in result.graph.tensors().values() if t.name not in ("x", "hidden", "y")]
    assert all(t.dtype != np.float16 for t in inner)
    assert next(n for n in result.graph.nodes if n.op == "MatMul").inputs[1].dtype == np.float32
    assert {"x", "hidden", "y"} >= {
        result.user_name(t) for t in ("x_as_float", "hidden_as_float", "y_as_float")
    }
    assert any("Half-precision" in note for note in result.notes)


@pytest.mark.parametrize("half", [False, True])
def test_large_models_with_external_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    """Weights beyond the limit go round the native steps, through memory maps."""
    kind = np.float16 if half else np.float32
    nodes = [node("Identity", "x", "i"), node("MatMul", "i w", "m"), node("Add", "m b", "y")]
    model = build(
        nodes,
        {"x": ["n", 64]},
        {"y": TensorProto.FLOAT16 if half else TensorProto.FLOAT},
        {"w": random(64, 96).astype(kind), "b": random(96).astype(kind)},
        input_type=TensorProto.FLOAT16 if half else TensorProto.FLOAT,
    )
    source, work = tmp_path / "m.onnx", tmp_path / "work"
    work.mkdir()
    reference = onnx.ModelProto()
    reference.CopyFrom(model)
    onnx.save(model, source, save_as_external_data=True, location="m.bin", size_threshold=100)
    monkeypatch.setattr(module, "LARGE_MODEL_BYTES", 1000)
    result = canonicalize(source, work)
    assert ("Identity" in ops(result)) is False
    assert any("onnxsim was skipped" in note for note in result.notes)
    feed = feed_for(reference)
    assert_close(run(reference, feed), run(result.path, feed), HALF_ROUNDING if half else 0)
    assert sorted(file.name for file in work.iterdir()) == ["canonical.onnx"]


def test_functions_are_inlined(tmp_path: Path) -> None:
    double = helper.make_function(
        "local",
        "Twice",
        ["a"],
        ["b"],
        [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 17)],
    )
    graph = helper.make_graph(
        [helper.make_node("Twice", ["x"], ["h"], domain="local"), helper.make_node("Relu", ["h"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, functions=[double], opset_imports=domains, ir_version=8)
    result = canonical(tmp_path, model)
    assert ops(result) == {"Add": 1, "Relu": 1}
    feed = feed_for(model)
    assert_close(run(model, feed), run(result.path, feed), 0)


def test_bodies_of_control_flow_stay_and_are_reported(tmp_path: Path) -> None:
    def branch(op: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node("MatMul", ["h", "w"], [f"{op}_m"]),
            helper.make_node(op, [f"{op}_m"], [f"{op}_y"]),
        ]
        return helper.make_graph(
            nodes, op, [], [helper.make_tensor_value_info(f"{op}_y", TensorProto.FLOAT, ["n", 3])]
        )

    nodes = [
        node("Relu", "x", "h"),
        node("ReduceSum", "x", "total", keepdims=0),
        node("Cast", "total", "flag", to=TensorProto.BOOL),
        helper.make_node(
            "If", ["flag"], ["y"], "choice", then_branch=branch("Neg"), else_branch=branch("Abs")
        ),
    ]
    model = build(nodes, {"x": ["n", 4]}, ["y"], {"w": random(4, 3)})
    model.graph.output[0].type.tensor_type.shape.CopyFrom(
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3]).type.tensor_type.shape
    )
    result = canonical(tmp_path, model)
    assert [(skip.site, "float" in skip.reason) for skip in result.skips] == [("choice", True)]
    feed = feed_for(model)
    assert_close(run(model, feed), run(result.path, feed), 0)


def loop_of_products() -> onnx.NodeProto:
    """``y = h W^trips``."""
    body = helper.make_graph(
        [
            helper.make_node("MatMul", ["state", "inner"], ["next"], name="step"),
            helper.make_node("Identity", ["keep"], ["still"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("keep", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, ["n", 4]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("next", TensorProto.FLOAT, ["n", 4]),
        ],
        [numpy_helper.from_array(random(4, 4), "inner")],
    )
    return helper.make_node("Loop", ["trips", "", "h"], ["y"], "again", body=body)


@pytest.mark.parametrize("simplify", [True, False])
def test_loops_of_a_constant_length_are_not_unrolled(tmp_path: Path, simplify: bool) -> None:
    nodes = [node("MatMul", "x w", "h"), loop_of_products()]
    model = build(nodes, {"x": ["n", 4]}, ["y"], {"w": random(4, 4), "trips": np.int64(5)})
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4]))
    result = canonical(tmp_path, model, simplify=simplify)
    assert ops(result) == {"MatMul": 1, "Loop": 1}
    assert [skip.site for skip in result.skips] == ["again"]
    feed = feed_for(model)
    assert_close(run(model, feed), run(result.path, feed), 0)


def test_a_constant_condition_is_decided(tmp_path: Path) -> None:
    def branch(op: str) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{op}_y", TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["h"], [f"{op}_y"])], op, [], [output])

    nodes = [
        node("MatMul", "x w", "h"),
        helper.make_node(
            "If", ["flag"], ["y"], "choice", then_branch=branch("Neg"), else_branch=branch("Abs")
        ),
    ]
    model = build(nodes, {"x": ["n", 4]}, ["y"], {"w": random(4, 4), "flag": np.bool_(False)})
    result = canonical(tmp_path, model)
    assert ops(result) == {"MatMul": 1, "Abs": 1}
    assert result.skips == ()
    feed = feed_for(model)
    assert_close(run(model, feed), run(result.path, feed), 0)


def test_metadata_is_kept(tmp_path: Path) -> None:
    model = network()
    model.metadata_props.add(key="author", value="someone")
    model.graph.node[0].metadata_props.add(key="layer", value="stem")
    result = canonical(tmp_path, model)
    written = onnx.load(result.path)
    assert result.model_metadata == {"author": "someone"}
    assert {p.key: p.value for p in written.metadata_props} == {"author": "someone"}
    conv = next(n for n in written.graph.node if n.op_type == "Conv")
    assert (
        {p.key: p.value for p in conv.metadata_props} == {"layer": "stem"} == result.node_metadata[conv.name]
    )


def test_names_lead_back_to_the_users_own(tmp_path: Path) -> None:
    model = network()
    result = canonical(tmp_path, model)
    known = {name for n in model.graph.node for name in n.output}
    known |= {t.name for t in model.graph.initializer} | {e.name for e in model.graph.input}
    assert {t: n for t, n in result.user_names.items() if n not in known} == {}
    conv, matmul = (next(n for n in result.graph.nodes if n.op == op) for op in ("Conv", "MatMul"))
    assert result.user_name(conv.inputs[1].name) == "w"
    assert result.user_name(matmul.inputs[1].name) == "v"
    assert result.user_name(conv.outputs[0].name) == "n"
    unmapped = {
        t.name for n in result.graph.nodes for t in n.outputs if result.user_name(t.name) not in known
    }
    assert unmapped == set()


def test_onnxsim_failing_is_a_note_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FOLD_LIMIT", "no size")
    model = network()
    result = canonical(tmp_path, model)
    feed = feed_for(model)
    assert_close(run(model, feed), run(result.path, feed), FLOAT_ROUNDING)
    assert any("onnxsim could not clean" in note for note in result.notes)


def test_double_weights_are_refused_by_name(tmp_path: Path) -> None:
    kind = TensorProto.DOUBLE
    model = build(
        [node("MatMul", "x w", "y")],
        {"x": ["n", 4]},
        {"y": kind},
        {"w": random(4, 3).astype(np.float64)},
        input_type=kind,
    )
    with pytest.raises(UnsupportedModelError, match="'w'"):
        canonical(tmp_path, model)


def test_bfloat16_weights_become_float(tmp_path: Path) -> None:
    weight = numpy_helper.to_array(numpy_helper.from_array(random(4, 3)))
    model = build(
        [
            node("Cast", "x", "h", to=TensorProto.BFLOAT16),
            node("MatMul", "h w", "m"),
            node("Cast", "m", "y", to=TensorProto.FLOAT),
        ],
        {"x": ["n", 4]},
        ["y"],
    )
    bits = weight.view(np.uint32) >> 16
    brain = helper.make_tensor("w", TensorProto.BFLOAT16, [4, 3], bits.astype(np.uint16).tobytes(), raw=True)
    model.graph.initializer.append(brain)
    model = onnx.shape_inference.infer_shapes(model)
    result = canonical(tmp_path, model)
    assert ops(result) == {"MatMul": 1}
    feed = feed_for(model)
    truncated = (bits << 16).view(np.float32)
    # One float32 matrix product in two summation orders.
    np.testing.assert_allclose(run(result.path, feed)["y"], feed["x"] @ truncated, rtol=1e-5, atol=1e-6)


def test_bfloat16_interfaces_are_refused_by_name(tmp_path: Path) -> None:
    brain = TensorProto.BFLOAT16
    model = build([node("Relu", "x", "y")], {"x": [3]}, {"y": brain}, input_type=brain)
    with pytest.raises(UnsupportedModelError, match="input 'x'"):
        canonical(tmp_path, model)


def test_sequences_are_refused_by_name(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("ConcatFromSequence", ["items"], ["y"], axis=0)],
        "g",
        [helper.make_tensor_sequence_value_info("items", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with pytest.raises(UnsupportedModelError, match="'items'"):
        canonical(tmp_path, model)


BEDS = ["resnet20_cifar10", "efficientnet_lite0", "fastestdet", "pointnet_modelnet40"]


@pytest.mark.parametrize("bed", BEDS)
def test_testbed(tmp_path: Path, testbed: Path, bed: str) -> None:
    source = testbed / "models" / f"{bed}.onnx"
    result = canonicalize(source, tmp_path)
    before = onnx.load(source)
    assert [i.name for i in result.inputs] == [e.name for e in before.graph.input]
    assert list(result.outputs) == [e.name for e in before.graph.output]
    assert not {"Constant", "Identity", "BatchNormalization", "Dropout"} & set(ops(result))
    feed = feed_for(before, symbol=2)
    # Batch norm folding and a changed opset reorder float32 roundings; through some 50 layers.
    assert_close(run(source, feed), run(result.path, feed), 1e-5)


ATTENTIONS: dict[str, tuple[dict[str, list[int | str]], dict[str, int]]] = {
    "flat": (
        {"q": ["n", 5, 12], "k": ["n", 7, 12], "v": ["n", 7, 12]},
        {"q_num_heads": 3, "kv_num_heads": 3},
    ),
    "heads": ({"q": [2, 4, 5, 6], "k": [2, 4, 5, 6], "v": [2, 4, 5, 6]}, {"is_causal": 1}),
    "grouped": ({"q": [1, 4, 5, 6], "k": [1, 2, 5, 6], "v": [1, 2, 5, 6]}, {}),
}


@pytest.mark.parametrize("kind", ATTENTIONS)
@pytest.mark.parametrize("mask", [True, False], ids=["masked", "plain"])
def test_attention_nodes_are_written_out_on_request(kind: str, mask: bool, tmp_path: Path) -> None:
    inputs, attrs = ATTENTIONS[kind]
    length = int(inputs["k"][-2])
    weights = {"m": np.where(random(5, length) > -0.5, 0, -1e4).astype(np.float32)} if mask else {}
    names = "q k v m" if mask else "q k v"
    model = build([node("Attention", names, "y", **attrs)], inputs, ["y"], weights, opset=23)
    kept = canonical(tmp_path, model)
    assert ops(kept)["Attention"] == 1
    result = canonical(tmp_path, model, "out", expanded=("Attention",))
    assert ops(result)["Attention"] == 0
    assert ops(result)["MatMul"] == 2
    assert "1 Attention nodes were written out as products." in result.notes
    assert result.fingerprint != kept.fingerprint
    (found,) = find_attention(GraphIndex(result.graph))
    assert found.form == "product"
    assert len(found.scores) == 1
    assert found.is_masked == (mask or "is_causal" in attrs)
    feed = feed_for(model)
    assert_close(run(model, feed), run(result.path, feed), 1e-5)


def encoder_attention() -> onnx.ModelProto:
    """Attention over two heads as exporters write it, with layers for queries, keys and values of their own."""
    nodes = [node("Constant", "", "four", value=numpy_helper.from_array(np.array(4.0, np.float32)))]
    for letter in "qkv":
        nodes += [
            node("MatMul", f"x {letter}w", f"{letter}m"),
            node("Add", f"{letter}b {letter}m", f"{letter}a"),
            node("Reshape", f"{letter}a heads", f"{letter}r"),
            node(
                "Transpose", f"{letter}r", f"{letter}t", perm=[0, 2, 3, 1] if letter == "k" else [0, 2, 1, 3]
            ),
        ]
    nodes += [
        node("MatMul", "qt kt", "scores"),
        node("Div", "scores four", "scaled"),
        node("Softmax", "scaled", "p", axis=-1),
        node("MatMul", "p vt", "o"),
        node("Transpose", "o", "ot", perm=[0, 2, 1, 3]),
        node("Reshape", "ot flat", "or"),
        node("MatMul", "or ow", "y"),
    ]
    weights: dict[str, Any] = {f"{letter}w": random(32, 32, seed=i) for i, letter in enumerate("qkvo")}
    weights |= {f"{letter}b": random(32, seed=i) for i, letter in enumerate("qkv")}
    weights |= {"heads": np.array([0, 5, 2, 16]), "flat": np.array([0, 5, 32])}
    return build(nodes, {"x": ["n", 5, 32]}, ["y"], weights)


def test_attention_stays_a_product_of_matrices(tmp_path: Path) -> None:
    """onnxsim would merge it, with the layers in front of it, into an operator of com.microsoft."""
    model = encoder_attention()
    result = canonical(tmp_path, model)
    assert ops(result)["MatMul"] == 6
    assert {n.domain for n in result.graph.nodes} <= {"", None}
    feed = feed_for(model, symbol=2)
    assert_close(run(model, feed), run(result.path, feed), FLOAT_ROUNDING)


def test_onnxsim_is_left_out_where_it_writes_operators_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [name for name in module._SKIPPED_OPTIMIZERS if name != "fuse_attention"]
    monkeypatch.setattr(module, "_SKIPPED_OPTIMIZERS", kept)
    model = encoder_attention()
    result = canonical(tmp_path, model)
    assert "onnxsim wrote operators of com.microsoft and was skipped." in result.notes
    assert ops(result)["MatMul"] == 6
    feed = feed_for(model, symbol=2)
    assert_close(run(model, feed), run(result.path, feed), FLOAT_ROUNDING)


def test_every_pass_has_words_for_the_report() -> None:
    for rewrite in PASSES:
        for count in (1, 3):
            note = rewrite.note(count)
            assert note.startswith("One " if count == 1 else "3 ")
            assert note.endswith(".")
            assert "_" not in note


def test_layers_that_share_a_weight_share_it_after_rewrites(tmp_path: Path) -> None:
    """The factor of attention scores goes into the projection, of which each layer would get a copy."""
    width, tokens = 64, 5
    weights = {
        "w": random(width, 3 * width),
        "s": np.float32(width**-0.5),
        "parts": np.array([width] * 3),
        "root": random(width, width),
    }
    nodes = [node("MatMul", "x root", "h0")]
    for i in range(3):
        nodes += [
            node("MatMul", f"h{i} w", f"p{i}"),
            node("Split", f"p{i} parts", f"q{i} k{i} v{i}", axis=-1),
            node("Mul", f"q{i} s", f"qs{i}"),
            node("Transpose", f"k{i}", f"kt{i}", perm=[0, 2, 1]),
            node("MatMul", f"qs{i} kt{i}", f"scores{i}"),
            node("Softmax", f"scores{i}", f"a{i}", axis=-1),
            node("MatMul", f"a{i} v{i}", f"h{i + 1}"),
        ]
    model = build(nodes, {"x": [1, tokens, width]}, ["h3"], weights)
    feed = feed_for(model)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    found = canonicalize(path, tmp_path)
    assert not any(n.op == "Mul" for n in found.graph.nodes)
    large = [
        t.name for t in found.graph.tensors().values() if isinstance(t, gs.Constant) and len(t.shape) == 2
    ]
    assert sorted(large) == ["root", "w"]
    assert_close(run(model, feed), run(found.path, feed), tolerance=1e-5)
