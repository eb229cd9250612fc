"""Saving: what is written equals what is in the graph, and a failure leaves the folder as it was."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxptq.errors import OutputPathError
from onnxptq.graph import save
from onnxptq.graph.save import exposed_copy, save_graph
from onnxptq.graph.surgeon import import_graph
from tests.unit.graph.graph_helpers import assert_close, build, feed_for, node, random, run


def two_layers() -> onnx.ModelProto:
    nodes = [node("MatMul", "x w", "h"), node("Relu", "h", "r"), node("MatMul", "r v", "y")]
    return build(nodes, {"x": ["n", 40]}, ["y"], {"w": random(40, 30), "v": random(30, 20)})


@pytest.mark.parametrize("external", [False, True])
def test_round_trip(tmp_path: Path, external: bool) -> None:
    model = two_layers()
    graph = import_graph(model, tmp_path)
    path = tmp_path / "out.onnx"
    written = save_graph(graph, path, external_data=external)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == (["out.onnx", "out.onnx.data"] if external else ["out.onnx"])
    assert written == sum(file.stat().st_size for file in tmp_path.iterdir())
    onnx.checker.check_model(str(path), full_check=True)
    feed = feed_for(model)
    assert_close(run(model, feed), run(path, feed), 0)
    again = import_graph(onnx.load(path, load_external_data=False), tmp_path)
    assert isinstance(again.tensors()["w"].values, np.memmap) == external
    assert_close(run(model, feed), run(resaved(again, tmp_path / "third.onnx"), feed), 0)


def resaved(graph: gs.Graph, path: Path) -> Path:
    save_graph(graph, path)
    return path


def test_the_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    graph = import_graph(two_layers(), tmp_path)
    first = resaved(graph, tmp_path / "a.onnx").read_bytes()
    assert resaved(graph, tmp_path / "b.onnx").read_bytes() == first


def test_large_models_switch_to_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save, "EXTERNAL_DATA_BYTES", 4000)
    save_graph(import_graph(two_layers(), tmp_path), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx.data").exists()
    assert (tmp_path / "out.onnx").stat().st_size < 2000


def test_variants_share_the_data_of_their_folder(tmp_path: Path) -> None:
    base = tmp_path / "base.onnx"
    save_graph(import_graph(two_layers(), tmp_path), base, external_data=True)
    graph = import_graph(onnx.load(str(base), load_external_data=False), tmp_path)
    shared, moved = tmp_path / "shared.onnx", tmp_path / "elsewhere"
    moved.mkdir()
    save_graph(graph, shared, share=True)
    save_graph(graph, moved / "own.onnx", share=True)
    assert shared.stat().st_size < 4000 < (moved / "own.onnx").stat().st_size
    assert not (tmp_path / "shared.onnx.data").exists()
    for path in (shared, moved / "own.onnx"):
        for mine, theirs in zip(
            onnx.load(str(path)).graph.initializer, onnx.load(str(base)).graph.initializer, strict=True
        ):
            assert mine.name == theirs.name
            assert np.array_equal(onnx.numpy_helper.to_array(mine), onnx.numpy_helper.to_array(theirs))


def test_changed_and_cut_constants_are_not_shared(tmp_path: Path) -> None:
    base = tmp_path / "base.onnx"
    save_graph(import_graph(two_layers(), tmp_path), base, external_data=True)
    graph = import_graph(onnx.load(str(base), load_external_data=False), tmp_path)
    maps = [t for t in graph.tensors().values() if isinstance(getattr(t, "_values", None), np.memmap)]
    assert len(maps) > 1
    wanted = {t.name: np.array(t.values) for t in maps}
    for tensor, change in zip(maps, (lambda v: v * 2, lambda v: v[::-1]), strict=False):
        tensor.values = change(tensor.values)
        wanted[tensor.name] = change(wanted[tensor.name])
    save_graph(graph, tmp_path / "variant.onnx", share=True)
    found = onnx.load(str(tmp_path / "variant.onnx")).graph.initializer
    for entry in found:
        if entry.name in wanted:
            assert np.array_equal(onnx.numpy_helper.to_array(entry), wanted[entry.name])


@pytest.mark.parametrize("external", [False, True])
def test_packed_types_survive(tmp_path: Path, external: bool) -> None:
    """A 4-bit constant wrapped as LazyValues is written as it stands."""
    values = np.arange(5000) % 16 - 8
    packed = helper.make_tensor("q", TensorProto.INT4, [5000], values.tolist())
    raw = onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(packed), "q")
    for tensor in (packed, raw):
        x = gs.Variable("x", np.float32, [5000])
        y = gs.Variable("y", np.float32, [5000])
        dequantized = gs.Variable("d", np.float32, [5000])
        constant = gs.Constant("q", LazyValues(tensor))
        nodes = [
            gs.Node("Cast", "cast", {"to": TensorProto.FLOAT}, [constant], [dequantized]),
            gs.Node("Add", "add", {}, [x, dequantized], [y]),
        ]
        path = tmp_path / "out.onnx"
        save_graph(gs.Graph(nodes, [x], [y], opset=21), path, external_data=external)
        stored = onnx.load(path).graph.initializer[0]
        assert stored.data_type == TensorProto.INT4
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored).astype(int), values)
        found = run(path, {"x": np.zeros(5000, np.float32)})["y"]
        np.testing.assert_array_equal(found, values.astype(np.float32))


def test_metadata(tmp_path: Path) -> None:
    path = tmp_path / "out.onnx"
    graph = import_graph(two_layers(), tmp_path)
    save_graph(graph, path, model_metadata={"k": "v"}, node_metadata={"n_r": {"a": "1", "b": "2"}})
    model = onnx.load(path)
    assert {p.key: p.value for p in model.metadata_props} == {"k": "v"}
    assert [{p.key: p.value for p in n.metadata_props} for n in model.graph.node] == [
        {},
        {"a": "1", "b": "2"},
        {},
    ]


def test_empty_list_attributes_and_domains(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["h"], name="sum", keepdims=1),
        helper.make_node("QuickGelu", ["h"], ["y"], name="gelu", domain="com.microsoft"),
    ]
    model = build(nodes, {"x": [3]}, ["y"], extra_domains={"com.microsoft": 1})
    graph = import_graph(model, tmp_path)
    graph.nodes[0].attrs = {"keepdims": 1}
    before = len(graph.import_domains)
    path = resaved(graph, tmp_path / "out.onnx")
    assert len(graph.import_domains) == before
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import} == {
        "": 17,
        "com.microsoft": 1,
    }
    empty = build([node("Transpose", "x", "y", perm=[0])], {"x": [3]}, ["y"])
    graph = import_graph(empty, tmp_path)
    graph.nodes[0].attrs["perm"] = []
    attribute = onnx.load(resaved(graph, tmp_path / "empty.onnx")).graph.node[0].attribute[0]
    assert (attribute.name, attribute.type) == ("perm", onnx.AttributeProto.INTS)


class SomeError(Exception):
    pass


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), SomeError()]
)
@pytest.mark.parametrize("moment", ["write", "publish"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, moment: str, existing: bool
) -> None:
    graph = import_graph(two_layers(), tmp_path)
    path = tmp_path / "out.onnx"
    if existing:
        path.write_bytes(b"older")
    replace = Path.replace

    def fail_on_model(self: Path, target: Path) -> Path:
        if Path(target) == path:
            raise error
        return replace(self, target)

    def fail(*_: object) -> None:
        raise error

    if moment == "write":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(Path, "replace", fail_on_model)
    with pytest.raises(OutputPathError if isinstance(error, OSError) else type(error)):
        save_graph(graph, path, external_data=True)
    assert [file.name for file in tmp_path.iterdir()] == (["out.onnx"] if existing else [])
    if existing:
        assert path.read_bytes() == b"older"


def test_a_file_system_that_takes_no_more(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="file size limits are POSIX")
    graph = import_graph(two_layers(), tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(OutputPathError, match=r"out\.onnx cannot be written"):
            save_graph(graph, tmp_path / "out.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


def test_an_absent_folder(tmp_path: Path) -> None:
    graph = import_graph(two_layers(), tmp_path)
    with pytest.raises(OutputPathError, match=r"absent/out\.onnx cannot be written"):
        save_graph(graph, tmp_path / "absent" / "out.onnx")


@pytest.mark.parametrize("external", [False, True])
def test_exposed_copy(tmp_path: Path, external: bool) -> None:
    model = two_layers()
    path, out = tmp_path / "model.onnx", tmp_path / "exposed.onnx"
    graph = import_graph(model, tmp_path)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Variable) and tensor.name in ("h", "r"):
            tensor.dtype = None
    save_graph(graph, path, external_data=external)
    exposed_copy(path, ["r", "h", "r", "y", "x"], out)
    feed = feed_for(model)
    found = run(out, feed)
    assert list(found) == ["y", "r", "h", "x"]
    expected = feed["x"] @ random(40, 30)
    # One float32 matrix product in two summation orders.
    np.testing.assert_allclose(found["h"], expected, rtol=1e-4, atol=1e-5)
    assert_close(run(path, feed), {"y": found["y"]}, 0)
    if external:
        assert out.stat().st_size < 2000


def test_exposed_copy_names_what_it_cannot_find(tmp_path: Path) -> None:
    path = resaved(import_graph(two_layers(), tmp_path), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="'nope'"):
        exposed_copy(path, ["nope"], tmp_path / "e.onnx")
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="beside"):
        exposed_copy(path, ["h"], tmp_path / "other" / "e.onnx")
