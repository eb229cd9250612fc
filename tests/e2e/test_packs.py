"""Networks solved pack by pack, through the whole product: what is written is what was simulated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml

import onnxptq
from onnxptq.graph.index import GraphIndex
from onnxptq.graph.linear import find_linears
from onnxptq.packing import find_packing
from onnxptq.recipe import Recipe
from tests.e2e.pack_nets import ONE, of_any_size, segmentation
from tests.e2e.packed import feeds, noise, quantized, quantized_net, require_proven
from tests.unit.reconstruct.pack_cases import case
from tests.unit.small_nets import attention_block, residual_block

SETTINGS = {
    "residual, fixed batch": ((2, 8), (4, 4)),
    "windows": ((3, 5), (4, 8)),
    "attention": ((2, 8), (3, 8)),
    "points, fixed batch": ((3, 3), (2, 6)),
    "two inputs": ((2, 3), (5, 4)),
    "two outputs": ((3, 6), (8, 4)),
}
"""Bits of weights and activations: solved in closed form with the first, learnt with the second."""


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("kind", SETTINGS)
def test_few_bits(kind: str, place: int, tmp_path: Path) -> None:
    weight_bits, activation_bits = SETTINGS[kind][place]
    options = {"target": "simulate", "weight_bits": weight_bits, "activation_bits": activation_bits}
    nearest = quantized(kind, tmp_path, method="rtn", **options)
    effort = ("fast", "balanced")[place]
    found = quantized(kind, tmp_path, method="pack-ptq", effort=effort, **options)
    require_proven(found)
    assert noise(found) < noise(nearest)
    assert any("packs" in note for note in found.report.notes)
    assert found.report.packs
    assert all((pack.steps > 0) == (effort == "balanced") for pack in found.report.packs)
    assert sum(pack.after for pack in found.report.packs) < sum(pack.before for pack in found.report.packs)
    assert all(row.nearest_sqnr_db is None for row in nearest.report.tensors)
    gains = [
        row.sqnr_db - row.nearest_sqnr_db for row in found.report.tensors if row.nearest_sqnr_db is not None
    ]
    assert len(gains) == len(found.report.tensors)
    # Inside a pack a tensor may well be farther off than by rounding to nearest.
    assert max(gains) > 0.0
    assert not list((tmp_path / "work" / "packs").iterdir())


@pytest.mark.parametrize(
    ("kind", "target", "effort"),
    [
        ("windows", "ort-cpu", "balanced"),
        ("windows", "tensorrt", "fast"),
        ("two outputs", "tensorrt", "fast"),
        ("stacked matrices", "tensorrt", "balanced"),
        ("stacked matrices", "simulate", "balanced"),
    ],
)
def test_deployment_targets(kind: str, target: str, effort: str, tmp_path: Path) -> None:
    options = {"target": target, "weight_bits": 4}
    nearest = quantized(kind, tmp_path, method="rtn", **options)
    found = quantized(kind, tmp_path, method="pack-ptq", effort=effort, **options)
    require_proven(found)
    assert noise(found) < noise(nearest)


@pytest.mark.parametrize("method", ["brecq", "qdrop", "adaround"])
def test_methods_of_others(method: str, tmp_path: Path) -> None:
    kind, options = "residual, fixed batch", {"target": "simulate", "weight_bits": 3, "activation_bits": 6}
    nearest = quantized(kind, tmp_path, method="rtn", **options)
    found = quantized(kind, tmp_path, method=method, **options)
    require_proven(found)
    assert noise(found) < noise(nearest)
    if method == "adaround":
        for row in found.report.packs:
            assert row.blocks == 1


@pytest.mark.parametrize(
    ("method", "limit", "is_told"), [("pack-ptq", 16, True), ("pack-ptq", 24, False), ("rtn", 16, False)]
)
def test_samples_that_are_left_out_are_told(method: str, limit: int, is_told: bool, tmp_path: Path) -> None:
    """Where weights are learnt from samples; rounding to nearest would gain nothing from more."""
    path = tmp_path / "net.onnx"
    onnx.save(residual_block(), str(path))
    recipe = {"target": "simulate", "weight_bits": 4, "method": method, "effort": "fast", "samples": limit}
    recipe |= {"holdout": 0.0, "simplify": False}
    if method == "rtn":
        del recipe["effort"]
    found = onnxptq.quantize(path, calibration=feeds(ONE, 24), recipe=recipe, work_dir=tmp_path / "work")
    told = [note for note in found.report.notes if note.startswith(f"{limit} of 24 samples are used.")]
    assert len(told) == is_told
    assert all("--samples 24 takes all of them" in note for note in told)


def test_units_of_adaround_hold_one_layer_each(tmp_path: Path) -> None:
    made = case(residual_block(), tmp_path, samples=2)

    def layers(method: str) -> list[int]:
        recipe = Recipe(method=method, target="simulate")
        packs = find_packing(made.model, made.plan, made.start, made.samples, recipe, device="cpu").packs
        own = {layer.node.name for layer in find_linears(GraphIndex(made.model.graph))}
        return [sum(node in own for node in pack.nodes) for pack in packs]

    assert max(layers("adaround")) == 1
    assert sum(layers("adaround")) == sum(layers("brecq")) == 4
    assert layers("aiqvit") == layers("brecq")
    assert max(layers("brecq")) == 2


@pytest.mark.parametrize("target", ["simulate", "ort-cpu", "tensorrt"])
@pytest.mark.parametrize("kind", ["attention", "two outputs"])
def test_scales_and_biases_are_tuned_on_the_outputs(kind: str, target: str, tmp_path: Path) -> None:
    options = {"target": target, "weight_bits": 3, "activation_bits": 4, "effort": "balanced"}
    found = quantized(kind, tmp_path, **options)
    require_proven(found)
    (note,) = [note for note in found.report.notes if "learnt on the outputs" in note]
    tuning = found.report.tuning
    assert tuning is not None
    assert tuning.blocks == len(found.report.blocks)
    assert tuning.after <= tuning.before
    assert ("dropped" in note) == (tuning.after == tuning.before)
    without = quantized(kind, tmp_path, tune=False, **options)
    assert not any("learnt on the outputs" in note for note in without.report.notes)
    assert without.report.packs == found.report.packs


def test_bits_per_pack_go_to_nodes_that_the_user_has(tmp_path: Path) -> None:
    """Roots of softmax outputs are nodes of the written file, not of the model that a plan is for."""
    recipe: dict[str, Any] = {"target": "simulate", "method": "auto", "softmax_root": 3}
    found = quantized("attention", tmp_path / "chosen", average_bits=4.0, **recipe)
    assert {"Log", "Exp", "Pow"} & {node.op_type for node in onnx.load(str(found.output)).graph.node}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(_plan_of(found)))
    again = quantized("attention", tmp_path / "applied", plan=str(tmp_path / "plan.yaml"), **recipe)
    assert [(row.tensor, row.bits) for row in again.report.quantized] == [
        (row.tensor, row.bits) for row in found.report.quantized
    ]
    given = {node.name for node in attention_block().graph.node}
    assert {name for pack in _plan_of(found)["packs"] for name in pack["nodes"]} <= given


def _plan_of(result: onnxptq.Result) -> dict[str, Any]:
    (text,) = [
        prop.value
        for prop in onnx.load(str(result.output), load_external_data=False).metadata_props
        if prop.key == "onnxptq.plan"
    ]
    values: dict[str, Any] = yaml.safe_load(text)
    return values


@pytest.mark.parametrize(
    "options",
    [
        {"method": "qdrop"},
        {"method": "aiqvit", "tune": True},
        {"method": "brecq", "loss": "global-local"},
        {"method": "auto", "effort": "balanced"},
    ],
    ids=str,
)
def test_nothing_is_learnt_from_integers(options: Mapping[str, Any], tmp_path: Path) -> None:
    bits = {"target": "simulate", "weight_bits": 4, "activation_bits": 4}
    found = quantized_net(segmentation(), feeds(ONE), tmp_path, **bits, **options)
    require_proven(found)
    assert all(pack.steps for pack in found.report.packs)
    assert max(block.pack for block in found.report.blocks) not in {pack.pack for pack in found.report.packs}
    assert found.report.tuning is None
    assert (options["method"] in ("aiqvit", "auto")) == any(
        "none of them holds floats" in note for note in found.report.notes
    )


@pytest.mark.parametrize(
    "options",
    [
        {"method": "pack-ptq"},
        {"method": "auto", "effort": "balanced"},
        {"average_bits": 4.0, "effort": "fast"},
    ],
    ids=["pack-ptq", "auto", "budget"],
)
def test_pictures_of_several_sizes(options: Mapping[str, Any], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    sizes = [(8, 8), (8, 12), (11, 9), (8, 8)] * 5
    samples = [{"x": rng.standard_normal((1, 3, *size)).astype(np.float32)} for size in sizes]
    bits = {"target": "simulate", "weight_bits": 4, "activation_bits": 4}
    found = quantized_net(of_any_size(), samples, tmp_path, **bits, **options)
    require_proven(found)
    # Whether or not they won, packs were solved on samples that cannot be stacked.
    assert any("packs" in note for note in found.report.notes)
