"""The pipeline: what is checked before any work, in which order stages run, and what a failure leaves."""

from __future__ import annotations

import ast
import errno
import inspect
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxptq import feeding, forming, pipeline, steps
from onnxptq.comparison import missed_gate
from onnxptq.errors import MemoryBudgetError, OnnxPtqError
from onnxptq.pipeline import quantize
from onnxptq.placing import require_quantizers
from onnxptq.recipe import Recipe
from onnxptq.types import QuantPlan, Skip
from onnxptq.validate.metrics import OutputMetrics
from tests.unit.equalize.equalize_helpers import samples_for, unbalanced
from tests.unit.small_nets import Net, canonical, conv_relu_conv

RECIPE = Recipe(method="rtn", observer="minmax", simplify=False)
ORDER = (
    "canonical_model",
    "open_data",
    "prepared",
    "allocated",
    "solved",
    "write",
    "check",
    "report",
    "write_report",
    "require_quality",
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "user" / "net.onnx"
    path.parent.mkdir()
    onnx.save(conv_relu_conv(), str(path))
    return path


def _samples(count: int = 6) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


def _spied(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
    for name in ORDER:
        module = {"prepared": forming, "open_data": feeding}.get(name, steps)
        real = getattr(module, name)

        def step(*given: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            before(name)
            return real(*given, **options)

        monkeypatch.setattr(module, name, step)


def test_stages_run_once_and_in_order(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    _spied(monkeypatch, ran.append)
    result = quantize(model, calibration=_samples(), recipe=RECIPE, work_dir=tmp_path / "work")
    assert tuple(ran) == ORDER
    assert result.output == model.with_name("net.int8.onnx")
    assert result.report.stages[0].name == "canonicalize"


ERRORS = (MemoryBudgetError("no room"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full"))


@pytest.mark.parametrize(
    ("stage", "error"),
    list(zip(ORDER, itertools.cycle(ERRORS), strict=False)),
    ids=lambda v: str(v) or "interrupt",
)
def test_a_failure_anywhere_leaves_nothing(
    stage: str, error: BaseException, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(name: str) -> None:
        if name == stage:
            raise error

    _spied(monkeypatch, fail)
    expected = OnnxPtqError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        quantize(model, calibration=_samples(), recipe=RECIPE, work_dir=tmp_path / "work")
    assert list(model.parent.iterdir()) == [model]
    assert [p for p in (tmp_path / "work").iterdir() if not p.name.startswith("calibration-")] == []


def test_the_pipeline_has_no_logic_of_its_own() -> None:
    function = ast.parse(inspect.getsource(pipeline.quantize)).body[0]
    branches = [n for n in ast.walk(function) if isinstance(n, ast.For | ast.While | ast.Try | ast.Match)]
    assert branches == []
    # The optional arguments only.
    assert sum(isinstance(n, ast.If) for n in ast.walk(function)) <= 1


def test_rounding_to_8_bits_needs_no_torch(model: Path, tmp_path: Path) -> None:
    """Its import takes longer than quantizing a small network."""
    np.savez(
        tmp_path / "samples.npz", **{k: np.concatenate([s[k] for s in _samples()]) for k in _samples()[0]}
    )
    program = (
        "import sys; from onnxptq.pipeline import quantize; "
        f"quantize({str(model)!r}, {str(tmp_path / 'out.onnx')!r}, calibration={str(tmp_path / 'samples.npz')!r}, "
        f"work_dir={str(tmp_path / 'work')!r}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.mark.parametrize("bits", [8, 4])
def test_baselines_with_rescaled_channels_and_corrected_biases(bits: int, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    net = unbalanced(4.0)
    for node, weight in zip(net.graph.node, list(net.graph.initializer), strict=True):
        bias = onnx.numpy_helper.from_array(np.ones(weight.dims[0], np.float32), f"{weight.name} bias")
        net.graph.initializer.append(bias)
        node.input.append(bias.name)
    onnx.save(net, str(path))
    feeds = list(samples_for(net, 40))
    found = {}
    for name, asked in {
        "plain": {},
        "biases": {"correct_bias": True},
        "rescaled": {"equalize": True},
        "both": {"equalize": True, "correct_bias": True},
    }.items():
        recipe = RECIPE.updated(target="simulate", weight_bits=bits, activation_bits=bits, **asked)
        out = tmp_path / f"{name}.onnx"
        found[name] = quantize(path, out, calibration=feeds, recipe=recipe, work_dir=tmp_path / "work")
        said = "\n".join(found[name].report.notes)
        assert ("3 biases were corrected on 32 samples" in said) == ("correct_bias" in asked)
        assert ("rescaled per channel" in said) == ("equalize" in asked)
        assert found[name].report.recipe.get("equalize") == asked.get("equalize")
    level = {name: result.report.outputs[0].sqnr_db or 0.0 for name, result in found.items()}
    assert level["rescaled"] > level["plain"] + 1
    assert level["biases"] != level["plain"]
    assert level["both"] not in (level["rescaled"], level["biases"])
    again = Recipe.create(found["both"].report.recipe)
    repeated = quantize(
        path, tmp_path / "x.onnx", calibration=feeds, recipe=again, work_dir=tmp_path / "work"
    )
    assert repeated.output.read_bytes() == found["both"].output.read_bytes()


@pytest.mark.parametrize(("enough", "is_judged"), [(0.0, False), (200.0, True), (None, True)])
def test_rescaled_channels_are_judged_unless_they_are_good_enough(
    enough: float | None, is_judged: bool, tmp_path: Path
) -> None:
    onnx.save(unbalanced(), tmp_path / "model.onnx")
    result = quantize(
        tmp_path / "model.onnx",
        calibration=list(samples_for(unbalanced(), 16)),
        recipe=Recipe(enough=enough, holdout=0.0),
        work_dir=tmp_path / "work",
    )
    note = next(note for note in result.report.notes if "rescaled per channel" in note)
    assert ("in trial" in note) is is_judged


def _output(name: str, **values: Any) -> OutputMetrics:
    found = dict.fromkeys(OutputMetrics.__dataclass_fields__)
    return OutputMetrics(**{**found, "name": name, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "gates", "said"),
    [
        ({"sqnr_db": 30.0}, {"min_sqnr": 30.0}, None),
        ({"sqnr_db": 29.9}, {"min_sqnr": 30.0}, "29.9"),
        ({"sqnr_db": float("nan")}, {"min_sqnr": 1.0}, "nan"),
        ({"sqnr_db": float("inf")}, {"min_sqnr": 200.0}, None),
        ({"sqnr_db": 30.0}, {"min_agreement": 0.5}, "cannot be judged"),
        ({"top1_agreement": 0.4}, {"min_agreement": 0.5}, "0.4"),
        ({"quantized_accuracy": 0.4}, {"min_accuracy": 0.4}, None),
        ({}, {}, None),
    ],
)
def test_gates(values: dict[str, float], gates: dict[str, float], said: str | None) -> None:
    missed = missed_gate([_output("head", **values)], **gates)
    assert (missed is None) == (said is None)
    if missed is not None and said is not None:
        assert said in missed.message
        assert missed.remedy


def test_gates_hold_for_every_output() -> None:
    outputs = [_output("good", sqnr_db=40.0), _output("other", sqnr_db=None), _output("bad", sqnr_db=5.0)]
    missed = missed_gate(outputs, min_sqnr=20)
    assert missed is not None
    assert "'bad'" in missed.message


@pytest.mark.parametrize(
    ("recipe", "reason", "code"),
    [
        (Recipe(), "an operator without a quantized kernel", 3),
        (Recipe(include=("Relu",)), "not chosen by --include", 5),
        (Recipe(exclude=("Conv",)), "excluded by 'Conv'", 2),
    ],
)
def test_a_plan_without_quantizers_is_refused(recipe: Recipe, reason: str, code: int, tmp_path: Path) -> None:
    net = canonical(conv_relu_conv(), tmp_path)
    empty = QuantPlan(target="ort-cpu", quantizers=(), skips=(Skip(site="conv1", reason=reason),))
    with pytest.raises(OnnxPtqError, match="ort-cpu") as caught:
        require_quantizers(empty, net, recipe)
    assert caught.value.exit_code == code
    assert caught.value.remedy


def test_an_output_that_nothing_quantized_reaches_says_nothing_of_the_others(tmp_path: Path) -> None:
    """It is equal whatever is done, and must not make a mean of outputs look good."""

    def notes(name: str, outputs: list[str]) -> list[str]:
        net = Net()
        hidden = net.op("Relu", "hidden", net.linear("first", "x", 16, 16))
        net.linear("deep", hidden, 16, 8)
        net.op("Abs", "beside", "x")
        size = net.op("Shape", "size", "first.mm")
        net.op("Reshape", "as large", "beside", size)
        path = tmp_path / f"{name}.onnx"
        onnx.save(net.proto({"x": ["n", 16]}, outputs), str(path))
        data = list(np.random.default_rng(0).standard_normal((12, 16)).astype(np.float32))
        found = quantize(path, calibration=data, recipe=Recipe(enough=60.0), work_dir=tmp_path / "work")
        return [note for note in found.report.notes if "dB" in note]

    alone = notes("one", ["deep"])
    assert any("calibration samples" in note for note in alone)
    assert notes("both", ["deep", "beside", "as large"]) == alone
