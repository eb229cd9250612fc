"""From a recipe's selectors and rules to a placement request, in the user's names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxptq import placing
from onnxptq.errors import SelectorError
from onnxptq.placing import Selectors, observer_overrides, placement_request, selector_notes
from onnxptq.recipe import Recipe
from onnxptq.selectors import Catalogue, Selection, select_nodes
from onnxptq.targets import PlacementRequest
from onnxptq.types import CanonicalModel, UserNode
from tests.unit.small_nets import NETS, Net, canonical


@pytest.fixture
def model(tmp_path: Path) -> CanonicalModel:
    built = canonical(NETS["residual_block"](), tmp_path)
    return replace(built, user_names={"relu1": "layer1/act", "head": "logits"})


def _request(model: CanonicalModel, **settings: Any) -> PlacementRequest:
    return placement_request(Selectors(model), Recipe.create(settings), {"x": "why"})


def test_defaults_decline_nothing(model: CanonicalModel) -> None:
    request = _request(model)
    assert dict(request.declined) == {}
    assert dict(request.uncalibrated) == {"x": "why"}


def test_include_keeps_what_it_names(model: CanonicalModel) -> None:
    request = _request(model, include=("Conv",))
    kept = {node.name for node in model.graph.nodes} - set(request.declined)
    assert kept == {"stem", "conv1", "conv2"}
    assert set(request.declined.values()) == {"not chosen by --include"}


def test_exclude_wins_and_knows_the_users_names(model: CanonicalModel) -> None:
    request = _request(model, include=("Conv", "Gemm"), exclude=("logits",))
    assert request.declined["head"] == "excluded by 'logits'"
    assert "stem" not in request.declined


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_patterns_that_match_nothing(option: str, model: CanonicalModel) -> None:
    with pytest.raises(SelectorError, match=f"--{option} 'Convs'") as caught:
        _request(model, **{option: ("Convs",)})
    assert "Conv" in caught.value.remedy


def test_later_rules_win_field_by_field(model: CanonicalModel) -> None:
    rules = [
        {"match": "Conv", "weight_bits": 4},
        {"match": "conv1", "activation_bits": 6},
        {"match": "conv2", "weight_bits": 3},
        {"match": "head", "observer": "minmax"},
    ]
    request = _request(model, target="simulate", weight_bits=8, activation_bits=7, rules=rules)
    assert request.bits_of == {"stem": (4, 7), "conv1": (4, 6), "conv2": (3, 7)}


def test_rules_may_name_an_input_of_the_model(model: CanonicalModel) -> None:
    (name,) = (tensor.name for tensor in model.graph.inputs)
    readers = {node.name for node in model.graph.nodes if name in (t.name for t in node.inputs)}
    request = _request(
        model, target="simulate", activation_bits=4, rules=[{"match": name, "activation_bits": 8}]
    )
    assert request.bits_of == dict.fromkeys(readers, (8, 8)) != {}
    with pytest.raises(SelectorError):
        _request(model, exclude=(name,))


def test_rules_that_match_nothing(model: CanonicalModel) -> None:
    with pytest.raises(SelectorError, match="rule 'nothing'"):
        _request(model, rules=[{"match": "nothing", "weight_bits": 4}])


@pytest.mark.parametrize(
    ("target", "opset", "storage"),
    [("simulate", 21, "int4"), ("simulate", 20, "int8"), ("ort-cpu", 21, "int8"), ("tensorrt", 25, "int8")],
)
def test_int4_storage_needs_its_opset_and_target(
    target: str, opset: int, storage: str, model: CanonicalModel
) -> None:
    assert _request(replace(model, opset=opset), target=target).weight_storage == storage


def test_weights_that_no_grid_can_hold_are_declined(tmp_path: Path) -> None:
    net = Net()
    weight = np.ones((4, 4), np.float32)
    weight[1, 2] = np.inf
    net.op("MatMul", "bad", "x", net.constant("w", weight))
    net.op("MatMul", "good", "bad", net.weight("v", 4, 4))
    model = canonical(net.proto({"x": [4, 4]}, ["good"]), tmp_path)
    assert set(_request(model).declined) == {"bad"}


def _overrides(model: CanonicalModel, match: str) -> dict[str, str]:
    recipe = Recipe.create({"rules": [{"match": match, "observer": "minmax"}]})
    tensors = frozenset({"x", "stem_relu", "relu1", "conv2", "flat"})
    found = observer_overrides(Selectors(model), recipe, tensors)
    return {name: observer.name for name, observer in found.items()}


def test_observers_of_tensors_by_the_users_names(model: CanonicalModel) -> None:
    assert _overrides(model, "layer1/*") == {"relu1": "minmax"}


def test_observers_of_what_a_node_reads_and_writes(model: CanonicalModel) -> None:
    assert _overrides(model, "Gemm") == {"flat": "minmax"}
    assert _overrides(model, "conv1") == {"stem_relu": "minmax"}


def test_observers_for_nothing(model: CanonicalModel) -> None:
    with pytest.raises(SelectorError):
        _overrides(model, "nowhere")


def test_later_observers_win(model: CanonicalModel) -> None:
    rules = [
        {"match": "*", "observer": "minmax"},
        {"match": "flat", "observer": "percentile"},
        {"match": "flat", "weight_bits": 4},
    ]
    recipe = Recipe.create({"rules": rules, "percentile": 99.0})
    found = observer_overrides(Selectors(model), recipe, frozenset({"flat", "x"}))
    assert found["flat"].name == "percentile"
    assert found["flat"].percentile == 99.0
    assert found["x"].name == "minmax"


@pytest.fixture
def layers(tmp_path: Path) -> CanonicalModel:
    """Two linear layers with a residual sum; the bias of each is an Add of its own."""
    net = Net()
    hidden = net.op("Relu", "act", net.linear("up", "x", 8, 16))
    total = net.op("Add", "residual", net.linear("down", hidden, 16, 8), "x")
    return canonical(net.proto({"x": [4, 8]}, [net.op("Softmax", "weights", total)]), tmp_path)


def _notes(model: CanonicalModel, **settings: Any) -> str:
    recipe = Recipe.create(settings)
    return "\n".join(selector_notes(Selectors(model), recipe, (recipe.target,)))


@pytest.mark.parametrize("pattern", ["up", "re:^up$"])
def test_the_bias_of_a_layer_by_name_is_the_layer(layers: CanonicalModel, pattern: str) -> None:
    assert set(_request(layers, exclude=(pattern,)).declined) == {"up", "up.mm"}
    assert {node.name for node in layers.graph.nodes} - set(
        _request(layers, include=(pattern,)).declined
    ) == {
        "up",
        "up.mm",
    }
    rules = [{"match": pattern, "weight_bits": 4}]
    assert _request(layers, target="simulate", rules=rules).bits_of == {"up": (4, 8), "up.mm": (4, 8)}
    note = _notes(layers, exclude=(pattern,))
    assert note == f"--exclude '{pattern}' names parts of other nodes, and holds for these: 'up' of 'up.mm'."


def test_the_type_of_a_bias_is_not_the_layer(layers: CanonicalModel) -> None:
    assert set(_request(layers, exclude=("Add",)).declined) == {"up", "down", "residual"}
    note = _notes(layers, exclude=("Add",))
    assert "'Add' does not hold for layers whose bias is a node of this type ('down', 'up')" in note


def test_patterns_that_name_layers_themselves_say_nothing(layers: CanonicalModel) -> None:
    assert _notes(layers, exclude=("up*",), target="simulate") == ""
    assert _notes(layers) == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude": ("weights",)},
        {"exclude": ("MatMul", "weights")},
        {"include": ("MatMul", "weights")},
        {"rules": [{"match": "weights", "weight_bits": 4}], "target": "simulate"},
        {"rules": [{"match": "up.mm", "weight_bits": 8}, {"match": "weights", "weight_bits": 4}]},
    ],
)
def test_patterns_that_change_nothing_are_told(layers: CanonicalModel, settings: dict[str, Any]) -> None:
    told = [line for line in _notes(layers, **settings).splitlines() if "changes nothing" in line]
    assert any("'weights' changes nothing" in line and "it matches 'weights'" in line for line in told)
    assert not any("'MatMul' changes nothing" in line for line in told)


def test_what_a_pattern_changes_depends_on_the_others(layers: CanonicalModel) -> None:
    assert _notes(layers, exclude=("up.mm", "up.mm")).count("changes nothing") == 2


def test_merged_nodes_are_noted(layers: CanonicalModel) -> None:
    merged = UserNode(name="bn", op="BatchNormalization", outputs=("up.mm",), homes=("up.mm",))
    model = replace(layers, user_nodes=(merged,))
    assert set(_request(model, exclude=("BatchNormalization",)).declined) == {"up.mm"}
    assert "'bn' of 'up.mm'" in _notes(model, exclude=("BatchNormalization",))


def test_each_pattern_is_matched_once(layers: CanonicalModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is asked: notes compare the plans with and without each pattern."""
    matched: list[tuple[str, str]] = []

    def select(pattern: str, catalogue: Catalogue, *, option: str) -> Selection:
        matched.append((pattern, option))
        return select_nodes(pattern, catalogue, option=option)

    monkeypatch.setattr(placing, "select_nodes", select)
    rules = [{"match": "up", "weight_bits": 4}, {"match": "down", "observer": "minmax"}]
    recipe = Recipe.create({"include": ("MatMul", "up"), "exclude": ("down",), "rules": rules})
    selectors = Selectors(layers)
    assert selector_notes(selectors, recipe, ("simulate", "ort-cpu"))
    placement_request(selectors, recipe, {})
    observer_overrides(selectors, recipe, frozenset({"down"}))
    assert sorted(matched) == [
        ("MatMul", "--include"),
        ("down", "--exclude"),
        ("up", "--include"),
        ("up", "rule"),
    ]
