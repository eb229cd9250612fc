"""From a recipe's selectors and rules to a placement request in canonical names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxptq.calibrate.observers import Observer
from onnxptq.errors import SelectorError, TargetIllegalError, UnsupportedModelError
from onnxptq.graph.index import GraphIndex, is_constant, is_float32
from onnxptq.recipe import Recipe
from onnxptq.selectors import compile_pattern, match_nodes, match_tensors
from onnxptq.targets import PlacementRequest
from onnxptq.types import CanonicalModel, QuantPlan

_UNCHOSEN = ("not chosen by", "excluded by")
_SHOWN = 3


def placement_request(
    model: CanonicalModel,
    index: GraphIndex,
    recipe: Recipe,
    uncalibrated: Mapping[str, str],
    planned: Mapping[str, tuple[int, int]] = {},
) -> PlacementRequest:
    """Which nodes the recipe quantizes, at which bits.

    Args:
        planned: bits of weights and activations per node, from a plan; the recipe's rules go before it.

    Raises:
        SelectorError: a pattern matches nothing.
    """
    names = {node.name: _known_names(model, node) for node in index.nodes}
    ops = {node.name: node.op for node in index.nodes}
    declined = _unusable_weights(model, index)
    if recipe.include:
        chosen = frozenset().union(*(match_nodes(p, names, ops, option="--include") for p in recipe.include))
        declined.update({name: "not chosen by --include" for name in names if name not in chosen})
    for pattern in recipe.exclude:
        matched = match_nodes(pattern, names, ops, option="--exclude")
        declined.update(dict.fromkeys(matched, f"excluded by '{pattern}'"))
    bits: dict[str, tuple[int, int]] = dict(planned)
    given = {tensor.name for tensor in model.graph.inputs}
    readers = {
        node.name: (*names[node.name], *(t.name for t in node.inputs if t.name in given))
        for node in index.nodes
    }
    for rule in recipe.rules:
        if rule.weight_bits is None and rule.activation_bits is None:
            continue
        for name in match_nodes(rule.match, readers, ops, option="rule"):
            weight, activation = bits.get(name, (recipe.weight_bits, recipe.activation_bits))
            bits[name] = (rule.weight_bits or weight, rule.activation_bits or activation)
    return PlacementRequest(
        weight_bits=recipe.weight_bits,
        activation_bits=recipe.activation_bits,
        weight_storage="int4" if model.opset >= 21 and recipe.target == "simulate" else "int8",
        bits_of=bits,
        declined=declined,
        uncalibrated=uncalibrated,
    )


def _unusable_weights(model: CanonicalModel, index: GraphIndex) -> dict[str, str]:
    """Nodes that read a constant with NaN or infinity, which no grid can hold, and the reason."""
    spoilt: dict[str, str] = {}
    for node in index.nodes:
        for tensor in node.inputs:
            if is_constant(tensor) and is_float32(tensor) and math.prod(tensor.shape):
                values = tensor.values
                if not (np.isfinite(values.min()) and np.isfinite(values.max())):
                    spoilt[node.name] = f"its constant '{model.user_name(tensor.name)}' holds NaN or infinity"
    return spoilt


def require_quantizers(plan: QuantPlan, model: CanonicalModel, recipe: Recipe) -> None:
    """Refuse a plan that quantizes nothing: its file would be the input under another name.

    Raises:
        TargetIllegalError: ``--include`` chose only what the target does not quantize.
        SelectorError: ``--exclude`` left nothing.
        UnsupportedModelError: the model holds nothing that the target quantizes.
    """
    if plan.quantizers:
        return
    excluded = any(skip.reason.startswith("excluded by") for skip in plan.skips)
    reasons = [f"{s.site}: {s.reason}" for s in plan.skips if not s.reason.startswith(_UNCHOSEN)]
    why = f" ({'; '.join(reasons[:_SHOWN])})" if reasons else ""
    if recipe.include:
        raise TargetIllegalError(
            f"{recipe.target} quantizes nothing that --include chooses{why}.",
            f"'onnxptq inspect {model.source}' lists what it would quantize.",
        )
    if excluded and recipe.exclude:
        raise SelectorError(
            f"--exclude leaves nothing that {recipe.target} could quantize{why}.", "Exclude less."
        )
    raise UnsupportedModelError(
        f"{model.source} holds nothing that {recipe.target} could quantize{why}.",
        f"'onnxptq inspect {model.source}' lists its operators and what each target would quantize.",
    )


def observer_overrides(
    model: CanonicalModel, index: GraphIndex, recipe: Recipe, tensors: frozenset[str]
) -> dict[str, Observer]:
    """The observers that the recipe's rules set for single tensors, by canonical name.

    A rule names tensors, or nodes: then it holds for what they read and write.

    Raises:
        SelectorError: a pattern matches nothing.
    """
    overrides: dict[str, Observer] = {}
    users = {model.user_name(name): name for name in tensors}
    names = {node.name: _known_names(model, node) for node in index.nodes}
    ops = {node.name: node.op for node in index.nodes}
    for rule in recipe.rules:
        if rule.observer is None:
            continue
        observer = Observer(name=rule.observer, percentile=recipe.percentile)
        matches = compile_pattern(rule.match)
        matched = {tensor for name, tensor in users.items() if matches(name)}
        if not matched:
            nodes = match_nodes(rule.match, names, ops, option="rule")
            touched = {t.name for n in nodes for t in (*index.by_name[n].inputs, *index.by_name[n].outputs)}
            matched = touched & tensors
        if not matched:
            match_tensors(rule.match, sorted(users), option="rule")
        overrides.update(dict.fromkeys(matched, observer))
    return overrides


def _known_names(model: CanonicalModel, node: Any) -> tuple[str, ...]:
    outputs = [model.user_name(t.name) for t in node.outputs if t.name]
    return (node.name, *outputs)
