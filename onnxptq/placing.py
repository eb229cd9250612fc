"""From a recipe's selectors and rules to a placement request in canonical names."""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from onnxptq.calibrate.observers import Observer
from onnxptq.errors import SelectorError, TargetIllegalError, UnsupportedModelError
from onnxptq.graph.index import GraphIndex, is_constant, is_float32
from onnxptq.graph.linear import find_linears
from onnxptq.listing import listed
from onnxptq.recipe import Recipe, Target
from onnxptq.selectors import Catalogue, Selection, compile_pattern, match_tensors, select_nodes
from onnxptq.targets import TARGETS, PlacementRequest
from onnxptq.types import CanonicalModel, Quantizer, QuantPlan

_UNCHOSEN = ("not chosen by", "excluded by")
_SHOWN = 3

_NARROW_OPSET = 21
"""The first with types of 4 bits that QuantizeLinear takes."""


def placement_request(
    selectors: Selectors,
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
    declined = dict(selectors.unusable)
    if recipe.include:
        chosen = frozenset().union(*(selectors.chosen(p, "--include") for p in recipe.include))
        nodes = selectors.index.by_name
        declined.update({name: "not chosen by --include" for name in nodes if name not in chosen})
    for pattern in recipe.exclude:
        matched = selectors.chosen(pattern, "--exclude")
        declined.update(dict.fromkeys(matched, f"excluded by '{pattern}'"))
    bits: dict[str, tuple[int, int]] = dict(planned)
    for rule in recipe.rules:
        if rule.weight_bits is None and rule.activation_bits is None:
            continue
        for name in selectors.chosen(rule.match, "rule"):
            weight, activation = bits.get(name, (recipe.weight_bits, recipe.activation_bits))
            bits[name] = (rule.weight_bits or weight, rule.activation_bits or activation)
    return PlacementRequest(
        weight_bits=recipe.weight_bits,
        activation_bits=recipe.activation_bits,
        weight_storage="int4" if _has_half_bytes(recipe.target, selectors.model.opset) else "int8",
        residuals=recipe.residuals,
        bits_of=bits,
        declined=declined,
        uncalibrated=uncalibrated,
    )


def _has_half_bytes(target: Target, opset: int) -> bool:
    """Whether weights of up to 4 bits take half a byte each."""
    return target == "simulate" and opset >= _NARROW_OPSET


def storage_notes(target: Target, opset: int) -> tuple[str, ...]:
    """Why weights of up to 4 bits take a byte each; empty where they take half of one."""
    if _has_half_bytes(target, opset):
        return ()
    if target != "simulate":
        return (
            f"Weights of any bits take a byte each on {target}; --target simulate stores 4 bits and fewer in half.",
        )
    return (
        f"Weights of 4 bits and fewer take a byte each in a model of opset {opset}, and half with --opset "
        f"{_NARROW_OPSET}.",
    )


def budget_notes(recipe: Recipe, opset: int) -> tuple[str, ...]:
    """What the recipe's budget cannot do on its target, in a model of this opset."""
    if recipe.max_size is not None or recipe.max_loss is not None:
        return storage_notes(recipe.target, opset)
    is_partial = recipe.average_bits is not None and recipe.average_activation_bits is None
    if is_partial and recipe.target != "simulate":
        return (
            f"--average-bits holds for weights: activations stay at 8 bits, which {recipe.target} executes "
            "(--target simulate takes fewer).",
        )
    return ()


class Selectors:
    """The patterns of recipes on one model; each is matched once, whoever asks for what it chooses."""

    def __init__(self, model: CanonicalModel) -> None:
        self.model = model
        self.index = index = GraphIndex(model.graph)
        self._found: dict[tuple[str, str], Selection] = {}
        names = {node.name: _known_names(model, node) for node in index.nodes}
        given = {tensor.name for tensor in model.graph.inputs}
        readers: dict[str, list[str]] = defaultdict(list)
        for node in index.nodes:
            for tensor in node.inputs:
                if is_constant(tensor) or tensor.name in given:
                    readers[model.user_name(tensor.name)].append(node.name)
        self._catalogue = Catalogue(
            names=names,
            op_types={node.name: node.op for node in index.nodes},
            user_nodes=model.user_nodes,
            constants=readers,
            source=str(model.source),
        )
        # A rule may name an input of the model as well: it then holds for the nodes that read it.
        inputs = {model.user_name(name) for name in given}
        fed = {node: [name for name in inputs if node in readers[name]] for node in names}
        self._with_inputs = replace(
            self._catalogue, names={node: (*known, *fed[node]) for node, known in names.items()}
        )
        self._layers = {
            layer.bias_node.name: layer.node.name
            for layer in find_linears(index)
            if layer.bias_node is not None and layer.bias_node is not layer.node
        }

    def chosen(self, pattern: str, option: str) -> frozenset[str]:
        """The nodes that ``pattern`` chooses. The Add of a linear layer, where it is named, stands for the layer."""
        found = self.selection(pattern, option)
        return found.nodes | {self._layers[node] for node in found.by_name if node in self._layers}

    def selection(self, pattern: str, option: str) -> Selection:
        """What ``pattern`` matches itself."""
        if (pattern, option) not in self._found:
            catalogue = self._with_inputs if option == "rule" else self._catalogue
            self._found[pattern, option] = select_nodes(pattern, catalogue, option=option)
        return self._found[pattern, option]

    @functools.cached_property
    def unusable(self) -> Mapping[str, str]:
        """Nodes that read a constant with NaN or infinity, which no grid can hold, and the reason."""
        return _unusable_weights(self.model, self.index)

    def notes(self, pattern: str, option: str) -> Iterator[str]:
        """Where ``pattern`` chooses other nodes than it names."""
        found = self.selection(pattern, option)
        parts = [f"'{user.name}' of {_quoted(user.homes)}" for user in found.moved]
        biases = sorted(found.nodes & self._layers.keys())
        parts += [
            f"'{bias}' of '{self._layers[bias]}'"
            for bias in biases
            if bias in found.by_name and self._layers[bias] not in found.nodes
        ]
        if parts:
            yield f"{option} '{pattern}' names parts of other nodes, and holds for these: {listed(parts)}."
        left = [f"'{bias}'" for bias in biases if bias not in found.by_name]
        if left:
            yield (
                f"{option} '{pattern}' does not hold for layers whose bias is a node of this type ({listed(left)}): "
                "name these to choose the layers."
            )


def _quoted(names: Sequence[str]) -> str:
    return listed([f"'{name}'" for name in names])


def selector_notes(selectors: Selectors, recipe: Recipe, targets: Sequence[str]) -> tuple[str, ...]:
    """What a user should know of the recipe's selectors: where they choose other nodes than they name, and where they
    change nothing for any of ``targets``.

    Raises:
        SelectorError: a pattern matches nothing.
    """
    options = [("--include", p) for p in recipe.include] + [("--exclude", p) for p in recipe.exclude]
    rules = [rule for rule in recipe.rules if rule.weight_bits or rule.activation_bits]
    given = [*options, *(("rule", rule.match) for rule in rules)]
    notes = [note for option, pattern in given for note in selectors.notes(pattern, option)]
    if not given:
        return ()

    def quantizers(changed: Recipe) -> list[tuple[Quantizer, ...]]:
        requests = (placement_request(selectors, changed.updated(target=name), {}) for name in targets)
        return [
            TARGETS[name](selectors.index, request).quantizers
            for name, request in zip(targets, requests, strict=True)
        ]

    wanted = quantizers(recipe)
    fewer = [
        *(recipe.updated(include=_without(recipe.include, i)) for i in range(len(recipe.include))),
        *(recipe.updated(exclude=_without(recipe.exclude, i)) for i in range(len(recipe.exclude))),
        *(recipe.updated(rules=tuple(r for r in recipe.rules if r is not rule)) for rule in rules),
    ]
    for (option, pattern), changed in zip(given, fewer, strict=True):
        if quantizers(changed) == wanted:
            names = _quoted(sorted(selectors.chosen(pattern, option)))
            notes.append(
                f"{option} '{pattern}' changes nothing for {' or '.join(targets)}: it matches {names}, but the plan "
                "is the same without it."
            )
    return tuple(notes)


def _without(patterns: tuple[str, ...], place: int) -> tuple[str, ...]:
    return patterns[:place] + patterns[place + 1 :]


def _unusable_weights(model: CanonicalModel, index: GraphIndex) -> dict[str, str]:
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
    skips = (*plan.skips, *model.skips)
    reasons = [f"{s.site}: {s.reason.removesuffix('.')}" for s in skips if not s.reason.startswith(_UNCHOSEN)]
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


def observer_overrides(selectors: Selectors, recipe: Recipe, tensors: frozenset[str]) -> dict[str, Observer]:
    """The observers that the recipe's rules set for single tensors, by canonical name.

    A rule names tensors, or nodes: then it holds for what they read and write.

    Raises:
        SelectorError: a pattern matches nothing.
    """
    overrides: dict[str, Observer] = {}
    users = {selectors.model.user_name(name): name for name in tensors}
    by_name = selectors.index.by_name
    for rule in recipe.rules:
        if rule.observer is None:
            continue
        observer = Observer(name=rule.observer, percentile=recipe.percentile)
        matches = compile_pattern(rule.match)
        matched = {tensor for name, tensor in users.items() if matches(name)}
        if not matched:
            nodes = selectors.chosen(rule.match, "rule")
            touched = {t.name for n in nodes for t in (*by_name[n].inputs, *by_name[n].outputs)}
            matched = touched & tensors
        if not matched:
            match_tensors(rule.match, sorted(users), option="rule")
        overrides.update(dict.fromkeys(matched, observer))
    return overrides


def _known_names(model: CanonicalModel, node: Any) -> tuple[str, ...]:
    outputs = [model.user_name(t.name) for t in node.outputs if t.name]
    return (node.name, *outputs)
