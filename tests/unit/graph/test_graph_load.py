"""Reading untrusted files: each kind of damage gives its own error, and none crashes this process."""

from __future__ import annotations

import random as stdlib_random
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxptq.errors import (
    AlreadyQuantizedError,
    InvalidModelError,
    OnnxPtqError,
    OutputPathError,
    UnsupportedModelError,
    UsageError,
)
from onnxptq.graph import native
from onnxptq.graph.canonicalize import canonicalize
from onnxptq.graph.load import load_model, model_bytes, read_model
from onnxptq.graph.specs import input_specs
from tests.unit.graph.graph_helpers import assert_close, build, feed_for, node, random, run


def linear(**options: int) -> onnx.ModelProto:
    nodes = [node("MatMul", "x w", "z"), node("Add", "z b", "y")]
    return build(nodes, {"x": ["n", 4]}, ["y"], {"w": random(4, 300), "b": random(300)}, **options)


def saved(tmp_path: Path, model: onnx.ModelProto, **options: object) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(model, path, **options)
    return path


def external(tmp_path: Path, edit: Callable[[TensorProto], None] = lambda _: None) -> Path:
    """A model with its weight in a file, and ``edit`` applied to the reference."""
    path = saved(tmp_path, linear(), save_as_external_data=True, location="weights.bin", size_threshold=100)
    model = onnx.load(path, load_external_data=False)
    edit(next(t for t in model.graph.initializer if t.name == "w"))
    path.write_bytes(model.SerializeToString())
    return path


def set_entry(key: str, value: str) -> Callable[[TensorProto], None]:
    def edit(tensor: TensorProto) -> None:
        kept = {entry.key: entry.value for entry in tensor.external_data} | {key: value}
        del tensor.external_data[:]
        for name, text in kept.items():
            tensor.external_data.add(key=name, value=text)

    return edit


def test_a_good_model_keeps_its_external_references(tmp_path: Path) -> None:
    path = external(tmp_path)
    model = load_model(path)
    weight = next(t for t in model.graph.initializer if t.name == "w")
    assert weight.data_location == TensorProto.EXTERNAL
    assert not weight.raw_data
    assert model_bytes(model, path) == path.stat().st_size + (tmp_path / "weights.bin").stat().st_size


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "empty"), (b"not a model" * 50, "not an ONNX file|no graph")],
    ids=["absent", "empty", "text"],
)
def test_no_model(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError if content is None else InvalidModelError, match=message):
        load_model(path)


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="folder"):
        load_model(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_truncated(tmp_path: Path, share: float) -> None:
    path = saved(tmp_path, linear())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(InvalidModelError):
        load_model(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_entry("location", "absent.bin"), "'w'.*absent.bin does not exist"),
        (set_entry("location", "../weights.bin"), "outside the model's folder"),
        (set_entry("location", "/etc/passwd"), "outside the model's folder"),
        (set_entry("offset", "4000000"), "'w'.*weights.bin has"),
        (set_entry("offset", "-8"), "offset -8"),
        (set_entry("offset", "nine"), "invalid literal"),
        (set_entry("length", "12"), "needs 4800 bytes"),
        (lambda tensor: tensor.dims.__setitem__(0, 10**12), "needs"),
        (lambda tensor: tensor.external_data.__delitem__(slice(None)), "no location"),
    ],
    ids=["absent", "parent", "absolute", "beyond", "negative", "text", "length", "absurd", "none"],
)
def test_external_data(tmp_path: Path, edit: Callable[[TensorProto], None], message: str) -> None:
    path = external(tmp_path, edit)
    with pytest.raises(InvalidModelError, match=message):
        load_model(path)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = external(folder)
    (folder / "weights.bin").rename(tmp_path / "elsewhere.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "elsewhere.bin")
    with pytest.raises(InvalidModelError, match=r"leads to .*elsewhere\.bin, is outside") as refused:
        load_model(path)
    assert "not as a link" in refused.value.remedy


def linked(tmp_path: Path) -> Path:
    """A model and its data as links into a folder of contents, as caches of downloads keep them."""
    contents, snapshot = tmp_path / "contents", tmp_path / "snapshots" / "latest"
    contents.mkdir()
    snapshot.mkdir(parents=True)
    for number, file in enumerate([external(tmp_path), tmp_path / "weights.bin"]):
        file.rename(contents / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "contents" / str(number))
    return snapshot / "model.onnx"


@pytest.mark.parametrize("large", [False, True], ids=["small", "road of large models"])
def test_model_and_data_may_be_links_into_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    if large:
        monkeypatch.setattr("onnxptq.graph.canonicalize.LARGE_MODEL_BYTES", 1000)
    path, work = linked(tmp_path), tmp_path / "work"
    work.mkdir()
    assert model_bytes(load_model(path), path) == sum(
        f.stat().st_size for f in (tmp_path / "contents").iterdir()
    )
    result = canonicalize(path, work)
    feed = feed_for(linear())
    assert_close(run(linear(), feed), run(result.path, feed), 0)


def test_what_links_do_not_hide_is_refused(tmp_path: Path) -> None:
    path = linked(tmp_path)
    (tmp_path / "contents" / "1").rename(tmp_path / "2")
    (tmp_path / "contents" / "1").symlink_to(tmp_path / "2")
    with pytest.raises(InvalidModelError, match="outside"):
        load_model(path)


def test_data_with_several_hard_links(tmp_path: Path) -> None:
    path = external(tmp_path)
    (tmp_path / "other.bin").hardlink_to(tmp_path / "weights.bin")
    assert load_model(path).graph.initializer


@pytest.mark.parametrize("ir_version", [3, 8])
def test_the_checker_sees_models_with_external_data(tmp_path: Path, ir_version: int) -> None:
    model = linear()
    model.ir_version = ir_version
    model.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in model.graph.initializer
    )
    path = saved(tmp_path, model, save_as_external_data=True, location="w.bin", size_threshold=0)
    read = load_model(path)
    assert all(t.data_location == TensorProto.EXTERNAL for t in read.graph.initializer)
    read.graph.node[0].op_type = "Concat"
    path.write_bytes(read.SerializeToString())
    with pytest.raises(InvalidModelError, match="axis"):
        load_model(path)


def test_external_data_cut_short(tmp_path: Path) -> None:
    path = external(tmp_path)
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:1000])
    with pytest.raises(InvalidModelError, match=r"'w'.*weights\.bin has 1000 bytes"):
        load_model(path)


@pytest.mark.parametrize("dims", [[10**12], [2**40, 2**40], [-1, 4], [3]], ids=str)
def test_dimensions_that_do_not_fit_the_bytes(tmp_path: Path, dims: list[int]) -> None:
    model = linear()
    del model.graph.initializer[0].dims[:]
    model.graph.initializer[0].dims.extend(dims)
    with pytest.raises(InvalidModelError, match="'w'"):
        load_model(saved(tmp_path, model))


def test_typed_data_is_counted_too(tmp_path: Path) -> None:
    model = linear()
    model.graph.initializer[1].CopyFrom(helper.make_tensor("b", TensorProto.FLOAT, [300], [1.0] * 300))
    read_model(saved(tmp_path, model))
    model.graph.initializer[1].float_data.pop()
    with pytest.raises(InvalidModelError, match="300 stored values, 299"):
        read_model(saved(tmp_path, model))


def test_the_checker_runs(tmp_path: Path) -> None:
    model = linear()
    model.graph.node[0].op_type = "MatMull"
    with pytest.raises(InvalidModelError, match="MatMull"):
        load_model(saved(tmp_path, model))
    shapes = linear()
    shapes.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5
    with pytest.raises(InvalidModelError, match=r"[Ii]ncompatible"):
        load_model(saved(tmp_path, shapes))


def test_opsets(tmp_path: Path) -> None:
    for version, message in ((10, "opset 10; opset 11"), (999, "opset 999")):
        model = linear()
        model.opset_import[0].version = version
        with pytest.raises(UnsupportedModelError, match=message):
            load_model(saved(tmp_path, model))
    model = linear()
    del model.opset_import[:]
    with pytest.raises(InvalidModelError, match="operator set"):
        load_model(saved(tmp_path, model))


def test_no_inputs_or_outputs(tmp_path: Path) -> None:
    model = linear()
    del model.graph.output[:]
    with pytest.raises(InvalidModelError, match="no graph outputs"):
        load_model(saved(tmp_path, model))
    constant = build([node("Relu", "w", "y")], {}, ["y"], {"w": random(4)})
    constant.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))
    with pytest.raises(InvalidModelError, match="no graph inputs"):
        load_model(saved(tmp_path, constant))


def test_sparse_initializers_are_refused_by_name(tmp_path: Path) -> None:
    model = linear()
    values = helper.make_tensor("sparse_one", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10**12]))
    with pytest.raises(UnsupportedModelError, match="sparse_one"):
        load_model(saved(tmp_path, model))


@pytest.mark.parametrize(
    ("op", "domain"),
    [
        ("QuantizeLinear", ""),
        ("DequantizeLinear", ""),
        ("DynamicQuantizeLinear", ""),
        ("QLinearConv", ""),
        ("ConvInteger", ""),
        ("MatMulInteger", ""),
        ("QuantizeLinear", "com.microsoft"),
        ("QLinearAdd", "com.microsoft"),
        ("MatMulNBits", "com.microsoft"),
        ("QAttention", "com.microsoft"),
    ],
)
@pytest.mark.parametrize("place", ["main", "branch"])
def test_quantized_models_are_refused_by_node_name(tmp_path: Path, op: str, domain: str, place: str) -> None:
    model = linear(extra_domains={"com.microsoft": 1})
    quantized = helper.make_node(op, ["x", "b"], ["q"], name="the_culprit", domain=domain)
    if place == "main":
        model.graph.node.append(quantized)
    else:
        branch = helper.make_graph([quantized], "branch", [], [])
        model.graph.node.append(helper.make_node("If", ["x"], ["u"], then_branch=branch, else_branch=branch))
    with pytest.raises(AlreadyQuantizedError, match=f"'the_culprit' is a {op}"):
        read_model(saved(tmp_path, model))


def test_float_contrib_operators_are_not_quantized(tmp_path: Path) -> None:
    model = linear(extra_domains={"com.microsoft": 1})
    model.graph.node.append(helper.make_node("QuickGelu", ["x"], ["q"], domain="com.microsoft"))
    read_model(saved(tmp_path, model))


def test_a_crash_and_a_hang_of_native_code_become_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, linear())
    worker = tmp_path / "worker.py"
    monkeypatch.setattr(native, "_WORKER", worker)
    worker.write_text("import os, signal\nprint('check', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    with pytest.raises(InvalidModelError, match=r"crashed.*SIGSEGV"):
        load_model(path)
    worker.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(native, "_BASE_SECONDS", 0.3)
    with pytest.raises(InvalidModelError, match="did not finish"):
        load_model(path)


def test_an_absurd_allocation_is_refused(tmp_path: Path) -> None:
    """A constant shape of 4 TB: folding it must not try to allocate it, and nothing else must either."""
    model = build(
        [node("ConstantOfShape", "shape", "c"), node("ReduceSum", "c", "s"), node("Add", "x s", "y")],
        {"x": ["n", 4]},
        ["y"],
        {"shape": np.array([1 << 20, 1 << 20])},
    )
    result = canonicalize(saved(tmp_path, model), tmp_path)
    assert result.path.stat().st_size < 10_000


def mutated(data: bytes, seed: int) -> bytes:
    """One to four random bytes changed, a slice removed, or a slice repeated."""
    rng = stdlib_random.Random(seed)
    result = bytearray(data)
    kind = rng.randrange(4)
    if kind < 2:
        for _ in range(rng.randint(1, 4)):
            result[rng.randrange(len(result))] ^= 1 << rng.randrange(8)
    else:
        start = rng.randrange(len(result))
        piece = result[start : start + rng.randint(1, 40)]
        result[start : start + len(piece)] = b"" if kind == 2 else piece * 2
    return bytes(result)


def small_network() -> bytes:
    """Little weight and much structure, so that most mutations hit structure."""
    nodes = [
        node("Constant", "", "shape", value_ints=[0, -1]),
        node("Conv", "x w b", "c", pads=[1, 1], group=1),
        node("BatchNormalization", "c s s s s", "n"),
        node("Relu", "n", "r"),
        node("Reshape", "r shape", "f"),
        node("MatMul", "f v", "m"),
        node("Add", "m d", "y"),
    ]
    weights = {
        "w": random(2, 1, 3),
        "b": random(2),
        "s": np.ones(2, np.float32),
        "v": random(8, 2),
        "d": random(2),
    }
    return build(nodes, {"x": ["n", 1, 4]}, ["y"], weights).SerializeToString()


def test_mutated_files_never_do_more_than_raise(tmp_path: Path) -> None:
    """Reading in Python is cheap, so it gets many mutations; the native part a few of them."""
    original, path = small_network(), tmp_path / "model.onnx"
    outcomes = set()
    for seed in range(400):
        path.write_bytes(mutated(original, seed))
        try:
            read_model(path)
            outcomes.add("read")
        except OnnxPtqError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


@pytest.mark.parametrize("seed", range(8))
def test_mutated_files_through_the_native_steps(tmp_path: Path, seed: int) -> None:
    work, path = tmp_path / "work", tmp_path / "model.onnx"
    work.mkdir()
    path.write_bytes(mutated(small_network(), 1000 + seed))
    caught = None
    try:
        canonicalize(path, work)
    except OnnxPtqError as error:
        caught = error
    if caught is not None:
        assert str(path) in caught.message
        assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    "answer", ["", '{"step": "check", "reason": "OSError", "errno": 28}'], ids=["cut off", "told"]
)
def test_a_native_process_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import json, sys\n"
        "job = json.load(open(sys.argv[1]))\n"
        f"open(job['result'], 'w').write({answer!r})\n"
        "sys.exit(1)\n"
    )
    monkeypatch.setattr(native, "_WORKER", worker)
    with pytest.raises(OutputPathError, match=r"full|No space left") as caught:
        load_model(saved(tmp_path, linear()))
    assert tempfile.gettempdir() in caught.value.message
    assert "TMPDIR" in caught.value.remedy


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    model = linear()
    feed = feed_for(model)
    expected = run(model, feed)
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))
    path = saved(tmp_path, model)

    assert [node.op_type for node in load_model(path).graph.node] == ["MatMul", "Add"]
    found = canonicalize(path, tmp_path)
    assert "Nodes stood before others that they read: they were sorted." in found.notes
    assert_close(expected, run(found.path, feed), tolerance=1e-6)


def test_sorting_moves_no_more_than_it_must_and_sees_what_nested_graphs_read(tmp_path: Path) -> None:
    def branch(name: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([node("Identity", "late", name)], "branch", [], [out])

    chosen = helper.make_node(
        "If", ["c"], ["y"], name="n_y", then_branch=branch("then"), else_branch=branch("else")
    )
    nodes = [node("Relu", "x", "a"), node("Neg", "a", "late"), node("ReduceMax", "a", "top", keepdims=0)]
    nodes += [node("Cast", "top", "c", to=TensorProto.BOOL), chosen]
    model = build(nodes, {"x": ["n", 4]}, ["y"])
    del model.graph.node[:]
    model.graph.node.extend(nodes[i] for i in (0, 4, 2, 3, 1))
    read = load_model(saved(tmp_path, model))
    assert [n.output[0] for n in read.graph.node] == ["a", "top", "c", "late", "y"]


def test_nodes_that_read_each_other_in_a_circle_are_refused(tmp_path: Path) -> None:
    nodes = [node("Add", "x r", "a"), node("Relu", "a", "r"), node("Neg", "r", "y")]
    model = linear()
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    with pytest.raises(InvalidModelError, match="topologically sorted"):
        load_model(saved(tmp_path, model))


def test_negative_dimensions_are_unknown_ones(tmp_path: Path) -> None:
    model = linear()
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    path = saved(tmp_path, model)

    assert input_specs(path)[0].shape == (None, 4)
    assert canonicalize(path, tmp_path).inputs[0].shape == (None, 4)
