"""Comparing two files: ours, and those of another tool."""

from __future__ import annotations

import logging
import shutil
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from onnxptq.errors import FeedError, InvalidModelError, UsageError
from onnxptq.runtime import Session, open_exposed
from onnxptq.validate import layers as layers_module
from onnxptq.validate.compare import Comparison, compare
from onnxptq.validate.layers import LayerQuality
from tests.unit.validate.written_model import ListFeeds, Written, run_outputs, samples

FEEDS = ListFeeds(samples(5, seed=3))


def _compare(written: Written, folder: Path, quantized: Path | None = None, **options: Any) -> Comparison:
    feeds = options.pop("feeds", FEEDS)
    return compare(written.model.source, quantized or written.path, feeds, work_dir=folder, **options)


def _sqnr(wanted: list[np.ndarray], found: list[np.ndarray]) -> float:
    r = np.concatenate([v.ravel() for v in wanted]).astype(float)
    q = np.concatenate([v.ravel() for v in found]).astype(float)
    return float(10 * np.log10((r**2).sum() / ((r - q) ** 2).sum()))


@pytest.mark.parametrize("exact", [True, False])
def test_outputs(int8: Written, tmp_path: Path, exact: bool) -> None:
    result = _compare(int8, tmp_path, exact=exact)
    assert result.samples == 5
    for output in result.outputs:
        wanted = [run_outputs(int8.model.source, s)[output.name] for s in FEEDS]
        found = [run_outputs(int8.path, s, exact=exact)[output.name] for s in FEEDS]
        assert output.sqnr_db == pytest.approx(_sqnr(wanted, found), abs=1e-9)
    assert [o.name for o in result.outputs] == ["scores", "features"]
    assert result.outputs[0].top1_agreement is not None
    assert result.outputs[1].top1_agreement is None


def test_a_model_equals_itself(int8: Written, tmp_path: Path) -> None:
    result = _compare(int8, tmp_path, int8.model.source, layers=True)
    assert all(o.sqnr_db == np.inf and o.cosine == pytest.approx(1.0) for o in result.outputs)
    assert {layer.tensor for layer in result.layers} == {
        *("c0", "r0", "c1", "sum", "act", "c2", "features", "pooled", "flat", "scores")
    }
    assert all(layer.sqnr_db == np.inf and layer.quantized_sqnr_db is None for layer in result.layers)


def _exposed(path: Path, tensor: str, feeds: list[Any]) -> list[np.ndarray]:
    session = open_exposed(path, [tensor], exact=True)
    return [session.run(feed, [tensor])[tensor] for feed in feeds]


@pytest.mark.parametrize("group_bytes", [1, 1 << 30])
def test_layers(int8: Written, tmp_path: Path, group_bytes: int) -> None:
    result = _compare(int8, tmp_path, layers=True, layer_samples=2, group_bytes=group_bytes)
    found = {layer.tensor: layer for layer in result.layers}
    assert list(found) == [
        "x",
        *("c0", "r0", "c1", "sum", "act", "c2", "features", "pooled", "flat", "scores"),
    ]
    assert [layer.position for layer in result.layers] == list(range(len(found)))
    used = [FEEDS[0], FEEDS[4]]  # spread over the feeds
    reference = int8.model.path
    # Behind its quantizer: what the DequantizeLinear returns.
    assert found["r0"].quantized_sqnr_db == pytest.approx(
        _sqnr(_exposed(reference, "r0", used), _exposed(int8.path, "r0_DequantizeLinear_Output", used)),
        abs=1e-9,
    )
    assert found["r0"].sqnr_db == pytest.approx(
        _sqnr(_exposed(reference, "r0", used), _exposed(int8.path, "r0", used)), abs=1e-9
    )
    # A quantized graph output keeps its name behind the quantizer.
    inner = "features_QuantizeLinear_Input"
    assert found["features"].sqnr_db == pytest.approx(
        _sqnr(_exposed(reference, "features", used), _exposed(int8.path, inner, used)), abs=1e-9
    )
    assert found["features"].quantized_sqnr_db is not None
    assert found["features"].quantized_sqnr_db < found["features"].sqnr_db
    assert found["x"].sqnr_db == np.inf
    assert found["x"].quantized_sqnr_db is not None
    assert found["sum"].quantized_sqnr_db is None


def test_layers_of_narrow_files_look_through_the_clips(narrow: Written, tmp_path: Path) -> None:
    found = {layer.tensor: layer for layer in _compare(narrow, tmp_path, layers=True).layers}
    assert found["r0"].quantized_sqnr_db is not None
    assert found["act"].quantized_sqnr_db is not None
    assert found["act"].quantized_sqnr_db < found["act"].sqnr_db


def test_a_file_of_onnxruntimes_own_quantizer(int8: Written, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = iter(FEEDS)

        def get_next(self) -> Any:
            return next(self.left, None)

    logging.disable(logging.WARNING)
    try:
        quantize_static(int8.model.source, tmp_path / "other.onnx", Reader(), quant_format=QuantFormat.QDQ)
    finally:
        logging.disable(logging.NOTSET)
    result = _compare(int8, tmp_path, tmp_path / "other.onnx", layers=True)
    assert result.notes == ()
    found = {layer.tensor: layer for layer in result.layers}
    # 20 dB: 8-bit min-max on six channels; a wrong pairing of tensors gives about 0.
    assert all((layer.quantized_sqnr_db or layer.sqnr_db) > 20 for layer in result.layers)
    assert found["features"].quantized_sqnr_db is not None
    assert found["x"].quantized_sqnr_db is not None


def _renamed_output(source: Path, target: Path) -> None:
    model = onnx.load(str(source))
    model.graph.output[0].name = "logits"
    next(n for n in model.graph.node if n.name == "head").output[0] = "logits"
    onnx.save(model, str(target))


def test_other_output_names_are_matched_by_order(int8: Written, tmp_path: Path) -> None:
    _renamed_output(int8.path, tmp_path / "renamed.onnx")
    result = _compare(int8, tmp_path, tmp_path / "renamed.onnx")
    (note,) = result.notes
    assert "scores = logits" in note
    assert result.outputs == _compare(int8, tmp_path).outputs


def test_another_number_of_outputs(int8: Written, tmp_path: Path) -> None:
    model = onnx.load(str(int8.path))
    del model.graph.output[1]
    onnx.save(model, str(tmp_path / "fewer.onnx"))
    with pytest.raises(UsageError, match=r"2 outputs .*the quantized model 1"):
        _compare(int8, tmp_path, tmp_path / "fewer.onnx")


def test_labels(int8: Written, tmp_path: Path) -> None:
    scores = np.concatenate([run_outputs(int8.model.source, s)["scores"] for s in FEEDS])
    result = _compare(int8, tmp_path, labels=scores.argmax(axis=1))
    assert result.outputs[0].reference_accuracy == 1.0
    assert result.outputs[0].quantized_accuracy == result.outputs[0].top1_agreement
    unused = _compare(int8, tmp_path, labels=[0] * 10, scores=[])
    assert any("labels were not used" in note for note in unused.notes)
    with pytest.raises(FeedError, match="fewer labels"):
        _compare(int8, tmp_path, labels=[0])
    with pytest.raises(UsageError, match="'nothing' is no output"):
        _compare(int8, tmp_path, scores=["nothing"])


def test_labels_beyond_the_classes(int8: Written, tmp_path: Path) -> None:
    with pytest.raises(FeedError, match="labels, sample 3: 1000 is no class of this model"):
        _compare(int8, tmp_path, labels=[0, 1, 2, 1000, 0, 0, 0, 0, 0, 0])


def test_a_quantized_file_against_itself(int8: Written, tmp_path: Path) -> None:
    for exact in (True, False):
        feeds = ListFeeds(samples(3, seed=4))
        result = compare(int8.path, int8.path, feeds, work_dir=tmp_path, exact=exact)
        assert all(o.sqnr_db is not None and o.sqnr_db > 80.0 for o in result.outputs)


def test_no_feeds(int8: Written, tmp_path: Path) -> None:
    with pytest.raises(FeedError, match="no sample"):
        _compare(int8, tmp_path, feeds=ListFeeds())


def test_models_in_folders_that_cannot_be_written(int8: Written, tmp_path: Path) -> None:
    folder, work = tmp_path / "locked", tmp_path / "work"
    folder.mkdir()
    work.mkdir()
    model = onnx.load(str(int8.path))
    onnx.save(model, str(folder / "m.onnx"), save_as_external_data=True, location="w.bin", size_threshold=0)
    before = sorted(folder.iterdir())
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        result = _compare(int8, work, folder / "m.onnx", layers=True)
    finally:
        folder.chmod(0o700)
    assert len(result.layers) == 11
    assert sorted(folder.iterdir()) == before
    assert list(work.iterdir()) == []


def test_progress_counts_every_step(int8: Written, tmp_path: Path) -> None:
    steps: dict[str, list[int]] = {}

    class Counter:
        def start(self, title: str, total: int) -> Any:
            steps[title] = [total, 0]

            def tick() -> None:
                steps[title][1] += 1

            return tick

        def message(self, text: str) -> None:
            raise AssertionError(text)

    _compare(int8, tmp_path, layers=True, progress=Counter(), group_bytes=50_000)
    assert all(total == done for total, done in steps.values())
    assert len(steps) == 2


def test_tensors_that_share_only_a_name_are_left_out(
    int8: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a file whose tool reused the name for a tensor of another shape."""
    original = layers_module.shared_tensors

    def wrong(*args: Any) -> Any:
        return [
            layers_module._Shared("pooled", "flat", None, is_input=False) if s.tensor == "pooled" else s
            for s in original(*args)
        ]

    monkeypatch.setattr(layers_module, "shared_tensors", wrong)
    result = _compare(int8, tmp_path, layers=True)
    assert "pooled" not in {layer.tensor for layer in result.layers}
    assert any("pooled" in note for note in result.notes)
    assert all(isinstance(layer, LayerQuality) for layer in result.layers)


def _foreign(path: Path, *, quantized: bool) -> Path:
    """h -> QuickGelu -> g -> Relu -> r, of onnxruntime's own domain; quantized at h by that domain's operators."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="h"),
        helper.make_node(
            "QuickGelu", ["h_back" if quantized else "h"], ["g"], name="g", domain="com.microsoft"
        ),
        helper.make_node("Relu", ["g"], ["r"], name="r"),
        helper.make_node("ArgMax", ["g"], ["chosen"], name="chosen", axis=1),
        helper.make_node("MatMul", ["r", "w"], ["y"], name="y"),
    ]
    if quantized:
        nodes[1:1] = [
            helper.make_node("QuantizeLinear", ["h", "s", "z"], ["h_q"], name="h_q", domain="com.microsoft"),
            helper.make_node(
                "DequantizeLinear", ["h_q", "s", "z"], ["h_back"], name="d", domain="com.microsoft"
            ),
        ]
    weights = {"w": rng.normal(0, 1, (4, 4)).astype(np.float32), "s": np.float32(0.1), "z": np.uint8(128)}
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [
            helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4]),
            helper.make_tensor_value_info("chosen", onnx.TensorProto.INT64, ["n", 1]),
        ],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=8), str(path))
    return path


def _compare_foreign(folder: Path) -> Comparison:
    paths = [_foreign(folder / f"{kind}.onnx", quantized=kind == "q") for kind in "fq"]
    feeds = ListFeeds([{"x": np.random.default_rng(1).normal(0, 1, (3, 4)).astype(np.float32)}])
    return compare(*paths, feeds, work_dir=folder, layers=True)


def test_layers_behind_operators_of_other_domains(tmp_path: Path) -> None:
    """The onnx package knows the type of none of them; onnxruntime does."""
    result = _compare_foreign(tmp_path)
    assert result.notes == ()
    found = {layer.tensor: layer for layer in result.layers}
    assert list(found) == ["h", "g", "r", "y"]
    assert found["h"].sqnr_db == np.inf
    assert found["h"].quantized_sqnr_db is not None
    assert all(10 < found[name].sqnr_db < 60 for name in "gr")


def test_layers_whose_type_cannot_be_had_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, tensors: list[str]) -> dict[str, int]:
        raise InvalidModelError(f"{path.name} will not load.")

    monkeypatch.setattr(layers_module, "element_types", refuse)
    result = _compare_foreign(tmp_path)
    assert [layer.tensor for layer in result.layers] == ["h", "y"]
    assert result.notes == tuple(
        f"Not compared, as onnxruntime does not tell their type: g, r. {kind}.onnx will not load."
        for kind in "fq"
    )


def test_sessions_are_of_the_requested_kind(
    int8: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, bool]] = []

    class Recorded(Session):
        def __init__(self, model: Path, **options: Any) -> None:
            seen.append((model.name, options.get("exact", False)))
            super().__init__(model, **options)

    monkeypatch.setattr(sys.modules["onnxptq.validate.compare"], "Session", Recorded)
    _compare(int8, tmp_path, exact=True)
    assert seen == [("network.onnx", True), ("ort-cpu.onnx", True)]


@pytest.mark.parametrize("name", ["exposed.onnx", "model"])
def test_models_of_any_name_are_compared_layer_by_layer(int8: Written, tmp_path: Path, name: str) -> None:
    source, written = tmp_path / "a" / name, tmp_path / "b" / name
    for place, original in ((source, int8.model.source), (written, int8.path)):
        place.parent.mkdir()
        shutil.copyfile(original, place)
    found = compare(source, written, FEEDS, work_dir=tmp_path, layers=True, group_bytes=1)
    assert found.layers == _compare(int8, tmp_path, layers=True).layers


def test_inputs_and_outputs_of_other_names_are_matched_by_their_order(int8: Written, tmp_path: Path) -> None:
    other = onnx.load(str(int8.path))
    names = {"x": "pictures", "scores": "logits"}
    for entry in (*other.graph.input, *other.graph.output):
        entry.name = names.get(entry.name, entry.name)
    for node in other.graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    onnx.save(other, str(tmp_path / "other.onnx"))
    found = _compare(int8, tmp_path, tmp_path / "other.onnx", layers=True)
    same = _compare(int8, tmp_path, layers=True)
    assert found.outputs == same.outputs
    assert "inputs have different names and were matched by their order: x = pictures" in found.notes[0]
    assert "scores = logits, features = features" in found.notes[1]
    assert {"x", "c1", "sum"} <= {layer.tensor for layer in found.layers}


def test_labels_are_not_expected_to_fit_outputs_that_are_no_class_scores(
    int8: Written, tmp_path: Path
) -> None:
    found = _compare(int8, tmp_path, labels=[6, *[0] * 9])
    assert [output.labelled for output in found.outputs] == [10, 0]
    assert found.notes == ()
