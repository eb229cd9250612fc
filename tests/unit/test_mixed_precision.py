"""Budgets end to end: bits per pack in the file, its annotations, the report, and a plan that is re-applied."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from click.testing import CliRunner

import onnxptq
from cli.main import cli
from onnxptq.bit_plan import BitPlan, read_bit_plan
from onnxptq.errors import BudgetError, RecipeError, UnsupportedOperatorError
from onnxptq.pipeline import Result
from onnxptq.recipe import Recipe
from onnxptq.types import Sample
from tests.unit.small_nets import Net


def network(opset: int = 21) -> onnx.ModelProto:
    """Four blocks of very different size, so that budgets leave room for choices."""
    net = Net(opset=opset)
    x = net.op("Relu", "stem_relu", net.conv("stem", "x", (8, 3, 3, 3)))
    for i, kernel in enumerate((3, 1)):
        y = net.op("Relu", f"relu{i}", net.conv(f"a{i}", x, (8, 8, kernel, kernel)))
        y = net.conv(f"b{i}", y, (8, 8, kernel, kernel))
        x = net.op("Relu", f"out{i}", net.op("Add", f"sum{i}", y, x))
    x = net.op("Flatten", "flat", net.op("GlobalAveragePool", "pool", x))
    x = net.op("Gemm", "head", x, net.weight("head.w", 6, 8), net.weight("head.b", 6), transB=1)
    return net.proto({"x": ["n", 3, 8, 8]}, [x])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    onnx.save(network(), str(path))
    return path


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    rng = np.random.default_rng(3)
    return [{"x": rng.standard_normal((1, 3, 8, 8)).astype(np.float32)} for _ in range(16)]


def quantized(model: Path, samples: Sequence[Sample], folder: Path, **settings: Any) -> Result:
    recipe = Recipe.create({"target": "simulate", "equalize": False, "simplify": False, **settings})
    return onnxptq.quantize(
        model,
        folder / "out.onnx",
        calibration=list(samples),
        recipe=recipe,
        report_dir=folder / "report",
        work_dir=folder / "work",
    )


@pytest.fixture(scope="module")
def average(model: Path, samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Result:
    folder = tmp_path_factory.mktemp("average")
    return quantized(model, samples, folder, average_bits=3.5, average_activation_bits=4.5)


def plan_of(result: Result) -> BitPlan:
    assert result.report_dir is not None
    return read_bit_plan(result.report_dir / "plan.yaml")


def scores_in(path: Path) -> dict[str, dict[str, str]]:
    """Pack, block, S and Omega of every node that has them."""
    keys = ("onnxptq.pack", "onnxptq.block", "onnxptq.sensitivity", "onnxptq.omega")
    said = {n.name: {p.key: p.value for p in n.metadata_props} for n in onnx.load(path).graph.node}
    found = {name: {k: values[k] for k in keys} for name, values in said.items() if keys[0] in values}
    assert found
    return found


def true_average(result: Result, role: str, sizes: dict[str, int]) -> float:
    rows = [row for row in result.report.quantized if row.role == role]
    return sum(sizes[r.tensor] * r.bits for r in rows) / sum(sizes[r.tensor] for r in rows)


def test_true_averages_of_the_file_stay_within_the_budget(average: Result) -> None:
    weights = {t.name: int(np.prod(t.dims)) for t in network().graph.initializer}
    activations = dict.fromkeys(("stem_relu", "relu0", "out0", "relu1"), 8 * 64) | {"x": 192, "flat": 8}
    assert 3.0 < true_average(average, "weight", weights) <= 3.5
    assert 4.0 < true_average(average, "activation", activations) <= 4.5
    plan = plan_of(average)
    assert plan.average_weight_bits == pytest.approx(true_average(average, "weight", weights), rel=1e-5)
    assert plan.average_activation_bits == pytest.approx(
        true_average(average, "activation", activations), rel=1e-5
    )
    assert len({row.bits for row in average.report.quantized if row.role == "weight"}) > 1
    # Every quantizer has the bits of its pack.
    bits = {node: (p.weight_bits, p.activation_bits) for p in plan.packs for node in p.nodes}
    for row in average.report.quantized:
        for reader in row.readers:
            assert row.bits == bits[reader][0 if row.role == "weight" else 1], row


def test_nodes_and_model_are_annotated(average: Result) -> None:
    file = onnx.load(average.output)
    plan = plan_of(average)
    nodes = {n.name: {p.key: p.value for p in n.metadata_props} for n in file.graph.node}
    for entry in plan.packs:
        weighted = [n for n in entry.nodes if n in ("stem", "a0", "b0", "a1", "b1", "head")]
        for name in weighted:
            assert nodes[name]["onnxptq.pack"] == str(entry.index)
            assert nodes[name]["onnxptq.weight_bits"] == str(entry.weight_bits)
            assert nodes[name]["onnxptq.activation_bits"] == str(entry.activation_bits)
            assert float(nodes[name]["onnxptq.sensitivity"]) == pytest.approx(entry.sensitivity[0], rel=1e-5)
            assert float(nodes[name]["onnxptq.omega"]) == pytest.approx(entry.omega[0], rel=1e-5)
    assert "onnxptq.pack" not in nodes["sum0"]  # nothing of it is quantized
    about = {p.key: p.value for p in file.metadata_props}
    assert about["onnxptq.method"] == "auto"
    source = Path(average.report.model.path)
    assert (
        about["onnxptq.source_sha256"] == plan.fingerprint == hashlib.sha256(source.read_bytes()).hexdigest()
    )
    assert BitPlan.model_validate(yaml.safe_load(about["onnxptq.plan"])) == plan
    assert len(about["onnxptq.plan_sha256"]) == len(about["onnxptq.recipe_sha256"]) == 64


def test_the_report_holds_the_plan(average: Result) -> None:
    assert average.report_dir is not None
    content = json.loads((average.report_dir / "report.json").read_text())
    plan = plan_of(average)
    assert content["bit_plan"]["average_weight_bits"] == plan.average_weight_bits
    assert [p["weight_bits"] for p in content["bit_plan"]["packs"]] == [p.weight_bits for p in plan.packs]
    assert content["bit_plan"]["packs"][0]["weight_loss"].keys() == {"2", "3", "4", "5", "6", "8"}
    assert "Bits per pack" in (average.report_dir / "report.html").read_text()
    assert any(note.startswith("Bits per pack for average bits 3.5") for note in average.report.notes)
    assert any("was measured on 3 samples" in note for note in average.report.notes)


def test_costs_never_rise_with_bits(average: Result) -> None:
    for pack in plan_of(average).packs:
        for losses in (pack.weight_loss, pack.activation_loss):
            assert list(losses.values()) == sorted(losses.values(), reverse=True)


def test_a_plan_applied_again_gives_the_same_quantizers(
    average: Result, model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    assert average.report_dir is not None
    path = average.report_dir / "plan.yaml"
    again = quantized(model, samples, tmp_path, plan=str(path))
    assert again.report.quantized == average.report.quantized
    assert plan_of(again) == plan_of(average)
    assert scores_in(again.output) == scores_in(average.output)
    rounded = quantized(model, samples, tmp_path, plan=str(path), method="rtn")
    assert scores_in(rounded.output) == scores_in(average.output)
    # An edit counts; the rest stays.
    values = yaml.safe_load(path.read_text())
    (head,) = [p for p in values["packs"] if "head" in p["nodes"]]
    head["weight_bits"] = 7
    edited = tmp_path / "edited.yaml"
    edited.write_text(yaml.safe_dump(values))
    found = quantized(model, samples, tmp_path, plan=str(edited))
    bits = {r.tensor: r.bits for r in found.report.quantized if r.role == "weight"}
    assert bits == {r.tensor: r.bits for r in average.report.quantized if r.role == "weight"} | {"head.w": 7}


def test_the_same_request_gives_the_same_bytes(model: Path, samples: list[Sample], tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        found = quantized(model, samples, tmp_path / name, average_bits=4, method="rtn")
        results.append((found.output.read_bytes(), plan_of(found).to_yaml()))
    assert results[0] == results[1]


def test_a_rule_goes_before_the_plan(
    average: Result, model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    assert average.report_dir is not None
    rule = {"match": "head", "activation_bits": 7}
    found = quantized(
        model, samples, tmp_path, plan=str(average.report_dir / "plan.yaml"), rules=(rule,), method="rtn"
    )
    before = {r.tensor: r.bits for r in average.report.quantized}
    assert {r.tensor: r.bits for r in found.report.quantized} == before | {"flat": 7}


def test_plans_of_other_models_are_refused(average: Result, tmp_path: Path, samples: list[Sample]) -> None:
    assert average.report_dir is not None
    other = network()
    other.graph.initializer[0].raw_data = bytes(len(other.graph.initializer[0].raw_data))
    onnx.save(other, str(tmp_path / "other.onnx"))
    with pytest.raises(RecipeError, match=r"another model \('net.onnx'\)"):
        quantized(tmp_path / "other.onnx", samples, tmp_path, plan=str(average.report_dir / "plan.yaml"))


def test_a_file_within_a_size(model: Path, samples: list[Sample], tmp_path: Path) -> None:
    fixed = {"activation_bits": 6, "method": "rtn"}
    wide = quantized(model, samples, tmp_path, max_size=1.0, **fixed)
    assert {r.bits for r in wide.report.quantized if r.role == "weight"} == {8}
    assert {r.bits for r in wide.report.quantized if r.role == "activation"} == {6}
    # 4-bit weights take half a byte each: half of the 1544 bytes of 8-bit weights can go, 300 must.
    size = wide.output.stat().st_size
    found = quantized(model, samples, tmp_path, max_size=(size - 300) / 1e6, **fixed)
    assert size - 1500 < found.output.stat().st_size <= size - 300
    assert {r.bits for r in found.report.quantized if r.role == "weight"} == {4, 8}
    assert not any(note.startswith("The file takes") for note in found.report.notes)
    with pytest.raises(
        BudgetError, match=r"A file of 0.001 MB is out of reach for simulate: the least is 0\.0"
    ):
        quantized(model, samples, tmp_path, max_size=0.001, **fixed)


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
@pytest.mark.parametrize("method", ["rtn", "pack-ptq"])
def test_deploy_targets_average_weights_alone(
    target: str, method: str, model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    steps = {} if method == "rtn" else {"steps": 5}
    found = quantized(model, samples, tmp_path, target=target, method=method, average_bits=4, **steps)
    plan = plan_of(found)
    assert plan.average_weight_bits is not None
    assert 3.0 < plan.average_weight_bits <= 4.0
    assert plan.average_activation_bits == 8.0
    assert {r.bits for r in found.report.quantized if r.role == "activation"} == {8}
    assert any("activations stay at 8 bits" in note for note in found.report.notes)


def test_sizes_that_need_a_newer_opset_say_so(samples: list[Sample], tmp_path: Path) -> None:
    path = tmp_path / "old.onnx"
    onnx.save(network(opset=17), str(path))
    said = "take a byte each in a model of opset 17, and half with --opset 21"
    with pytest.raises(BudgetError, match=said):
        quantized(path, samples, tmp_path, max_size=0.001, method="rtn")
    found = quantized(path, samples, tmp_path, max_loss=0.1, method="rtn")
    assert any(said in note for note in found.report.notes)
    raised = quantized(path, samples, tmp_path, max_loss=0.1, method="rtn", opset=21)
    assert not any("--opset 21" in note for note in raised.report.notes)
    deployed = quantized(path, samples, tmp_path, max_loss=0.1, method="rtn", target="ort-cpu")
    assert any("take a byte each on ort-cpu" in note for note in deployed.report.notes)


def test_the_smallest_file_within_a_loss(model: Path, samples: list[Sample], tmp_path: Path) -> None:
    losses = []
    for limit in (1e-3, 1e-1):
        found = plan_of(quantized(model, samples, tmp_path, max_loss=limit, method="rtn"))
        assert found.expected_loss is not None
        assert found.expected_loss <= limit
        assert {p.activation_bits for p in found.packs} == {8}
        losses.append(found.weight_bytes or 0)
    assert losses[0] > losses[1]
    with pytest.raises(BudgetError, match=r"A loss of 1e-12 cannot be reached"):
        quantized(model, samples, tmp_path, max_loss=1e-12, method="rtn")


@pytest.mark.parametrize("settings", [{"average_bits": 4, "method": "rtn"}, {"method": "pack-ptq"}])
def test_what_torch_cannot_run_is_refused_before_any_work(
    settings: dict[str, Any], samples: list[Sample], tmp_path: Path
) -> None:
    net = Net()
    stem = net.conv("stem", "x", (8, 3, 3, 3))
    x = net.op("Unique", "unique", net.op("Relu", "relu", stem))
    onnx.save(net.proto({"x": [1, 3, 8, 8]}, [stem, x]), str(tmp_path / "net.onnx"))
    with pytest.raises(UnsupportedOperatorError, match=r"Unique version 11 \(node 'unique'\)") as caught:
        quantized(tmp_path / "net.onnx", samples, tmp_path, **settings, unknown_operators="refuse")
    assert caught.value.exit_code == 3
    assert not list((tmp_path / "work").glob("calibration-*"))


def test_the_greedy_allocator(model: Path, samples: list[Sample], tmp_path: Path) -> None:
    plan = plan_of(quantized(model, samples, tmp_path, average_bits=3, allocator="greedy", method="rtn"))
    assert [(p.weight_bits, p.activation_bits) for p in plan.packs][:: len(plan.packs) - 1] == [(4, 4)] * 2
    assert {p.weight_bits for p in plan.packs} <= {3, 4}
    assert plan.allocator == "greedy"


def test_packs_of_the_plan_are_the_packs_that_are_solved(
    model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    found = quantized(
        model, samples, tmp_path, average_bits=4, method="pack-ptq", effort="balanced", max_pack_blocks=2
    )
    plan = plan_of(found)
    assert [b.pack for b in found.report.blocks] == [p.index for p in plan.packs for _ in p.blocks]
    assert found.report.packs
    file = onnx.load(found.output)
    said = {n.name: {p.key: p.value for p in n.metadata_props} for n in file.graph.node}
    for entry in plan.packs:
        for name in set(entry.nodes) & {"stem", "a0", "b1", "head"}:
            assert said[name]["onnxptq.pack"] == str(entry.index)
    assert found.report_dir is not None
    path = found.report_dir / "plan.yaml"
    again = quantized(model, samples, tmp_path, plan=str(path), effort="balanced", max_pack_blocks=2, steps=2)
    assert scores_in(again.output).keys() == scores_in(found.output).keys()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"average_bits": 3, "max_size": 1}, "average_bits and max_size exclude each other"),
        ({"plan": "plan.yaml", "max_loss": 0.0}, "max_loss and plan exclude each other"),
        ({"average_activation_bits": 3}, "average_activation_bits goes with average_bits"),
        ({"allocator": "greedy"}, "the greedy allocator needs average_bits"),
        ({"allocator": "greedy", "average_bits": 4}, "it needs --target simulate, since ort-cpu"),
        (
            {"average_bits": 4, "average_activation_bits": 6, "target": "tensorrt"},
            "tensorrt executes activations at 8 bits, --target simulate at 2 to 8",
        ),
        ({"average_bits": 9}, "'average_bits'.*less than or equal to 8"),
    ],
)
def test_budgets_that_contradict(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.create(settings)


def test_the_start_is_near_the_average() -> None:
    target = {"target": "simulate"}
    recipe = Recipe.create({"average_bits": 3.4, "average_activation_bits": 5.6, **target})
    assert (recipe.weight_bits, recipe.activation_bits) == (3, 6)
    assert Recipe.create({"average_bits": 3.4, "weight_bits": 8}).weight_bits == 8
    assert Recipe.create({"average_bits": 3.4, **target}).activation_bits == 3
    assert Recipe.create({"average_bits": 3.4}).activation_bits == 8
    assert recipe.is_low_bit
    assert Recipe.create({"max_size": 3}).is_solved_by_packs
    assert recipe.bit_budget == {"average_bits": 3.4, "average_activation_bits": 5.6}


def test_sensitivity(model: Path, samples: list[Sample], tmp_path: Path) -> None:
    found = onnxptq.sensitivity(
        model, calibration=samples, report_dir=tmp_path / "report", work_dir=tmp_path / "work"
    )
    assert found.loss == "kl"
    assert [b.block for b in found.blocks] == list(range(len(found.blocks)))
    assert all(b.curvature and b.omega for b in found.blocks)
    for row in found.packs:
        for losses in (row.weight_loss, row.activation_loss):
            assert list(losses) == [2, 3, 4, 5, 6, 8]
            assert losses[2] > 10 * losses[8]  # six bits are a factor of 64 in the error
    assert sum(row.weights or 0 for row in found.packs) == 8 * 27 + 2 * 576 + 2 * 64 + 48
    page = (tmp_path / "report" / "sensitivity.html").read_text()
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http-equiv", "")
    assert json.loads((tmp_path / "report" / "sensitivity.json").read_text()) == found.to_json()
    assert not list(model.parent.glob("*int8*"))


def test_the_command(model: Path, samples: list[Sample], tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", x=np.concatenate([s["x"] for s in samples]))
    given = ["sensitivity", str(model), "--calib", str(tmp_path / "calib.npz"), "--work-dir", str(tmp_path)]
    done = CliRunner().invoke(cli, [*given, "--json", "-w", "3"], catch_exceptions=False)
    assert done.exit_code == 0
    content = json.loads(done.stdout)
    assert content["weight_bits"] == 3
    assert content["packs"][0]["weight_loss"].keys() == {"2", "3", "4", "5", "6", "8"}
    shown = CliRunner().invoke(cli, given, catch_exceptions=False)
    assert "Loss by bits of activations" in shown.stdout
    quantize = [
        "quantize",
        str(model),
        "--calib",
        str(tmp_path / "calib.npz"),
        "-t",
        "simulate",
        "--method",
        "rtn",
    ]
    quantize += [
        "--no-report",
        "--average-bits",
        "4",
        "-o",
        str(tmp_path / "o.onnx"),
        "--work-dir",
        str(tmp_path),
    ]
    done = CliRunner().invoke(cli, quantize, catch_exceptions=False)
    assert done.exit_code == 0
    about = {p.key: p.value for p in onnx.load(tmp_path / "o.onnx").metadata_props}
    assert "average_bits: 4.0" in about["onnxptq.recipe"]
