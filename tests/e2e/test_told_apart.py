"""What a run says of its data: what it measures on, what pictures go through, and whose fault a failure is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import onnxptq
from tests.e2e.command import Bench, Finished, here, pictures
from tests.unit.small_nets import Net

RECIPE = {"method": "rtn", "observer": "minmax", "simplify": False}


def _notes(done: Finished) -> str:
    assert done.code == 0, done.err
    return "\n".join(json.loads(done.out)["notes"])


def _photos(folder: Path, count: int, *, first: int = 0, size: tuple[int, int] = (8, 8)) -> Path:
    folder.mkdir()
    for i in range(first, first + count):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


# ---- evaluation samples that calibration has seen ---------------------------------------------------------


def test_the_same_data_cannot_be_calibrated_and_measured_on(bench: Bench) -> None:
    bench.refuses(
        2, "All 10 evaluation samples (data.npz)", "--eval", do=lambda: bench.quantize("--eval", bench.data)
    )


def test_shared_samples_are_left_out_and_labels_stay_with_the_others(bench: Bench) -> None:
    other = bench.folder / "other.npz"
    np.savez(other, x=np.concatenate([pictures(10)[4:7], pictures(5, seed=9)]))
    done = bench.quantize("--eval", other, "--json")
    assert "3 of 8 evaluation samples are calibration samples as well" in _notes(done)
    report = json.loads(done.out)
    assert (report["heldout"]["count"], report["calibration"]["count"]) == (5, 10)
    assert "calibration samples left out" in report["heldout"]["description"]

    # Labels count all samples of the source: those of the float model's own classes, and wrong ones for the rest.
    import onnxruntime as ort

    scores = ort.InferenceSession(str(bench.model)).run(None, {"x": np.load(other)["x"]})[0]
    labels = np.asarray(scores).argmax(1)
    labels[:3] = (labels[:3] + 1) % 10
    np.save(bench.folder / "labels.npy", labels)
    given = bench.quantize("--eval", other, "--labels", bench.folder / "labels.npy", "--json")
    assert json.loads(given.out)["outputs"][0]["reference_accuracy"] == 1.0


def test_arrays_in_python_are_told_apart_by_their_values(bench: Bench) -> None:
    samples = pictures(6)

    def generated() -> Iterator[dict[str, np.ndarray]]:
        for sample in samples:
            yield {"x": sample}

    for evaluation in (samples, samples.copy(), list(samples), generated()):
        with pytest.raises(onnxptq.OnnxPtqError, match="All 6 evaluation samples") as caught:
            onnxptq.quantize(
                bench.model, calibration=samples, evaluation=evaluation, recipe=RECIPE, work_dir=bench.work
            )
        assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("samples", "options", "said"),
    [
        (np.repeat(pictures(1), 20, axis=0), (), "all 20 are identical"),
        (pictures(1), (), "there is only one"),
        (pictures(4), ("--holdout", 0), "holdout is 0"),
    ],
)
def test_why_nothing_is_held_out(
    bench: Bench, samples: np.ndarray, options: tuple[object, ...], said: str
) -> None:
    np.savez(bench.data, x=samples)
    assert said in _notes(bench.quantize("--json", *options))


# ---- made-up data -----------------------------------------------------------------------------------------


def test_random_data_are_said_in_the_verdict(bench: Bench) -> None:
    done = bench.quantize(calib="random")
    assert done.code == 0
    assert "Random data" in done.out.split("target")[0]
    measured = bench.quantize("--eval", bench.data, calib="random").out
    assert "Calibrated on random data" in measured
    assert "nothing of real inputs" not in measured
    # Random samples to measure on are others than those to calibrate on.
    assert bench.quantize("--eval", "random", calib="random").code == 0
    shown = here(bench.capsys, "validate", bench.model, bench.output, "--data", "random")
    assert "random" in shown.out


# ---- pictures ---------------------------------------------------------------------------------------------


def _pixels(folder: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
    np.savez(folder / "pixels.npz", x=values)
    return folder / "pixels.npz"


SOURCES: dict[str, Callable[[Path], Path]] = {
    "folder": lambda folder: _photos(folder / "photos", 4),
    "one picture": lambda folder: _photos(folder / "photos", 1) / "0.png",
    "array of pixels": _pixels,
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_preprocessing_is_said_whatever_holds_the_pictures(
    bench: Bench, make: Callable[[Path], Path]
) -> None:
    data = make(bench.folder)
    done = bench.quantize("--json", calib=data)
    assert "Pictures: guessed: " in _notes(done)
    assert json.loads(done.out)["recipe"]["preprocess"]["mean"] == [0.485, 0.456, 0.406]
    notes = _notes(bench.quantize("--json", "--mean", "0.5", calib=data))
    assert "mean 0.5" in notes
    assert "guessed of this: resize, color, layout, scale, std;" in notes
    shown = here(bench.capsys, "validate", bench.model, bench.output, "--data", data)
    assert "note: Pictures: guessed: " in shown.out


def test_picture_options_for_values_of_the_model(bench: Bench) -> None:
    done = bench.quantize("--json", "--mean", "0.5")
    assert "The picture options were not used for data.npz" in _notes(done)
    assert "Pictures" not in _notes(bench.quantize("--json"))


def test_a_size_for_a_model_that_fixes_none(bench: Bench) -> None:
    net = Net()
    bench.write(net.proto({"x": ["n", 3, "h", "w"]}, [net.conv("conv", "x", (16, 3, 3, 3))]))
    photos = _photos(bench.folder / "photos", 4, size=(20, 24))
    for options in (("--size", 16), ("--size", 16, "--resize", "short_side")):
        notes = _notes(bench.quantize("--json", "--target", "simulate", *options, calib=photos))
        assert "resize to cover 16x16 (bicubic), centre crop 16x16" in notes


# ---- samples that the model cannot be run on --------------------------------------------------------------


def _lookup(index: int = 0) -> onnx.ModelProto:
    """A table of 50 rows, and an index into its columns that exists or not."""
    rng = np.random.default_rng(0)
    constants = {
        "table": rng.standard_normal((50, 32)).astype(np.float32),
        "w": rng.standard_normal((32, 32)).astype(np.float32),
        "column": np.array([index]),
    }
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"], name="rows"),
        helper.make_node("MatMul", ["rows", "w"], ["made"], name="made"),
        helper.make_node("Gather", ["made", "column"], ["y"], name="y", axis=2),
    ]
    graph = helper.make_graph(
        nodes,
        "lookup",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["n", "length"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def _ids(*bad: int, count: int = 8) -> np.ndarray:
    ids = np.random.default_rng(1).integers(0, 50, (count, 6))
    ids[list(bad), 2] = 64
    return ids


@pytest.mark.parametrize("bad", [(5,), tuple(range(8))], ids=["one", "all"])
@pytest.mark.parametrize("options", [(), ("--method", "auto")], ids=["rtn", "auto"])
def test_the_sample_that_cannot_be_run_is_named(
    bench: Bench, bad: tuple[int, ...], options: tuple[str, ...]
) -> None:
    bench.write(_lookup())
    np.save(bench.folder / "ids.npy", _ids(*bad))
    said = (f"ids.npy, sample {bad[0]}:", "idx=64", "'rows'")
    given: dict[str, Any] = {"calib": bench.folder / "ids.npy"}
    bench.refuses(2, *said, do=lambda: bench.quantize("--holdout", 0, *options, **given))


def test_files_and_held_out_samples_are_named(bench: Bench) -> None:
    bench.write(_lookup())
    calib, other = (bench.folder / name for name in ("calib", "other"))
    for folder, ids in ((calib, _ids()), (other, _ids(3, count=5)[::-1])):
        folder.mkdir()
        for i, row in enumerate(ids):
            np.save(folder / f"{i}.npy", row[None] if folder == calib else row[None, ::-1])
    bench.refuses(2, "folder other, 1.npy:", do=lambda: bench.quantize("--eval", other, calib=calib))


def test_validate_names_the_sample(bench: Bench) -> None:
    bench.write(_lookup())
    np.save(bench.folder / "ids.npy", _ids())
    assert bench.quantize("--no-report", calib=bench.folder / "ids.npy").code == 0
    np.save(bench.folder / "bad.npy", _ids(2))
    validate = ("validate", bench.model, bench.output, "--data", bench.folder / "bad.npy")
    bench.refuses(2, "bad.npy, sample 2:", do=lambda: here(bench.capsys, *validate))


def test_a_model_that_runs_on_nothing_is_at_fault_itself(bench: Bench) -> None:
    bench.write(_lookup(index=99))
    np.save(bench.folder / "ids.npy", _ids())
    bench.refuses(3, "idx=99", "any values", do=lambda: bench.quantize(calib=bench.folder / "ids.npy"))


# ---- order and progress -----------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", [("--exclude", "Convv"), ("--include", "Convv")])
def test_patterns_are_looked_up_before_data_are_read(bench: Bench, pattern: tuple[str, str]) -> None:
    bench.refuses(2, " ".join((pattern[0], "'Convv'")), do=lambda: bench.quantize(*pattern, calib="gone"))


def test_patterns_of_rules_as_well(bench: Bench) -> None:
    recipe = {**RECIPE, "rules": [{"match": "Convv", "observer": "mse"}]}
    with pytest.raises(onnxptq.OnnxPtqError, match="rule 'Convv'"):
        onnxptq.quantize(bench.model, calibration="gone", recipe=recipe, work_dir=bench.work)


class _Heard:
    def __init__(self) -> None:
        self.left: dict[str, int] = {}

    def start(self, title: str, total: int) -> Any:
        self.left[title] = self.left.get(title, 0) + total

        def step() -> None:
            self.left[title] -= 1

        return step

    def message(self, text: str) -> None:
        pass


def test_reading_and_checking_are_told(bench: Bench) -> None:
    heard = _Heard()
    onnxptq.quantize(
        bench.model,
        calibration=bench.data,
        evaluation=pictures(4, seed=8),
        recipe=RECIPE,
        work_dir=bench.work,
        progress=heard,
    )
    told = {"read samples", "check quantizers", "check outputs", "measure latency"}
    assert told <= heard.left.keys()
    assert set(heard.left.values()) == {0}


# ---- what Python callers give -----------------------------------------------------------------------------


def test_a_dict_is_a_recipe(bench: Bench) -> None:
    result = onnxptq.quantize(bench.model, calibration=bench.data, recipe=RECIPE, work_dir=bench.work)
    assert result.report.method == "rtn"
    with pytest.raises(onnxptq.OnnxPtqError, match="'metod'; did you mean method"):
        onnxptq.quantize(bench.model, calibration=bench.data, recipe={"metod": "rtn"})
    with pytest.raises(onnxptq.OnnxPtqError, match="The recipe is a str") as caught:
        onnxptq.quantize(bench.model, calibration=bench.data, recipe="recipe.yaml")  # type: ignore[arg-type]
    assert "from_yaml" in caught.value.remedy
    assert onnxptq.inspect(bench.model, recipe={"exclude": ["Conv"]}).targets["simulate"].quantized == {
        "Gemm": 1
    }


def test_a_model_in_memory_is_refused_with_the_remedy(bench: Bench) -> None:
    model: Any = onnx.load(str(bench.model))
    calls: tuple[Callable[[], object], ...] = (
        lambda: onnxptq.quantize(model, calibration=bench.data),
        lambda: onnxptq.sensitivity(model, calibration=bench.data),
        lambda: onnxptq.validate(model, bench.model, data=bench.data),
        lambda: onnxptq.validate(bench.model, model, data=bench.data),
        lambda: onnxptq.inspect(model),
    )
    for call in calls:
        with pytest.raises(onnxptq.OnnxPtqError, match="as a ModelProto, not as a path") as caught:
            call()
        assert caught.value.exit_code == 2
        assert "onnx.save" in caught.value.remedy


def test_what_is_not_as_asked_comes_first_and_housekeeping_last(bench: Bench) -> None:
    model = onnx.load(bench.model)
    model.graph.node.insert(0, onnx.helper.make_node("Identity", ["x"], ["same"], name="idle"))
    for node in list(model.graph.node)[1:]:
        node.input[:] = ["same" if name == "x" else name for name in node.input]
    bench.write(model)
    options = ("--json", "--holdout", 0, "--no-simplify")
    notes = _notes(bench.quantize(*options, fast=False)).splitlines()
    assert notes[0].startswith("No sample was held out")
    assert len(notes) > 2
    assert notes[-1] == "One node that hands its input on unchanged was removed."
