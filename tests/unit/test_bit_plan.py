"""plan.yaml: what is written is read, edits are checked, and errors name file, pack and node."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from onnxptq.allocate.choices import AverageBits, Choice, PackChoices
from onnxptq.allocate.exact import allocate
from onnxptq.bit_plan import BitPlan, build_bit_plan, executed, planned_bits, read_bit_plan
from onnxptq.errors import RecipeError
from onnxptq.partition.blocks import find_blocks
from onnxptq.partition.pack import pack_blocks
from onnxptq.recipe import Recipe
from onnxptq.types import CanonicalModel, Sensitivity
from tests.unit.small_nets import canonical, residual_block


@pytest.fixture
def model(tmp_path: Path) -> CanonicalModel:
    built = canonical(residual_block(), tmp_path)
    return replace(
        built, source_sha256="0123456789abcdef", user_names={"relu1": "layer1/act", "head": "logits"}
    )


@pytest.fixture
def plan(model: CanonicalModel) -> BitPlan:
    blocks = find_blocks(model.graph)
    scores = [
        Sensitivity(
            block=i,
            loss=1.0,
            squared_error=1.0,
            absolute_error=1.0,
            curvature=math.inf if i == 1 else 1.0 / 3,
            omega=2.0 / 3,
        )
        for i in range(len(blocks))
    ]
    packs = pack_blocks(blocks, scores, max_pack_blocks=1)
    curve = tuple(Choice(bits=b, cost=2.0**-b / 3, size=b) for b in (2, 4, 8))
    choices = [
        PackChoices(
            pack=p.index,
            omega=1.0,
            weight_elements=10,
            activation_elements=7,
            weights=curve,
            activations=() if p.index == 1 else curve,
        )
        for p in packs
    ]
    return build_bit_plan(
        model,
        packs,
        scores,
        choices,
        allocate(choices, AverageBits(4.0, 8.0)),
        source=model,
        recipe=Recipe(target="simulate", average_bits=4.0, average_activation_bits=8.0),
    )


def written(plan: BitPlan, folder: Path, **changes: Any) -> Path:
    values = {**yaml.safe_load(plan.to_yaml()), **changes}
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def test_figures_are_those_of_the_bits_that_a_plan_has_now(plan: BitPlan) -> None:
    assert executed(plan, None) is plan
    eights = plan.model_copy(
        update={"packs": tuple(p.model_copy(update={"weight_bits": 8}) for p in plan.packs)}
    )
    found = executed(eights, None)
    assert (found.average_weight_bits, found.average_activation_bits) == (8.0, plan.average_activation_bits)
    assert (found.budget, found.allocator, found.weight_bytes) == ({}, "", None)
    costs = [p.weight_loss[8] for p in plan.packs]
    costs += [p.activation_loss[p.activation_bits] for p in plan.packs if p.activation_bits is not None]
    assert found.expected_loss == pytest.approx(sum(costs), rel=1e-5)
    # Bits that nothing was measured at.
    five = eights.model_copy(
        update={"packs": (plan.packs[0].model_copy(update={"weight_bits": 5}), *eights.packs[1:])}
    )
    assert executed(five, None).expected_loss is None


def test_deploy_targets_execute_activations_at_their_own_bits(plan: BitPlan) -> None:
    low = plan.model_copy(
        update={
            "packs": tuple(
                p.model_copy(update={"activation_bits": None if p.activation_bits is None else 4})
                for p in plan.packs
            )
        }
    )
    found = executed(low, 8)
    assert found.average_activation_bits == 8.0
    assert [p.activation_bits for p in found.packs] == [p.activation_bits and 8 for p in low.packs]


def test_what_is_written_is_read(plan: BitPlan, model: CanonicalModel, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(plan.to_yaml(), encoding="utf-8")
    assert read_bit_plan(path) == plan
    values = yaml.safe_load(plan.to_yaml())
    assert values["budget"] == {"average_bits": 4.0, "average_activation_bits": 8.0}
    assert values["fingerprint"] == model.source_sha256
    assert values["packs"][1]["sensitivity"] == [math.inf]
    # Names are the user's.
    assert [p["to"] for p in values["packs"]][-1] == ["logits"]
    assert {b for p in values["packs"] for b in p["weight_loss"]} == {2, 4, 8}
    bits = planned_bits(plan, model, path, (5, 6))
    assert bits.keys() == {name for p in plan.packs for name in p.nodes}
    for entry in plan.packs:
        for name in entry.nodes:
            assert bits[name] == (entry.weight_bits, 6 if entry.index == 1 else 8)


def test_a_plan_by_hand(model: CanonicalModel, tmp_path: Path) -> None:
    """Bits and nodes are enough; a node may go by the name of what it writes."""
    path = tmp_path / "mine.yaml"
    path.write_text("packs:\n- {index: 0, weight_bits: 3, nodes: [conv1, logits]}\n")
    assert planned_bits(read_bit_plan(path), model, path, (8, 7)) == {"conv1": (3, 7), "head": (3, 7)}


@pytest.mark.parametrize(
    ("pack", "message"),
    [
        ({"weight_bits": 9}, r"pack 4 \(from node 'conv1'\): 'weight_bits'.*less than or equal to 8.*got 9"),
        ({"weight_bits": "x"}, r"pack 4 \(from node 'conv1'\): 'weight_bits'.*integer.*got 'x'"),
        ({"weigth_bits": 4}, r"pack 4 .*unknown key 'weigth_bits'; did you mean weight_bits"),
        ({"nodes": []}, r"pack 4: 'nodes'.*at least 1"),
        ({"index": None}, r"pack None .*'index'"),
    ],
    ids=["too many", "no number", "typing error", "no nodes", "no index"],
)
def test_errors_name_file_pack_and_node(pack: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump({"packs": [{"index": 4, "nodes": ["conv1"], **pack}]}))
    with pytest.raises(RecipeError, match=message) as caught:
        read_bit_plan(path)
    assert str(path) in caught.value.message
    assert caught.value.message.count("(got") == ("unknown" not in message)


def test_errors_of_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text("pack: []\n")
    with pytest.raises(RecipeError, match="'packs' is missing; unknown key 'pack'; did you mean packs"):
        read_bit_plan(path)
    with pytest.raises(RecipeError, match="Cannot read"):
        read_bit_plan(tmp_path / "none.yaml")


def test_plans_of_other_models(plan: BitPlan, model: CanonicalModel, tmp_path: Path) -> None:
    other = replace(model, source_sha256="fedcba9876543210")
    path = written(plan, tmp_path)
    with pytest.raises(RecipeError, match=r"another model \('model.onnx'\).*0123456789ab.*fedcba987654"):
        planned_bits(read_bit_plan(path), other, path, (8, 8))
    path = written(plan, tmp_path, fingerprint="")
    assert planned_bits(read_bit_plan(path), other, path, (8, 8))


def test_unknown_and_repeated_nodes(model: CanonicalModel, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"

    def bits(*packs: list[str]) -> object:
        entries = [{"index": i, "nodes": nodes} for i, nodes in enumerate(packs)]
        path.write_text(yaml.safe_dump({"packs": entries}))
        return planned_bits(read_bit_plan(path), model, path, (8, 8))

    with pytest.raises(RecipeError, match="in pack 1 that the model lacks: 'conv3'") as caught:
        bits(["stem"], ["conv3"])
    assert "conv1" in caught.value.remedy
    with pytest.raises(RecipeError, match="node 'logits' in pack 0 and in pack 1"):
        bits(["head"], ["logits"])
