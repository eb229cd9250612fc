"""The Python interface means what the command line means."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnxruntime.quantization import CalibrationDataReader

import onnxptq
from tests.e2e.command import Bench, here, pictures

RECIPE = onnxptq.Recipe(method="rtn", observer="minmax", simplify=False, holdout=0.0)


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, samples: np.ndarray) -> None:
        self._left = iter(samples)

    def get_next(self) -> dict[str, np.ndarray] | None:
        sample = next(self._left, None)
        return None if sample is None else {"x": sample[None]}


class _Pictures(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, samples: np.ndarray) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self._samples[index])


def _generated(samples: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    for sample in samples:
        yield {"x": sample[None]}


def _sources(samples: np.ndarray) -> dict[str, Any]:
    return {
        "dicts": [{"x": sample[None]} for sample in samples],
        "generator": _generated(samples),
        "array": samples,
        "dict of arrays": {"x": samples},
        "reader": _Reader(samples),
        "loader": torch.utils.data.DataLoader(_Pictures(samples), batch_size=3),
    }


def test_every_kind_of_calibration_data_gives_the_same_file(bench: Bench) -> None:
    samples = pictures(7)
    written = {}
    for kind, source in _sources(samples).items():
        result = onnxptq.quantize(
            bench.model, bench.output, calibration=source, recipe=RECIPE, work_dir=bench.work
        )
        written[kind] = result.output.read_bytes()
    assert len(set(written.values())) == 1, {kind: len(b) for kind, b in written.items()}


def test_the_file_is_the_command_lines(bench: Bench) -> None:
    assert bench.quantize("--holdout", 0, "--no-report").code == 0
    by_command = bench.output.read_bytes()
    onnxptq.quantize(str(bench.model), calibration=str(bench.data), recipe=RECIPE, work_dir=bench.work)
    ours, theirs = onnx.load(str(bench.output)).graph, onnx.ModelProto.FromString(by_command).graph
    assert ours == theirs


def test_the_result(bench: Bench) -> None:
    recipe = RECIPE.updated(holdout=0.3)
    result = onnxptq.quantize(
        bench.model, calibration=bench.data, recipe=recipe, report_dir=bench.folder / "r", work_dir=bench.work
    )
    assert result.output == bench.output
    assert result.report_dir == bench.folder / "r"
    assert json.loads((bench.folder / "r/report.json").read_text()) == result.report.to_json()
    assert result.report.heldout is not None
    assert result.report.heldout.count + result.report.calibration.count == 10
    assert result.report.outputs[0].sqnr_db > 20


def test_no_report_unless_asked(bench: Bench) -> None:
    result = onnxptq.quantize(bench.model, calibration=bench.data, recipe=RECIPE, work_dir=bench.work)
    assert result.report_dir is None
    assert not (bench.folder / "net.int8.report").exists()


def test_errors_have_a_message_a_remedy_and_an_exit_code(bench: Bench) -> None:
    with pytest.raises(onnxptq.OnnxPtqError, match="nothing") as caught:
        onnxptq.quantize(bench.model, calibration="nothing", work_dir=bench.work)
    assert caught.value.exit_code == 2
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"provider": "foo"}, "provider is 'foo'"),
        ({"min_agreement": 3}, "min_agreement is 3"),
        ({"min_accuracy": -1.0}, r"min_accuracy is -1\.0"),
        ({"min_agreement": "most"}, "min_agreement is 'most'"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_arguments_of_validate_that_cannot_be(bench: Bench, given: dict[str, Any], said: str) -> None:
    with pytest.raises(onnxptq.OnnxPtqError, match=said) as caught:
        onnxptq.validate(bench.model, bench.model, data=bench.data, **given)
    assert caught.value.exit_code == 2
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: onnxptq.Recipe(wight_bits=4), "did you mean weight_bits"),
        (lambda: onnxptq.ImagePreprocess(mean="x"), "mean"),
        (lambda: onnxptq.ImagePreprocess(men=0.5), "unknown option 'men'.\nDid you mean mean"),
    ],
)
def test_settings_that_cannot_be(make: Callable[[], object], said: str) -> None:
    with pytest.raises(onnxptq.OnnxPtqError, match=said) as caught:
        make()
    assert caught.value.exit_code == 2


def test_the_users_own_exceptions_pass_through(bench: Bench) -> None:
    def failing() -> Iterator[dict[str, np.ndarray]]:
        yield {"x": pictures(1)}
        raise ZeroDivisionError("mine")

    with pytest.raises((ZeroDivisionError, onnxptq.OnnxPtqError), match="mine"):
        onnxptq.quantize(bench.model, calibration=failing(), work_dir=bench.work)
    assert list(bench.work.iterdir()) == []


def test_validate_means_the_same(bench: Bench) -> None:
    assert bench.quantize("--no-report").code == 0
    found = onnxptq.validate(bench.model, bench.output, data=bench.data, layers=True)
    arguments = ("validate", bench.model, bench.output, "--data", bench.data, "--layers", "--json")
    said = json.loads(here(bench.capsys, *arguments).out)
    assert said["samples"] == found.samples == 10
    assert said["outputs"][0]["sqnr_db"] == found.outputs[0].sqnr_db
    assert [row["tensor"] for row in said["layers"]] == [row.tensor for row in found.layers]
    with pytest.raises(onnxptq.OnnxPtqError) as caught:
        onnxptq.validate(bench.model, bench.output, data=bench.data, min_sqnr=99)
    assert caught.value.exit_code == here(bench.capsys, *arguments, "--min-sqnr", 99).code == 4


def test_validate_measures_accuracy(bench: Bench) -> None:
    assert bench.quantize("--no-report").code == 0
    samples = np.load(bench.data)["x"]
    scores = ort.InferenceSession(str(bench.model)).run(None, {"x": samples})[0]
    found = onnxptq.validate(
        bench.model, bench.output, data=bench.data, labels=scores.argmax(1), min_accuracy=0.5
    )
    assert found.outputs[0].reference_accuracy == 1.0
    assert found.outputs[0].quantized_accuracy == found.outputs[0].top1_agreement


def test_validating_a_model_against_itself(bench: Bench) -> None:
    found = onnxptq.validate(bench.model, bench.model, data=bench.data, min_sqnr=100, min_agreement=1)
    assert found.outputs[0].sqnr_db == float("inf")


def test_inspect_means_the_same(bench: Bench) -> None:
    found = onnxptq.inspect(bench.model)
    said = json.loads(here(bench.capsys, "inspect", bench.model, "--json").out)
    assert said == json.loads(json.dumps(found.to_json()))
    assert found.operators == {
        "Relu": 2,
        "Conv": 2,
        "Add": 1,
        "GlobalAveragePool": 1,
        "Flatten": 1,
        "Gemm": 1,
    }
    assert found.parameters == 16 * 27 + 16 + 16 * 144 + 16 + 160 + 10
    assert found.targets["simulate"].quantized == {"Conv": 2, "Gemm": 1}


def test_inspect_takes_selectors(bench: Bench) -> None:
    done = here(bench.capsys, "inspect", bench.model, "--exclude", "Conv", "--json")
    views = json.loads(done.out)["targets"]
    assert views["simulate"]["quantized"] == {"Gemm": 1}
    assert any("excluded by 'Conv'" in skip["reason"] for skip in views["simulate"]["skips"])


class _Heard:
    def __init__(self) -> None:
        self.steps: dict[str, tuple[int, int]] = {}

    def start(self, title: str, total: int) -> Any:
        self.steps[title] = (total, 0)

        def step() -> None:
            self.steps[title] = (total, self.steps[title][1] + 1)

        return step

    def message(self, text: str) -> None:
        assert text


def test_progress_reaches_its_totals(bench: Bench) -> None:
    heard = _Heard()
    onnxptq.quantize(
        bench.model,
        calibration=bench.data,
        work_dir=bench.work,
        progress=heard,
        recipe=onnxptq.Recipe(simplify=False),
    )
    assert {"calibrate"} <= {title.lower() for title in heard.steps}
    assert {title: done for title, (total, done) in heard.steps.items() if done != total} == {}


def test_paths_may_be_strings_or_paths(bench: Bench) -> None:
    paths: Sequence[str | Path] = (str(bench.model), bench.model)
    assert len({onnxptq.inspect(path).nodes for path in paths}) == 1
